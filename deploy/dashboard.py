"""A Grafana dashboard of what /metrics holds: python deploy/dashboard.py > opennemo.json

One panel for each row of `PANELS`; a test compares the names with what the server reports. The data
source, a Prometheus, is chosen when the dashboard is imported.
"""

import json
from dataclasses import dataclass
from typing import Any

SELECTED = '{model_name=~"$model"}'
SPAN = "[$__rate_interval]"


@dataclass(frozen=True, kw_only=True)
class Panel:
    title: str
    unit: str  # one of Grafana's
    queries: dict[str, str]  # legend -> PromQL


def rate(counter: str) -> str:
    return f"sum(rate(opennemo_{counter}_total{SELECTED}{SPAN}))"


def rate_by(counter: str, label: str) -> str:
    return f"sum by ({label}) (rate(opennemo_{counter}_total{SELECTED}{SPAN}))"


def gauge(name: str) -> str:
    return f"sum(opennemo_{name}{SELECTED})"


def quantiles(histogram: str) -> dict[str, str]:
    buckets = f"sum by (le) (rate(opennemo_{histogram}_bucket{SELECTED}{SPAN}))"
    return {f"{q}%": f"histogram_quantile({q / 100}, {buckets})" for q in (50, 95, 99)}


def share(part: str, whole: str) -> str:
    return f"{rate(part)} / {rate(whole)}"


PANELS = [
    Panel(title="Answers", unit="short", queries={
        "being computed": gauge("requests_running"), "waiting": gauge("requests_waiting"),
        "at most": gauge("requests_max"),
    }),
    Panel(title="Requests that ended", unit="reqps", queries={
        "{{finished_reason}}": rate_by("requests_finished", "finished_reason"),
        "succeeded": rate("requests_succeeded"), "failed": rate("requests_failed"),
    }),
    Panel(title="Requests turned down", unit="reqps", queries={
        "{{status}}": rate_by("requests_rejected", "status"),
    }),
    Panel(title="Tokens a second", unit="short", queries={
        "of prompts": rate("prompt_tokens"), "generated": rate("generation_tokens"),
    }),
    Panel(title="Time to the first token", unit="s",
          queries=quantiles("time_to_first_token_seconds")),
    Panel(title="Time between tokens", unit="s",
          queries=quantiles("inter_token_latency_seconds")),
    Panel(title="Time of a request", unit="s", queries=quantiles("request_seconds")),
    Panel(title="Tokens of a prompt", unit="short", queries=quantiles("request_prompt_tokens")),
    Panel(title="Tokens of an answer", unit="short",
          queries=quantiles("request_generation_tokens")),
    Panel(title="KV cache in use", unit="percentunit", queries={
        "share of pages": f"max(opennemo_kv_cache_usage{SELECTED})",
    }),
    Panel(title="Pages of the KV cache in use", unit="short", queries={
        "pages": gauge("kv_cache_pages_used"),
    }),
    Panel(title="Prompt tokens found in the cache", unit="percentunit", queries={
        "share": share("prefix_cache_hits", "prefix_cache_queries"),
    }),
    Panel(title="Guesses that were right", unit="percentunit", queries={
        "share": share("draft_tokens_kept", "draft_tokens"),
    }),
    Panel(title="Answers that gave their pages back", unit="cps", queries={
        "preemptions": rate("preemptions"),
    }),
    Panel(title="Engines that answer", unit="short", queries={"replicas": gauge("replicas")}),
]  # fmt: skip


def render() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    source = {"type": "prometheus", "uid": "${DS_PROMETHEUS}"}
    model = {
        "name": "model", "type": "query", "datasource": source, "multi": True,
        "includeAll": True, "allValue": ".*", "refresh": 2, "current": {},
        "query": {"query": "label_values(opennemo_requests_running, model_name)", "refId": "A"},
    }  # fmt: skip
    return {
        "__inputs": [
            {
                "name": "DS_PROMETHEUS", "label": "Prometheus", "type": "datasource",
                "pluginId": "prometheus", "pluginName": "Prometheus",
            }
        ],
        "title": "OpenNemo", "uid": "opennemo", "schemaVersion": 39, "editable": True,
        "refresh": "10s", "time": {"from": "now-1h", "to": "now"},
        "templating": {"list": [model]},
        "panels": [
            {
                "id": i + 1, "type": "timeseries", "title": panel.title, "datasource": source,
                "gridPos": {"x": i % 3 * 8, "y": i // 3 * 8, "w": 8, "h": 8},
                "fieldConfig": {"defaults": {"unit": panel.unit, "min": 0}, "overrides": []},
                "targets": [
                    {
                        "refId": chr(ord("A") + j), "expr": query, "legendFormat": legend,
                        "datasource": source,
                    }
                    for j, (legend, query) in enumerate(panel.queries.items())
                ],
            }
            for i, panel in enumerate(PANELS)
        ],
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps(render(), indent=2))

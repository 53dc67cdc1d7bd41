"""Prometheus metrics: counts and times of requests, and the engine's state when scraped.

Names are our own, `opennemo_...`; with `--metrics-compat vllm` the same series also appear under
vLLM's names, and at NIM's path under those that NVIDIA's dashboards read (docs.nvidia.com/nim,
"Observability"), so that existing dashboards and autoscalers work. Labels never hold what a user
sent.
"""

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from opennemo.llm import LLM
from opennemo.serve.protocols.stream import Generation

PREFIX = "opennemo_"
VLLM = {  # ours, without prefix -> vLLM's
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "kv_cache_usage": "kv_cache_usage_perc",
    "prefix_cache_queries": "prefix_cache_queries",
    "prefix_cache_hits": "prefix_cache_hits",
    "preemptions": "num_preemptions",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "requests_finished": "request_success",
    "requests_rejected": "admission_rejections",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "inter_token_latency_seconds",
    "request_seconds": "e2e_request_latency_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
}
NIM = {  # ours -> NIM's, which have no prefix
    "requests_running": "num_requests_running",
    "requests_waiting": "num_requests_waiting",
    "requests_max": "num_request_max",
    "kv_cache_usage": "gpu_cache_usage_perc",
    "prompt_tokens": "prompt_tokens",
    "generation_tokens": "generation_tokens",
    "requests_finished": "request_finish",
    "requests_succeeded": "request_success",
    "requests_failed": "request_failure",
    "time_to_first_token_seconds": "time_to_first_token_seconds",
    "inter_token_latency_seconds": "time_per_output_token_seconds",
    "request_seconds": "e2e_request_latency_seconds",
    "request_prompt_tokens": "request_prompt_tokens",
    "request_generation_tokens": "request_generation_tokens",
}
FAST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.08, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 40, 160, 640, 2560)
SLOW = (0.3, 0.5, 1, 1.5, 2.5, 5, 10, 20, 40, 60, 120, 480, 1920, 7680)
ENGINE = {  # from Engine.stats; many replicas add theirs up
    "replicas": (GaugeMetricFamily, "Engines that answer"),
    "requests_running": (GaugeMetricFamily, "Answers being computed"),
    "requests_waiting": (GaugeMetricFamily, "Answers waiting for their turn"),
    "kv_cache_usage": (GaugeMetricFamily, "Share of pages in use"),
    "kv_cache_pages_used": (GaugeMetricFamily, "Pages of the KV cache in use"),
    "prefix_cache_queries": (CounterMetricFamily, "Prompt tokens looked up"),
    "prefix_cache_hits": (CounterMetricFamily, "Prompt tokens found in the cache"),
    "draft_tokens": (CounterMetricFamily, "Tokens guessed ahead"),
    "draft_tokens_kept": (CounterMetricFamily, "Guesses that were right"),
    "preemptions": (CounterMetricFamily, "Answers that gave their pages back"),
}
SIZES = (1, 10, 50, 100, 500, 1000, 5000, 10_000, 50_000, 100_000)


class Metrics:
    """The registry of one server."""

    def __init__(self, model_name: str, *, compat: str = "none", n_requests: int):
        """`n_requests` is how many answers are computed side by side at most."""
        self.registry, self.model_name = CollectorRegistry(), model_name
        self._n_requests = n_requests

        def counter(name: str, help: str, *labels: str) -> Counter:
            return Counter(PREFIX + name, help, ("model_name", *labels), registry=self.registry)

        def histogram(name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
            labels = ("model_name",)
            return Histogram(PREFIX + name, help, labels, registry=self.registry, buckets=buckets)

        self._prompt = counter("prompt_tokens", "Tokens of prompts")
        self._generated = counter("generation_tokens", "Tokens generated")
        self._finished = counter("requests_finished", "Requests by their end", "finished_reason")
        self._good = counter("requests_succeeded", "Requests that came to their end")
        self._bad = counter("requests_failed", "Requests that were broken off")
        self._rejected = counter("requests_rejected", "Requests turned down", "status")
        self._first = histogram("time_to_first_token_seconds", "Until the first token", FAST)
        self._gap = histogram("inter_token_latency_seconds", "Between tokens", FAST)
        self._whole = histogram("request_seconds", "From start to end", SLOW)
        self._prompt_size = histogram("request_prompt_tokens", "Tokens of a prompt", SIZES)
        self._answer_size = histogram("request_generation_tokens", "Tokens of an answer", SIZES)
        self._compat = compat == "vllm"

    def watch(self, llm: LLM) -> None:
        """From now on, report this model's engine, too."""
        for counter in (self._good, self._bad):  # a series that never counted is 0, not absent
            counter.labels(self.model_name)
        self.registry.register(_EngineState(llm, self.model_name, self._n_requests))

    def refused(self, status: int) -> None:
        self._rejected.labels(self.model_name, str(status)).inc()

    def finished(self, generation: Generation, seconds: float) -> None:
        reply, name = generation.reply, self.model_name
        self._prompt.labels(name).inc(reply.n_prompt_tokens)
        self._generated.labels(name).inc(generation.n_output_tokens)
        for answer in generation.answers:
            reason = "abort" if generation.failure else answer.finish_reason
            complete = reason in ("stop", "length", "repetition", "tool_calls")
            self._finished.labels(name, reason if complete else "abort").inc()
            (self._good if complete else self._bad).labels(name).inc()
        if generation.first_token_at is not None:
            self._first.labels(name).observe(generation.first_token_at - generation.started)
        for gap in generation.gaps:
            self._gap.labels(name).observe(gap)
        self._whole.labels(name).observe(seconds)
        self._prompt_size.labels(name).observe(reply.n_prompt_tokens)
        self._answer_size.labels(name).observe(generation.n_output_tokens)

    def render(self, *, nim: bool = False) -> bytes:
        """Prometheus' text format, with `nim` under NIM's names as well."""
        text = generate_latest(self.registry)
        for wanted, prefix, names in ((self._compat, "vllm:", VLLM), (nim, "", NIM)):
            if wanted:
                renamed = CollectorRegistry()
                renamed.register(_Renamed(self.registry, prefix, names))
                text += generate_latest(renamed)
        return text


class _EngineState(Collector):
    """Numbers that the engine keeps anyway, read at each scrape."""

    def __init__(self, llm: LLM, name: str, n_requests: int):
        self._llm, self._model, self._n_requests = llm, name, n_requests

    def collect(self) -> Iterator[Metric]:
        stats = self._llm.engine.stats()
        stats["kv_cache_usage"] = stats["kv_cache_pages_used"] / stats["kv_cache_pages"]
        for name, (family, help) in ENGINE.items():
            metric = family(PREFIX + name, help, labels=["model_name"])
            metric.add_metric([self._model], stats.get(name, 1))
            yield metric
        metric = GaugeMetricFamily(
            f"{PREFIX}requests_max", "Answers computed side by side at most", labels=["model_name"]
        )
        metric.add_metric([self._model], self._n_requests * stats.get("replicas", 1))
        yield metric


class _Renamed(Collector):
    """The same series under other names."""

    def __init__(self, registry: CollectorRegistry, prefix: str, names: dict[str, str]):
        self._registry, self._prefix, self._names = registry, prefix, names

    def collect(self) -> Iterator[Metric]:
        for metric in self._registry.collect():
            ours = metric.name.removeprefix(PREFIX)
            if ours not in self._names:
                continue
            name = self._prefix + self._names[ours]
            renamed = Metric(name, metric.documentation, metric.type)
            renamed.samples = [
                Sample(s.name.replace(metric.name, name, 1), *s[1:]) for s in metric.samples
            ]
            yield renamed

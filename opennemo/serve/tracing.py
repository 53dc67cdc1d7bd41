"""A span for each request, sent to a collector of OpenTelemetry, with the extra `otel`.

Spans hold method, path, status and times, and continue the trace that a client names. They never
hold prompts or answers, and there is no span for a single token.
"""

# pyright: reportMissingImports=false

from fastapi import FastAPI

from opennemo.errors import InvalidRequest

UNSEEN = "health,ping,metrics"  # paths that are requested every few seconds


def trace(app: FastAPI, endpoint: str) -> None:
    """Report the application's requests to an address such as http://127.0.0.1:4318/v1/traces.

    Raises:
        InvalidRequest: the extra is not installed.
    """
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.util.http import parse_excluded_urls
    except ImportError:
        raise InvalidRequest(
            "--otlp-traces-endpoint needs more packages; in the checkout: pip install -e '.[otel]'"
        ) from None
    provider = TracerProvider(resource=Resource.create({"service.name": "opennemo"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint)))
    app.add_middleware(
        OpenTelemetryMiddleware,
        tracer_provider=provider,
        excluded_urls=parse_excluded_urls(UNSEEN),
        exclude_spans=["receive", "send"],
    )

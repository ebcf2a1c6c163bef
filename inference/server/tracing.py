"""OpenTelemetry spans, where an operator enables them: the request with details of its answer, and the decision."""

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from fastapi import FastAPI

from ...modeling.errors import require_extra

_TRACE = {
    "traceparent": re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}"),
    "tracestate": re.compile(r"[ -~]{1,512}"),
}


class Tracing:
    """Tracer of requests. Without `start` it does nothing.

    Spans hold no text of a conversation, like the log.
    """

    def __init__(self) -> None:
        self._trace: Any = None
        self._provider: Any = None

    def start(self, app: FastAPI) -> None:
        """Trace the requests of an application.

        OpenTelemetry's own variables set the destination and the sampling: `OTEL_EXPORTER_OTLP_ENDPOINT` and similar
        ones, `OTEL_SERVICE_NAME`, `OTEL_TRACES_SAMPLER`.

        Raises:
            ImportError: The extra `otel` is not installed.
        """
        instrumentation = require_extra("opentelemetry.instrumentation.fastapi", "otel")
        from opentelemetry import trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        named = {} if "OTEL_SERVICE_NAME" in os.environ else {"service.name": "expertoken"}
        self._trace, self._provider = trace, TracerProvider(resource=Resource.create(named))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        # A span for each chunk sent would make a thousand spans for one answer.
        instrumentation.FastAPIInstrumentor.instrument_app(
            app, tracer_provider=self._provider, exclude_spans=["receive", "send"]
        )

    def stop(self) -> None:
        """Send the remaining spans."""
        if self._provider is not None:
            self._provider.shutdown()

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Trace a part of the current request."""
        if self._provider is None:
            yield
            return
        with self._provider.get_tracer("expertoken").start_as_current_span(name):
            yield

    def propagated(self, given: Mapping[str, str]) -> dict[str, str]:
        """Return the headers that join requests to experts to the current trace.

        Args:
            given: Headers of the client's request.
        """
        if self._provider is None:
            return {name: given[name] for name, form in _TRACE.items() if form.fullmatch(given.get(name, ""))}
        from opentelemetry import propagate

        found: dict[str, str] = {}
        propagate.inject(found)
        return found

    def note(self, attributes: dict[str, Any]) -> None:
        """Add attributes to the current request's span."""
        if self._trace is not None:
            told = {f"expertoken.{key}": value for key, value in attributes.items() if value is not None}
            self._trace.get_current_span().set_attributes(told)

"""OpenTelemetry traces of requests. Imported only where traces are wanted; made from records of requests that ended.

    POST /v1/chat/completions             the HTTP request, child of the caller's span (W3C trace context)
    ├── fetch, render, prepare            in the front; prepare holds decode and map, one for each media item
    └── generate                          one for each request to the engine
        ├── queue                         in the scheduler's queue
        ├── prefill                       from the first step to the first token, encoders included
        └── decode                        from the first token to the last

Spans hold counts, names and times, and nothing of what was asked or answered. Sampling and resource follow
OpenTelemetry's environment variables (`OTEL_TRACES_SAMPLER`, `OTEL_SERVICE_NAME`, ...).
"""

from __future__ import annotations

import time

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import SERVICE_NAME, OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from sensorium.entrypoints.openai.records import Generation, RequestRecord
from sensorium.stages import Stage

_INSIDE_PREPARE = ("decode", "map")


class Traces:
    """Turns records into spans. Its owner closes it.

    Args:
        provider: where spans go.
    """

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("sensorium")
        self._propagator = TraceContextTextMapPropagator()
        # Spans are dated by the wall clock, records by the monotonic one.
        self._offset_ns = time.time_ns() - time.monotonic_ns()

    @classmethod
    def to(cls, endpoint: str) -> Traces:
        """Sends traces to an address, in batches, by a separate thread."""
        # OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES win.
        resource = Resource.create({SERVICE_NAME: "sensorium", **OTELResourceDetector().detect().attributes})
        provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint)))
        return cls(provider)

    def close(self) -> None:
        """Send what is left."""
        self._provider.shutdown()

    def take(self, record: RequestRecord) -> None:
        """Make the spans of a request that has ended."""
        parent = self._propagator.extract(record.trace_headers)
        attributes: dict[str, str | int] = {
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": record.status,
            "sensorium.request_id": record.request_id,
        }
        span = self._tracer.start_span(
            f"{record.method} {record.route}", parent, SpanKind.SERVER, attributes, start_time=self._ns(record.start_s)
        )
        if record.failure is not None:
            span.set_attribute("error.type", record.failure)
            if record.status >= 500 or record.status == 200:  # an answer may fail after it has begun
                span.set_status(Status(StatusCode.ERROR))
        inside = set_span_in_context(span)
        self._add_stages(record.stages, inside)
        for generation in record.generations:
            self._add_generation(generation, inside)
        span.end(self._ns(record.end_s))

    def _add_stages(self, stages: list[Stage], parent: Context) -> None:
        prepared = [(stage, self._span(stage, parent)) for stage in stages if stage.name == "prepare"]
        for stage in stages:
            if stage.name == "prepare":
                continue
            around = parent
            if stage.name in _INSIDE_PREPARE:
                holders = [span for each, span in prepared if each.start_s <= stage.start_s <= each.end_s]
                around = set_span_in_context(holders[0]) if holders else parent
            self._span(stage, around).end(self._ns(stage.end_s))
        for stage, span in prepared:
            span.end(self._ns(stage.end_s))

    def _span(self, stage: Stage, parent: Context) -> Span:
        attributes = {} if stage.modality is None else {"sensorium.modality": stage.modality}
        return self._tracer.start_span(stage.name, parent, attributes=attributes, start_time=self._ns(stage.start_s))

    def _add_generation(self, generation: Generation, parent: Context) -> None:
        attributes: dict[str, str | int | list[str]] = {
            "sensorium.outcome": generation.outcome,
            "gen_ai.usage.input_tokens": generation.num_prompt_tokens,
            "gen_ai.usage.output_tokens": generation.num_output_tokens,
            "sensorium.cached_tokens": generation.num_cached_tokens,
            "gen_ai.response.finish_reasons": list(generation.finish_reasons),
        }
        attributes |= {f"sensorium.media.{modality}": count for modality, count in generation.num_media.items()}
        start_ns = self._ns(generation.start_s)
        span = self._tracer.start_span("generate", parent, attributes=attributes, start_time=start_ns)
        times = generation.times
        if times is not None:
            inside = set_span_in_context(span)
            self._add_part("queue", times.queued_time_s, times.scheduled_time_s, inside)
            self._add_part("prefill", times.scheduled_time_s, times.first_token_time_s, inside)
            self._add_part("decode", times.first_token_time_s, times.last_token_time_s, inside)
        span.end(self._ns(generation.end_s))

    def _add_part(self, name: str, start_s: float | None, end_s: float | None, parent: Context) -> None:
        if start_s is not None and end_s is not None:
            span = self._tracer.start_span(name, parent, start_time=self._ns(start_s))
            span.end(self._ns(max(start_s, end_s)))

    def _ns(self, time_s: float) -> int:
        return round(time_s * 1e9) + self._offset_ns

"""What the server tells Prometheus: requests, tokens, times, and the engine's own gauges and counters."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.errors import SensoriumError
from sensorium.outputs import RequestOutput

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)

_GAUGES = {
    "num_running": "Requests in the running batch.",
    "num_waiting": "Requests in the scheduler's line.",
    "kv_cache_usage": "Share of the KV blocks that requests use, 0 to 1.",
    "num_encoder_cache_rows": "Encoder output rows kept.",
}
_COUNTERS = {
    "num_steps": "Steps of the engine.",
    "num_preemptions": "Requests whose KV was given up and computed again.",
    "num_prefix_query_tokens": "Prompt tokens looked up in the prefix cache.",
    "num_prefix_hit_tokens": "Prompt tokens found there.",
    "num_encoder_queries": "Media items that requests needed encoded.",
    "num_encoder_hits": "Those of them that were encoded already.",
    "num_encoded_rows": "Rows that encoders computed.",
}


class ServerMetrics:
    """Owns a registry of its own, so that servers in one process don't meet."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(engine))
        self.requests = Counter(
            "sensorium_requests", "Ended requests by outcome.", ["outcome"], registry=self._registry
        )
        self.prompt_tokens = Counter("sensorium_prompt_tokens", "Prompt tokens served.", registry=self._registry)
        self.output_tokens = Counter("sensorium_output_tokens", "Tokens generated.", registry=self._registry)
        self.first_token = self._histogram("first_token_seconds", "From arrival to a request's first token.")
        self.between_tokens = self._histogram("between_tokens_seconds", "Mean time between a request's tokens.")
        self.whole = self._histogram("request_seconds", "From arrival to a request's end.")

    def watch(self) -> RequestWatch:
        """Count one request, whose outputs are deltas or one whole."""
        return RequestWatch(self)

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        text: bytes = generate_latest(self._registry)
        return text

    def _histogram(self, name: str, text: str) -> Histogram:
        return Histogram(f"sensorium_{name}", text, buckets=_SECONDS, registry=self._registry)


class RequestWatch:
    """Counts one request into `ServerMetrics`, once, however it ends."""

    def __init__(self, metrics: ServerMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._start_s = clock()
        self._last: RequestOutput | None = None
        self._outcome = "cancelled"
        self._num_tokens = 0

    def take(self, output: RequestOutput) -> None:
        """Note an output, delta or whole."""
        self._last = output
        self._num_tokens += sum(len(each.token_ids) for each in output.outputs)
        if output.finished:
            self._outcome = "finished"

    def failed(self, error: Exception) -> None:
        """Note why there will be no more."""
        self._outcome = f"error_{error.status}" if isinstance(error, SensoriumError) else "error_500"

    def close(self) -> None:
        """Count."""
        metrics = self._metrics
        metrics.requests.labels(self._outcome).inc()
        if self._last is None:
            return
        metrics.prompt_tokens.inc(len(self._last.prompt_token_ids))
        metrics.output_tokens.inc(self._num_tokens)
        metrics.whole.observe(self._clock() - self._start_s)
        times = self._last.metrics
        if times is None or times.first_token_time_s is None or times.last_token_time_s is None:
            return
        metrics.first_token.observe(times.first_token_time_s - times.arrival_time_s)
        if self._num_tokens > 1:
            gaps_s = times.last_token_time_s - times.first_token_time_s
            metrics.between_tokens.observe(gaps_s / (self._num_tokens - 1))


class _EngineCollector(Collector):  # type: ignore[misc]
    """The engine's latest statistics, read when they are asked for."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[GaugeMetricFamily | CounterMetricFamily]:
        """See prometheus_client."""
        load = self._engine.load()
        yield GaugeMetricFamily("sensorium_open_requests", "Requests that have not ended.", value=load.num_open)
        yield GaugeMetricFamily("sensorium_unstarted_requests", "Requests without output yet.", value=load.num_waiting)
        yield GaugeMetricFamily("sensorium_waiting_media_bytes", "Media of those requests.", value=load.num_media_bytes)
        num_tasks = len(asyncio.all_tasks())
        yield GaugeMetricFamily("sensorium_event_loop_tasks", "Tasks of the server's event loop.", value=num_tasks)
        restarts = self._engine.num_restarts
        yield CounterMetricFamily("sensorium_core_restarts", "Cores that took a dead one's place.", value=restarts)
        cache = self._engine.preprocessor.statistics()
        yield CounterMetricFamily("sensorium_processor_cache_hits", "Media found mapped.", value=cache.hits)
        yield CounterMetricFamily("sensorium_processor_cache_misses", "Media that were mapped.", value=cache.misses)
        yield GaugeMetricFamily("sensorium_processor_cache_bytes", "Bytes of mapped media kept.", value=cache.num_bytes)
        stats = self._engine.stats
        if stats is None:
            return
        for name, text in _GAUGES.items():
            yield GaugeMetricFamily(f"sensorium_{name}", text, value=getattr(stats, name))
        for name, text in _COUNTERS.items():
            yield CounterMetricFamily(f"sensorium_{name}", text, value=getattr(stats, name))

"""The engine's metrics for Prometheus, read from its latest statistics at each scrape."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TypeAlias

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from sensorium.engine.async_llm_engine import AsyncLLMEngine

Family: TypeAlias = GaugeMetricFamily | CounterMetricFamily

_GAUGES = {
    "running_requests": ("num_running", "Requests in the running batch."),
    "waiting_requests": ("num_waiting", "Requests in the scheduler's waiting queue."),
    "kv_cache_usage_ratio": ("kv_cache_usage", "Share of the KV blocks that requests use, 0 to 1."),
    "kv_blocks": ("num_blocks", "KV blocks that there are."),
    "kv_cached_blocks": ("num_cached_blocks", "KV blocks with known content."),
    "encoder_cache_rows": ("num_encoder_cache_rows", "Encoder output rows kept."),
}
_COUNTERS = {
    "engine_steps": ("num_steps", "Steps of the engine."),
    "encode_seconds": ("encode_s", "Time that steps spent in encoders of media."),
    "forward_seconds": ("forward_s", "Time that steps spent in the rest of the model."),
    "idle_seconds": ("idle_s", "Time between steps in which the device had nothing to do, though requests ran."),
    "preemptions": ("num_preemptions", "Requests that were preempted, and their KV computed again."),
    "kv_block_evictions": ("num_block_evictions", "KV blocks with known content that were needed for other content."),
    "prefix_cache_query_tokens": ("num_prefix_query_tokens", "Prompt tokens looked up in the prefix cache."),
    "prefix_cache_hit_tokens": ("num_prefix_hit_tokens", "Prompt tokens found there."),
    "encoder_cache_queries": ("num_encoder_queries", "Media items that requests needed encoded."),
    "encoder_cache_hits": ("num_encoder_hits", "Those of them that were encoded already."),
    "encoded_rows": ("num_encoded_rows", "Rows that encoders computed."),
    "draft_tokens": ("num_draft_tokens", "Guesses of next tokens that were checked."),
    "accepted_draft_tokens": ("num_accepted_tokens", "Those of them that were right."),
}


class EngineCollector(Collector):  # type: ignore[misc]
    """The engine's latest statistics. Counters restart at zero when a new core replaces a dead one."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Family]:
        """See prometheus_client."""
        load = self._engine.load()
        yield _gauge("open_requests", "Requests that have not ended.", load.num_open)
        yield _gauge("unstarted_requests", "Requests without output yet.", load.num_waiting)
        yield _gauge("waiting_media_bytes", "Media of those requests.", load.num_media_bytes)
        yield _gauge("event_loop_tasks", "Tasks of the server's event loop.", len(asyncio.all_tasks()))
        yield _counter("core_restarts", "Cores that replaced a dead one.", self._engine.num_restarts)
        yield from self._processor_cache()
        stats = self._engine.stats
        if stats is None:
            return
        for name, (field, text) in _GAUGES.items():
            yield _gauge(name, text, getattr(stats, field))
        for name, (field, text) in _COUNTERS.items():
            yield _counter(name, text, getattr(stats, field))

    def _processor_cache(self) -> Iterator[Family]:
        cache = self._engine.preprocessor.statistics()
        hits = cache.hits + cache.shared
        yield _counter("processor_cache_queries", "Media items that requests needed mapped.", hits + cache.misses)
        yield _counter("processor_cache_hits", "Those of them that were mapped already.", hits)
        yield _counter("processor_cache_evictions", "Mapped media dropped for others.", cache.evictions)
        yield _gauge("processor_cache_bytes", "Bytes of mapped media kept.", cache.num_bytes)
        yield _gauge("processor_cache_max_bytes", "Bytes of mapped media that may be kept.", cache.max_bytes)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"sensorium_{name}", text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(f"sensorium_{name}", text, value=value)

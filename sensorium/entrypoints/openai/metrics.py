"""The server's metrics for Prometheus: requests, tokens, times, failures. The engine's are in `engine_metrics.py`.

Everything is counted on the event loop, when a request has ended; nothing takes a lock for each token.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector

import sensorium
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.entrypoints.openai.engine_metrics import EngineCollector
from sensorium.entrypoints.openai.records import Generation, RequestRecord, current_record
from sensorium.outputs import PoolingRequestOutput, RequestOutput

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536, 262144)
_GAPS_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.04, 0.06, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 5.0)


class ServerMetrics:
    """Has its own registry, so that several servers in one process stay apart."""

    def __init__(self, engine: AsyncLLMEngine) -> None:
        registry = self._registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        registry.register(EngineCollector(engine))
        self.gaps = _Gaps()
        registry.register(self.gaps)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"sensorium_{name}", text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
            return Histogram(f"sensorium_{name}", text, buckets=buckets, registry=registry)

        self._http = counter("http_requests", "HTTP requests that ended, by route and status.", "route", "status")
        self._failures = counter("failures", "HTTP requests that ended with an error, by its kind.", "kind")
        self._requests = counter("requests", "Requests to the engine that ended, by outcome.", "outcome")
        self._finishes = counter("finished_outputs", "Outputs that ended, by reason.", "reason")
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens served.")
        self._cached_tokens = counter("cached_prompt_tokens", "Those of them that came from the prefix cache.")
        self._output_tokens = counter("output_tokens", "Tokens generated.")
        self._media_items = counter("media_items", "Media items in requests, by modality.", "modality")
        self._media_seconds = counter(
            "media_seconds", "Time spent on media in front of the engine, by stage.", "stage", "modality"
        )
        self._prepare = histogram("prepare_seconds", "From a prompt to a request for the engine, waiting included.")
        self._queue = histogram("queue_seconds", "From the scheduler's queue to the first step.")
        self._prefill = histogram("prefill_seconds", "From the first step to the first token.")
        self._first_token = histogram("first_token_seconds", "From arrival to a request's first token.")
        self._per_token = histogram("output_token_seconds", "Mean time between a request's tokens.", _GAPS_S)
        self._whole = histogram("request_seconds", "From arrival to a request's end.")
        self._prompt_sizes = histogram("request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output_sizes = histogram("request_output_tokens", "Tokens generated for a request.", _TOKENS)
        info = Gauge("sensorium_info", "Always 1; says what runs.", ["version", "model"], registry=registry)
        info.labels(sensorium.__version__, engine.config.model_config.model).set(1)

    def watch(self) -> RequestWatch:
        """Count one request to the engine, whose outputs are deltas or one whole."""
        return RequestWatch(self)

    def take(self, record: RequestRecord) -> None:
        """Count an HTTP request that has ended."""
        self._http.labels(record.route, str(record.status)).inc()
        if record.failure is not None:
            self._failures.labels(record.failure).inc()
        for stage in record.stages:
            if stage.modality is not None:
                self._media_seconds.labels(stage.name, stage.modality).inc(stage.seconds)
            elif stage.name == "prepare":
                self._prepare.observe(stage.seconds)

    def take_generation(self, generation: Generation) -> None:
        """Count a request to the engine that has ended."""
        self._requests.labels(generation.outcome).inc()
        if not generation.num_prompt_tokens:
            return  # it never reached the model
        self._prompt_tokens.inc(generation.num_prompt_tokens)
        self._cached_tokens.inc(generation.num_cached_tokens)
        self._output_tokens.inc(generation.num_output_tokens)
        self._prompt_sizes.observe(generation.num_prompt_tokens)
        self._output_sizes.observe(generation.num_output_tokens)
        for reason in generation.finish_reasons:
            self._finishes.labels(reason).inc()
        for modality, count in generation.num_media.items():
            self._media_items.labels(modality).inc(count)
        self._whole.observe(generation.end_s - generation.start_s)
        self._take_times(generation)

    def _take_times(self, generation: Generation) -> None:
        times = generation.times
        if times is None:
            return
        if times.scheduled_time_s is not None and times.queued_time_s is not None:
            # The two clocks are one, read in two processes; a request may be scheduled before its front reads it.
            self._queue.observe(max(0.0, times.scheduled_time_s - times.queued_time_s))
        if times.first_token_time_s is None or times.last_token_time_s is None:
            return
        if times.scheduled_time_s is not None:
            self._prefill.observe(times.first_token_time_s - times.scheduled_time_s)
        self._first_token.observe(times.first_token_time_s - times.arrival_time_s)
        if generation.num_output_tokens > 1:
            gaps_s = times.last_token_time_s - times.first_token_time_s
            self._per_token.observe(gaps_s / (generation.num_output_tokens - 1))

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        text: bytes = generate_latest(self._registry)
        return text


class RequestWatch:
    """Follows one request to the engine, and counts it once, however it ends."""

    def __init__(self, metrics: ServerMetrics, clock: Callable[[], float] = time.monotonic) -> None:
        self._metrics = metrics
        self._clock = clock
        self._start_s = clock()
        self._last: RequestOutput | PoolingRequestOutput | None = None
        self._last_s = 0.0
        self._outcome = "cancelled"
        self._num_tokens = 0
        self._reasons: list[str] = []
        self._gaps = _Gaps()

    def take(self, output: RequestOutput) -> None:
        """Note an output, delta or whole."""
        now_s = self._clock()
        if self._last is not None:
            self._gaps.add(now_s - self._last_s)
        self._last, self._last_s = output, now_s
        for each in output.outputs:
            self._num_tokens += len(each.token_ids)
            if each.finish_reason is not None:
                self._reasons.append(each.finish_reason)
        if output.finished:
            self._outcome = "finished"

    def pooled(self, output: PoolingRequestOutput) -> None:
        """Note the answer of a request that pools."""
        self._last, self._outcome = output, "finished"

    def failed(self, error: Exception) -> None:
        """Mark the end of the outputs."""
        self._outcome = "failed"

    def close(self) -> None:
        """Count."""
        last = self._last
        generation = Generation(self._outcome, self._start_s, self._clock())
        if last is not None:
            generation = Generation(
                self._outcome,
                self._start_s,
                self._clock(),
                num_prompt_tokens=len(last.prompt_token_ids),
                num_cached_tokens=last.num_cached_tokens,
                num_output_tokens=self._num_tokens,
                num_media={modality: len(counts) for modality, counts in last.media_token_counts.items()},
                finish_reasons=tuple(self._reasons),
                times=last.metrics,
            )
        self._metrics.take_generation(generation)
        self._metrics.gaps.merge(self._gaps)
        record = current_record()
        if record is not None:
            record.generations.append(generation)


class _Gaps(Collector):  # type: ignore[misc]
    """Times between the pieces of streams. A plain list, since there is one gap for each token."""

    def __init__(self) -> None:
        self._counts = [0] * (len(_GAPS_S) + 1)
        self._sum_s = 0.0

    def add(self, gap_s: float) -> None:
        """Count one."""
        self._counts[bisect_left(_GAPS_S, gap_s)] += 1
        self._sum_s += gap_s

    def merge(self, other: _Gaps) -> None:
        """Count all of another's."""
        self._counts = [a + b for a, b in zip(self._counts, other._counts, strict=True)]
        self._sum_s += other._sum_s

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """See prometheus_client."""
        total = 0
        buckets = []
        for bound, count in zip([*map(str, _GAPS_S), "+Inf"], self._counts, strict=True):
            total += count
            buckets.append((bound, total))
        text = "Between the pieces of a stream; a piece is a token, or the tokens since the reader's last read."
        yield HistogramMetricFamily("sensorium_inter_token_seconds", text, buckets=buckets, sum_value=self._sum_s)

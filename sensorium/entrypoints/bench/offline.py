"""A model in this process under a workload: its throughput, and the latency of one batch."""

from __future__ import annotations

import gc
import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sensorium.config import Count
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.bench.chart import Panel, in_order, share_below
from sensorium.entrypoints.bench.report import plain
from sensorium.entrypoints.bench.stats import spread_ms
from sensorium.entrypoints.bench.workload import BenchRequest, RequestSource, Workload, messages
from sensorium.errors import ConfigError
from sensorium.media.limits import MediaLimits
from sensorium.outputs import RequestOutput
from sensorium.sampling_params import SamplingParams
from sensorium.settings import check_settings

if TYPE_CHECKING:
    from sensorium.entrypoints.llm import LLM


@dataclass(frozen=True, kw_only=True)
class OfflineBenchArgs:
    """How a model in this process is measured."""

    repeats: Count = 3
    """Measured runs, each with requests of its own."""
    batch_size: Count = 1
    """Requests that are sent together and waited for; only for latency."""
    plain: bool = False
    """Send texts as they are, without a chat around them; for models without a chat template, and without media."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """One measured call."""

    wall_s: float
    outputs: list[RequestOutput]

    @property
    def num_prompt_tokens(self) -> int:
        """Over all requests."""
        return sum(len(output.prompt_token_ids) for output in self.outputs)

    @property
    def num_output_tokens(self) -> int:
        """Over all requests."""
        return sum(len(each.token_ids) for output in self.outputs for each in output.outputs)

    @property
    def ttft_s(self) -> list[float]:
        """Of each request, from its arrival in the engine."""
        found = [output.metrics.time_to_first_token_s for output in self.outputs if output.metrics is not None]
        return [each for each in found if each is not None]


class OfflineBench:
    """Loads a model once and runs batches of a workload, of which no two are the same."""

    def __init__(
        self, engine_args: EngineArgs, limits: MediaLimits, workload: Workload, args: OfflineBenchArgs
    ) -> None:
        """Load. Raises `ConfigError`, `ModelError` or `WeightsError`."""
        if args.plain and workload.has_media:
            raise ConfigError("plain: got media, which a chat places, expected text only. Leave out --plain.")
        from sensorium.entrypoints.llm import LLM  # loads torch

        settings = {name: getattr(engine_args, name) for name in EngineArgs.__dataclass_fields__}
        if not engine_args.limit_mm_per_prompt:
            settings["limit_mm_per_prompt"] = workload.media_limits
        start_s = time.perf_counter()
        self.llm: LLM = LLM(**settings, media_limits=limits)
        self.load_s = time.perf_counter() - start_s
        self._workload = workload
        self._is_plain = args.plain
        self._num_batches = 0

    def run(self, count: int) -> Batch:
        """Make `count` new requests, then measure answering them. Raises `RequestError` if one can't be."""
        source = RequestSource(self._workload, offset=self._num_batches)
        self._num_batches += 1
        requests = list(source.requests(count))
        prompts = [self._prompt(request, source) for request in requests]
        params = [
            SamplingParams(temperature=0, max_tokens=each.num_output_tokens, ignore_eos=True) for each in requests
        ]
        answer: Any = self.llm.generate if self._is_plain else self.llm.chat
        gc.collect()
        start_s = time.perf_counter()
        outputs = answer(prompts, params, use_tqdm=False)
        return Batch(time.perf_counter() - start_s, outputs)

    def close(self) -> None:
        """Free the model."""
        self.llm.shutdown()

    def _prompt(self, request: BenchRequest, source: RequestSource) -> Any:
        if self._is_plain:
            return f"{request.system} {request.text}" if request.system else request.text
        parts = [{"type": ref.modality, ref.modality: source.media(ref).data} for ref in request.media]
        return messages(request, parts)


def throughput(
    engine_args: EngineArgs, limits: MediaLimits, workload: Workload, args: OfflineBenchArgs
) -> tuple[dict[str, Any], list[Panel | None]]:
    """Answer all requests at once, `repeats` times; figures are those of the median run."""
    bench = OfflineBench(engine_args, limits, workload, args)
    try:
        bench.run(min(4, workload.num_requests))
        batches = [bench.run(workload.num_requests) for _ in range(args.repeats)]
    finally:
        bench.close()
    median = sorted(batches, key=_rate)[len(batches) // 2]
    figures = {
        "benchmark": "throughput",
        "model": engine_args.model,
        "requests": workload.num_requests,
        **_median_figures(median),
        "output_tokens_per_s_of_runs": [round(_rate(batch), 2) for batch in batches],
        "load_s": round(bench.load_s, 3),
        "settings": plain(workload),
    }
    return figures, [
        in_order("Output tokens per second", "tok/s", [_rate(batch) for batch in batches]),
        share_below("Time to first token", median.ttft_s),
    ]


def latency(
    engine_args: EngineArgs, limits: MediaLimits, workload: Workload, args: OfflineBenchArgs
) -> tuple[dict[str, Any], list[Panel | None]]:
    """Answer batches of `batch_size` requests one after the other."""
    bench = OfflineBench(engine_args, limits, workload, args)
    try:
        bench.run(args.batch_size)
        batches = [bench.run(args.batch_size) for _ in range(args.repeats)]
    finally:
        bench.close()
    walls, ttfts = [batch.wall_s for batch in batches], [each for batch in batches for each in batch.ttft_s]
    figures = {
        "benchmark": "latency",
        "model": engine_args.model,
        "batch_size": args.batch_size,
        "repeats": args.repeats,
        "prompt_tokens": statistics.median(batch.num_prompt_tokens for batch in batches),
        "output_tokens": statistics.median(batch.num_output_tokens for batch in batches),
        "batch_ms": spread_ms(walls),
        "ttft_ms": spread_ms(ttfts),
        "step_ms": spread_ms(_step_s(batch) for batch in batches if _step_s(batch) > 0),
        "load_s": round(bench.load_s, 3),
        "settings": {name: value for name, value in plain(workload).items() if name != "num_requests"},
    }
    return figures, [
        in_order("Whole batch", "milliseconds", [wall * 1e3 for wall in walls]),
        share_below("Time to first token", ttfts),
    ]


def _rate(batch: Batch) -> float:
    return batch.num_output_tokens / batch.wall_s


def _median_figures(batch: Batch) -> dict[str, Any]:
    num_prompt, num_output = batch.num_prompt_tokens, batch.num_output_tokens
    return {
        "wall_s": round(batch.wall_s, 3),
        "prompt_tokens": num_prompt,
        "output_tokens": num_output,
        "requests_per_s": round(len(batch.outputs) / batch.wall_s, 3),
        "output_tokens_per_s": round(num_output / batch.wall_s, 2),
        "total_tokens_per_s": round((num_prompt + num_output) / batch.wall_s, 2),
        "ttft_ms": spread_ms(batch.ttft_s),
    }


def _step_s(batch: Batch) -> float:
    """Between two tokens of the longest output of a batch, on average; 0 for outputs of one token."""
    longest = max(batch.outputs, key=lambda output: len(output.outputs[0].token_ids))
    times, count = longest.metrics, len(longest.outputs[0].token_ids)
    if times is None or times.first_token_time_s is None or times.last_token_time_s is None or count < 2:
        return 0.0
    return (times.last_token_time_s - times.first_token_time_s) / (count - 1)

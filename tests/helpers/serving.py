"""Drives an engine through a planned life: requests that arrive, abort and finish step by step."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sensorium import EngineArgs, LLMEngine, RequestOutput, SamplingParams
from sensorium.media import FetchPolicy, MediaLoader
from tests.helpers.device import TEST_DEVICE


@dataclass(frozen=True)
class Planned:
    """One request of a plan. Steps count from the start of the plan."""

    request_id: str
    prompt: Any
    params: SamplingParams
    arrival_step: int = 0
    abort_step: int | None = None
    priority: int = 0


@dataclass
class Served:
    """What came of a plan."""

    outputs: dict[str, RequestOutput] = field(default_factory=dict)
    num_steps: int = 0

    def tokens(self, request_id: str) -> list[int]:
        """The tokens of a request's only output."""
        return list(self.outputs[request_id].outputs[0].token_ids)


def make_engine(path: Path, **settings: Any) -> LLMEngine:
    """An engine on the device under test, over a small cache."""
    defaults = {"device": TEST_DEVICE, "num_blocks": 256, "max_num_seqs": 16}
    args = EngineArgs(model=str(path), **{**defaults, **settings})
    loader = MediaLoader(policy=FetchPolicy(allow_any_local_path=True))
    return LLMEngine(args.create_engine_config(), skip_tokenizer=args.skip_tokenizer_init, media_loader=loader)


def serve(engine: LLMEngine, plan: Iterable[Planned], max_steps: int = 20_000) -> Served:
    """Run a plan to its end; every request must end in one final output, aborted ones excepted."""
    arrivals = sorted(plan, key=lambda each: each.arrival_step)
    aborts = sorted((p.abort_step, p.request_id) for p in arrivals if p.abort_step is not None)
    served = Served()
    while arrivals or engine.has_unfinished_requests():
        while arrivals and arrivals[0].arrival_step <= served.num_steps:
            each = arrivals.pop(0)
            engine.add_request(each.request_id, each.prompt, each.params, priority=each.priority)
        while aborts and aborts[0][0] <= served.num_steps:
            engine.abort_request(aborts.pop(0)[1])
        for output in engine.step():
            assert isinstance(output, RequestOutput)
            if output.finished:
                assert output.request_id not in served.outputs, f"two final outputs of {output.request_id}"
                served.outputs[output.request_id] = output
        served.num_steps += 1
        assert served.num_steps < max_steps, "the engine makes no progress"
    return served


def alone(engine: LLMEngine, plan: Iterable[Planned]) -> dict[str, list[int]]:
    """Each request's tokens when nothing else is there."""
    return {
        each.request_id: serve(engine, [Planned(each.request_id, each.prompt, each.params)]).tokens(each.request_id)
        for each in plan
    }


def quiet_engine(path: Path, **settings: Any) -> LLMEngine:
    """An engine without any cache between requests, that runs every prompt whole."""
    quiet = {
        "enable_prefix_caching": False,
        "encoder_cache_rows": 0,
        "mm_processor_cache_bytes": 0,
        "max_num_batched_tokens": 2048,
        "max_num_seqs": 1,
    }
    return make_engine(path, **{**quiet, **settings})


def differing(got: Sequence[int], expected: Sequence[int]) -> str:
    """Where two token lists part, for messages."""
    step = next(
        (i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected))
    )
    return f"at token {step}: got {list(got[step : step + 4])}, expected {list(expected[step : step + 4])}"

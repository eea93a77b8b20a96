"""Two hundred random requests, disturbed in every way at once: each survivor's tokens equal those of a run alone.

Text, pictures of many sizes, clips and sounds; random lengths, arrivals, priorities and aborts; pools so small that
requests are preempted; chunks of 16 to 512 tokens; caches on and off.
"""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest

from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.device import TEST_DEVICE
from tests.helpers.graphs import HostReplay
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import Planned, alone, differing, make_engine, quiet_engine, serve

NUM_REQUESTS = {
    "qwen2_vl": 20,
    "qwen3_vl_moe": 20,
    "llava": 20,
    "qwen2_audio": 25,
    "qwen2_5_vl": 20,
    "gemma3": 30,
    "qwen3_5": 30,
    "whisper": 20,
    "mllama": 15,
}
"""Per family; two hundred in all."""

SETTINGS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16, "num_blocks": 64},
    "chunks of 100, priorities": {"max_num_batched_tokens": 100, "scheduling_policy": "priority", "num_blocks": 56},
    "chunks of 512, small encoder cache": {"max_num_batched_tokens": 512, "encoder_cache_rows": 40, "num_blocks": 44},
    "no caches": {
        "enable_prefix_caching": False,
        "encoder_cache_rows": 0,
        "mm_processor_cache_bytes": 0,
        "max_num_batched_tokens": 48,
        "num_blocks": 64,
    },
    "two steps in flight, priorities": {
        "max_steps_in_flight": 2,
        "max_num_batched_tokens": 100,
        "scheduling_policy": "priority",
        "num_blocks": 56,
    },
    "three steps in flight, decodes replayed": {
        "max_steps_in_flight": 3,
        "max_num_batched_tokens": 512,
        "encoder_cache_rows": 40,
        "num_blocks": 44,
    },
}

SMALLER_POOLS = {
    ("llava", "chunks of 512, small encoder cache"): {"num_blocks": 34},
    ("whisper", "chunks of 512, small encoder cache"): {"num_blocks": 26},
    ("mllama", "chunks of 512, small encoder cache"): {"num_blocks": 20},
    ("mllama", "chunks of 100, priorities"): {"num_blocks": 24},
    ("mllama", "two steps in flight, priorities"): {"num_blocks": 24},
}
"""For families whose requests are so short that the setting's pool has room for all of them."""
PREEMPTS = ("chunks of 100, priorities", "chunks of 512, small encoder cache", "two steps in flight, priorities")
READS_LENGTHS = ("qwen3_5",)
"""Families whose prefills go sequence by sequence, and so can't be recorded."""
ATTENDS_ACROSS = ("whisper", "mllama")
"""Families of which only decodes are recorded, since prefills write the rows of encoders."""
REPLAYS = "three steps in flight, decodes replayed"


@cache
def plan_and_reference(family: str) -> tuple[list[Planned], dict[str, list[int]]]:
    plan = random_plan(
        family, NUM_REQUESTS[family], random.Random(f"{family}-mixed"), spread=40, aborts=0.15, max_tokens=40
    )
    engine = quiet_engine(make_checkpoint(family), limit_mm_per_prompt=limits(family))
    return plan, alone(engine, plan)


def test_there_are_two_hundred_requests() -> None:
    assert sum(NUM_REQUESTS.values()) == 200


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", NUM_REQUESTS)
def test_survivors_are_undisturbed(family: str, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, reference = plan_and_reference(family)
    capture = HostReplay()
    if settings == REPLAYS and TEST_DEVICE == "cpu":
        monkeypatch.setattr(Worker, "_graph_capture", lambda worker: capture)
    sizes = {**SETTINGS[settings], **SMALLER_POOLS.get((family, settings), {})}
    engine = make_engine(make_checkpoint(family), limit_mm_per_prompt=limits(family), block_size=8, **sizes)

    served = serve(engine, plan)

    aborted = {each.request_id for each in plan if each.abort_step is not None}
    assert {each.request_id for each in plan} - aborted <= served.outputs.keys()
    for request_id, output in served.outputs.items():
        assert output.error is None
        got = served.tokens(request_id)
        assert got == reference[request_id], f"request {request_id} {differing(got, reference[request_id])}"
    engine.step()  # lets the worker free what the last requests held
    engine.core.scheduler.check_idle()
    runner = engine.core.executor.worker.runner  # type: ignore[attr-defined]
    assert runner.num_requests == 0
    assert engine.outputs.num_requests == 0
    if settings == REPLAYS:
        assert capture.num_replays > 50 or TEST_DEVICE != "cpu"
        assert runner.passes.decodes.recorded.refusal is None
        if family in READS_LENGTHS:
            assert "reads lengths of sequences on the host" in runner.passes.trunks.recorded.refusal
        else:
            assert runner.passes.refusals == []
            assert family in ATTENDS_ACROSS or len(runner.passes.trunks.recorded) > 3
    if settings in PREEMPTS:
        assert engine.core.stats().num_preemptions > 0, "the pool is meant to be too small"

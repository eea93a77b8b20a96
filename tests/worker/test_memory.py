"""What a device's memory is for: what is left of the engine's share goes to the KV cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sensorium import EngineArgs, LLMEngine
from sensorium.model_executor.layers.tower import RecordableTower
from sensorium.worker import memory
from tests.helpers.checkpoints import make_checkpoint

GIB = 1 << 30


@pytest.fixture(scope="module", params=["qwen2_vl", "llava", "qwen2"])
def engine(request: pytest.FixtureRequest) -> Any:
    limits = {} if request.param == "qwen2" else {"image": 1}
    args = EngineArgs(
        str(make_checkpoint(request.param)),
        device="cpu",
        num_blocks=64,
        max_num_seqs=4,
        limit_mm_per_prompt=limits,
        encoder_cache_rows=100,
        max_model_len=512,
        max_num_encoder_rows=600,
    )
    return LLMEngine.from_engine_args(args)


class FakeDevice:
    """A GPU of 10 GiB, of which the weights take 2 and others 1. What is run on it is run on the CPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, peak: int) -> None:
        for name, value in {
            "memory_allocated": 2 * GIB,
            "max_memory_allocated": 2 * GIB + peak,
            "memory_reserved": 3 * GIB,
            "mem_get_info": (6 * GIB, 10 * GIB),
            "synchronize": None,
            "empty_cache": None,
        }.items():
            monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)


def plan(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch, *, peak: int, records: bool) -> memory.MemoryPlan:
    """The plan of a fake GPU, with everything run that it runs there."""
    FakeDevice(monkeypatch, peak)
    worker: Any = engine.core.executor.worker  # type: ignore[attr-defined]
    for name in ("_run_full_step", "_run_full_tower"):
        plain = getattr(memory, name)
        on_cpu = lambda _, *args, plain=plain: plain(torch.device("cpu"), *args)  # noqa: E731
        monkeypatch.setattr(memory, name, on_cpu)
    layout = memory.CacheLayout.of(worker.model, engine.config)
    arguments = (engine.config, worker.model, worker._driver, layout, engine.core.features)
    with torch.inference_mode():
        return memory.plan_memory(torch.device("cuda"), *arguments, records=records)


def test_what_is_left_is_for_the_kv_cache(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    config = engine.config.model_config
    # More than the four requests have, since a prompt's rows are looked at 64 at a time.
    logits = 64 * config.vocab_size * (config.dtype.itemsize + 12)
    rows = 100 * config.hf_text_config.hidden_size * config.dtype.itemsize if config.is_multimodal_model else 0
    made = plan(engine, monkeypatch, peak=GIB // 2, records=False)
    assert made.activations == GIB // 2 + logits
    assert made.encoder_cache == rows
    assert made.recorded_passes == 0
    # A tenth of the GPU stays free, and 1 GiB is others'.
    assert made.available == 9 * GIB - 2 * GIB - GIB - GIB // 2 - logits - rows
    assert sum(made.parts().values()) == GIB // 2 + logits + rows


def test_a_tower_is_run_on_a_whole_steps_rows(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """They may be more than one request has, since a step encodes items of several."""
    seen: list[int] = []
    monkeypatch.setattr(
        RecordableTower, "forward", lambda tower, pixels, _: seen.append(len(pixels) // tower.merge_size**2)
    )
    plan(engine, monkeypatch, peak=0, records=False)
    towers = memory.towers_of(engine.core.executor.worker.model)  # type: ignore[attr-defined]
    assert len(seen) == len(towers)
    assert all(rows >= 600 for rows in seen)


def test_recorded_passes_take_their_part(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What they compute in between, once for all of them, and what each keeps."""
    plain = plan(engine, monkeypatch, peak=GIB // 2, records=False)
    recorded = plan(engine, monkeypatch, peak=GIB // 2, records=True)
    assert recorded.recorded_passes > recorded.activations
    assert plain.available - recorded.available == recorded.recorded_passes


def test_nothing_is_left(engine: LLMEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert plan(engine, monkeypatch, peak=20 * GIB, records=False).available == 0


def test_the_report_of_a_cpu_has_what_is_known_there(engine: LLMEngine) -> None:
    expected = {"weights", "KV cache"} | ({"encoder cache (at most)"} if engine.core.features.splits_media else set())
    if not engine.config.model_config.is_multimodal_model:
        expected = {"weights", "KV cache"}
    assert set(engine.report.memory_bytes) == expected

"""A KV cache of 8-bit floats: near the float cache, twice as many tokens, and the same tokens whatever is batched, cut,
cached and preempted."""

from __future__ import annotations

import json
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium import LLMEngine, SamplingParams
from sensorium.attention import Attention
from sensorium.errors import ConfigError, WeightsError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import Planned, alone, differing, make_engine, quiet_engine, serve

FAMILIES = ("gemma3", "qwen2_5_vl")
WAYS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 40, "block_size": 8, "max_num_batched_tokens": 64},
}
LIKELIHOODS = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)


def engine_of(family: str, kv_cache_dtype: str = "fp8", **settings: Any) -> LLMEngine:
    settings = {"limit_mm_per_prompt": limits(family), "device": "cpu", "dtype": "float32", **settings}
    return make_engine(make_checkpoint(family), kv_cache_dtype=kv_cache_dtype, **settings)


@cache
def plan_and_reference(family: str) -> tuple[list[Planned], dict[str, list[int]]]:
    plan = random_plan(family, 16, random.Random(family), spread=2, aborts=0, max_tokens=80)
    settings = {"device": "cpu", "limit_mm_per_prompt": limits(family), "kv_cache_dtype": "fp8"}
    return plan, alone(quiet_engine(make_checkpoint(family), **settings), plan)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_run_alone(family: str, way: str) -> None:
    """What a row reads of its past is rounded whether it was computed in this step, before, or for another request."""
    plan, reference = plan_and_reference(family)
    engine = engine_of(family, **WAYS[way])
    for _ in range(2):  # the second time with everything cached
        served = serve(engine, plan)
        for each in plan:
            got = served.tokens(each.request_id)
            assert got == reference[each.request_id], differing(got, reference[each.request_id])
    assert engine.core.stats().num_prefix_hit_tokens > 0
    assert way != "preempted" or engine.core.stats().num_preemptions > 0
    engine.core.scheduler.check_idle()


def likelihoods(engine: LLMEngine, plan: list[Planned]) -> torch.Tensor:
    """Of every prompt's tokens but the first."""
    values = []
    for each in plan:
        output = serve(engine, [Planned("r", each.prompt, LIKELIHOODS)]).outputs["r"]
        assert output.prompt_logprobs is not None
        entries = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
        values += [entry[token].logprob for token, entry in entries if entry is not None]
    return torch.tensor(values)


@pytest.mark.parametrize(("dtype", "bound"), [("fp8_e4m3", 0.06), ("fp8_e5m2", 0.12)])
def test_log_probabilities_are_near_those_of_a_float_cache(dtype: str, bound: float) -> None:
    plan = random_plan("qwen2", 3, random.Random(0), spread=0, aborts=0)
    engines = [engine_of("qwen2", each, num_blocks=None, kv_cache_bytes=1 << 20) for each in ("auto", dtype)]
    in_float, in_fp8 = (likelihoods(engine, plan) for engine in engines)
    error = (in_fp8 - in_float).pow(2).mean().sqrt() / in_float.std()
    assert 0 < error < bound
    # float32 takes four bytes.
    assert engines[1].report.num_blocks // engines[0].report.num_blocks == 4
    assert [f"float8_{dtype[4:]}" in line for line in engines[1].report.lines()].count(True) == 1
    assert not any("float8" in line for line in engines[0].report.lines())


def with_scales(path: Path, folder: Path, scales: dict[str, float], **config: Any) -> Path:
    """The checkpoint with other tensors, and as if it were in 8-bit floats, though no layer is."""
    shutil.copytree(path, folder)
    tensors = load_file(folder / "model.safetensors") | {name: torch.tensor(each) for name, each in scales.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    settings = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


FLOAT_8 = {"type": "float", "num_bits": 8, "strategy": "tensor", "symmetric": True}
SCHEME = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": FLOAT_8}},
    "kv_cache_scheme": FLOAT_8 | {"dynamic": False},
}


@pytest.mark.parametrize("names", ["{}.k_scale {}.v_scale", "{}.k_proj.output_scale {}.v_proj.output_scale"])
def test_a_checkpoint_brings_scales(names: str, tmp_path: Path) -> None:
    """And says that the cache has 8 bits. With scales of powers of two nothing but the range changes."""
    path = make_checkpoint("qwen2")
    scales: dict[str, float] = {}
    for layer in range(3):
        kinds = zip(names.format(*[f"model.layers.{layer}.self_attn"] * 2).split(), (2.0**-4, 2.0**-2), strict=True)
        scales |= dict(kinds)
    folder = with_scales(path, tmp_path / "scaled", scales, **SCHEME)
    engine = make_engine(folder, device="cpu", dtype="float32")
    (line,) = [line for line in engine.report.lines() if "float8" in line]
    assert "scales of the checkpoint in 3 of 3 layers" in line
    worker = engine.core.executor.worker  # type: ignore[attr-defined]
    layers = [module for module in worker.model.modules() if isinstance(module, Attention)]
    assert [(layer.k_scale, layer.v_scale) for layer in layers] == [(2.0**-4, 2.0**-2)] * 3
    plan = random_plan("qwen2", 2, random.Random(0), spread=0, aborts=0)
    plain = make_engine(path, device="cpu", dtype="float32")
    want, got = likelihoods(plain, plan), likelihoods(engine, plan)
    assert 0 < (got - want).pow(2).mean().sqrt() < 0.06 * want.std()
    in_float = make_engine(folder, device="cpu", dtype="float32", kv_cache_dtype="fp8_e5m2")
    assert any("float8_e5m2" in line for line in in_float.report.lines())


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"model.layers.0.self_attn.k_scale": 0.0}, "k_scale: got .0.0., expected one positive number"),
        ({"model.layers.7.self_attn.v_scale": 1.0}, "got some for layers.7.self_attn, expected an attention layer"),
    ],
)
def test_scales_that_are_none(scales: dict[str, float], message: str, tmp_path: Path) -> None:
    folder = with_scales(make_checkpoint("qwen2"), tmp_path / "wrong", scales, **SCHEME)
    with pytest.raises(WeightsError, match=message):
        make_engine(folder, device="cpu", dtype="float32")


def test_a_backend_that_reads_floats_only_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend: got 'native_cpu' .* it has no float8_e4m3fn"):
        engine_of("qwen2", attention_backend="native_cpu")

"""Every model in int8 and fp8: near the float model, and, in int8, its tokens the same whatever is batched, cut, cached
and preempted."""

from __future__ import annotations

import json
import random
import re
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium import EngineArgs, LLMEngine, SamplingParams
from sensorium.errors import ConfigError, ModelError, WeightsError
from sensorium.kernels import native_refusal
from tests.helpers import toy_models as toys
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.direct import load
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import Planned, alone, differing, make_engine, quiet_engine, serve

FAMILIES = ("llama", "qwen2", "qwen3", "llava", "qwen2_vl", "qwen2_5_vl", "qwen2_audio", "qwen2_5_omni_thinker")
WAYS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 40, "block_size": 8, "max_num_batched_tokens": 64},
}


@pytest.fixture(autouse=True)
def native_kernels() -> None:
    """Plain torch's products of floats, such as attention's, depend on the batch in their last bits."""
    reason = native_refusal()
    if reason is not None:
        pytest.skip(f"no native kernels on this machine: {reason}")


def int8_engine(family: str, dtype: str = "bfloat16", **settings: Any) -> LLMEngine:
    checkpoint = make_checkpoint(family, dtype=dtype)
    return make_engine(checkpoint, limit_mm_per_prompt=limits(family), device="cpu", quantization="int8", **settings)


@cache
def plan_and_reference(family: str) -> tuple[list[Planned], dict[str, list[int]]]:
    """Requests that arrive within a few steps, and the tokens of each when it runs alone and whole."""
    plan = random_plan(family, 16, random.Random(family), spread=2, aborts=0, max_tokens=80)
    settings = {"device": "cpu", "quantization": "int8", "limit_mm_per_prompt": limits(family)}
    return plan, alone(quiet_engine(make_checkpoint(family, dtype="bfloat16"), **settings), plan)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_are_those_of_a_run_alone(family: str, way: str) -> None:
    plan, reference = plan_and_reference(family)
    engine = int8_engine(family, **WAYS[way])
    for _ in range(2):  # the second time with everything cached
        served = serve(engine, plan)
        for each in plan:
            got = served.tokens(each.request_id)
            assert got == reference[each.request_id], differing(got, reference[each.request_id])
    assert engine.core.stats().num_prefix_hit_tokens > 0
    assert way != "preempted" or engine.core.stats().num_preemptions > 0
    engine.core.scheduler.check_idle()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probabilities_are_near_those_in_float(family: str) -> None:
    """Random weights are the hardest to round: no value is larger than the others, and none unimportant."""
    plan = random_plan(family, 3, random.Random(family), spread=0, aborts=0)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    engines = (
        make_engine(make_checkpoint(family), limit_mm_per_prompt=limits(family), device="cpu"),
        int8_engine(family, "float32"),
    )
    in_float, in_int8 = (torch.cat([prompt_logprobs(engine, each, params) for each in plan]) for engine in engines)
    error = in_int8 - in_float
    assert error.abs().max() > 0, "nothing was quantized"
    assert error.pow(2).mean().sqrt() < 0.1 * in_float.std()
    lines = "\n".join(engines[1].report.lines())
    assert "int8 weights in" in lines
    assert "in float" in lines
    weights = [engine.report.memory_bytes["weights"] for engine in engines]
    assert weights[1] < 0.75 * weights[0]


def prompt_logprobs(engine: LLMEngine, each: Planned, params: SamplingParams) -> torch.Tensor:
    """The log probability of every prompt token but the first."""
    output = serve(engine, [Planned("r", each.prompt, params)]).outputs["r"]
    assert output.prompt_logprobs is not None
    entries = zip(output.prompt_token_ids, output.prompt_logprobs, strict=True)
    return torch.tensor([entry[token].logprob for token, entry in entries if entry is not None])


@pytest.mark.parametrize("cls", [toys.SeedPageModel, toys.OwnMergeModel, toys.TwoMethodModel])
def test_the_report_says_what_stays_in_float_because_of_its_class(cls: type, tmp_path: Path) -> None:
    """A class of plain nn.Linear was asked for in int8: nothing was quantized, and nothing was said."""
    toys.save_checkpoint(cls, tmp_path)
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "device": "cpu"}
    lines = [each for each in make_engine(tmp_path, quantization="int8", **settings).report.lines() if "int8" in each]
    (line,) = lines
    model, _ = load(tmp_path, skip_tokenizer_init=True)
    plain = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    assert plain
    assert "torch.nn.Linear is never quantized" in line
    assert plain[0] in line
    assert "sensorium.model_executor.layers.linear" in line
    assert not [each for each in make_engine(tmp_path, **settings).report.lines() if each.startswith("weights")]


@pytest.mark.parametrize("cls", [toys.SeedPageModel, toys.OwnMergeModel, toys.TwoMethodModel])
def test_classes_of_every_tier(cls: type, tmp_path: Path) -> None:
    """Their own layers stay in float; what they take from the library is quantized without a word in them."""
    toys.save_checkpoint(cls, tmp_path)
    settings: dict[str, Any] = {"skip_tokenizer_init": True, "limit_mm_per_prompt": {"image": 3}, "device": "cpu"}
    ids = [9, 10, toys.IMAGE_TOKEN, 11, 12, 13]
    plan = [
        Planned(
            f"r{i}",
            {"prompt_token_ids": [20 + i, *ids], "multi_modal_data": {"image": [toys.image(i % 3, 5)]}},
            SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, logit_bias=toys.NO_MEDIA_TOKENS),
        )
        for i in range(5)
    ]
    in_float = make_engine(tmp_path, **settings)
    engine = make_engine(tmp_path, quantization="int8", **settings)
    assert engine.core.features == in_float.core.features
    reference = alone(engine, plan)
    served = serve(engine, plan)
    assert {each.request_id: served.tokens(each.request_id) for each in plan} == reference


# Checkpoints that are quantized already


def in_fp8(tensors: dict[str, torch.Tensor], kept: str) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """A checkpoint's decoder in 8-bit floats with a scale per block, and the floats that these mean; `kept` names what
    stays as it is."""
    quantized, meant = dict(tensors), dict(tensors)
    for name, weight in tensors.items():
        if not name.endswith("_proj.weight") or re.search(kept, name):
            continue
        blocks = (-(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK))
        scales = torch.rand(blocks, generator=torch.Generator().manual_seed(1)) / 448 + weight.abs().max() / 448
        wide = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[: weight.shape[0], : weight.shape[1]]
        values = (weight / wide).to(torch.float8_e4m3fn)
        quantized |= {name: values, f"{name}_scale_inv": scales}
        meant[name] = values.float() * wide
    assert len(quantized) > len(tensors)
    return quantized, meant


BLOCK = 24
TOWERS = "vision|visual|audio_tower"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("listed", ["every layer by its name", "nothing"])
def test_a_checkpoint_in_8_bit_floats_is_what_it_means(family: str, listed: str, tmp_path: Path) -> None:
    """Its towers are in float. Some files list them, under names that needn't be this model's; the tensors decide."""
    path = make_checkpoint(family)
    tensors = load_file(path / "model.safetensors")
    quantized, meant = in_fp8(tensors, TOWERS)
    settings: dict[str, Any] = {
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
        "activation_scheme": "dynamic",
    }
    if listed == "every layer by its name":
        settings["modules_to_not_convert"] = [name.removesuffix(".weight") for name in tensors if name not in quantized]
    for name, state in (("quantized", quantized), ("meant", meant)):
        shutil.copytree(path, tmp_path / name)
        save_file(state, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "quantized" / "config.json").read_text()) | {"quantization_config": settings}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    plan = random_plan(family, 3, random.Random(family), spread=0, aborts=0)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    engines = [
        make_engine(tmp_path / name, limit_mm_per_prompt=limits(family), device="cpu")
        for name in ("quantized", "meant")
    ]
    got, want = (torch.cat([prompt_logprobs(engine, each, params) for each in plan]) for engine in engines)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    (line,) = [each for each in engines[0].report.lines() if each.startswith("weights")]
    assert "fp8 weights, held in float32 on this device, in" in line
    quantized, in_float = line.split("; in float: ")
    assert "self_attn.qkv_proj" in quantized
    assert "self_attn.qkv_proj" not in in_float
    assert "lm_head" in in_float
    assert "lm_head" not in quantized


def test_fp8_at_load_is_near_float() -> None:
    plan = random_plan("llava", 3, random.Random(0), spread=0, aborts=0)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    engines = [
        make_engine(
            make_checkpoint("llava"), limit_mm_per_prompt=limits("llava"), device="cpu", quantization=quantization
        )
        for quantization in (None, "fp8")
    ]
    in_float, in_fp8 = (torch.cat([prompt_logprobs(engine, each, params) for each in plan]) for engine in engines)
    error = in_fp8 - in_float
    assert error.abs().max() > 0, "nothing was quantized"
    assert error.pow(2).mean().sqrt() < 0.15 * in_float.std()


FORMATS = {
    "gptq": {"quant_method": "gptq", "bits": 4},
    "awq": {"quant_method": "awq", "bits": 4},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "int-quantized"},
    "bitsandbytes": {"load_in_8bit": True, "load_in_4bit": False},
}


@pytest.mark.parametrize("name", FORMATS)
def test_quantized_checkpoints_are_refused_by_name(name: str, tmp_path: Path) -> None:
    """Their integers would load as if they were floats, or not at all; either way the format is what to know."""
    shutil.copytree(make_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((tmp_path / "config.json").read_text()) | {"quantization_config": FORMATS[name]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=f"quantized by {name}.*expected .*Use the checkpoint that it was made from"):
        EngineArgs(model=str(tmp_path), device="cpu").create_engine_config()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
@pytest.mark.parametrize("family", FAMILIES)
def test_quantized_tensors_without_a_word_in_the_config_are_refused(
    family: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """An int8 checkpoint whose config lost its quantization_config loaded as if 127 were a weight."""
    shutil.copytree(make_checkpoint(family), tmp_path, dirs_exist_ok=True)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.weight") and not re.search(TOWERS, name))
    tensors[name] = (tensors[name] * 20).to(dtype)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightsError, match=rf"qkv_proj.weight \(part 'q'\): got {dtype} .*quantization_config"):
        make_engine(tmp_path, limit_mm_per_prompt=limits(family), device="cpu")


def test_other_schemes_and_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = str(make_checkpoint("llama"))
    with pytest.raises(
        ConfigError, match="quantization: got 'int4', expected 'compressed-tensors', 'fp8', 'int8', 'mxfp4' or None"
    ):
        EngineArgs(model=model, device="cpu", quantization="int4").create_engine_config()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match="quantization on cuda: got 'int8', expected None"):
        EngineArgs(model=model, device="cuda", quantization="int8").create_engine_config()

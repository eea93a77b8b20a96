"""Text models equal Hugging Face's in float32, however the prompt is cut and whatever runs beside it."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from sensorium.attention import AttentionMetadata, compute_slot_mapping
from sensorium.distributed import TensorParallel
from sensorium.model_executor.model_loader import load_model
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.direct import DirectRun, engine_config, hf_logits, load, relative_error
from tests.helpers.ranks import on_ranks

TEXT_FAMILIES = [
    *("gemma", "gemma2", "gemma3", "llama", "llama_biased", "mistral", "mixtral", "gpt_oss"),
    *("qwen2", "qwen2_windowed", "qwen3", "qwen3_5", "qwen3_moe"),
]
TOLERANCE = 1e-5


def prompt(num_tokens: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 256, num_tokens).tolist()
    return tokens


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_whole_prompt(family: str) -> None:
    ids = prompt(90)
    expected = hf_logits(make_hf_model(family), ids, {})
    assert relative_error(DirectRun(*load(make_checkpoint(family))).step(ids), expected) < TOLERANCE


@pytest.mark.parametrize("family", TEXT_FAMILIES)
def test_chunks_and_single_tokens(family: str) -> None:
    ids = prompt(70)
    expected = hf_logits(make_hf_model(family), ids, {})
    run = DirectRun(*load(make_checkpoint(family)))
    cuts = [0, 1, 33, 50, *range(51, 71)]
    parts = [run.step(ids[start:end]) for start, end in itertools.pairwise(cuts)]
    assert relative_error(torch.cat(parts), expected) < TOLERANCE


@torch.inference_mode()
def test_sequences_in_one_batch_do_not_see_each_other() -> None:
    model, config = load(make_checkpoint("qwen2"))
    prompts = [prompt(20, seed=1), prompt(33, seed=2), prompt(1, seed=3)]
    run = DirectRun(model, config, num_blocks=12)
    block_table = np.array([[3, 7, 0], [1, 11, 5], [2, 0, 0]], dtype=np.int32)
    lens = np.array([len(ids) for ids in prompts], dtype=np.int32)
    metadata = AttentionMetadata.from_numpy(lens, lens, block_table, compute_slot_mapping(block_table, lens, lens, 16))
    hidden = model(
        input_ids=torch.tensor([token for ids in prompts for token in ids]),
        positions=torch.from_numpy(np.concatenate([np.arange(each) for each in lens])),
        kv_caches=run.kv_caches,
        attn_metadata=metadata,
    )
    together = torch.split(model.compute_logits(hidden, None), lens.tolist())
    for ids, logits in zip(prompts, together, strict=True):
        assert relative_error(logits, DirectRun(model, config).step(ids)) < TOLERANCE


def test_embeddings_take_the_place_of_ids() -> None:
    model, config = load(make_checkpoint("llama"))
    ids = prompt(12)
    embeddings = model.get_input_embeddings(torch.tensor(ids))
    by_embeddings = DirectRun(model, config).step(ids, inputs_embeds=embeddings)
    assert torch.equal(by_embeddings, DirectRun(model, config).step(ids))


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_rotary_positions(rope: dict[str, Any], tmp_path: Path) -> None:
    path = shutil.copytree(make_checkpoint("llama"), tmp_path, dirs_exist_ok=True)
    config = json.loads((path / "config.json").read_text())
    config["rope_parameters"] = rope | {"rope_theta": 10000.0}
    (path / "config.json").write_text(json.dumps(config))
    ids = prompt(80)
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager"), ids, {})
    assert relative_error(DirectRun(*load(path)).step(ids), expected) < TOLERANCE


def test_experts_in_4_bit_floats(tmp_path: Path) -> None:
    """GPT-OSS as it stands on the hub: experts in blocks, outputs first. Equal to the checkpoint of their values, also
    for ranks, which have whole blocks."""
    tensors = load_file(make_checkpoint("gpt_oss") / "model.safetensors")
    stored, meant = {}, {}
    generator = torch.Generator().manual_seed(0)
    for name, tensor in tensors.items():
        stored[name] = meant[name] = tensor
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, inputs, outputs = tensor.shape
            shape = (experts, outputs, inputs // 32)
            blocks = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
            scales = torch.randint(121, 126, shape, generator=generator, dtype=torch.uint8)
            del stored[name]
            stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            meant[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).contiguous()
    paths = []
    for folder, content in (("stored", stored), ("meant", meant)):
        paths.append(shutil.copytree(make_checkpoint("gpt_oss"), tmp_path / folder))
        save_file(content, paths[-1] / "model.safetensors")
    config = json.loads((paths[0] / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (paths[0] / "config.json").write_text(json.dumps(config))
    ids = prompt(40)
    logits, expected = (DirectRun(*load(path)).step(ids) for path in paths)
    assert torch.equal(logits, expected)

    config_of_ranks = engine_config(paths[0], tensor_parallel_size=2)

    def on_rank(group: TensorParallel) -> torch.Tensor:
        return DirectRun(load_model(config_of_ranks.as_rank_of(group)), config_of_ranks).step(ids)

    for of_rank in on_ranks(2, on_rank):
        assert relative_error(of_rank, expected) < TOLERANCE


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_stay_near(dtype: str) -> None:
    ids = prompt(40)
    exact = DirectRun(*load(make_checkpoint("qwen2"))).step(ids)
    narrow = DirectRun(*load(make_checkpoint("qwen2"), dtype=dtype)).step(ids)
    assert narrow.dtype == getattr(torch, dtype)
    assert relative_error(narrow, exact) < (0.1 if dtype == "bfloat16" else 0.02)

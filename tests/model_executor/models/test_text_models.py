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
from transformers import AutoModelForCausalLM

from sensorium.attention import AttentionMetadata, compute_slot_mapping
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.direct import DirectRun, hf_logits, load, relative_error

TEXT_FAMILIES = [
    *("gemma", "gemma2", "gemma3", "llama", "llama_biased", "mistral", "mixtral"),
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


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_dtypes_stay_near(dtype: str) -> None:
    ids = prompt(40)
    exact = DirectRun(*load(make_checkpoint("qwen2"))).step(ids)
    narrow = DirectRun(*load(make_checkpoint("qwen2"), dtype=dtype)).step(ids)
    assert narrow.dtype == getattr(torch, dtype)
    assert relative_error(narrow, exact) < (0.1 if dtype == "bfloat16" else 0.02)

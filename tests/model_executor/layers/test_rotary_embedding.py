"""Rotary embeddings against Hugging Face's, for every kind of scaling and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Qwen2VLTextConfig
from transformers.models.gptj.modeling_gptj import apply_rotary_pos_emb as apply_gptj
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLRotaryEmbedding

from sensorium.errors import ModelError
from sensorium.model_executor.layers.rotary_embedding import get_rope

HEAD_SIZE = 32
MAX_POSITION = 128
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, all settings": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 16,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 0.4,
        "truncate": False,
    },
    "yarn, given factor": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 1.25,
    },
}


def random_heads(num_tokens: int, num_heads: int, seed: int) -> torch.Tensor:
    return torch.randn(num_tokens, num_heads, HEAD_SIZE, generator=torch.Generator().manual_seed(seed))


def reference(config: LlamaConfig, positions: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> Any:
    cos, sin = LlamaRotaryEmbedding(config)(q, positions[None])
    rotated = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    return tuple(x[0].transpose(0, 1) for x in rotated)


@pytest.mark.parametrize("name", SCALINGS)
def test_scaling_equals_hugging_face(name: str) -> None:
    scaling = SCALINGS[name] | {"rope_theta": 5000.0}
    config = LlamaConfig(
        hidden_size=4 * HEAD_SIZE,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=scaling,
    )
    positions = torch.tensor([0, 1, 2, 17, 63, 64, 100, 127])
    q, k = random_heads(8, 4, 1), random_heads(8, 2, 2)
    rope = get_rope(HEAD_SIZE, HEAD_SIZE, MAX_POSITION, 5000.0, rope_scaling=scaling)
    rotated = rope(positions, q.flatten(1), k.flatten(1))
    for got, expected in zip(rotated, reference(config, positions, q, k), strict=True):
        torch.testing.assert_close(got.view(expected.shape), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("position", [128, 200, 1000])
def test_dynamic_scaling_beyond_the_trained_length_equals_hugging_face_when_decoding(position: int) -> None:
    scaling = SCALINGS["dynamic"] | {"rope_theta": 10000.0}
    config = LlamaConfig(
        hidden_size=4 * HEAD_SIZE,
        num_attention_heads=4,
        max_position_embeddings=MAX_POSITION,
        rope_parameters=scaling,
    )
    q, k = random_heads(1, 4, 1), random_heads(1, 2, 2)
    positions = torch.tensor([position])
    rope = get_rope(HEAD_SIZE, HEAD_SIZE, MAX_POSITION, 10000.0, rope_scaling=scaling)
    for got, expected in zip(rope(positions, q, k), reference(config, positions, q, k), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=2e-4)


def test_dynamic_scaling_does_not_depend_on_the_batch() -> None:
    rope = get_rope(HEAD_SIZE, HEAD_SIZE, MAX_POSITION, 10000.0, rope_scaling=SCALINGS["dynamic"])
    together = rope.cos_sin(torch.tensor([5, 500]))
    alone = rope.cos_sin(torch.tensor([5]))
    assert torch.equal(together[0][:1], alone[0])


@pytest.mark.parametrize("rope_type", ["default", "mrope"])
def test_mrope_equals_hugging_face(rope_type: str) -> None:
    section = [4, 6, 6]
    config = Qwen2VLTextConfig(
        hidden_size=4 * HEAD_SIZE,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    )
    positions = torch.randint(0, 300, (3, 9), generator=torch.Generator().manual_seed(3))
    q, k = random_heads(9, 4, 1), random_heads(9, 2, 2)
    cos, sin = Qwen2VLRotaryEmbedding(config)(q, positions[:, None])
    expected = apply_rotary_pos_emb(q.transpose(0, 1)[None], k.transpose(0, 1)[None], cos, sin)
    scaling = {"rope_type": rope_type, "mrope_section": section}
    rope = get_rope(HEAD_SIZE, HEAD_SIZE, 32768, 1e6, rope_scaling=scaling)
    for got, want in zip(rope(positions, q, k), expected, strict=True):
        torch.testing.assert_close(got, want[0].transpose(0, 1), rtol=1e-5, atol=1e-6)


def test_mrope_with_equal_rows_is_plain_rope() -> None:
    positions = torch.arange(11)
    q, k = random_heads(11, 4, 1), random_heads(11, 2, 2)
    plain = get_rope(HEAD_SIZE, HEAD_SIZE, 512, 1e4)
    mrope = get_rope(HEAD_SIZE, HEAD_SIZE, 512, 1e4, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]})
    expected = plain(positions, q, k)
    for three_rows in (positions.expand(3, -1), positions):
        for got, want in zip(mrope(three_rows, q, k), expected, strict=True):
            assert torch.equal(got, want)


def test_partial_neighbour_rotation_equals_hugging_face() -> None:
    rotary_dim = 8
    positions = torch.tensor([0, 3, 77])
    q, k = random_heads(3, 4, 1), random_heads(3, 4, 2)
    rope = get_rope(
        HEAD_SIZE, HEAD_SIZE, 128, 10000.0, is_neox_style=False, partial_rotary_factor=rotary_dim / HEAD_SIZE
    )
    frequencies = 1.0 / 10000.0 ** (torch.arange(0, rotary_dim, 2) / rotary_dim)
    angles = positions[:, None] * frequencies
    for x, got in zip((q, k), rope(positions, q, k), strict=True):
        turned = apply_gptj(x[None, ..., :rotary_dim], angles.sin()[None], angles.cos()[None])[0]
        torch.testing.assert_close(got, torch.cat((turned, x[..., rotary_dim:]), dim=-1), rtol=1e-5, atol=1e-6)


def test_equal_settings_share_one_embedding() -> None:
    assert get_rope(32, 32, 128, 1e4) is get_rope(32, 32, 128, 1e4)
    assert get_rope(32, 32, 128, 1e4) is not get_rope(32, 32, 128, 2e4)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "spiral"}, "rope_type: got 'spiral'"),
        ({"rope_type": "linear"}, r"expected also \['factor'\]"),
        (
            {"rope_type": "default", "mrope_section": [1, 2, 3]},
            "mrope_section: got .* the sum 6, expected the sum 16",
        ),
    ],
)
def test_unusable_settings_are_named(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        get_rope(HEAD_SIZE, HEAD_SIZE, 128, 1e4, rope_scaling=scaling)


def test_three_rows_of_positions_need_mrope() -> None:
    rope = get_rope(HEAD_SIZE, HEAD_SIZE, 128, 1e4)
    with pytest.raises(ModelError, match="without M-RoPE"):
        rope.cos_sin(torch.zeros(3, 5, dtype=torch.int64))

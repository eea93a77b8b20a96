"""Normalisation and activations against Hugging Face's."""

from __future__ import annotations

import pytest
import torch
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from sensorium.errors import ModelError
from sensorium.model_executor.layers.activation import (
    GeluAndMul,
    SiluAndMul,
    get_act_and_mul_fn,
    get_act_fn,
)
from sensorium.model_executor.layers.layernorm import RMSNorm


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_equals_hugging_face(dtype: torch.dtype) -> None:
    reference = LlamaRMSNorm(48, eps=1e-5).to(dtype)
    reference.weight.data.copy_(random_tensor(48, seed=1))
    norm = RMSNorm(48, eps=1e-5, dtype=dtype)
    norm.weight.data.copy_(reference.weight.data)
    x = (10 * random_tensor(5, 48)).to(dtype)
    torch.testing.assert_close(norm(x), reference(x))


def test_rms_norm_with_residual_returns_the_sum_and_changes_nothing() -> None:
    norm = RMSNorm(16)
    norm.weight.data.copy_(random_tensor(16, seed=1))
    x, residual = random_tensor(5, 16, seed=2), random_tensor(5, 16, seed=3)
    x_before, residual_before = x.clone(), residual.clone()
    normed, total = norm(x, residual)
    assert torch.equal(x, x_before)
    assert torch.equal(residual, residual_before)
    torch.testing.assert_close(total, x + residual)
    torch.testing.assert_close(normed, norm(x + residual))


@pytest.mark.parametrize(
    "name",
    [
        *("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh", "linear", "quick_gelu", "relu", "relu2"),
        *("sigmoid", "silu", "swish", "tanh"),
    ],
)
def test_activation_equals_hugging_face(name: str) -> None:
    x = 4 * random_tensor(3, 64)
    torch.testing.assert_close(get_act_fn(name)(x), ACT2FN[name](x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["gelu", "gelu_pytorch_tanh", "silu"])
def test_gated_activation_is_activation_times_gate(name: str) -> None:
    gate, up = 4 * random_tensor(3, 64, seed=1), random_tensor(3, 64, seed=2)
    expected = ACT2FN[name](gate) * up
    # Where 1 + erf(gate) nearly cancels, its rounding is all that is left, times |gate * up| / 2, here up to 15.
    torch.testing.assert_close(get_act_and_mul_fn(name)(torch.cat((gate, up), dim=-1)), expected, rtol=1e-5, atol=2e-6)


def test_gated_activations_by_class() -> None:
    x = random_tensor(3, 8)
    torch.testing.assert_close(SiluAndMul()(x), torch.nn.functional.silu(x[:, :4]) * x[:, 4:])
    torch.testing.assert_close(GeluAndMul("tanh")(x), torch.nn.functional.gelu(x[:, :4], approximate="tanh") * x[:, 4:])


def test_an_unknown_activation_is_named() -> None:
    with pytest.raises(ModelError, match="activation function: got 'wavy'"):
        get_act_fn("wavy")
    with pytest.raises(ModelError, match="activation function: got 'relu2'"):
        get_act_and_mul_fn("relu2")
    with pytest.raises(ModelError, match="approximate of GeluAndMul: got 'cubic'"):
        GeluAndMul("cubic")

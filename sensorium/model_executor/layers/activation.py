"""Activation functions as layers, by the names that Hugging Face configs use."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.kernels import gelu, gelu_and_mul, quick_gelu, silu_and_mul
from sensorium.model_executor.layers.quantization import QuantizationConfig

Activation = Callable[[torch.Tensor], torch.Tensor]


class SiluAndMul(nn.Module):
    """`silu(gate) * up` for `x = [gate, up]`: `(..., 2 * d)` to `(..., d)`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return silu_and_mul(x)


class GeluAndMul(nn.Module):
    """`gelu(gate) * up` for `x = [gate, up]`: `(..., 2 * d)` to `(..., d)`.

    Args:
        approximate: "none" (with erf) or "tanh".
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ModelError(f"approximate of GeluAndMul: got {approximate!r}, expected 'none' or 'tanh'.")
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class."""
        return gelu_and_mul(x, self.approximate)


class ClampedSwigluAndMul(nn.Module):
    """`gate * sigmoid(alpha * gate) * (up + 1)` for `x = [gate, up]`: `(..., 2 * d)` to `(..., d)`. The gate is clamped
    to at most `limit`, `up` to `[-limit, limit]`.

    Source: `transformers` `GptOssExperts`.
    """

    def __init__(self, alpha: float, limit: float) -> None:
        super().__init__()
        self.alpha = alpha
        self.limit = limit

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """See the class. Computed in float32, rounded once."""
        gate, up = x.float().chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (gate * torch.sigmoid(self.alpha * gate) * (up + 1.0)).to(x.dtype)


class GELU(nn.Module):
    """`x * Phi(x)`.

    Args:
        approximate: "none" (with erf) or "tanh".
    """

    def __init__(self, approximate: str = "none") -> None:
        super().__init__()
        self.approximate = approximate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as `x`."""
        return gelu(x, self.approximate)


class QuickGELU(nn.Module):
    """`x * sigmoid(1.702 x)`, CLIP's approximation of GELU."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as `x`."""
        return quick_gelu(x)


class ReLUSquared(nn.Module):
    """`relu(x)^2`. Source: So et al. 2021."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as `x`."""
        return F.relu(x).square()


_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GELU,
    # Three names of one formula, which approximates erf with tanh.
    "gelu_fast": lambda: GELU(approximate="tanh"),
    "gelu_new": lambda: GELU(approximate="tanh"),
    "gelu_pytorch_tanh": lambda: GELU(approximate="tanh"),
    "linear": nn.Identity,
    "quick_gelu": QuickGELU,
    "relu": nn.ReLU,
    "relu2": ReLUSquared,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "swish": nn.SiLU,
    "tanh": nn.Tanh,
}

_GATED_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": GeluAndMul,
    "gelu_pytorch_tanh": lambda: GeluAndMul(approximate="tanh"),
    "silu": SiluAndMul,
    "swish": SiluAndMul,
}


def get_act_fn(
    act_fn_name: str,
    quant_config: QuantizationConfig | None = None,  # noqa: ARG001  part of a known signature
) -> nn.Module:
    """The activation that a config names, such as "gelu_pytorch_tanh". `quant_config` is ignored: an activation has no
    weights.

    Raises:
        ModelError: No activation has that name.
    """
    return _lookup(_ACTIVATIONS, act_fn_name)


def get_act_and_mul_fn(act_fn_name: str) -> nn.Module:
    """The gated form of an activation: `act(gate) * up` for `x = [gate, up]`.

    Raises:
        ModelError: No gated activation has that name.
    """
    return _lookup(_GATED_ACTIVATIONS, act_fn_name)


def _lookup(table: dict[str, Callable[[], nn.Module]], name: str) -> nn.Module:
    factory = table.get(name.lower())
    if factory is None:
        raise ModelError(
            f"activation function: got {name!r}, expected one of {sorted(table)}. "
            "Pass the model's own nn.Module instead."
        )
    return factory()

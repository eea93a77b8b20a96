"""Activations of feed-forward layers, plain and gated. Computed in float32, rounded once."""

from __future__ import annotations

import torch
from torch.nn import functional as F


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for `x = [gate, up]` `(..., 2 * d)`; returns `(..., d)`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def gelu_and_mul_reference(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """`gelu(gate) * up` for `x = [gate, up]` `(..., 2 * d)`; `approximate` is `"none"` (erf) or `"tanh"`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate=approximate) * up).to(x.dtype)


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 * x)`, the activation of CLIP."""
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


silu_and_mul = silu_and_mul_reference
gelu_and_mul = gelu_and_mul_reference
quick_gelu = quick_gelu_reference

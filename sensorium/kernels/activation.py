"""Activations of feed-forward layers, plain and gated. Computed in float32, rounded once."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, native_for, rows_of

# The codes of `enum activation` in elementwise.c, and the names of the GPU kernel.
_SILU, _GELU, _GELU_TANH, _QUICK_GELU = range(4)
_NAMES = ("silu", "gelu", "gelu_tanh", "quick_gelu")


def silu_and_mul_reference(x: torch.Tensor) -> torch.Tensor:
    """`silu(gate) * up` for `x = [gate, up]` `(..., 2 * d)`; returns `(..., d)`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.silu(gate) * up).to(x.dtype)


def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
    """See `silu_and_mul_reference`."""
    out = _fused(x, _SILU, gated=True)
    return silu_and_mul_reference(x) if out is None else out


def gelu_and_mul_reference(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """`gelu(gate) * up` for `x = [gate, up]` `(..., 2 * d)`; `approximate` is `"none"` (erf) or `"tanh"`."""
    gate, up = x.float().chunk(2, dim=-1)
    return (F.gelu(gate, approximate=approximate) * up).to(x.dtype)


def gelu_and_mul(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """See `gelu_and_mul_reference`."""
    out = _fused(x, _GELU_TANH if approximate == "tanh" else _GELU, gated=True)
    return gelu_and_mul_reference(x, approximate) if out is None else out


def gelu_reference(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """`x * Phi(x)`; `approximate` is `"none"` (erf) or `"tanh"`."""
    return F.gelu(x.float(), approximate=approximate).to(x.dtype)


def gelu(x: torch.Tensor, approximate: str = "none") -> torch.Tensor:
    """See `gelu_reference`."""
    out = _fused(x, _GELU_TANH if approximate == "tanh" else _GELU, gated=False)
    return gelu_reference(x, approximate) if out is None else out


def quick_gelu_reference(x: torch.Tensor) -> torch.Tensor:
    """`x * sigmoid(1.702 * x)`, the activation of CLIP."""
    wide = x.float()
    return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """See `quick_gelu_reference`."""
    out = _fused(x, _QUICK_GELU, gated=False)
    return quick_gelu_reference(x) if out is None else out


def _fused(x: torch.Tensor, kind: int, *, gated: bool) -> torch.Tensor | None:
    """The activation in one pass, or `None` where no kernel takes `x`."""
    native = native_for(x)
    if native is None:
        return _on_gpu(x, _NAMES[kind], gated=gated) if on_gpu(x) else None
    rows = rows_of(x)
    num_rows, size = rows.shape
    size = size // 2 if gated else size
    out = x.new_empty((*x.shape[:-1], size))
    native.activation(
        *(out.data_ptr(), rows.data_ptr(), num_rows, size, rows.stride(0)),
        *(kind, gated, DTYPE_CODES[x.dtype], torch.get_num_threads()),
    )
    return out


def _on_gpu(x: torch.Tensor, kind: str, *, gated: bool) -> torch.Tensor:
    from sensorium.kernels.gpu.activation import activate

    return activate(x, kind, gated=gated)

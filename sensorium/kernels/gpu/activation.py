"""Activations, plain and gated, in one launch. The twins are in `sensorium.kernels.activation`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained, release_successor
from sensorium.kernels.native import rows_of

_BLOCK = 1024


@triton.jit
def _tanh(x):
    # Exact at both ends, where the exponential is 0 or infinite.
    return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)


@triton.jit
def _activate(
    out,
    x,
    x_stride,
    size,
    KIND: tl.constexpr,
    IS_GATED: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: a block of one row."""
    release_successor(IS_CHAINED)
    await_predecessor(IS_CHAINED)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < size
    cells = x + row * x_stride + columns
    gate = tl.load(cells, mask=is_column, other=0.0).to(tl.float32)
    if KIND == "silu":
        result = gate / (1.0 + tl.exp(-gate))
    elif KIND == "quick_gelu":
        result = gate * (1.0 / (1.0 + tl.exp(-1.702 * gate)))
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        result = 0.5 * gate * (1.0 + _tanh(inner))
    else:
        result = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476))
    if IS_GATED:
        result = result * tl.load(cells + size, mask=is_column, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, result.to(x.dtype.element_ty), mask=is_column)


def activate(x: torch.Tensor, kind: str, *, gated: bool) -> torch.Tensor:
    """The activation of `x` `(..., n)`, or, gated, of `[gate, up]` `(..., 2 * n)`.

    `kind` is "silu", "gelu", "gelu_tanh" or "quick_gelu".
    """
    rows = rows_of(x)
    num_rows, size = rows.shape
    size = size // 2 if gated else size
    out = x.new_empty((*x.shape[:-1], size))
    if out.numel():
        _activate[(num_rows, triton.cdiv(size, _BLOCK))](
            *(out, rows, rows.stride(0), size),
            KIND=kind,
            IS_GATED=gated,
            BLOCK=_BLOCK,
            num_warps=4,
            **chained(x.device),
        )
    return out

"""Root-mean-square normalisation in one launch, with or without the residual addition before it.

The twins in `sensorium.kernels.norm` give the rules of rounding. A program has a tile of whole rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained, release_successor
from sensorium.kernels.native import rows_of

_TILE = 2048
"""Elements of a program's tile if rows are short."""


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm(
    out,
    total,
    x,
    residual,
    weight,
    num_rows,
    x_stride,
    residual_stride,
    eps,
    SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROUND_FIRST: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, BLOCK)[None, :]
    is_column = columns < SIZE
    is_cell = (rows < num_rows) & is_column
    scale = tl.load(weight + columns, mask=is_column, other=0.0).to(tl.float32)
    release_successor(IS_CHAINED)
    await_predecessor(IS_CHAINED)
    values = tl.load(x + rows * x_stride + columns, mask=is_cell, other=0.0)
    if HAS_RESIDUAL:
        added = tl.load(residual + rows * residual_stride + columns, mask=is_cell, other=0.0)
        values = (values.to(tl.float32) + added.to(tl.float32)).to(x.dtype.element_ty)
        tl.store(total + rows * SIZE + columns, values, mask=is_cell)
    wide = values.to(tl.float32)
    mean_square = tl.sum(wide * wide, 1) / SIZE
    normed = wide * tl.rsqrt(mean_square + eps)[:, None]
    if ROUND_FIRST:
        normed = normed.to(x.dtype.element_ty).to(tl.float32)
    tl.store(out + rows * SIZE + columns, (normed * scale).to(x.dtype.element_ty), mask=is_cell)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `norm.rms_norm_reference`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(out, None, x, None, weight, eps)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `norm.add_rms_norm_reference`."""
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    total = torch.empty_like(x, memory_format=torch.contiguous_format)
    _launch(out, total, x, residual, weight, eps)
    return out, total


def _launch(
    out: torch.Tensor,
    total: torch.Tensor | None,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
) -> None:
    rows = rows_of(x)
    added = rows if residual is None else rows_of(residual)
    num_rows, size = rows.shape
    if not num_rows:
        return
    block = max(triton.next_power_of_2(size), 16)
    rows_each = max(_TILE // block, 1)
    _rms_norm[(triton.cdiv(num_rows, rows_each),)](
        *(out, out if total is None else total, rows, added, weight.contiguous()),
        *(num_rows, rows.stride(0), added.stride(0), eps),
        SIZE=size,
        BLOCK=block,
        ROWS=rows_each,
        HAS_RESIDUAL=residual is not None,
        ROUND_FIRST=weight.dtype == x.dtype,
        num_warps=min(max(block // 512, 4), 32),
        **chained(x.device),
    )

"""Quantizing inputs of 8-bit products, and scaling their sums, in one launch each; and the bounds of a cache's 8 bits.

The twins are in `kernels.fp8_linear` and `kernels.attention`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained, release_successor
from sensorium.kernels.native import rows_of

_LARGEST = tl.constexpr(448.0)
_SMALLEST_MAGNITUDE = tl.constexpr(2.0**-100)
_BLOCK = 4096
"""Columns that are read together."""


def largest_fp8(dtype: torch.dtype) -> float:
    """The largest number that a cache's type of 8 bits has; 0 for types of more bits."""
    return torch.finfo(dtype).max if dtype.itemsize == 1 else 0.0


@triton.jit
def within_fp8(x, factor, LARGEST: tl.constexpr):
    """`x * factor`, not larger than `LARGEST`, to be rounded to 8 bits; `x` itself where that is 0."""
    kept = x
    if LARGEST > 0:
        wide = x.to(tl.float32) * factor
        bounded = tl.minimum(tl.maximum(wide, -LARGEST), LARGEST)
        kept = tl.where(wide == wide, bounded, wide)  # NaN stays NaN
    return kept


@triton.jit
def _quantize_rows(
    values,
    scales,
    x,
    input_scale,
    x_stride,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: one row, whose columns from `SIZE` on become zeros."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    cells = x + row * x_stride + columns
    await_predecessor(IS_CHAINED)
    largest = tl.zeros([BLOCK], tl.float32)
    num_finite = tl.zeros([BLOCK], tl.int32)
    for start in tl.static_range(0, SIZE, BLOCK):
        wide = tl.abs(tl.load(cells + start, mask=start + columns < SIZE, other=0.0).to(tl.float32))
        # The maximum may skip NaN, so finite values are counted.
        num_finite += (wide < float("inf")).to(tl.int32)
        largest = tl.maximum(largest, wide)
    is_finite = tl.sum(num_finite, 0) == tl.cdiv(SIZE, BLOCK) * BLOCK
    if HAS_SCALE:
        scale = tl.load(input_scale)
    else:
        magnitude = tl.where(is_finite, tl.max(largest, 0), 0.0)
        scale = tl.div_rn(tl.maximum(magnitude, _SMALLEST_MAGNITUDE), _LARGEST)
    factor = tl.div_rn(1.0, scale)
    for start in tl.static_range(0, WIDTH, BLOCK):
        wide = tl.load(cells + start, mask=start + columns < SIZE, other=0.0).to(tl.float32)
        scaled = tl.minimum(tl.maximum(tl.where(is_finite, wide, 0.0) * factor, -_LARGEST), _LARGEST)
        kept = scaled.to(values.dtype.element_ty)
        tl.store(values + row * WIDTH + start + columns, kept, mask=start + columns < WIDTH)
    tl.store(scales + row, tl.where(is_finite, scale, float("nan")))


def quantize_fp8_rows(
    x: torch.Tensor, width: int, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows, width)` in 8-bit floats and `(rows, 1)` float32 scales; see `fp8_linear.quantize_fp8_rows`."""
    rows = rows_of(x)
    num_rows, size = rows.shape
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, 1, device=x.device)
    block = min(triton.next_power_of_2(max(width, 16)), _BLOCK)
    _quantize_rows[(num_rows,)](
        *(values, scales, rows, scales if input_scale is None else input_scale, rows.stride(0)),
        SIZE=size,
        WIDTH=width,
        BLOCK=block,
        HAS_SCALE=input_scale is not None,
        num_warps=8,
        **chained(x.device),
    )
    return values, scales


@triton.jit
def _scale_sums(
    out,
    sums,
    row_scales,
    scales,
    bias,
    sums_stride,
    size,
    HAS_BIAS: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_CHAINED: tl.constexpr,
):
    """One program: a block of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_column = columns < size
    scale = tl.load(scales + columns, mask=is_column, other=0.0)
    added = tl.load(bias + columns, mask=is_column, other=0.0).to(tl.float32) if HAS_BIAS else 0.0
    release_successor(IS_CHAINED)
    await_predecessor(IS_CHAINED)
    value = tl.load(sums + row * sums_stride + columns, mask=is_column, other=0.0)
    value = value * tl.load(row_scales + row) * scale + added
    tl.store(out + row * size + columns, value.to(out.dtype.element_ty), mask=is_column)


def scaled_sums(
    sums: torch.Tensor, row_scales: torch.Tensor, scales: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor
) -> torch.Tensor:
    """`sums * row_scales * scales + bias` in the columns of `out` `(rows, n)`; see `fp8_linear.scaled_sums`."""
    num_rows, size = out.shape
    block = min(triton.next_power_of_2(size), 2048)
    _scale_sums[(num_rows, triton.cdiv(size, block))](
        *(out, sums, row_scales, scales, out if bias is None else bias, sums.stride(0), size),
        HAS_BIAS=bias is not None,
        BLOCK=block,
        num_warps=4,
        **chained(out.device),
    )
    return out

"""Rows of an input in 8-bit floats, each with its scale, in one launch. The twin is in `kernels.fp8_linear`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained
from sensorium.kernels.native import rows_of

_LARGEST = tl.constexpr(448.0)
_SMALLEST_MAGNITUDE = tl.constexpr(2.0**-100)


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
    """One row: columns from `SIZE` on are zeros."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    await_predecessor(IS_CHAINED)
    wide = tl.load(x + row * x_stride + columns, mask=columns < SIZE, other=0.0).to(tl.float32)
    # Comparisons pass over NaN, so that numbers that are none are counted.
    is_finite = tl.sum((tl.abs(wide) < float("inf")).to(tl.int32), 0) == BLOCK
    wide = tl.where(is_finite, wide, 0.0)
    if HAS_SCALE:
        scale = tl.load(input_scale)
    else:
        scale = tl.div_rn(tl.maximum(tl.max(tl.abs(wide), 0), _SMALLEST_MAGNITUDE), _LARGEST)
    scaled = tl.minimum(tl.maximum(tl.div_rn(wide, tl.zeros([BLOCK], tl.float32) + scale), -_LARGEST), _LARGEST)
    tl.store(values + row * WIDTH + columns, scaled.to(values.dtype.element_ty), mask=columns < WIDTH)
    tl.store(scales + row, tl.where(is_finite, scale, float("nan")))


def quantize_fp8_rows(
    x: torch.Tensor, width: int, input_scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`(rows, width)` in 8-bit floats and `(rows, 1)` float32 scales; see `fp8_linear.quantize_fp8_rows`."""
    rows = rows_of(x)
    num_rows, size = rows.shape
    values = torch.empty(num_rows, width, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty(num_rows, 1, device=x.device)
    block = triton.next_power_of_2(max(width, 16))
    _quantize_rows[(num_rows,)](
        *(values, scales, rows, scales if input_scale is None else input_scale, rows.stride(0)),
        SIZE=size,
        WIDTH=width,
        BLOCK=block,
        HAS_SCALE=input_scale is not None,
        num_warps=min(max(block // 512, 4), 16),
        **chained(x.device),
    )
    return values, scales

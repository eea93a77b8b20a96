"""The greedy choice of a token in one launch. The twin is in `sensorium.kernels.argmax`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.native import rows_of

_BLOCK = 4096


@triton.jit
def _largest(ids, values, logits, stride, size, BLOCK: tl.constexpr):
    """One row, compared as integers in the order of the numbers, with NaN above all."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], -2147483648, tl.int32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, BLOCK):
        columns = start + lanes
        is_column = columns < size
        value = tl.load(logits + row * stride + columns, mask=is_column, other=0.0).to(tl.float32)
        value = tl.where(value == 0.0, 0.0, value)  # the two zeros are equal
        bits = value.to(tl.int32, bitcast=True)
        order = tl.where(value != value, 2147483647, bits ^ ((bits >> 31) & 2147483647))
        # The first of equal values stays.
        is_better = is_column & (order > best)
        best = tl.where(is_better, order, best)
        place = tl.where(is_better, columns, place)
    top = tl.max(best, 0)
    tl.store(ids + row, tl.min(tl.where(best == top, place, 2147483647), 0).to(tl.int64))
    # The order's function is its own inverse, and gives a NaN for that of NaN.
    tl.store(values + row, (top ^ ((top >> 31) & 2147483647)).to(tl.float32, bitcast=True))


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `argmax.largest_reference`."""
    rows = rows_of(logits)
    num_rows, size = rows.shape
    ids = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    values = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    if num_rows:
        _largest[(num_rows,)](ids, values, rows, rows.stride(0), size, BLOCK=_BLOCK, num_warps=16)
    return ids, values

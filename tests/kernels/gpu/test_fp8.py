"""Rows in 8-bit floats by the kernel: on a GPU the bits of the twin."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels import quantize_fp8_rows
from sensorium.kernels.gpu import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_scale", [None, 0.02])
@pytest.mark.parametrize(("size", "width"), [(1, 16), (44, 48), (3000, 3008)])
def test_rows_equal_the_twins(dtype: torch.dtype, input_scale: float | None, size: int, width: int) -> None:
    torch.manual_seed(size)
    x = torch.randn(7, size + 8, device=DEVICE).to(dtype)[:, :size]
    x[1] *= 1e-3
    x[2], x[3, 0], x[4, -1] = 0, torch.nan, torch.inf
    scale = None if input_scale is None else torch.tensor(input_scale, device=DEVICE)
    values, scales = fp8.quantize_fp8_rows(x, width, scale)
    want_values, want_scales = quantize_fp8_rows(x, scale)
    got, want = values[:, :size].float(), want_values.float()
    if DEVICE == "cuda":
        assert torch.equal(got, want)
    else:  # Triton's interpreter rounds differently from every device, and loses a carry into the exponent
        got = torch.where(want.abs().log2() % 1 == 0, want, got)
        torch.testing.assert_close(got, want, rtol=1 / 8, atol=2.0**-9)
    assert not values[:, size:].float().any()
    torch.testing.assert_close(scales, want_scales, rtol=0, atol=0, equal_nan=True)

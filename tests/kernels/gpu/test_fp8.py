"""Rows in 8-bit floats by the kernel: on a GPU the bits of the twin."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels import Fp8Weight, quantize_fp8_rows
from sensorium.kernels.fp8_linear import scaled_sums
from sensorium.kernels.gpu import fp8

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16, torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("input_scale", [None, 0.02])
@pytest.mark.parametrize(("size", "width"), [(1, 16), (44, 48), (3000, 3008), (9000, 9008), (8192, 8208)])
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("size", [5, 300, 5000])
def test_sums_are_scaled_as_the_twin_does(dtype: torch.dtype, has_bias: bool, size: int) -> None:
    torch.manual_seed(size)
    weight = Fp8Weight(*quantize_fp8_rows(torch.randn(size, 16)), dtype)
    sums, row_scales = torch.randn(3, size + 11), torch.rand(3, 1)
    row_scales[1] = torch.nan
    bias = torch.randn(size).to(dtype) if has_bias else None
    wide = weight.scales.shape[1]
    want = scaled_sums(torch.nn.functional.pad(sums[:, :size], (0, wide - size)), row_scales, weight, bias)
    on_device = [None if each is None else each.to(DEVICE) for each in (sums, row_scales, weight.scales, bias)]
    got = fp8.scaled_sums(*on_device, torch.empty(3, size, dtype=dtype, device=DEVICE))
    assert got[1].isnan().all()
    torch.testing.assert_close(got.cpu(), want, rtol=2e-3, atol=1e-6, equal_nan=True)

"""The product of few rows with a weight against torch's."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sensorium.kernels.gpu import linear

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(("size", "outputs"), [(8, 3), (100, 17), (2500, 6)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_few_rows(dtype: torch.dtype, rows: int, size: int, outputs: int, has_bias: bool) -> None:
    weight = torch.randn(outputs, size, device=DEVICE).to(dtype)
    x = torch.randn(rows, size + 8, device=DEVICE).to(dtype)[:, :size]
    bias = torch.randn(outputs, device=DEVICE).to(dtype) if has_bias else None
    assert linear.fits(x, weight, bias)
    want = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    got = linear.linear(x, weight, bias)
    assert got.dtype == dtype
    tolerance = 1e-3 if dtype == torch.float16 else 8e-3
    torch.testing.assert_close(got.double(), want, atol=tolerance * size**0.5 / 4, rtol=tolerance)


def test_what_the_kernel_leaves_to_others() -> None:
    weight = torch.randn(4, 8, dtype=torch.float16)
    rows = torch.randn(3, 8, dtype=torch.float16)
    assert linear.fits(rows[:2], weight, None)
    assert linear.fits(rows[0], weight, None)
    assert not linear.fits(rows, weight, None)  # too many
    assert not linear.fits(rows[:0], weight, None)
    large = torch.empty(70_000, 1000, dtype=torch.float16, device="meta")
    assert linear.fits(large[:1], large, None)
    assert not linear.fits(large[:2], large, None)
    assert not linear.fits(rows[:1].float(), weight, None)
    assert not linear.fits(rows[:1].float(), weight.float(), None)  # exact float32 is cuBLAS's
    assert not linear.fits(rows[:1], weight, torch.zeros(4))
    assert not linear.fits(rows[:1], weight.t().contiguous().t(), None)

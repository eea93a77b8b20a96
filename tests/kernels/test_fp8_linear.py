"""Products in 8-bit floats: what torch's instruction gives is what the twin says, for inputs of any size."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.kernels import FP8, Fp8Weight, dequantize_fp8, fp8_linear, fp8_refusal, quantize_fp8_rows
from sensorium.kernels.fp8_linear import LARGEST, fp8_linear_reference

SHAPES = [(1, 1), (16, 8), (33, 7), (64, 100), (5, 300)]


def weight_of(n: int, k: int, dtype: torch.dtype, input_scale: float | None = None) -> Fp8Weight:
    values, scales = quantize_fp8_rows(torch.randn(n, k))
    return Fp8Weight(values, scales, dtype, None if input_scale is None else torch.tensor(input_scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_scale", [None, 0.01])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_the_twin(dtype: torch.dtype, input_scale: float | None, n: int, k: int) -> None:
    torch.manual_seed(n)
    weight, bias, x = weight_of(n, k, dtype, input_scale), torch.randn(n).to(dtype), torch.randn(5, k).to(dtype)
    x[3] *= 1e-3
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    for added in (bias, None):
        want = fp8_linear_reference(x, weight, added)
        for rows in (0, 1, 2, 5):
            got = fp8_linear(x[:rows], weight, added)
            assert got.dtype == dtype
            torch.testing.assert_close(got, want[:rows], rtol=tolerance, atol=tolerance)


def test_rows_are_rounded_to_the_nearest() -> None:
    """Three bits of mantissa: each value is off by at most a sixteenth of itself, or half of the smallest step."""
    torch.manual_seed(0)
    x = torch.randn(50, 300) * torch.logspace(-8, 8, 50).unsqueeze(-1)
    values, scales = quantize_fp8_rows(x)
    assert values.dtype == FP8
    assert (values.float().abs().amax(-1) == LARGEST).all()
    error = (dequantize_fp8(values, scales, torch.float32) - x).abs()
    assert (error <= torch.maximum(x.abs() / 16, scales * 2.0**-10) * 1.0001).all()


def test_a_fixed_scale_bounds_what_is_larger() -> None:
    values, scales = quantize_fp8_rows(torch.tensor([[1.0, -3.0, 1e9, -1e9]]), torch.tensor([0.5]))
    assert values.float().tolist() == [[2.0, -6.0, LARGEST, -LARGEST]]
    assert scales.tolist() == [[0.5]]


def test_special_values_stay_in_their_row() -> None:
    torch.manual_seed(0)
    weight, x = weight_of(40, 30, torch.float32), torch.randn(9, 30)
    clean = fp8_linear(x, weight)
    x[1, 4], x[2, 29], x[4], x[5] = torch.nan, -torch.inf, 0, 1e-42
    for got in (fp8_linear(x, weight), fp8_linear_reference(x, weight)):
        assert got[1:3].isnan().all()
        assert not got[4:6].any()
        others = [0, 3, 6, 7, 8]
        torch.testing.assert_close(got[others], clean[others])


def test_shapes_and_strides() -> None:
    torch.manual_seed(0)
    weight = weight_of(20, 12, torch.float32)
    for x in (torch.randn(12), torch.randn(0, 12), torch.randn(2, 3, 12), torch.randn(5, 30)[:, 4:16]):
        torch.testing.assert_close(fp8_linear(x, weight), fp8_linear_reference(x, weight))


def test_the_error_is_that_of_four_bits() -> None:
    torch.manual_seed(0)
    plain, x = torch.randn(64, 300), torch.randn(20, 300)
    want = F.linear(x, plain)
    values, scales = quantize_fp8_rows(plain)
    error = fp8_linear(x, Fp8Weight(values, scales, torch.float32)) - want
    assert 0.01 < float(error.pow(2).mean().sqrt() / want.std()) < 0.05


def test_mismatches_are_refused() -> None:
    weight = weight_of(8, 4, torch.float32)
    for x in (torch.randn(2, 5), torch.randn(2, 4).to(torch.bfloat16)):
        with pytest.raises(ModelError, match=r"expected torch.float32 of shape \(..., 4\) on cpu"):
            fp8_linear(x, weight)


@pytest.mark.parametrize(("capability", "refusal"), [((9, 0), None), ((8, 9), None), ((8, 6), "capability 8.6")])
def test_which_devices_multiply(
    capability: tuple[int, int], refusal: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    reason = fp8_refusal(torch.device("cuda"))
    assert (reason is None) == (refusal is None)
    assert (refusal or "") in (reason or "")
    assert fp8_refusal(torch.device("cpu"))

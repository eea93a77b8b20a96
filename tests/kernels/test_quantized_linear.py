"""Linear layers in int8: the same bits by every instruction set, for every number of rows, as by plain torch."""

from __future__ import annotations

import ctypes
import platform
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.kernels import QuantizedWeight, build, native, quantize, quantized_linear
from sensorium.kernels.quantized_linear import (
    MAX_QUANTIZED_INPUTS,
    quantize_rows,
    quantized_linear_reference,
)

SHAPES = [(1, 1), (16, 8), (33, 7), (64, 896), (100, 1500), (5, 4864)]
ROWS = [1, 2, 3, 4, 5, 8, 9, 16, 17, 31, 50, 193, 530]

native_only = pytest.mark.usefixtures("native_kernels")


def plainly_quantized(weight: torch.Tensor) -> QuantizedWeight:
    """A weight for the twin."""
    integers, scales = quantize_rows(weight)
    return QuantizedWeight(*weight.shape, weight.dtype, integers=integers, scales=scales)


@native_only
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_the_twin_bit_for_bit(dtype: torch.dtype, n: int, k: int, tiles: bool, num_threads: int) -> None:
    torch.manual_seed(n)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    x = torch.randn(max(ROWS), k).to(dtype)
    x[3] *= 1e-3
    quantized, plain = quantize(weight), plainly_quantized(weight)
    for added in (bias, None):
        want = quantized_linear_reference(x, plain, added)
        for rows in ROWS:
            assert torch.equal(quantized_linear(x[:rows], quantized, added), want[:rows]), rows


INSTRUCTION_SETS = {
    "vectors of 8": ["-DVL=8", "-DTILES=0"],
    "vectors of 8 without dot products": ["-DVL=8", "-DTILES=0", "-mno-avxvnni", "-mno-avx512vnni"],
    "vectors of 16 without dot products": ["-DTILES=0", "-mno-avx512vnni", "-mno-avxvnni"],
    "no vector instructions": ["-DVL=8", "-DTILES=0", "-mno-avx2", "-Wno-psabi"],
    "emulated tiles": ["-DVL=16", "-DBF16_PAIRS=1", "-DTILES=2", "-Wno-psabi"],
}


@pytest.fixture(scope="module", params=INSTRUCTION_SETS)
def lesser_machine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The kernels of this module as another machine would compile them."""
    reason = native.native_refusal()
    if reason is not None or platform.machine() != "x86_64":
        pytest.skip(f"other instruction sets are tried on x86-64 with a compiler: {reason or platform.machine()}")
    path: Path = tmp_path_factory.mktemp("quantized") / "kernels.so"
    names = ("quantized_linear", "quantized_pack", "pool", "workspace", "tiles")
    sources = [build.SOURCE_FOLDER / f"{name}.c" for name in names]
    build.compile_sources(sources, path, ["-O1", *INSTRUCTION_SETS[request.param]])
    library, functions = ctypes.CDLL(str(path)), SimpleNamespace()
    native.add_quantized_functions(functions, library)
    library.sensorium_use_tiles(1)
    return functions


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_instruction_set_gives_the_same_bits(
    dtype: torch.dtype, lesser_machine: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_load", lambda: (lesser_machine, None))
    torch.manual_seed(0)
    for n, k in ((40, 100), (70, 900)):
        weight, bias, x = (torch.randn(shape).to(dtype) for shape in ((n, k), (n,), (40, k)))
        want = quantized_linear_reference(x, plainly_quantized(weight), bias)
        quantized = quantize(weight)
        for rows in (1, 2, 3, 7, 20, 40):
            assert torch.equal(quantized_linear(x[:rows], quantized, bias), want[:rows]), rows


@native_only
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_are_exact(sign: int, tiles: bool) -> None:
    """Nothing saturates or overflows, whatever is added on the way to meet the instructions' wishes."""
    weight = torch.full((3, MAX_QUANTIZED_INPUTS), float(sign))
    got = quantized_linear(torch.ones(6, MAX_QUANTIZED_INPUTS), quantize(weight))
    torch.testing.assert_close(got, torch.full((6, 3), float(sign * MAX_QUANTIZED_INPUTS)), rtol=1e-6, atol=0)


def test_the_error_is_that_of_eight_bits() -> None:
    """Each value is off by at most half a step of its row."""
    torch.manual_seed(0)
    weight, x = torch.randn(64, 300), torch.randn(20, 300)
    exact = x.double() @ weight.double().T
    steps = weight.abs().amax(-1) / 127, x.abs().amax(-1, keepdim=True) / 127
    bound = 0.5 * (
        x.abs().sum(-1, keepdim=True) * steps[0] + steps[1] * weight.abs().sum(-1) + 300 * steps[0] * steps[1]
    )
    error = (quantized_linear(x, quantize(weight)).double() - exact).abs()
    assert (error <= bound).all()
    assert error.pow(2).mean() / exact.pow(2).mean() < 0.015**2


@native_only
def test_special_values_stay_in_their_row(tiles: bool) -> None:
    """A number that is none makes its whole row so; zeros and the smallest numbers are nothing special."""
    torch.manual_seed(0)
    weight, bias, x = torch.randn(40, 30), torch.randn(40), torch.randn(9, 30)
    quantized = quantize(weight)
    clean = quantized_linear(x, quantized, bias)
    x[1, 4], x[2, 29], x[4], x[5] = torch.nan, -torch.inf, 0, 1e-42
    got = quantized_linear(x, quantized, bias)
    assert got[1:3].isnan().all()
    assert torch.equal(got[4:6], bias.expand(2, -1))
    others = [0, 3, 6, 7, 8]
    assert torch.equal(got[others], clean[others])
    assert torch.equal(got.nan_to_num(), quantized_linear_reference(x, plainly_quantized(weight), bias).nan_to_num())


@native_only
def test_shapes_and_strides() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(20, 12), torch.randn(40)[::2]
    quantized, plain = quantize(weight), plainly_quantized(weight)
    for x in (torch.randn(12), torch.randn(0, 12), torch.randn(2, 3, 12), torch.randn(5, 30)[:, 4:16]):
        before = x.clone()
        assert torch.equal(quantized_linear(x, quantized, bias), quantized_linear_reference(x, plain, bias))
        assert torch.equal(x, before)
    for view in (torch.randn(12, 20).T, torch.randn(20, 24)[:, ::2], torch.randn(40, 12)[::2]):
        x = torch.randn(3, 12)
        assert torch.equal(quantized_linear(x, quantize(view)), quantized_linear_reference(x, plainly_quantized(view)))


@native_only
def test_it_takes_a_byte_per_weight() -> None:
    weight = torch.randn(512, 1024)
    [held] = quantize(weight).tensors().values()
    assert held.untyped_storage().nbytes() == weight.numel() + 512 * 8  # a scale and a correction per row


def test_mismatches_are_refused() -> None:
    quantized = quantize(torch.randn(8, 4))
    for x in (torch.randn(2, 5), torch.randn(2, 4).to(torch.bfloat16)):
        with pytest.raises(ModelError, match=r"expected torch.float32 of shape \(..., 4\)"):
            quantized_linear(x, quantized)
    with pytest.raises(ModelError, match=f"got {MAX_QUANTIZED_INPUTS + 1}, expected at most"):
        quantize(torch.zeros(1, MAX_QUANTIZED_INPUTS + 1))


def test_twin_without_native(without_native: None) -> None:
    torch.manual_seed(0)
    weight, bias, x = torch.randn(8, 2000), torch.randn(8), torch.randn(2, 3, 2000)
    quantized = quantize(weight)
    assert quantized.panels is None
    integers, scales = quantize_rows(x.reshape(6, -1))
    assert quantized.integers is not None
    assert quantized.scales is not None
    sums = integers.long() @ quantized.integers.long().T
    want = (sums * scales.double()[:, None] * quantized.scales.double() + bias).reshape(2, 3, 8)
    torch.testing.assert_close(quantized_linear(x, quantized, bias).double(), want, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(want.float(), F.linear(x, weight, bias), rtol=0.05, atol=3)

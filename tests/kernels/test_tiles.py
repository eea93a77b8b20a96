"""Products by matrix tiles: their order of summation, which the emulation shares with the instruction."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sensorium.kernels import build, native, pack, packed_linear

pytestmark = pytest.mark.usefixtures("native_kernels")


@pytest.fixture(scope="module")
def emulation(tmp_path_factory: pytest.TempPathFactory) -> native.NativeLibrary:
    """The kernels with emulated tiles, which run on any machine."""
    path: Path = tmp_path_factory.mktemp("tiles") / "kernels.so"
    sources = sorted(build.SOURCE_FOLDER.glob("*.c"))
    build.compile_sources(sources, path, ["-O1", "-DVL=16", "-DBF16_PAIRS=1", "-DTILES=2", "-Wno-psabi"])
    return native.NativeLibrary(path)


def in_order_of_tiles(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`x @ weight.T` in float32: of every 32 products the even and the odd ones are summed apart from zero, the two
    sums added, and that added to the total. A product is exact in float64, so that rounding its sum with a float32 to
    float32 is what a fused multiply-add does."""
    total = torch.zeros(len(x), len(weight))
    for begin in range(0, x.shape[1], 32):
        parts = torch.zeros(2, len(x), len(weight))
        for k in range(begin, min(begin + 32, x.shape[1])):
            products = x[:, k, None].double() * weight[:, k].double()
            parts[k % 2] = (parts[k % 2].double() + products).float()
        total += parts[0] + parts[1]
    return total


@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 33, 31), (16, 32, 64), (17, 40, 100), (50, 70, 900)])
def test_order_of_summation(
    m: int, n: int, k: int, emulation: native.NativeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the last bit, by emulation and, where the machine has them, by its tiles."""
    torch.manual_seed(k)
    x, weight = torch.randn(m, k).bfloat16(), torch.randn(n, k).bfloat16()
    want = in_order_of_tiles(x, weight).bfloat16()
    machine = native.native_library()
    assert machine is not None
    assert emulation.use_tiles(True)
    for library in (emulation, machine) if machine.use_tiles(True) else (emulation,):
        monkeypatch.setattr(native, "_load", lambda library=library: (library, None))
        assert torch.equal(packed_linear(x, pack(weight)), want)


def test_switched_off_the_same_weights_serve(emulation: native.NativeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system refuses tiles, vectors read the layout that was made for them."""
    monkeypatch.setattr(native, "_load", lambda: (emulation, None))
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((20, 70), (50, 70), (50,)))
    packed = pack(weight)
    try:
        by_tiles = packed_linear(x, packed, bias)
        assert not emulation.use_tiles(False)
        by_vectors = packed_linear(x, packed, bias)
    finally:
        emulation.use_tiles(True)
    want = x.double() @ weight.double().T + bias.double()
    for got in (by_tiles, by_vectors):
        torch.testing.assert_close(got.double(), want, atol=2e-2, rtol=1e-2)
    assert torch.equal(packed_linear(x, packed, bias), by_tiles)

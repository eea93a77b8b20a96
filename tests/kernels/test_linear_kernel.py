"""The packed linear layer: accuracy, rounding, and rows that don't depend on their neighbours."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.kernels import linear, pack, packed_linear

pytestmark = pytest.mark.usefixtures("native_kernels")

SHAPES = [(1, 1), (16, 8), (33, 7), (64, 896), (100, 1500), (5, 4864)]
ROWS = [1, 2, 3, 4, 5, 6, 7, 12, 13, 16, 64, 193, 400]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_equals_the_product_rounded_once(dtype: torch.dtype, n: int, k: int, tiles: bool) -> None:
    """In float64 the product is exact enough to say what one rounding of it is."""
    torch.manual_seed(n)
    weight, bias = torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    x = torch.randn(max(ROWS), k).to(dtype)
    packed = pack(weight)
    whole = packed_linear(x, packed, bias)
    exact = x.double() @ weight.double().T + bias.double()
    # The float32 sum's error is relative to the terms, not to what is left of them after cancellation.
    float32_error = 3e-7 * (x.double().abs() @ weight.double().abs().T + 1)
    rounding = 0.5 * torch.finfo(dtype).eps * exact.abs() if dtype != torch.float32 else 0
    assert ((whole.double() - exact).abs() <= float32_error + rounding).all()
    for rows in ROWS:
        assert torch.equal(packed_linear(x[:rows], packed, bias), whole[:rows]), rows
    assert torch.equal(packed_linear(x[5:6], packed, bias), whole[5:6])


def test_float32_is_within_1e_5_of_torch() -> None:
    torch.manual_seed(0)
    for n, k in ((1152, 896), (896, 4864)):
        weight, x = torch.randn(n, k) / k**0.5, torch.randn(40, k)
        torch.testing.assert_close(packed_linear(x, pack(weight)), F.linear(x, weight), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_do_not_change_the_result(dtype: torch.dtype, num_threads: int, tiles: bool) -> None:
    """Also where there are so few columns that rows are shared out too."""
    torch.manual_seed(0)
    for n, k, rows in ((24, 600, 300), (300, 64, 3), (1000, 40, 70)):
        weight, x = torch.randn(n, k).to(dtype), torch.randn(rows, k).to(dtype)
        packed = pack(weight)
        alone = torch.cat([packed_linear(row[None], packed) for row in x])
        assert torch.equal(packed_linear(x, packed), alone)


def test_shapes_and_strides() -> None:
    torch.manual_seed(0)
    weight, bias = torch.randn(20, 12), torch.randn(40)[::2]
    packed = pack(weight)
    assert (packed.out_features, packed.in_features, packed.dtype) == (20, 12, torch.float32)
    for x in (
        torch.randn(12),
        torch.randn(0, 12),
        torch.randn(2, 3, 12),
        torch.randn(5, 30)[:, 4:16],
        torch.randn(12, 5).T,
    ):
        before = x.clone()
        torch.testing.assert_close(packed_linear(x, packed, bias), F.linear(x, weight, bias))
        assert torch.equal(x, before)
    for view in (torch.randn(12, 20).T, torch.randn(20, 24)[:, ::2], torch.randn(40, 12)[::2]):
        x = torch.randn(3, 12)
        torch.testing.assert_close(packed_linear(x, pack(view)), F.linear(x, view))


def test_special_values_stay_in_their_row(tiles: bool) -> None:
    weight = torch.randn(40, 30).to(torch.bfloat16)
    x = torch.randn(3, 30).to(torch.bfloat16)
    clean = packed_linear(x, pack(weight))
    x[1, 4] = torch.nan
    got = packed_linear(x, pack(weight))
    assert torch.equal(got[[0, 2]], clean[[0, 2]])
    assert got[1].isnan().all()


def test_later_changes_of_the_weight_are_not_seen() -> None:
    weight, x = torch.randn(8, 8), torch.randn(1, 8)
    packed = pack(weight)
    want = packed_linear(x, packed)
    weight.zero_()
    assert torch.equal(packed_linear(x, packed), want)


def test_mismatches_are_refused() -> None:
    packed = pack(torch.randn(8, 4))
    for x in (torch.randn(2, 5), torch.randn(2, 4).to(torch.bfloat16)):
        with pytest.raises(ModelError, match=r"expected torch.float32 of shape \(..., 4\)"):
            packed_linear(x, packed)


def test_arena_gives_memory_back() -> None:
    """A mapping lives exactly as long as a weight in it, and pieces don't overlap."""
    arena = linear._Arena()
    pieces = [arena.take(n) for n in (1, 5000, 1 << 20)]
    for i, piece in enumerate(pieces):
        piece.fill_(i + 1)
    assert [int(piece.min()) for piece in pieces] == [1, 2, 3]
    assert all(piece.data_ptr() % 64 == 0 for piece in pieces)
    mapping = weakref.ref(pieces[0].untyped_storage())
    big = arena.take(arena.CHUNK_BYTES + 1)
    assert big.numel() == arena.CHUNK_BYTES + 1
    del pieces, piece
    gc.collect()
    assert mapping() is None


def test_twin_without_native(without_native: None) -> None:
    weight, bias, x = torch.randn(8, 4), torch.randn(8), torch.randn(2, 3, 4)
    packed = pack(weight)
    assert packed.panels is None
    assert torch.equal(packed_linear(x, packed, bias), F.linear(x, weight, bias))

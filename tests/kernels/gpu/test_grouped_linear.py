"""Products of sorted rows with their groups' weights against the twin."""

from __future__ import annotations

import pytest
import torch

from sensorium.kernels.gpu import grouped_linear as gpu
from sensorium.kernels.grouped_linear import RowGroups, grouped_linear_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16] if DEVICE == "cuda" else [torch.float32, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SHAPES = {
    "one row": [1],
    "the first and the last group": [3, 0, 0, 2],
    "more groups than a power of two": [0, 1, 0, 5, 1],
    "many rows, tiles that are full and not": [64, 0, 65, 130],
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("counts", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_every_group_has_its_weight(dtype: torch.dtype, counts: list[int], has_bias: bool) -> None:
    num_groups, size, num_outputs = len(counts), 50, 70
    ids = torch.arange(num_groups, device=DEVICE).repeat_interleave(torch.tensor(counts, device=DEVICE))
    groups = RowGroups.of_sorted(ids, num_groups)
    x = torch.randn(len(ids), size + 6, device=DEVICE).to(dtype)[:, :size]  # rows of a wider tensor
    weight = torch.randn(num_groups, num_outputs, size, device=DEVICE).to(dtype) / size**0.5
    bias = torch.randn(num_groups, num_outputs, device=DEVICE).to(dtype) if has_bias else None
    got = gpu.grouped_linear(x, weight, groups.ends, bias)
    want = grouped_linear_reference(x, weight, groups, bias)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_no_rows() -> None:
    groups = RowGroups.of_sorted(torch.empty(0, dtype=torch.int64, device=DEVICE), 3)
    weight = torch.randn(3, 4, 5, device=DEVICE)
    assert gpu.grouped_linear(torch.empty(0, 5, device=DEVICE), weight, groups.ends).shape == (0, 4)


@pytest.mark.parametrize("num_rows", [1, 8, 100, 5000])
@pytest.mark.parametrize("num_groups", [1, 5, 128])
def test_there_are_programs_for_every_division_of_the_rows(num_rows: int, num_groups: int) -> None:
    """The worst is a row more than full tiles in as many groups as can be."""
    block = gpu.grouped_config(num_rows, num_groups, 2).block_m
    sizes, rest = [], num_rows
    for group in range(num_groups):
        sizes.append(min(rest, 1 if group < num_groups - 1 else rest))
        rest -= sizes[-1]
    needed = sum(-(-size // block) for size in sizes)
    assert needed <= gpu.most_tiles(num_rows, num_groups, block)

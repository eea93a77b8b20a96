"""A linear layer with one weight per group of rows, as a mixture of experts has: rows sorted by group, one call."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch.nn import functional as F

from sensorium.kernels.gpu import on_gpu


@dataclass(frozen=True, slots=True, eq=False)
class RowGroups:
    """The groups of rows that are sorted by group.

    For example, with 4 groups, rows of the groups `[0, 0, 2]` have the ends `[2, 2, 3, 3]`.
    """

    ends: torch.Tensor
    """`(num_groups,)` int32: where each group's rows end, and the next group's begin."""

    @classmethod
    def of_sorted(cls, group_ids: torch.Tensor, num_groups: int) -> RowGroups:
        """The groups of rows with the ascending group ids `(num_rows,)`. Doesn't wait for the device."""
        groups = torch.arange(num_groups, device=group_ids.device, dtype=group_ids.dtype)
        return cls(torch.searchsorted(group_ids, groups, right=True, out_int32=True))

    def present(self) -> list[tuple[int, int, int]]:
        """For each group with rows: its index, and where its rows begin and end. Waits for the device."""
        ends = self.ends.tolist()
        pairs = enumerate(pairwise([0, *ends]))
        return [(group, begin, end) for group, (begin, end) in pairs if begin < end]


def grouped_linear_reference(
    x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x[i] @ weight[g].T + bias[g]` for each row `i`, where `g` is its group; summed in float32 and rounded once.

    Args:
        x: `(num_rows, in_features)`, sorted by group.
        weight: `(num_groups, out_features, in_features)` of the same dtype.
        groups: The rows' groups.
        bias: `(num_groups, out_features)` of the same dtype.

    Returns:
        `(num_rows, out_features)`.
    """
    out = x.new_empty(len(x), weight.shape[1])
    for group, begin, end in groups.present():
        out[begin:end] = F.linear(x[begin:end], weight[group], None if bias is None else bias[group])
    return out


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, groups: RowGroups, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """See `grouped_linear_reference`. On a GPU nothing waits for the device."""
    if on_gpu(x):
        from sensorium.kernels.gpu.grouped_linear import grouped_linear as on_device

        return on_device(x, weight, groups.ends, bias)
    return grouped_linear_reference(x, weight, groups, bias)

"""Matrix multiplication with a weight that is laid out once, after loading, for the machine that it runs on."""

from __future__ import annotations

import torch
from torch.nn import functional as F


class PackedWeight:
    """A linear layer's weight `(out_features, in_features)` in the layout that `packed_linear` is fastest with."""

    __slots__ = ("dtype", "in_features", "out_features", "plain")

    def __init__(self, weight: torch.Tensor) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        self.plain: torch.Tensor = weight


def pack(weight: torch.Tensor) -> PackedWeight:
    """Lay out a weight `(out_features, in_features)`; later changes to `weight` are not seen."""
    return PackedWeight(weight.detach())


def packed_linear_reference(
    x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`x @ weight.T + bias` for `x` `(..., in_features)`; accumulated in float32 and rounded once."""
    return F.linear(x, packed.plain, bias)


packed_linear = packed_linear_reference

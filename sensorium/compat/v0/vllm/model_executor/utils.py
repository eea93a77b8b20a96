"""Helpers of layers that a file writes itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

__all__ = ["set_random_seed", "set_weight_attrs"]


def set_weight_attrs(weight: torch.Tensor, weight_attrs: Mapping[str, Any] | None) -> None:
    """Give a parameter what its loaders look for on it, such as a `weight_loader`; nothing that it has already.

    Raises:
        AssertionError: It has one of them.
    """
    for name, value in (weight_attrs or {}).items():
        assert not hasattr(weight, name), f"the parameter has {name!r} already"
        setattr(weight, name, value)


def set_random_seed(seed: int) -> None:
    """Seed torch's generators."""
    torch.manual_seed(seed)

"""Tensors that are as far away as a GPU's: what needs their values on the host fails."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

_READS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("tolist", "item", "numpy", "__bool__", "__int__", "__float__", "__index__", "nonzero", "cpu")
)


class FarTensor(torch.Tensor):
    """A tensor of the host that may not be looked at from Python. What is computed from it may not be, either."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        assert func not in _READS, f"{func.__name__} waits for the device"
        return super().__torch_function__(func, types, args, kwargs or {})


def put_far(value: Any) -> Any:
    """A tensor, or each of a list of them, as `FarTensor`."""
    if isinstance(value, list | tuple):
        return [put_far(each) for each in value]
    return value.as_subclass(FarTensor) if isinstance(value, torch.Tensor) else value

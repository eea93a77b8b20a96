"""Mapped media of several items as the keyword arguments of one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sensorium.multimodal import MultiModalKwargs


def batch_kwargs(items: Sequence[Mapping[str, Any]], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Batch items by the rules of `MultiModalKwargs.batch`; every leaf gets a leading batch axis.

    Floating-point leaves are cast to the model's dtype: Hugging Face processors return float32 whatever the weights
    are, and a convolution over bfloat16 weights would refuse that.
    """
    batched = MultiModalKwargs.batch([MultiModalKwargs(item) for item in items])
    moved = MultiModalKwargs.as_kwargs(batched, device=device)
    return {name: _cast(value, dtype) for name, value in moved.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return [_cast(each, dtype) for each in value]
    return value

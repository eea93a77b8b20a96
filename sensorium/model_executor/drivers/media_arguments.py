"""What goes with several items in one call: their mapped media as keyword arguments, and the maps of where their rows
stand, for models that merge by map instead of by token id.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch

from sensorium.messages import MediaItem
from sensorium.multimodal import MultiModalKwargs
from sensorium.multimodal.placeholder_map import IndexMap


def kwargs_of_items(items: Iterable[MediaItem], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """The arguments of one call with these items, batched by modality in the order of the items."""
    by_modality: dict[str, list[Mapping[str, Any]]] = {}
    for item in items:
        by_modality.setdefault(item.modality, []).append(item.kwargs or {})
    batches = [batch_kwargs(members, device, dtype) for members in by_modality.values()]
    return {name: value for batch in batches for name, value in batch.items()}


def batch_kwargs(
    items: Sequence[Mapping[str, Any]], device: torch.device, dtype: torch.dtype, on_host: Collection[str] = ()
) -> dict[str, Any]:
    """Batch items by the rules of `MultiModalKwargs.batch`; every leaf gets a leading batch axis.

    Floating-point leaves are cast to the model's dtype: Hugging Face processors return float32 whatever the weights
    are, and a convolution over bfloat16 weights would refuse that.

    Args:
        items: The mapped media of each item.
        device: Where leaves go.
        dtype: The model's.
        on_host: Names of arguments that stay where they are.
    """
    batched = MultiModalKwargs.batch([MultiModalKwargs(item) for item in items])
    there = {name: value for name, value in batched.items() if name not in on_host}
    moved = {**batched, **MultiModalKwargs.as_kwargs(MultiModalKwargs(there), device=device)}
    return {name: _cast(value, dtype) for name, value in moved.items()}


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, torch.Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if isinstance(value, list | tuple):
        return [_cast(each, dtype) for each in value]
    return value


def index_maps(media: Sequence[MediaItem], start: int = 0) -> dict[str, IndexMap]:
    """Per modality, the map of whole items in a batch whose first row is position `start` of the prompt."""
    src: dict[str, list[int]] = {}
    dest: dict[str, list[int]] = {}
    for item in media:
        sources = src.setdefault(item.modality, [])
        sources.extend(range(len(sources), len(sources) + item.span.num_rows))
        dest.setdefault(item.modality, []).extend((item.span.positions() - start).tolist())
    return {name: IndexMap(src=src[name], dest=dest[name]) for name in src}

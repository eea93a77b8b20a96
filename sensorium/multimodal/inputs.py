"""Types of media data and of what mappers make of it, and the batching of the latter.

No torch at import: `MultiModalKwargs` loads it when it batches.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict, TypeVar

import numpy as np

from sensorium.errors import ModelError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

T = TypeVar("T")

MultiModalData: TypeAlias = T | list[T]
"""One item of a modality, or a list of them."""

ImageItem: TypeAlias = "Image | np.ndarray[Any, Any] | torch.Tensor"
"""A picture, or its embeddings `(feature_size, hidden_size)`."""

VideoItem: TypeAlias = (
    "list[Image] | np.ndarray[Any, Any] | torch.Tensor | list[np.ndarray[Any, Any]] | list[torch.Tensor]"
)
"""Frames, `(num_frames, height, width, 3)`, or embeddings."""

AudioItem: TypeAlias = "np.ndarray[Any, Any] | list[float] | tuple[np.ndarray[Any, Any], float]"
"""Samples `(num_samples,)`, with their rate in Hz where it isn't the model's own."""


class MultiModalDataBuiltins(TypedDict, total=False):
    """Media of the modalities that have a built-in plugin."""

    image: MultiModalData[ImageItem]
    video: MultiModalData[VideoItem]
    audio: MultiModalData[AudioItem]


MultiModalDataDict: TypeAlias = Mapping[str, Any]
"""Media by modality: `MultiModalDataBuiltins`, and any other name that has a plugin."""


class PlaceholderRange(TypedDict):
    """Where the placeholder tokens of one item stand, counted in the expanded prompt."""

    offset: int
    length: int


MultiModalPlaceholderDict: TypeAlias = Mapping[str, Sequence[PlaceholderRange]]
"""For each modality, the range of each of its items."""

NestedTensors: TypeAlias = "torch.Tensor | Sequence[NestedTensors]"
"""A tensor, or nested lists of tensors whose shapes differ."""

BatchedTensorInputs: TypeAlias = "dict[str, NestedTensors]"
"""Keyword arguments of a batch."""


class MultiModalKwargs(UserDict[str, Any]):
    """What a mapper returns: keyword arguments for the model's `forward`.

    A value is a tensor, an array, a number, or nested lists and tuples of these.
    """

    @staticmethod
    def batch(inputs_list: Iterable[Mapping[str, Any]]) -> BatchedTensorInputs:
        """Join the keyword arguments of several prompts.

        For each key, the values of the entries that have it are put in a list, in order, and the list is stacked
        from the inside out wherever all its members are tensors of one shape. So a batch axis always appears in
        front: one entry of shape `(1, 2)` becomes `(1, 1, 2)`. Entries `[a, b]` and `[c]` of equal shape `(1, 2, 3)`
        become the list of a `(2, 1, 2, 3)` and a `(1, 1, 2, 3)` tensor. `flatten_bn` undoes it.
        """
        values: dict[str, list[Any]] = {}
        for inputs in inputs_list:
            for key, value in inputs.items():
                values.setdefault(key, []).append(value)
        return {key: _stack(items) for key, items in values.items()}

    @staticmethod
    def as_kwargs(batch_inputs: Mapping[str, Any], *, device: torch.types.Device) -> BatchedTensorInputs:
        """Move every tensor of a batch to `device`, without waiting for the copy."""
        return {key: _to_device(value, device) for key, value in batch_inputs.items()}


MultiModalInputs = MultiModalKwargs
"""`MultiModalKwargs` under its older name."""


class MultiModalInputsV2(TypedDict):
    """Inputs made by a merged processor, which expands the prompt and maps the media in one go."""

    type: Literal["multimodal"]
    prompt: str
    prompt_token_ids: list[int]
    token_type_ids: NotRequired[list[int]]
    mm_kwargs: MultiModalKwargs
    mm_hashes: NotRequired[list[str]]
    mm_placeholders: MultiModalPlaceholderDict


def as_tensor(leaf: Any) -> torch.Tensor:
    """A tensor from a leaf of mapped keyword arguments: a tensor itself, an array, or a number.

    Raises `ModelError` (a `TypeError`) for anything else.
    """
    import torch

    if isinstance(leaf, torch.Tensor):
        return leaf
    if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "biuf":
        # torch shares memory only with writable arrays of positive strides
        shareable = leaf.flags.writeable and leaf.flags.c_contiguous and leaf.dtype.isnative
        return torch.from_numpy(leaf if shareable else np.array(leaf, dtype=leaf.dtype.newbyteorder("=")))
    if isinstance(leaf, int | float | np.number | np.bool_):
        return torch.tensor(leaf)
    what = f"an array of {leaf.dtype}" if isinstance(leaf, np.ndarray) else f"{type(leaf).__name__}"
    raise ModelError(f"Mapped keyword argument: got {what}, expected a tensor, a numeric array or a number.")


def check_leaves(kwargs: Mapping[str, Any], mapper_name: str) -> None:
    """Refuse values that could not be batched and moved to a device; `ModelError` (a `TypeError`) names the key."""
    for key, value in kwargs.items():
        for leaf in iter_leaves(value):
            if not _is_leaf(leaf):
                raise ModelError(
                    f"Input mapper {mapper_name}: got {type(leaf).__name__} in {key!r}, expected tensors, numeric "
                    f"arrays or numbers, or lists of them. Convert it in the mapper, or leave the key out."
                )


def iter_leaves(value: Any) -> Iterable[Any]:
    """The leaves of nested lists and tuples, in order."""
    if isinstance(value, list | tuple):
        for item in value:
            yield from iter_leaves(item)
    else:
        yield value


def _is_leaf(leaf: object) -> bool:
    if isinstance(leaf, np.ndarray):
        return leaf.dtype.kind in "biuf"
    if isinstance(leaf, int | float | np.number | np.bool_):
        return True
    import torch

    return isinstance(leaf, torch.Tensor)


def _stack(value: Any) -> NestedTensors:
    import torch

    if not isinstance(value, list | tuple):
        return as_tensor(value)
    items = [_stack(item) for item in value]
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    if not items or len(tensors) < len(items) or any(t.shape != tensors[0].shape for t in tensors):
        return items
    return torch.stack(tensors)


def _to_device(value: Any, device: torch.types.Device) -> NestedTensors:
    if isinstance(value, list | tuple):
        return [_to_device(item, device) for item in value]
    import torch

    tensor: torch.Tensor = value
    if tensor.device.type == "cpu" and torch.device(device or "cpu").type == "cuda":
        tensor = tensor.pin_memory()  # from other memory, the host waits for the copy and all work before it
    return tensor.to(device, non_blocking=True)


def each_item(value: Any, item_dims: int) -> list[torch.Tensor]:
    """Tensors of `item_dims` axes, of whatever sizes, in the order in which they are nested or stacked."""
    import torch

    if isinstance(value, torch.Tensor):
        return list(value.reshape(-1, *value.shape[value.dim() - item_dims :]))
    return [item for each in value for item in each_item(each, item_dims)]

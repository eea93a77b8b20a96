"""What the multimodal model files share: placeholders in token space, given embeddings, sub-configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sensorium.config import EngineConfig
from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.inputs.admission import check_length
from sensorium.multimodal import PlaceholderRange

if TYPE_CHECKING:
    import torch


def language_config(config: EngineConfig) -> EngineConfig:
    """The configuration of a multimodal model's decoder. That its head is tied may stand in the whole's config."""
    whole = config.model_config.hf_config
    text = copy.copy(whole.get_text_config())
    text.tie_word_embeddings = any(getattr(each, "tie_word_embeddings", False) for each in (whole, text))
    return config.with_hf_config(text)


def as_items(data: Any) -> list[Any]:
    """A modality's data as a list of items; anything but a list is one item."""
    return data if isinstance(data, list) else [data]


def expand_placeholders(
    token_ids: Sequence[int],
    row_counts: Mapping[int, Sequence[int]],
    names: Mapping[int, str],
    max_model_len: int,
) -> tuple[list[int], dict[int, list[PlaceholderRange]]]:
    """Replace the k-th occurrence of each placeholder token by as many as its item has rows.

    A prompt that comes with all its placeholders already (as many as there are rows) is left as it is. For
    example, with counts `{9: [2, 3]}`, `[1, 9, 5, 9]` becomes `[1, 9, 9, 5, 9, 9, 9]` with the ranges (1, 2)
    and (4, 3).

    Args:
        token_ids: The prompt.
        row_counts: Placeholder token id to the number of rows of each item.
        names: Placeholder token id to the modality's name, for error messages.
        max_model_len: Nothing is expanded beyond this, however many rows are asked for.

    Raises:
        InvalidRequestError: The number of placeholders fits neither the items nor their rows, or the prompt would be
            too long.
    """
    pending = {}
    num_text = sum(1 for token_id in token_ids if token_id not in row_counts)
    rows = {names[token_id]: counts for token_id, counts in row_counts.items()}
    check_length(num_text + sum(map(sum, row_counts.values())), rows, max_model_len, pooling=True)
    for token_id, counts in row_counts.items():
        found = sum(1 for each in token_ids if each == token_id)
        if found == len(counts):
            pending[token_id] = [(count, 1) for count in counts]
        elif found == sum(counts):
            pending[token_id] = [(count, count) for count in counts]
        else:
            raise InvalidRequestError(
                f"{names[token_id]} placeholders in the prompt: got {found}, expected {len(counts)}, one "
                "for each "
                f"item (or {sum(counts)} already expanded). Put a placeholder where each item stands."
            )
        pending[token_id].reverse()
    expanded: list[int] = []
    ranges: dict[int, list[PlaceholderRange]] = {token_id: [] for token_id in row_counts}
    position = 0
    while position < len(token_ids):
        token_id = token_ids[position]
        if token_id not in pending:
            expanded.append(token_id)
            position += 1
            continue
        num_rows, width = pending[token_id].pop()
        if any(each != token_id for each in token_ids[position : position + width]):
            raise InvalidRequestError(
                f"{names[token_id]} placeholders in the prompt: got a run shorter than {width} tokens, "
                "expected the "
                "rows of an item together. Expand each placeholder as often as its item has rows, or not at "
                "all."
            )
        ranges[token_id].append(PlaceholderRange(offset=len(expanded), length=num_rows))
        expanded.extend([token_id] * num_rows)
        position += width
    return expanded, ranges


def check_embeddings(embeddings: Any, num_rows: int | None, hidden_size: int, name: str) -> torch.Tensor:
    """Rows `(num_rows, hidden_size)` that a request brings in the place of media.

    Args:
        embeddings: `(rows, hidden_size)`, or the same with leading axes.
        num_rows: How many rows there must be; any number above 0 if `None`.
        hidden_size: The decoder's width.
        name: What they are called in `multi_modal_data`, for error messages.

    Raises:
        InvalidTypeError: Not a dense floating-point tensor.
        InvalidRequestError: Wrong shape, or a value that isn't finite.
    """
    import torch

    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        raise InvalidTypeError(
            f"{name}: got {type(embeddings).__name__}, expected a floating-point tensor. Pass rows of shape "
            f"(num_rows, {hidden_size})."
        )
    is_dense = embeddings.layout == torch.strided
    if not is_dense or embeddings.dim() < 2 or embeddings.shape[-1] != hidden_size or not embeddings.numel():
        raise InvalidRequestError(
            f"{name}: got shape {tuple(embeddings.shape)}, expected (num_rows, {hidden_size}), dense. Pass "
            "the rows "
            "that the model's projector returns."
        )
    rows = embeddings.reshape(-1, hidden_size)
    if num_rows is not None and len(rows) != num_rows:
        raise InvalidRequestError(
            f"{name}: got {len(rows)} rows, expected {num_rows}. Pass as many rows as the item has placeholders."
        )
    if not bool(torch.isfinite(rows).all()):
        raise InvalidRequestError(f"{name}: got values that are not finite. Check how they were computed.")
    return rows


def stacked(value: Any, item_dims: int) -> torch.Tensor:
    """Tensors of `item_dims` axes out of a batch, `(items, ...)`: undoes stacking and nesting, in order.

    For example, images in a tensor `(B, N, 3, H, W)`, or in a list of `(N, 3, H, W)`, have 3 axes; rows have
    1.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.reshape(-1, *value.shape[value.dim() - item_dims :])
    return torch.cat([stacked(each, item_dims) for each in value])

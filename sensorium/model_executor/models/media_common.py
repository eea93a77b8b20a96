"""Shared by multimodal model files: placeholders among token ids, embeddings from requests, sub-configurations."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from sensorium.config import EngineConfig
from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.inputs.admission import check_length
from sensorium.multimodal import PlaceholderRange

if TYPE_CHECKING:
    import torch

Pieces: TypeAlias = tuple[tuple[int, int], ...]
"""An item's tokens in an expanded prompt, run-length encoded: token ids, each with its number of repetitions."""


def language_config(config: EngineConfig) -> EngineConfig:
    """The configuration of a multimodal model's decoder. `tie_word_embeddings` may be in the outer config only."""
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

    For example, with counts `{9: [2, 3]}`, `[1, 9, 5, 9]` becomes `[1, 9, 9, 5, 9, 9, 9]` with the ranges (1, 2)
    and (4, 3). See `expand_items`.
    """
    pieces = {token_id: [((token_id, count),) for count in counts] for token_id, counts in row_counts.items()}
    return expand_items(token_ids, pieces, names, max_model_len)


def expand_items(
    token_ids: Sequence[int],
    expansions: Mapping[int, Sequence[Pieces]],
    names: Mapping[int, str],
    max_model_len: int,
) -> tuple[list[int], dict[int, list[PlaceholderRange]]]:
    """Replace the k-th occurrence of each placeholder token by its item's tokens.

    A prompt that is expanded already (with as many placeholder tokens as all its items have) is returned unchanged. For
    example, with `{9: [((9, 2), (7, 1))]}`, `[1, 9, 5]` becomes `[1, 9, 9, 7, 5]` with the range (1, 3).

    Args:
        token_ids: The prompt.
        expansions: For each placeholder token id, the tokens of each item.
        names: For each placeholder token id, the modality's name, for error messages.
        max_model_len: The longest expansion that is made, whatever a request asks for.

    Raises:
        InvalidRequestError: The number of placeholders fits neither the items nor their expansions, or the prompt would
            be too long.
    """
    waiting = {
        token_id: _Waiting(token_ids, token_id, pieces, names[token_id]) for token_id, pieces in expansions.items()
    }
    lengths = {names[token_id]: [length_of(each) for each in pieces] for token_id, pieces in expansions.items()}
    num_more = sum(sum(lengths[names[kind]]) - len(expansions[kind]) for kind, it in waiting.items() if not it.is_there)
    check_length(len(token_ids) + num_more, lengths, max_model_len, pooling=True)
    begins = {each.begins_with: token_id for token_id, each in waiting.items()}
    expanded: list[int] = []
    ranges: dict[int, list[PlaceholderRange]] = {token_id: [] for token_id in expansions}
    position = 0
    while position < len(token_ids):
        kind = begins.get(token_ids[position])
        taken = None if kind is None else waiting[kind].take(position)
        if kind is None or taken is None:
            expanded.append(token_ids[position])
            position += 1
            continue
        item, width = taken
        ranges[kind].append(PlaceholderRange(offset=len(expanded), length=len(item)))
        expanded.extend(item)
        position += width
    for each in waiting.values():
        each.check_empty()
    return expanded, ranges


def length_of(pieces: Pieces) -> int:
    """Tokens of an item."""
    return sum(count for _, count in pieces)


def num_tokens_of(pieces: Pieces, token_id: int) -> int:
    """How many of an item's tokens have this id."""
    return sum(count for piece, count in pieces if piece == token_id)


class _Waiting:
    """The items of a modality that are not yet found in the prompt."""

    def __init__(self, token_ids: Sequence[int], token_id: int, items: Sequence[Pieces], name: str) -> None:
        self._prompt = token_ids
        self._token_id = token_id
        self._items = list(reversed(items))
        self._name = name
        found = sum(1 for each in token_ids if each == token_id)
        num_expanded = sum(num_tokens_of(pieces, token_id) for pieces in items)
        self.is_there = found != len(items)
        """Whether the prompt is expanded already, rather than having a placeholder for each item."""
        if found not in (len(items), num_expanded):
            raise InvalidRequestError(
                f"{name} placeholders in the prompt: got {found}, expected {len(items)}, one for each item (or "
                f"{num_expanded} already expanded). Put a placeholder where each item stands."
            )

    @property
    def begins_with(self) -> int:
        """The token at which an item may begin."""
        return self._items[-1][0][0] if self.is_there and self._items else self._token_id

    def take(self, position: int) -> tuple[list[int], int] | None:
        """The tokens of the next item, and how many of the prompt's they replace; None if no item begins here."""
        if not self._items:
            return None
        item = [token_id for token_id, count in self._items[-1] for _ in range(count)]
        if self.is_there and list(self._prompt[position : position + len(item)]) != item:
            if self._prompt[position] != self._token_id:
                return None
            self.check_empty()
        self._items.pop()
        return item, len(item) if self.is_there else 1

    def check_empty(self) -> None:
        """Raise `InvalidRequestError` (a `ValueError`) if the prompt lacks tokens of items."""
        if self._items:
            raise InvalidRequestError(
                f"{self._name} placeholders in the prompt: got a run shorter than {length_of(self._items[-1])} tokens, "
                "or others, expected the tokens of an item together. Expand each placeholder as its item's size says, "
                "or not at all."
            )


def check_embeddings(embeddings: Any, num_rows: int | None, hidden_size: int, name: str) -> torch.Tensor:
    """Check a request's embeddings, and return them as `(num_rows, hidden_size)`.

    Args:
        embeddings: `(num_rows, hidden_size)`, possibly with more leading axes.
        num_rows: The number of rows that there must be; any above 0 if `None`.
        hidden_size: The decoder's width.
        name: Their name in `multi_modal_data`, for error messages.

    Raises:
        InvalidTypeError: Not a dense floating-point tensor.
        InvalidRequestError: Wrong shape, or a value that isn't finite.
    """
    import torch

    if not isinstance(embeddings, torch.Tensor) or not embeddings.is_floating_point():
        raise InvalidTypeError(
            f"got {type(embeddings).__name__}, expected a floating-point tensor. Pass rows of shape "
            f"(num_rows, {hidden_size}).",
            field=name,
        )
    is_dense = embeddings.layout == torch.strided
    if not is_dense or embeddings.dim() < 2 or embeddings.shape[-1] != hidden_size or not embeddings.numel():
        raise InvalidRequestError(
            f"got shape {tuple(embeddings.shape)}, expected (num_rows, {hidden_size}), dense. Pass "
            "the rows "
            "that the model's projector returns.",
            field=name,
        )
    rows = embeddings.reshape(-1, hidden_size)
    if num_rows is not None and len(rows) != num_rows:
        raise InvalidRequestError(
            f"got {len(rows)} rows, expected {num_rows}. Pass as many rows as the item has placeholders.", field=name
        )
    if not bool(torch.isfinite(rows).all()):
        raise InvalidRequestError("got values that are not finite. Check how they were computed.", field=name)
    return rows


def stacked(value: Any, item_dims: int) -> torch.Tensor:
    """One tensor `(items, ...)` of tensors with `item_dims` axes from a batch, which may be stacked or nested; keeps
    their order.

    For example, images in a tensor `(B, N, 3, H, W)`, or in a list of `(N, 3, H, W)`, have 3 axes; single rows have 1.
    """
    import torch

    if isinstance(value, torch.Tensor):
        return value.reshape(-1, *value.shape[value.dim() - item_dims :])
    return torch.cat([stacked(each, item_dims) for each in value])

"""Captures the rows that an outer model of Hugging Face computes from media for its trunk, and passes them to the trunk
in later passes.

A decoder gets media only through its trunk's arguments: embedded rows, and perhaps further tensors, such as rows for
several layers (DeepStack). They are captured once per item, by running the outer model up to its trunk on the item's
part of the prompt. Later passes run the trunk alone, with the captured rows in their places.

No token's or argument's name is known in advance. Media rows are those that differ from the embedding of their token
ids. The length of an axis tells whether a further tensor has rows for all tokens or for media rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

from sensorium.model_executor.drivers import ItemRows, MediaRows, PlacedRows
from sensorium.model_executor.drivers.carrier import Captured, Carrier
from sensorium.model_executor.models.transformers.refusal import CannotRunError

_MADE_ANEW = frozenset(("attention_mask", "position_ids", "cache_position", "past_key_values", "use_cache"))
"""Arguments of a trunk that every pass makes anew."""
_MAX_AXIS = 2


@dataclass(frozen=True, slots=True, eq=False)
class Extra:
    """A further argument of the trunk that comes from media."""

    name: str
    tree: TreeSpec
    """How its tensors are nested."""
    shapes: tuple[tuple[int, ...], ...]
    """The shape of each tensor, as captured."""
    axis: int
    """The axis of its rows."""
    is_per_token: bool
    """Whether it has a row for every token, text included; otherwise for media rows only."""
    fill: float | None = 0
    """The value of text rows if it is per token; None: what the outer model computes from their ids in every pass."""

    def key(self, i: int) -> str:
        """The name of its i-th tensor in `ItemRows`."""
        return f"{self.name}.{i}"

    def rows_of(self, captured: Captured, media: torch.Tensor) -> dict[str, torch.Tensor]:
        """Its tensors, transposed to `(num_media_rows, ...)`; empty if the pass had no such argument."""
        if captured.others.get(self.name) is None:
            return {}
        leaves, _ = tree_flatten(captured.others[self.name])
        rows = [leaf.movedim(self.axis, 0) for leaf in leaves]
        return {self.key(i): (each[media] if self.is_per_token else each) for i, each in enumerate(rows)}

    def argument(self, others: Mapping[str, PlacedRows], num_tokens: int, of_text: Any = None) -> Any:
        """The argument for a batch; None if no item has it. `of_text`: its value for the ids without media."""
        if self.key(0) not in others:
            return of_text
        placed = [others[self.key(i)] for i in range(len(self.shapes))]
        if of_text is not None:
            made = [leaf.movedim(self.axis, 0) for leaf in tree_flatten(of_text)[0]]
            pairs = zip(made, placed, strict=True)
            leaves = [leaf.index_copy(0, each.index, each.rows).movedim(0, self.axis) for leaf, each in pairs]
        else:
            leaves = [self._leaf(each, shape, num_tokens) for each, shape in zip(placed, self.shapes, strict=True)]
        return tree_unflatten(leaves, self.tree)

    def _leaf(self, placed: PlacedRows, shape: tuple[int, ...], num_tokens: int) -> torch.Tensor:
        if not self.is_per_token:
            return placed.rows.movedim(0, self.axis)
        assert self.fill is not None
        whole = placed.rows.new_full((num_tokens, *shape[: self.axis], *shape[self.axis + 1 :]), self.fill)
        return whole.index_copy_(0, placed.index, placed.rows).movedim(0, self.axis)


@dataclass(frozen=True, slots=True, eq=False)
class Capture:
    """The trunk's arguments for one prompt."""

    captured: Captured
    media: torch.Tensor
    """`(num_tokens,)`: which rows are media rows."""


class TrunkInputs:
    """Captures a trunk's arguments, and makes them for later passes. One per model.

    Args:
        model: The outer model.
        trunk: Its trunk, which takes embedded rows.
        vocab_size: Ids from here on are placeholders.
    """

    def __init__(self, model: Any, trunk: nn.Module, vocab_size: int) -> None:
        self._model = (model,)  # in a tuple, so that it is no submodule of the holder
        self._carrier = Carrier(trunk, "trunk", "trunk")
        self._vocab_size = vocab_size
        self.extras: tuple[Extra, ...] = ()

    def remove(self) -> None:
        """Leave the trunk as it was."""
        self._carrier.remove()

    # Capturing

    def run(self, token_ids: torch.Tensor, tensors: Mapping[str, Any]) -> Captured:
        """The trunk's arguments when the outer model runs on a prompt. Raises whatever the model raises."""
        ids = token_ids[None]
        model = self._model[0]
        captured = self._carrier.capture(
            lambda: model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False, **tensors)
        )
        if captured is None:
            raise CannotRunError("its decoder isn't reached with embedded rows")
        if len(captured.rows) != len(token_ids):
            raise CannotRunError(f"its decoder gets {len(captured.rows)} rows for {len(token_ids)} tokens")
        return captured

    def compared(self, token_ids: torch.Tensor, tensors: Mapping[str, Any]) -> Capture:
        """The trunk's arguments for a prompt with media, and which rows are media rows."""
        captured = self.run(token_ids, tensors)
        text = self.embed(token_ids.clamp(0, self._vocab_size - 1))
        media = (captured.rows != text.to(captured.rows.dtype)).any(-1)
        if bool(media.all()):
            raise CannotRunError("rows of text aren't the embedding of their tokens alone")
        if not bool(media.any()):
            raise CannotRunError("media change no row in front of its decoder")
        return Capture(captured, media)

    def learn(self, captures: Sequence[Capture]) -> None:
        """Find out from prompts with media which further arguments there are. Raises `CannotRunError`."""
        found: dict[str, Extra] = {}
        for capture in captures:
            for name, value in capture.captured.others.items():
                if name not in _MADE_ANEW and (extra := _extra(name, value, capture.media)) is not None:
                    known = found.setdefault(name, extra)
                    if (known.axis, known.is_per_token, known.tree) != (extra.axis, extra.is_per_token, extra.tree):
                        raise CannotRunError(f"its decoder gets {name} in other forms for other media")
        self.extras = tuple(found.values())

    def item_rows(self, token_ids: torch.Tensor, tensors: Mapping[str, Any], media: torch.Tensor) -> ItemRows:
        """The trunk's arguments for the media rows of a part of a prompt; `media`: their places in it."""
        captured = self.run(token_ids, tensors)
        others: dict[str, torch.Tensor] = {}
        for extra in self.extras:
            others |= extra.rows_of(captured, media)
        if any(len(each) != len(media) for each in others.values()):
            raise CannotRunError("its decoder gets other numbers of rows beside those of media")
        return ItemRows(captured.rows[media], others)

    # Making

    def embed(self, token_ids: torch.Tensor, media: MediaRows | None = None) -> torch.Tensor:
        """Rows `(num_tokens, hidden_size)`: embedded text, media in their places."""
        embedding: Callable[[torch.Tensor], torch.Tensor] = self._model[0].get_input_embeddings()
        rows = embedding(token_ids)
        return rows if media is None else rows.index_copy(0, media.index, media.rows.to(rows.dtype))

    def arguments(self, token_ids: torch.Tensor, media: MediaRows | None) -> dict[str, Any]:
        """The trunk's arguments other than rows, for a pass with media and these ids, none of them a placeholder."""
        others = {} if media is None else media.others
        of_text: Mapping[str, Any] = {}
        if any(extra.fill is None for extra in self.extras):
            of_text = self.run(token_ids, {}).others
        made = {
            extra.name: extra.argument(others, len(token_ids), of_text.get(extra.name) if extra.fill is None else None)
            for extra in self.extras
        }
        return {name: value for name, value in made.items() if value is not None}


def _extra(name: str, value: Any, media: torch.Tensor) -> Extra | None:
    """An argument as an `Extra`; None for one without tensors."""
    leaves, tree = tree_flatten(value)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors:
        return None
    if len(tensors) == len(leaves):
        shapes = tuple(tuple(each.shape) for each in tensors)
        for count, is_per_token in ((len(media), True), (int(media.sum()), False)):
            for axis in range(_MAX_AXIS):
                if all(len(each) > axis and each[axis] == count and (axis == 0 or each[0] == 1) for each in shapes):
                    fill = _fill(tensors, axis, media) if is_per_token else 0
                    return Extra(name, tree, shapes, axis, is_per_token, fill)
    raise CannotRunError(f"its outer module computes {name} for its decoder, neither for tokens nor for media rows")


def _fill(tensors: Sequence[torch.Tensor], axis: int, media: torch.Tensor) -> float | None:
    """The value of all text rows, if they have one value."""
    values = {float(end) for leaf in tensors for end in leaf.movedim(axis, 0)[~media].float().aminmax()}
    return values.pop() if len(values) == 1 else None


def on_device(tensors: Mapping[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Keyword arguments of `forward` on the model's device, floating-point tensors in its dtype."""

    def moved(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return leaf
        return leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype)

    return {name: tree_map(moved, value) for name, value in tensors.items()}

"""Where media stand in an expanded prompt: the span of each item, whatever the input processor said about it.

In this order: ranges that the processor returned; runs of the model's placeholder tokens; what the processor
added to the prompt. Where these are not one run for each item, items are told apart by their row counts, or by the
text between their placeholders before the expansion; otherwise all items of the modality share one span. A miscount is
refused here, with both numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.multimodal.placeholders import (
    check_disjoint,
    inserted_ids,
    is_placeholder,
    joined,
    runs,
    spans_of_ranges,
    split_by_rows,
)
from sensorium.spans import IntArray, Span

RowsHint: TypeAlias = Callable[[int], Sequence[int] | None]
"""Given the number of rows in all, the rows of each item, or None where nothing tells."""
SpansHint: TypeAlias = Callable[[], Sequence[Span] | None]
"""The span of each item as the prompt before its expansion tells it, or None where it doesn't."""


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """Token ids before and after the input processor."""

    before: IntArray
    after: IntArray


@dataclass(frozen=True, slots=True, eq=False)
class Placement:
    """Media that share one span: one item, or a group of them.

    `indices`: the members' positions among the items of their modality, one tuple for each modality.
    """

    modalities: tuple[str, ...]
    indices: tuple[tuple[int, ...], ...]
    span: Span

    @property
    def counts(self) -> dict[str, int]:
        """Members by modality."""
        return {modality: len(each) for modality, each in zip(self.modalities, self.indices, strict=True)}

    @property
    def is_group(self) -> bool:
        """Whether several items share the span."""
        return sum(map(len, self.indices)) > 1


def locate(
    modality: str,
    num_items: int,
    prompt: Prompt,
    placeholder_ids: Collection[int],
    *,
    ranges: Sequence[Any] | None,
    rows_hint: RowsHint,
    spans_hint: SpansHint = lambda: None,
) -> list[Placement]:
    """The placements of a modality's items: one each, or one for all; none if nothing in the prompt points to
    them.

    `placeholder_ids`: the ids known to stand where the modality's rows go, empty if none are known. `ranges`:
    what the processor returned for the modality, if it did.

    Raises `InvalidRequestError` (a `ValueError`) if the prompt has places for more or fewer items.
    """
    if ranges is not None:
        pairs = _pairs(modality, ranges)
        if len(pairs) != num_items:
            raise InvalidRequestError(
                f"{modality} placeholders: got {len(pairs)} ranges for {num_items} items, expected the same length. "
                f"Put one placeholder for each item into the prompt."
            )
        spans = spans_of_ranges(pairs, prompt.after, placeholder_ids)
        check_disjoint(spans)
        return _items(modality, spans)
    positions = np.flatnonzero(is_placeholder(prompt.after, placeholder_ids))
    if len(positions):
        _check_before(modality, num_items, prompt, placeholder_ids, len(positions))
    else:
        added = inserted_ids(prompt.before, prompt.after)
        positions = np.flatnonzero(is_placeholder(prompt.after, added))
    return _split(modality, num_items, positions, rows_hint, spans_hint) if len(positions) else []


def _pairs(modality: str, ranges: Sequence[Any]) -> list[tuple[int, int]]:
    try:
        return [(int(each["offset"]), int(each["length"])) for each in ranges]
    except (TypeError, KeyError, ValueError) as exc:
        raise InvalidRequestError(
            "got something other than ranges, expected a list of dicts with "
            "offset and length. Correct the input processor.",
            field=f"multi_modal_placeholders[{modality!r}]",
        ) from exc


def _items(modality: str, spans: Sequence[Span]) -> list[Placement]:
    return [Placement((modality,), ((index,),), span) for index, span in enumerate(spans)]


def _check_before(
    modality: str, num_items: int, prompt: Prompt, placeholder_ids: Collection[int], num_after: int
) -> None:
    """Compare items with the placeholders that the prompt had before the processor expanded them.

    A prompt that had none gets them from the processor, and one that had as many as now came expanded:
    neither says anything about the number of items. Otherwise each item has one token; or one run of several
    different ones, where an item's start and end are media rows too.
    """
    mask = is_placeholder(prompt.before, placeholder_ids)
    num_before = int(mask.sum())
    if not 0 < num_before < num_after:
        return
    is_one_token = len(np.unique(prompt.before[mask])) == 1
    num_places = num_before if is_one_token or num_before < num_items else len(runs(mask)[0])
    if num_places > num_items or num_before < num_items:
        raise miscounted(modality, num_places, num_items)


def miscounted(modality: str, num_placeholders: int, num_items: int) -> InvalidRequestError:
    """The error for a prompt whose placeholders are not one for each item."""
    return InvalidRequestError(
        f"{modality} placeholders: got {num_placeholders} in the prompt for {num_items} items, expected the same "
        f"number. Put one placeholder into the prompt for each item of multi_modal_data[{modality!r}]."
    )


def _split(
    modality: str, num_items: int, positions: IntArray, rows_hint: RowsHint, spans_hint: SpansHint
) -> list[Placement]:
    """Give media positions to items: all to one, a run to each, by row counts, or by the text between; else all to
    all.
    """
    if num_items == 1:
        return _items(modality, [Span.of_positions(positions)])
    breaks = np.flatnonzero(np.diff(positions) > 1) + 1
    if len(breaks) + 1 == num_items:
        return _items(modality, [Span.of_positions(part) for part in np.split(positions, breaks)])
    rows = rows_hint(len(positions))
    if rows is not None and len(rows) == num_items and sum(rows) == len(positions) and min(rows) > 0:
        return _items(modality, split_by_rows(positions, rows))
    spans = spans_hint()
    if spans is not None:
        return _items(modality, spans)
    return [Placement((modality,), (tuple(range(num_items)),), Span.of_positions(positions))]


def group(placements: Sequence[Placement], num_tokens: int) -> Placement:
    """One placement for all members of several, which may be of several modalities."""
    members: dict[str, list[int]] = {}
    for placement in placements:
        for modality, indices in zip(placement.modalities, placement.indices, strict=True):
            members.setdefault(modality, []).extend(indices)
    span = joined([placement.span for placement in placements], num_tokens)
    return Placement(tuple(members), tuple(tuple(sorted(each)) for each in members.values()), span)


def group_overlapping(placements: Sequence[Placement], num_tokens: int, *, may_group: bool) -> list[Placement]:
    """Placements in order of offset whose spans don't overlap; those that do are grouped.

    Spans overlap where rows of several modalities alternate. `may_group`: the model takes media of several
    modalities in one call and puts the rows in place itself. Raises `UnsupportedFeatureError` if it doesn't.
    """
    result: list[Placement] = []
    for placement in sorted(placements, key=lambda placement: placement.span.offset):
        if not result or result[-1].span.end <= placement.span.offset:
            result.append(placement)
            continue
        if not may_group:
            names = " and ".join(dict.fromkeys(result[-1].modalities + placement.modalities))
            raise UnsupportedFeatureError(
                f"got {names} items whose places alternate, expected each item's rows together for this model. "
                f"Order the media by kind, or let the input processor return multi_modal_placeholders.",
                field="prompt",
            )
        result[-1] = group([result[-1], placement], num_tokens)
    return result

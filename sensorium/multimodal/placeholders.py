"""Placeholder arithmetic: which rows of an expanded prompt come from which media item.

Pure index arithmetic over token ids, linear in the length of the prompt; independent of models and media.
Called by preprocessing. Positions count in the expanded prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from sensorium.errors import InvalidRequestError
from sensorium.spans import IntArray, Span

BoolArray: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]


def runs(mask: BoolArray) -> tuple[IntArray, IntArray]:
    """Starts and ends (exclusive) of the maximal runs of True, ascending.

    For example, `[0, 1, 1, 0, 1]` gives starts `[1, 4]` and ends `[3, 5]`.
    """
    padded = np.zeros(len(mask) + 2, dtype=np.int8)
    padded[1:-1] = mask
    edges = np.flatnonzero(np.diff(padded))
    return edges[::2], edges[1::2]


def is_placeholder(token_ids: IntArray, placeholder_ids: Collection[int]) -> BoolArray:
    """Which positions hold one of `placeholder_ids`."""
    if len(placeholder_ids) <= 4:  # the usual case, much faster one by one
        mask = np.zeros(len(token_ids), dtype=np.bool_)
        for placeholder_id in placeholder_ids:
            mask |= token_ids == placeholder_id
        return mask
    return np.isin(token_ids, np.fromiter(placeholder_ids, dtype=np.int64, count=len(placeholder_ids)))


def split_by_rows(positions: IntArray, rows_per_item: Sequence[int]) -> list[Span]:
    """Give ascending media positions to items in order, `rows_per_item[i]` to item i.

    The caller has checked that the counts are positive and add up to the number of positions.
    """
    bounds = np.cumsum(np.asarray(rows_per_item, dtype=np.int64))
    return [Span.of_positions(part) for part in np.split(positions, bounds[:-1])]


def spans_of_ranges(
    ranges: Iterable[tuple[int, int]], token_ids: IntArray, placeholder_ids: Collection[int]
) -> list[Span]:
    """Spans from `(offset, length)` ranges that a processor returned.

    A range may cover separators and padding: where some of its ids are known placeholders, only those rows
    are media; where none is, all are. Raises `InvalidRequestError` for a range that is empty or lies outside
    the prompt.
    """
    spans = []
    for offset, length in ranges:
        if length < 1 or offset < 0 or offset + length > len(token_ids):
            raise InvalidRequestError(
                f"got the range [{offset}, {offset + length}), expected a "
                f"non-empty range in a prompt of {len(token_ids)} tokens. Correct the input processor.",
                field="multi_modal_placeholders",
            )
        is_media = is_placeholder(token_ids[offset : offset + length], placeholder_ids)
        spans.append(Span.of_mask(offset, is_media) if is_media.any() else Span(offset, length))
    return spans


def inserted_ids(before: IntArray, after: IntArray) -> frozenset[int]:
    """The ids that a processor added: those that occur more often after it than before.

    Only the part is compared in which the two prompts differ, between their longest common prefix and suffix,
    so that a separator which the processor repeats counts only if it stands among what was added.
    """
    prefix = _common_prefix(before, after)
    suffix = _common_prefix(before[prefix:][::-1], after[prefix:][::-1])
    ids, counts = np.unique(after[prefix : len(after) - suffix], return_counts=True)
    old_ids, old_counts = np.unique(before[prefix : len(before) - suffix], return_counts=True)
    old = dict(zip(old_ids.tolist(), old_counts.tolist(), strict=True))
    new = zip(ids.tolist(), counts.tolist(), strict=True)
    return frozenset(token for token, count in new if count > old.get(token, 0))


def _common_prefix(a: IntArray, b: IntArray) -> int:
    shorter = min(len(a), len(b))
    differing = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differing[0]) if len(differing) else shorter


def check_disjoint(spans: Iterable[Span]) -> None:
    """Raises `InvalidRequestError` if two spans share a row."""
    end = 0
    for span in sorted(spans, key=lambda span: span.offset):
        if span.offset < end:
            raise InvalidRequestError(
                f"got a range from {span.offset} on, expected at least {end}, "
                f"where the one before it ends. Correct the input processor.",
                field="multi_modal_placeholders",
            )
        end = span.end


def media_mask(spans: Iterable[Span], num_tokens: int) -> BoolArray:
    """`(num_tokens,)`: which rows of the prompt come from media."""
    mask = np.zeros(num_tokens, dtype=np.bool_)
    for span in spans:
        if span.is_dense:
            mask[span.offset : span.end] = True
        else:
            mask[span.positions()] = True
    return mask


def joined(spans: Sequence[Span], num_tokens: int) -> Span:
    """One span over all rows of several."""
    return Span.of_positions(np.flatnonzero(media_mask(spans, num_tokens)))

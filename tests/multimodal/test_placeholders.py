"""Placeholder arithmetic: spans found in random prompts are the spans that were put there."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import InvalidRequestError
from sensorium.multimodal.placeholders import (
    check_disjoint,
    inserted_ids,
    is_placeholder,
    joined,
    media_mask,
    runs,
    spans_of_ranges,
    split_by_rows,
)
from sensorium.spans import Span

PAD, SEPARATOR = -3, 90
"""A placeholder outside the vocabulary, and a token that stands between the rows of one item."""


def array(ids: list[int]) -> Any:
    return np.asarray(ids, dtype=np.int64)


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[int], list[tuple[int, list[int]]]]:
    """A prompt, and for each item its offset and the parts of its span: positive media rows, negative
    separators.
    """
    ids: list[int] = []
    items: list[tuple[int, list[int]]] = []
    for _ in range(draw(st.integers(0, 5))):
        ids += draw(st.lists(st.integers(0, 50), max_size=4))
        parts = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
        offset = len(ids)
        spread: list[int] = []
        for index, rows in enumerate(parts):
            if index:
                ids.append(SEPARATOR)
                spread.append(-1)
            ids += [PAD] * rows
            spread.append(rows)
        items.append((offset, spread))
    ids += draw(st.lists(st.integers(0, 50), max_size=4))
    return ids, items


def expected_span(offset: int, parts: list[int]) -> tuple[int, int, list[bool]]:
    mask = [part > 0 for part in parts for _ in range(abs(part))]
    return offset, len(mask), mask


def shape_of(span: Span) -> tuple[int, int, list[bool]]:
    rows = set(span.positions().tolist())
    return span.offset, span.length, [position in rows for position in range(span.offset, span.end)]


@given(prompts())
def test_known_row_counts_reconstruct_every_span(
    prompt: tuple[list[int], list[tuple[int, list[int]]]],
) -> None:
    ids, items = prompt
    positions = np.flatnonzero(is_placeholder(array(ids), {PAD}))
    rows = [sum(part for part in parts if part > 0) for _, parts in items]
    spans = split_by_rows(positions, rows) if items else []
    assert [shape_of(span) for span in spans] == [expected_span(*item) for item in items]
    assert [span.num_rows for span in spans] == rows
    mask = media_mask(spans, len(ids))
    assert mask.tolist() == [token == PAD for token in ids]
    check_disjoint(spans)
    if items:
        whole = joined(spans, len(ids))
        assert whole.positions().tolist() == positions.tolist()
        assert (whole.offset, whole.end) == (positions[0], positions[-1] + 1)


@given(prompts())
def test_ranges_reconstruct_every_span(prompt: tuple[list[int], list[tuple[int, list[int]]]]) -> None:
    ids, items = prompt
    ranges = [(offset, sum(map(abs, parts))) for offset, parts in items]
    spans = spans_of_ranges(ranges, array(ids), {PAD})
    assert [shape_of(span) for span in spans] == [expected_span(*item) for item in items]


@given(st.lists(st.booleans(), max_size=40))
def test_runs_are_maximal_and_cover_the_mask(mask: list[bool]) -> None:
    starts, ends = runs(np.asarray(mask, dtype=np.bool_))
    rebuilt = np.zeros(len(mask), dtype=np.bool_)
    for start, end in zip(starts, ends, strict=True):
        assert start < end
        rebuilt[start:end] = True
    assert rebuilt.tolist() == mask
    assert all(end < start for end, start in zip(ends, starts[1:], strict=False))


def test_a_range_without_known_placeholders_is_media_throughout() -> None:
    (span,) = spans_of_ranges([(1, 3)], array([5, 6, 7, 8]), {PAD})
    assert span.row_offsets is None
    assert span.num_rows == 3


def test_pads_inside_a_range_are_not_media() -> None:
    (span,) = spans_of_ranges([(1, 4)], array([5, SEPARATOR, PAD, PAD, SEPARATOR]), {PAD})
    assert shape_of(span) == (1, 4, [False, True, True, False])
    assert span.positions().tolist() == [2, 3]


@pytest.mark.parametrize("wrong", [(0, 0), (-1, 2), (3, 2), (4, 1), (0, -1)])
def test_ranges_outside_the_prompt_are_refused(wrong: tuple[int, int]) -> None:
    with pytest.raises(InvalidRequestError, match="expected a non-empty range in a prompt of 4 tokens"):
        spans_of_ranges([wrong], array([1, 2, 3, 4]), {PAD})


def test_overlapping_ranges_are_refused_in_any_order() -> None:
    check_disjoint([Span(4, 2), Span(0, 4)])
    with pytest.raises(InvalidRequestError, match="from 3 on, expected at least 4"):
        check_disjoint([Span(3, 2), Span(0, 4)])


def test_positions_without_gaps_need_no_mask() -> None:
    assert Span.of_positions(array([4, 5, 6])).row_offsets is None
    assert shape_of(Span.of_positions(array([4, 6]))) == (4, 3, [True, False, True])


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ([1, 9, 2], [1, 9, 9, 9, 2], {9}),  # expanded in place
        ([1, 2], [7, 7, 7, 1, 2], {7}),  # put in front
        ([1, 2], [7, 8, 7, 8, 1, 2, 3], {7, 8, 3}),  # rebuilt, with a separator at the end
        ([1, 9, 2, 9, 3], [1, 9, 9, 2, 9, 9, 9, 3], {9}),  # the text between items is no placeholder
        ([1, 2, 3], [1, 2, 3], set()),
        ([], [4, 4], {4}),
        ([9, 9], [9], set()),
    ],
)
def test_ids_that_a_processor_added(before: list[int], after: list[int], expected: set[int]) -> None:
    assert inserted_ids(array(before), array(after)) == expected


def test_a_million_tokens_take_a_moment() -> None:
    # Published as CVE-2025-46560: expansion that was quadratic in the prompt stalled the engine.
    ids = array([1, PAD] * 500_000)
    start = time.process_time()
    positions = np.flatnonzero(is_placeholder(ids, {PAD, -4, SEPARATOR}))
    spans = split_by_rows(positions, [250_000, 250_000])
    assert inserted_ids(array([1, 2]), ids) == {1, PAD}
    assert media_mask(spans, len(ids)).sum() == 500_000
    assert time.process_time() - start < 5.0

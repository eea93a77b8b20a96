"""Spans: positions and rows of any mask are what counting one by one says."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.spans import WHOLE_PROMPT, Span, merged, two_way_spans

OFFSETS = st.integers(0, 12)
MASKS = st.lists(st.booleans(), min_size=1, max_size=12) | st.integers(1, 12).map(lambda length: [True] * length)
POSITIONS = st.integers(-2, 28)


def counted(offset: int, mask: list[bool]) -> list[int]:
    """Positions of the rows, one by one."""
    return [offset + i for i, is_row in enumerate(mask) if is_row]


@given(OFFSETS, MASKS)
def test_a_span_has_the_rows_of_its_mask(offset: int, mask: list[bool]) -> None:
    span, rows = Span.of_mask(offset, mask), counted(offset, mask)
    assert (span.offset, span.length, span.end) == (offset, len(mask), offset + len(mask))
    assert (span.num_rows, span.is_dense) == (len(rows), all(mask))
    assert span.positions().tolist() == rows
    assert span.rows_end == (rows[-1] + 1 if rows else offset)
    assert span.has_valid_rows


@given(OFFSETS, MASKS, POSITIONS, POSITIONS)
def test_rows_before_in_and_from_a_position(offset: int, mask: list[bool], begin: int, end: int) -> None:
    span, rows = Span.of_mask(offset, mask), counted(offset, mask)
    assert span.rows_before(begin) == sum(row < begin for row in rows)
    assert span.first_row_from(begin) == next((row for row in rows if row >= begin), None)
    inside = span.rows_in(begin, end)
    assert inside.start == span.rows_before(begin)
    assert [rows[i] for i in inside] == [row for row in rows if begin <= row < end]
    if inside:
        assert span.positions(inside).tolist() == [rows[i] for i in inside]


@given(OFFSETS, MASKS, st.sets(st.integers(0, 28), max_size=6))
def test_wherever_a_prompt_is_cut_each_row_lies_in_one_piece(offset: int, mask: list[bool], cuts: set[int]) -> None:
    span = Span.of_mask(offset, mask)
    bounds = sorted(cuts | {0, 40})
    pieces = [row for begin, end in itertools.pairwise(bounds) for row in span.rows_in(begin, end)]
    assert pieces == list(range(span.num_rows))


@given(OFFSETS, MASKS.filter(any))
def test_positions_make_the_shortest_span(offset: int, mask: list[bool]) -> None:
    span = Span.of_positions(Span.of_mask(offset, mask).positions())
    rows = counted(offset, mask)
    assert span.positions().tolist() == rows
    assert (span.offset, span.end) == (rows[0], rows[-1] + 1)
    assert span.is_dense == (span.row_offsets is None)


def test_the_worked_example() -> None:
    span = Span.of_mask(10, [False, True, True, False, True])
    assert span.positions().tolist() == [11, 12, 14]
    assert (span.rows_before(13), span.rows_in(12, 20), span.first_row_from(13)) == (2, range(1, 3), 14)


def test_a_span_without_rows() -> None:
    span = Span.of_mask(10, [False, False])
    assert [span.first_row_from(position) for position in (0, 10, 11)] == [None, None, None]
    assert (span.num_rows, span.rows_end, len(span.rows_in(0, 100)), span.positions().tolist()) == (0, 10, 0, [])


@pytest.mark.parametrize("span", [Span(3, 4), Span.of_mask(3, [True, False, True])])
def test_a_span_is_a_value(span: Span) -> None:
    with pytest.raises(AttributeError):
        span.offset = 4  # type: ignore[misc]


@given(st.lists(st.tuples(st.sampled_from(["image", "audio"]), MASKS), max_size=4), st.sampled_from(["image", "audio"]))
def test_two_way_spans_are_the_runs_of_rows(items: list[tuple[str, list[bool]]], seen: str) -> None:
    offset, media, rows = 0, [], set[int]()
    for modality, mask in items:
        media.append(([modality], Span.of_mask(offset, mask)))
        rows |= set(counted(offset, mask)) if modality == seen else set()
        offset += len(mask)
    spans = two_way_spans(frozenset({seen}), media, offset)
    assert [p for begin, end in spans for p in range(begin, end)] == sorted(rows)
    assert all(one[1] < other[0] for one, other in itertools.pairwise(spans)), "runs that touch are one"
    assert two_way_spans(frozenset(), media, offset) == ()
    assert two_way_spans(frozenset({WHOLE_PROMPT, seen}), media, offset) == ((0, offset),)


@given(st.lists(st.tuples(POSITIONS, st.integers(1, 9)).map(lambda each: (each[0], sum(each))), max_size=6))
def test_merged_ranges_share_no_position(ranges: list[tuple[int, int]]) -> None:
    result = merged(ranges)
    assert sorted({p for each in ranges for p in range(*each)}) == [p for each in result for p in range(*each)]
    inner_cuts = {p for each in result for p in range(each[0] + 1, each[1])}
    assert inner_cuts == {p for each in ranges for p in range(each[0] + 1, each[1])}, "no cut is lost or made up"

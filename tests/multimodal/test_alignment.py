"""Items whose own rows have other tokens between them are told apart by what the prompt was before its expansion."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sensorium.multimodal.alignment import align_items

PAD, OTHER, BREAK, START, END = 7, 8, 6, 90, 91


def aligned(before: list[int], after: list[int]) -> dict[str, list[list[int]]] | None:
    """The media positions of each item, by modality."""
    one, other = np.asarray(before, np.int64), np.asarray(after, np.int64)
    masks = {name: (one == pad, other == pad) for name, pad in (("image", PAD), ("video", OTHER)) if pad in before}
    spans = align_items(one, other, masks)
    if spans is None:
        return None
    return {name: [span.positions().tolist() for span in each] for name, each in spans.items()}


def test_the_text_between_two_items_ends_the_first() -> None:
    before = [1, PAD, 20, PAD, 2]
    after = [1, START, PAD, PAD, BREAK, PAD, END, 20, START, PAD, BREAK, PAD, BREAK, PAD, END, 2]
    assert aligned(before, after) == {"image": [[2, 3, 5], [9, 11, 13]]}


def test_items_side_by_side_are_told_apart_by_what_surrounds_each() -> None:
    before = [1, PAD, PAD, 2]
    after = [1, START, PAD, BREAK, PAD, END, START, PAD, BREAK, PAD, END, 2]
    assert aligned(before, after) == {"image": [[2, 4], [7, 9]]}


def test_a_token_in_front_of_the_whole_prompt_does_no_harm() -> None:
    before = [PAD, 20, 21, PAD]
    after = [99, PAD, BREAK, PAD, 20, 21, PAD, BREAK, PAD]
    assert aligned(before, after) == {"image": [[1, 3], [6, 8]]}


def test_kinds_that_alternate_are_ends_by_themselves() -> None:
    before = [OTHER, PAD, OTHER, 3]
    after = [OTHER, 30, OTHER, PAD, BREAK, PAD, OTHER, 31, OTHER, 3]
    assert aligned(before, after) == {"image": [[3, 5]], "video": [[0, 2], [6, 8]]}


def test_a_text_that_is_also_a_separator_says_nothing() -> None:
    before = [1, PAD, BREAK, PAD, 2]
    after = [1, PAD, BREAK, PAD, BREAK, PAD, 2]
    assert aligned(before, after) is None


def test_side_by_side_without_marks_says_nothing() -> None:
    assert aligned([1, PAD, PAD, 2], [1, PAD, BREAK, PAD, PAD, BREAK, PAD, 2]) is None


def test_more_items_than_runs_says_nothing() -> None:
    assert aligned([PAD, PAD], [PAD, PAD, PAD]) is None


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], list[int], dict[str, list[list[int]]]]:
    """Items of two kinds with text of their own tokens around them, before and after; and where each one's rows are."""
    before: list[int] = draw(st.lists(st.integers(10, 30), max_size=3))
    after = list(before)
    places: dict[str, list[list[int]]] = {}
    for _ in range(draw(st.integers(1, 6))):
        name, pad = draw(st.sampled_from([("image", PAD), ("video", OTHER)]))
        before.append(pad)
        after.append(START)
        rows = []
        for i, tile in enumerate(draw(st.lists(st.integers(1, 3), min_size=1, max_size=4))):
            after += [BREAK] * (i > 0)
            rows += range(len(after), len(after) + tile)
            after += [pad] * tile
        after.append(END)
        places.setdefault(name, []).append(rows)
        text = draw(st.lists(st.integers(10, 30), max_size=3))
        before += text
        after += text
    return before, after, places


@given(documents())
def test_every_item_gets_its_own_rows(document: tuple[list[int], list[int], dict[str, list[list[int]]]]) -> None:
    before, after, places = document
    assert aligned(before, after) == places


@given(st.lists(st.integers(5, 9), max_size=8), st.lists(st.integers(5, 9), max_size=16))
def test_what_is_found_is_a_division_in_order(before: list[int], after: list[int]) -> None:
    """Whatever the two prompts are: no row is given twice, none is left over, and items follow each other."""
    found = aligned(before, after)
    if found is None:
        return
    for name, pad in (("image", PAD), ("video", OTHER)):
        if name in found:
            assert len(found[name]) == before.count(pad)
            assert [row for item in found[name] for row in item] == [i for i, each in enumerate(after) if each == pad]
            assert all(found[name])

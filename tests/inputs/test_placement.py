"""Where media stand: every way in which a processor may tell, and what happens where none does."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.multimodal.placement import Placement, Prompt, group_overlapping, locate
from sensorium.spans import Span
from tests.inputs.front import (
    IMAGE,
    VIDEO,
    Calls,
    Front,
    features_of,
    map_pictures,
    new_model,
    picture,
    spans_of,
)

PAD, OTHER_PAD, START, END = 7, 8, 90, 91


def prompt_of(before: list[int], after: list[int]) -> Prompt:
    return Prompt(np.asarray(before, dtype=np.int64), np.asarray(after, dtype=np.int64))


def found(
    num_items: int,
    before: list[int],
    after: list[int],
    ids: set[int] | None = None,
    ranges: Any = None,
    rows: list[int] | None = None,
) -> list[tuple[int, int, int]]:
    """Offset, length and media rows of each placement."""
    placements = locate(
        "image",
        num_items,
        prompt_of(before, after),
        ids if ids is not None else {PAD},
        ranges=ranges,
        rows_hint=lambda total: rows,
    )
    return [(p.span.offset, p.span.length, p.span.num_rows) for p in placements]


@st.composite
def documents(draw: st.DrawFn) -> tuple[list[int], list[int], list[tuple[int, int]]]:
    """A prompt before and after expansion, and the spans of its items. Neighbours are allowed."""
    before: list[int] = draw(st.lists(st.integers(10, 60), max_size=3))
    after = list(before)
    spans = []
    for _ in range(draw(st.integers(1, 5))):
        rows = draw(st.integers(2, 6))
        spans.append((len(after), rows))
        text = draw(st.lists(st.integers(10, 60), max_size=3))
        before += [PAD, *text]
        after += [PAD] * rows + text
    return before, after, spans


@given(documents())
def test_spans_are_found_again_from_row_counts(document: tuple[list[int], list[int], list[tuple[int, int]]]) -> None:
    before, after, spans = document
    rows = [length for _, length in spans]
    assert found(len(spans), before, after, rows=rows) == [(offset, length, length) for offset, length in spans]


@given(documents())
def test_spans_are_found_again_without_row_counts_or_are_one_group(
    document: tuple[list[int], list[int], list[tuple[int, int]]],
) -> None:
    before, after, spans = document
    result = found(len(spans), before, after)
    has_neighbours = any(a + length == b for (a, length), (b, _) in pairwise(spans))
    if not has_neighbours:
        assert result == [(offset, length, length) for offset, length in spans]
    else:
        start, end = spans[0][0], sum(spans[-1])
        assert result == [(start, end - start, sum(length for _, length in spans))]


@given(documents(), st.integers(-1, 1), st.booleans())
def test_a_miscount_is_never_taken_for_a_placement(
    document: tuple[list[int], list[int], list[tuple[int, int]]], surplus: int, apart: bool
) -> None:
    """A typed placeholder that the processor left as it was, or an item without one."""
    before, after, spans = document
    typed = [20, PAD] if apart else [PAD]
    if surplus == 1:
        before, after = before + typed, after + typed
    num_items = len(spans) - min(surplus, 0)
    if surplus == 0:
        assert found(num_items, before, after)
    else:
        with pytest.raises(InvalidRequestError, match=f"for {num_items} items, expected the same number"):
            found(num_items, before, after)


def test_an_item_s_start_and_end_may_be_media_rows_too() -> None:
    ids = {START, PAD, END}
    before, after = [START, PAD, END, 1], [START, PAD, PAD, PAD, END, 1]
    assert found(1, before, after, ids) == [(0, 5, 5)]
    with pytest.raises(InvalidRequestError, match="got 2 in the prompt for 1 items"):
        found(1, [*before, PAD], [*after, PAD], ids)


def test_row_counts_that_do_not_add_up_are_not_believed() -> None:
    assert found(2, [PAD, PAD], [PAD] * 5, rows=[2, 2]) == [(0, 5, 5)]
    assert found(2, [PAD, PAD], [PAD] * 5, rows=[5]) == [(0, 5, 5)]
    assert found(2, [PAD, PAD], [PAD] * 5, rows=[0, 5]) == [(0, 5, 5)]


def test_one_item_may_stand_in_several_places() -> None:
    assert found(1, [1, 2], [START, PAD, PAD, END, PAD, 1, 2]) == [(1, 4, 3)]


def test_a_prompt_that_comes_expanded_is_believed() -> None:
    assert found(2, [PAD, PAD, 1, PAD], [PAD, PAD, 1, PAD]) == [(0, 2, 2), (3, 1, 1)]


def test_a_processor_may_bring_the_placeholders_itself() -> None:
    assert found(1, [1, 2], [PAD, PAD, 1, 2]) == [(0, 2, 2)]
    assert found(2, [1, 2], [PAD, PAD, 5, PAD, 1, 2]) == [(0, 2, 2), (3, 1, 1)]


@pytest.mark.parametrize("ids", [set(), {OTHER_PAD}])
def test_without_known_placeholders_what_the_processor_added_counts(ids: set[int]) -> None:
    assert found(1, [1, 2, 3], [1, PAD, PAD, 2, 3], ids) == [(1, 2, 2)]
    assert found(2, [1, PAD, 2, PAD, 3], [1, PAD, PAD, 2, PAD, PAD, PAD, 3], ids) == [(1, 2, 2), (4, 3, 3)]
    assert found(1, [1, 2, 3], [1, 2, 3], ids) == []


def test_ranges_win_over_tokens() -> None:
    ranges = [{"offset": 0, "length": 2}, {"offset": 2, "length": 3}]
    assert found(2, [PAD, PAD], [PAD] * 5, ranges=ranges) == [(0, 2, 2), (2, 3, 3)]


@pytest.mark.parametrize("ranges", [[(0, 2)], [{"offset": 0}], [{"offset": "a", "length": 1}], 5])
def test_ranges_of_another_form_are_refused(ranges: Any) -> None:
    with pytest.raises(InvalidRequestError, match="expected a list of dicts with offset and length"):
        found(1, [PAD], [PAD, PAD], ranges=ranges)


def test_overlapping_ranges_are_refused() -> None:
    ranges = [{"offset": 0, "length": 3}, {"offset": 2, "length": 3}]
    with pytest.raises(InvalidRequestError, match="got a range from 2 on, expected at least 3"):
        found(2, [PAD, PAD], [PAD] * 5, ranges=ranges)


# Placements of several modalities


def placement(modality: str, index: int, offset: int, length: int) -> Placement:
    return Placement((modality,), ((index,),), Span(offset, length))


def test_placements_that_do_not_overlap_are_put_in_order() -> None:
    ordered = group_overlapping([placement("image", 0, 5, 2), placement("video", 0, 0, 5)], 7, may_group=False)
    assert [p.modalities for p in ordered] == [("video",), ("image",)]


def test_alternating_modalities_are_grouped_where_the_model_places_rows_itself() -> None:
    sound = Placement(("audio",), ((0,),), Span(1, 5, np.array([True, False, False, True, True])))
    clip = Placement(("video",), ((0,),), Span(2, 2))
    (both,) = group_overlapping([clip, sound], 8, may_group=True)
    assert both.counts == {"audio": 1, "video": 1}
    assert (both.span.offset, both.span.length, both.span.row_offsets) == (1, 5, None)
    with pytest.raises(UnsupportedFeatureError, match="audio and video items whose places alternate"):
        group_overlapping([clip, sound], 8, may_group=False)


# Through the preprocessor


def test_neighbours_of_full_size_are_told_apart() -> None:
    images = [picture(8, 1), picture(8, 2)]
    assert spans_of(Front().images(*images, text="<image><image>")) == [(0, 8), (8, 8)]


def test_neighbours_of_unknown_size_form_a_group() -> None:
    # Two adjacent items with swapped lengths (3 + 2 and 2 + 3) have equal token ids, and must not have equal keys.
    front = Front()
    one, other = (
        front.images(picture(first, 1), picture(second, 2), text="<image><image>").engine_request
        for first, second in ((3, 2), (2, 3))
    )
    assert one.prompt_token_ids == other.prompt_token_ids
    assert [(item.span.offset, item.span.length) for item in one.media] == [(0, 5)]
    assert one.media[0].key != other.media[0].key
    assert one.media[0].kwargs is not None
    assert [len(rows) for rows in one.media[0].kwargs["pixel_values"]] == [3, 2]


def test_a_model_in_one_piece_takes_media_without_a_place() -> None:
    features = features_of(tier="0 atomic", splits_media=False, atomic_items=True, placeholder_token_ids={})
    front = Front(new_model(processor=None), features=features)
    (item,) = front.images(picture(3), text="abc").engine_request.media
    assert (item.span.offset, item.span.length, item.span.row_offsets) == (0, 3, None)


def test_interleaved_groups_of_two_modalities() -> None:
    calls = Calls()
    mappers = {"image": map_pictures("image", calls), "video": map_pictures("video", calls, "video_values")}
    data = {"image": [picture(1, 1), picture(2, 2)], "video": [picture(2, 3)[None]]}
    prompt = {"prompt": "<image>a<|video_pad|>b<image>", "multi_modal_data": data}
    grouped = features_of(tier="0 auto-split", maps_items_alone=False)
    (item,) = Front(new_model(mappers=mappers), features=grouped)(prompt).engine_request.media
    assert (item.modality, item.span.offset, item.span.length, item.span.num_rows) == ("image+video", 0, 7, 5)
    assert item.kwargs is not None
    assert set(item.kwargs) == {"pixel_values", "video_values"}
    with pytest.raises(UnsupportedFeatureError, match="places alternate"):
        Front(new_model(mappers=mappers), features=features_of(maps_items_alone=False))(prompt)


def test_a_group_holds_only_the_items_whose_places_alternate() -> None:
    def processor(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
        ids = [IMAGE, IMAGE, 5, IMAGE, VIDEO, IMAGE, VIDEO]
        ranges = {"image": [(0, 2), (3, 3)], "video": [(4, 3)]}
        placeholders = {
            name: [{"offset": offset, "length": length} for offset, length in each] for name, each in ranges.items()
        }
        return {**inputs, "prompt_token_ids": ids, "multi_modal_placeholders": placeholders}

    calls = Calls()
    mappers = {"image": map_pictures("image", calls), "video": map_pictures("video", calls, "video_values")}
    front = Front(new_model(mappers=mappers, processor=processor), features=features_of(tier="0 auto-split"))
    images, clip = [picture(2, 1), picture(2, 2)], picture(2, 3)[None]
    prompt = {"prompt": "a", "multi_modal_data": {"image": images, "video": [clip]}}
    alone, group = front(prompt).engine_request.media
    assert (alone.modality, alone.span.offset, alone.span.num_rows) == ("image", 0, 2)
    assert (group.modality, group.span.offset, group.span.num_rows, group.index) == ("image+video", 3, 4, 1)
    assert group.kwargs is not None
    (pixels,) = group.kwargs["pixel_values"]
    np.testing.assert_array_equal(pixels, images[1])


def test_the_config_s_token_is_used_where_nothing_was_observed() -> None:
    features = features_of(placeholder_token_ids={})
    front = Front(features=features)
    front.config.model_config.hf_config.image_token_id = IMAGE
    processed = Front(features=features, hf_config=front.config.model_config.hf_config).images(picture(3), picture(2))
    assert spans_of(processed) == [(0, 3), (4, 2)]


def test_two_modalities_with_one_token_need_ranges() -> None:
    shared = frozenset({IMAGE, VIDEO})
    calls = Calls()
    mappers = {"image": map_pictures("image", calls), "video": map_pictures("video", calls, "video_values")}
    front = Front(
        new_model(mappers=mappers), features=features_of(placeholder_token_ids={"image": shared, "video": shared})
    )
    data = {"image": [picture(1)], "video": [picture(2)[None]]}
    with pytest.raises(InvalidRequestError, match="got 2 in the prompt for 1 items"):
        front({"prompt": "<image>a<|video_pad|>", "multi_modal_data": data})

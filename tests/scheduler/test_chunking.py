"""Where chunks end: budgets, media that isn't encoded, items that stay whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from sensorium.cache_spec import CacheGroup, CacheKind, SpanRule
from sensorium.config import ModelFeatures
from sensorium.scheduler.chunking import ChunkDraft, ChunkPlanner, Shortage
from sensorium.scheduler.encoder_cache_manager import EncoderCacheManager
from sensorium.scheduler.pacing import StepPace
from sensorium.scheduler.request import RequestState
from sensorium.scheduler.step_plan import StepPlan
from tests.scheduler.simulation import Parts, make_request

ANOTHER = ("another", 0)


def make_state(parts: Parts, two_way: frozenset[str] = frozenset()) -> RequestState:
    return RequestState(make_request("r", parts, two_way=two_way), (0, 0, 0), 1000)


def make_planner(
    *, capacity: int = 100, chunked: bool = True, splits_media: bool = True, atomic_items: bool = False
) -> tuple[ChunkPlanner, EncoderCacheManager]:
    cache = EncoderCacheManager(capacity)
    features = ModelFeatures(splits_media=splits_media, atomic_items=atomic_items)
    return ChunkPlanner(features, cache, enable_chunked_prefill=chunked), cache


def draft(
    planner: ChunkPlanner,
    state: RequestState,
    tokens: int,
    rows: int = 100,
    *,
    start: int = 0,
    max_tokens: int = 1000,
    is_alone: bool = False,
    pace: StepPace | None = None,
) -> tuple[int, list[int]] | Shortage:
    """End of the chunk and indices of the items to encode."""
    plan = StepPlan(tokens, rows, is_alone=is_alone)
    plan.pace = pace or StepPace()
    result = planner.draft(state, plan, start=start, max_tokens=max_tokens)
    if isinstance(result, Shortage):
        return result
    return result.end, [state.message.media.index(item) for item in result.encode]


def image(rows: int, key: str = "a") -> tuple[str, Sequence[bool]]:
    return key, (True,) * rows


MIXED = [[1] * 5, image(6, "a"), [1] * 2, image(4, "b"), [1] * 3]  # spans [5, 11) and [13, 17), 20 tokens


def test_a_chunk_ends_at_the_budget_of_tokens_and_at_the_table() -> None:
    planner, _ = make_planner()
    state = make_state([[1] * 20])
    assert draft(planner, state, 8) == (8, [])
    assert draft(planner, state, 80) == (20, [])
    assert draft(planner, state, 8, start=15) == (20, [])
    assert draft(planner, state, 8, max_tokens=4) == (4, [])
    assert draft(planner, state, 0) is Shortage.BUDGET
    assert draft(planner, state, 8, start=4, max_tokens=4) is Shortage.BLOCKS


def test_items_that_a_chunk_reaches_are_encoded_and_a_chunk_may_end_inside_one() -> None:
    planner, _ = make_planner()
    assert draft(planner, make_state(MIXED), 5) == (5, [])
    assert draft(planner, make_state(MIXED), 8) == (8, [0])
    assert draft(planner, make_state(MIXED), 20) == (20, [0, 1])
    assert draft(planner, make_state(MIXED), 20, start=11) == (20, [1])


def test_a_chunk_is_cut_before_the_first_row_that_nobody_encoded() -> None:
    planner, _ = make_planner()
    assert draft(planner, make_state(MIXED), 20, rows=9) == (13, [0])
    masked = [[1] * 3, image(6, "a"), ("b", (False, False, True, True))]
    assert draft(planner, make_state(masked), 20, rows=7) == (11, [0]), "separators of the span need no encoder"


def test_an_item_over_the_budget_is_encoded_as_the_only_one() -> None:
    planner, _ = make_planner()
    assert draft(planner, make_state(MIXED), 20, rows=1) == (13, [0])
    assert draft(planner, make_state(MIXED), 20, rows=1, start=13) == (20, [1])
    plan = StepPlan(20, 9)
    state = make_state(MIXED)
    plan.add_encoder_input(state, state.message.media[0])
    assert planner.draft(state, plan, start=13, max_tokens=1000) is Shortage.BUDGET


def test_rows_count_and_not_spans() -> None:
    planner, _ = make_planner()
    sparse = [("a", (True, *(False,) * 9)), ("b", (True, *(False,) * 9))]
    assert draft(planner, make_state(sparse), 20, rows=2) == (20, [0, 1])


def test_items_in_the_cache_are_not_encoded_again() -> None:
    planner, cache = make_planner()
    cache.hold("a", 6, ANOTHER)
    assert draft(planner, make_state(MIXED), 20, rows=4) == (20, [1])
    cache.release("a", ANOTHER)
    assert draft(planner, make_state(MIXED), 20, rows=4) == (20, [1])


def test_an_item_that_stands_twice_is_encoded_once() -> None:
    planner, _ = make_planner(capacity=6)
    assert draft(planner, make_state([image(6), [1], image(6)]), 20, rows=6) == (13, [0])


def test_a_full_cache_cuts_the_chunk_and_says_so_where_nothing_is_left() -> None:
    planner, cache = make_planner(capacity=12)
    cache.hold("x", 5, ANOTHER)
    assert draft(planner, make_state(MIXED), 20) == (13, [0])
    assert draft(planner, make_state(MIXED), 20, start=5) == (13, [0])
    cache.hold("y", 5, ANOTHER)
    assert draft(planner, make_state(MIXED), 20) == (5, [])
    assert draft(planner, make_state(MIXED), 20, start=5) is Shortage.ENCODER_CACHE


def test_an_item_larger_than_the_cache_is_taken_when_nothing_else_is_held() -> None:
    planner, cache = make_planner(capacity=3)
    assert draft(planner, make_state(MIXED), 20) == (13, [0])
    cache.hold("x", 1, ANOTHER)
    assert draft(planner, make_state(MIXED), 20, start=5) is Shortage.ENCODER_CACHE
    cache.release("x", ANOTHER)
    assert draft(planner, make_state(MIXED), 20, start=5) == (13, [0])


def test_entries_that_must_be_held_again_count_as_room_taken() -> None:
    """An unheld entry may be evicted for others; a chunk that needs it and another item needs room for both."""
    planner, cache = make_planner(capacity=8)
    cache.hold("b", 4, ANOTHER)
    cache.release("b", ANOTHER)
    assert draft(planner, make_state(MIXED), 20) == (13, [0])


def test_nobody_takes_more_of_a_closed_encoder_cache() -> None:
    planner, cache = make_planner()
    cache.hold("a", 6, ANOTHER)
    plan = StepPlan(20, 100)
    plan.is_encoder_closed = True
    result = planner.draft(make_state(MIXED), plan, start=0, max_tokens=1000)
    assert isinstance(result, ChunkDraft)
    assert (result.end, result.encode) == (13, []), "what is held may be shared"


@pytest.mark.parametrize("splits_media", [True, False])
def test_whole_items(splits_media: bool) -> None:
    planner, _ = make_planner(splits_media=splits_media, atomic_items=True)
    state = make_state(MIXED)
    first, second = ([0], [1]) if splits_media else ([], [])
    assert draft(planner, state, 8) == (5, [])
    assert draft(planner, state, 11) == (11, first)
    assert draft(planner, state, 16) == (13, first)
    assert draft(planner, state, 5, start=5) is Shortage.BUDGET
    assert draft(planner, state, 6, start=5) == (11, first)
    assert draft(planner, state, 6, start=12) == (18, second)
    assert draft(planner, state, 20, start=5, max_tokens=10) is Shortage.BLOCKS
    assert [planner.min_chunk(state, p) for p in (0, 5, 11, 13, 17)] == [1, 6, 1, 4, 1]


IMAGES = frozenset({"image"})
PROMPT = frozenset({"prompt"})


def test_a_span_that_sees_itself_both_ways_is_computed_in_one_chunk() -> None:
    """Its first position needs the last one's key, which a later chunk would bring."""
    planner, _ = make_planner()
    state = make_state(MIXED, IMAGES)
    assert draft(planner, state, 8) == (5, [])
    assert draft(planner, state, 11) == (11, [0])
    assert draft(planner, state, 16) == (13, [0])
    assert draft(planner, state, 5, start=5) is Shortage.BUDGET
    assert draft(planner, state, 20, start=5, max_tokens=10) is Shortage.BLOCKS
    assert [planner.min_chunk(state, p) for p in (0, 5, 11, 13, 17)] == [1, 6, 1, 4, 1]
    assert planner.least_chunk_tokens(state.message) == 6


@pytest.mark.parametrize(
    ("kind", "reach", "rule", "rounded"),
    [
        (CacheKind.FULL, None, SpanRule.SEEN, [0, 4, 8, 12, 16, 20]),
        (CacheKind.WINDOW, 4, SpanRule.SEEN, [0, 4, 8, 12, 16, 20]),
        (CacheKind.WINDOW, 3, SpanRule.SEEN, [0, 4, 4, 12, 12, 20]),
        (CacheKind.WINDOW, 3, SpanRule.WITHIN_REACH, [0, 4, 8, 12, 16, 20]),
        (CacheKind.CHUNK, 8, SpanRule.SEEN, [0, 4, 4, 12, 12, 20]),
        (CacheKind.CHUNK, 8, SpanRule.IGNORED, [0, 4, 8, 12, 16, 20]),
    ],
)
def test_a_prefix_ends_inside_a_span_only_if_its_beginning_is_seen_from_there(
    kind: CacheKind, reach: int | None, rule: SpanRule, rounded: list[int]
) -> None:
    """Spans [5, 11) and [13, 17), which a window of 3 doesn't reach back over."""
    features = ModelFeatures(two_way=IMAGES)
    groups = [CacheGroup(CacheKind.FULL, 9, 4), CacheGroup(kind, 9, 4, reach, spans=rule)]
    planner = ChunkPlanner(features, EncoderCacheManager(100), enable_chunked_prefill=True, groups=groups)
    state = make_state(MIXED, IMAGES)
    assert [planner.round_prefix(state, n, 4) for n in (0, 4, 8, 12, 16, 20)] == rounded
    whole = ChunkPlanner(
        replace(features, atomic_items=True), EncoderCacheManager(100), enable_chunked_prefill=True, groups=groups
    )
    assert whole.round_prefix(make_state([[1] * 3, ("a", (False, True, True, True))], IMAGES), 5, 1) == 3


def test_only_the_rows_of_an_item_see_one_another_and_not_its_markers() -> None:
    planner, _ = make_planner()
    parts = [[1] * 2, ("a", (False, True, True, True, False, True, True))]  # rows at 3 to 5 and at 7 to 8
    assert draft(planner, make_state(parts, IMAGES), 3) == (3, [])
    assert draft(planner, make_state(parts, IMAGES), 5) == (3, [])
    assert draft(planner, make_state(parts, IMAGES), 6) == (6, [0])
    assert draft(planner, make_state(parts, IMAGES), 8) == (7, [0])


def test_items_of_one_span_are_encoded_in_one_step_or_not_yet() -> None:
    """Rows that follow each other are one span, and a whole prompt is one: without the last item none is of use."""
    planner, cache = make_planner()
    parts = [[1] * 4, image(3, "a"), image(3, "b"), [1] * 2]
    assert draft(planner, make_state(parts, IMAGES), 20, rows=3) == (4, [])
    assert draft(planner, make_state(parts, IMAGES), 20, rows=6) == (12, [0, 1])
    assert draft(planner, make_state(MIXED, PROMPT), 19) is Shortage.BUDGET
    assert draft(planner, make_state(MIXED, PROMPT), 20, rows=9) is Shortage.BUDGET
    assert draft(planner, make_state(MIXED, PROMPT), 20) == (20, [0, 1])
    cache.hold("x", 92, ANOTHER)
    assert draft(planner, make_state(MIXED, PROMPT), 20) is Shortage.ENCODER_CACHE
    for capacity in (0, 6):
        assert draft(make_planner(capacity=capacity)[0], make_state(MIXED, PROMPT), 20) == (20, [0, 1]), "nobody else's"


def test_a_first_prefill_takes_the_time_of_all_items_that_it_can_not_do_without() -> None:
    planner, _ = make_planner()
    slow = StepPace(1.0, token_s=0.01, row_s=1.0)
    assert draft(planner, make_state(MIXED, PROMPT), 100, pace=slow) == (20, [0, 1])


def test_whole_items_are_cut_before_the_span_and_not_before_its_first_row() -> None:
    planner, _ = make_planner(atomic_items=True)
    parts = [image(6, "a"), ("b", (False, False, True, True))]
    assert draft(planner, make_state(parts), 20, rows=6) == (6, [0])


def test_a_prefix_ends_inside_no_whole_item() -> None:
    planner, _ = make_planner(splits_media=False)
    state = make_state(MIXED)
    rounded = [planner.round_prefix(state, n, 4) for n in (0, 4, 8, 12, 16, 20)]
    assert rounded == [0, 4, 4, 12, 12, 20]
    split, _ = make_planner()
    assert split.round_prefix(make_state(MIXED), 8, 4) == 8


def test_rounding_may_land_in_the_item_before() -> None:
    planner, _ = make_planner(splits_media=False)
    state = make_state([[1] * 5, image(4, "a"), image(9, "b")])  # spans [5, 9) and [9, 18)
    assert planner.round_prefix(state, 16, 4) == 4


def test_whole_prompts_take_all_or_nothing() -> None:
    planner, cache = make_planner(chunked=False)
    state = make_state(MIXED)
    assert draft(planner, state, 19) is Shortage.BUDGET
    assert draft(planner, state, 20, max_tokens=19) is Shortage.BLOCKS
    assert draft(planner, state, 20, rows=9) is Shortage.BUDGET
    assert draft(planner, state, 20, rows=9, is_alone=True) == (20, [0, 1])
    assert draft(planner, state, 20, rows=10) == (20, [0, 1])
    cache.hold("x", 95, ANOTHER)
    assert draft(planner, state, 20) is Shortage.ENCODER_CACHE


def test_the_pace_bounds_tokens_and_items_but_not_the_first_of_each() -> None:
    planner, _ = make_planner()
    state = make_state(MIXED)
    slow = StepPace(0.0, 1.0, 1.0)
    assert draft(planner, state, 20, pace=slow) == (13, [0]), "one item; the floor of tokens is above 13"
    plan = StepPlan(20, 100)
    plan.pace = slow
    plan.add_prefill(1, ())
    assert planner.draft(state, plan, start=0, max_tokens=1000) is Shortage.BUDGET
    fast = StepPace(1.0, 0.01, 0.01)
    assert draft(planner, state, 20, pace=fast) == (20, [0, 1])


def test_time_spent_encoding_shortens_the_chunk() -> None:
    planner, _ = make_planner()
    state = make_state([image(50), [1] * 100])
    assert draft(planner, state, 150, pace=StepPace(1.0, 0.01, 0.01)) == (50, [0])
    assert draft(planner, state, 150, pace=StepPace(2.0, 0.01, 0.01)) == (150, [0])


def test_the_pace_never_splits_a_whole_item_or_a_whole_prompt() -> None:
    slow = StepPace(0.0, 1.0, 1.0)
    whole_items, _ = make_planner(atomic_items=True)
    big = make_state([image(60), [1] * 60])
    assert draft(whole_items, big, 200, pace=slow) == (60, [0])
    whole_prompts, _ = make_planner(chunked=False, capacity=1000)
    assert draft(whole_prompts, big, 200, pace=slow) == (120, [0])


@pytest.mark.parametrize("mode", [{"atomic_items": True}, {"chunked": False}], ids=str)
def test_behind_another_prefill_an_item_needs_time_to_be_encoded(mode: dict[str, bool]) -> None:
    planner, _ = make_planner(**mode)
    state = make_state([image(60)])
    for seconds, expected in ((0.8, False), (1.3, True)):
        plan = StepPlan(200, 100)
        plan.pace = StepPace(seconds, 0.01, 0.01)
        plan.add_prefill(5, ())
        result = planner.draft(state, plan, start=0, max_tokens=1000)
        assert isinstance(result, ChunkDraft) == expected, "5 + 60 tokens and 60 rows take 1.25 s"

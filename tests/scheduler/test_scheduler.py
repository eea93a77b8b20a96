"""The scheduler's behaviour, one promise per test, against the fake worker."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest

from sensorium.cache_spec import CacheGroup, CacheKind
from sensorium.config import CacheConfig, ModelFeatures, SchedulerConfig
from sensorium.messages import FinishReason, ModelRunnerOutput, SchedulerOutput
from sensorium.scheduler.pacing import Pacer
from tests.scheduler.simulation import Limits, Simulation, full_attention, make_request


def make_simulation(
    *,
    tokens: int = 64,
    seqs: int = 8,
    rows: int = 100,
    cache_rows: int | None = None,
    blocks: int = 64,
    chunked: bool = True,
    prefix_caching: bool = True,
    policy: str = "fcfs",
    splits_media: bool = True,
    atomic_items: bool = False,
    two_way: frozenset[str] = frozenset(),
    max_drafts: int = 0,
) -> Simulation:
    scheduler = SchedulerConfig(
        max_num_batched_tokens=tokens,
        max_num_seqs=seqs,
        max_num_encoder_rows=rows,
        enable_chunked_prefill=chunked,
        policy=policy,
        max_token_gap_s=1e9,
    )
    cache = CacheConfig(block_size=4, enable_prefix_caching=prefix_caching, encoder_cache_rows=cache_rows)
    features = ModelFeatures(splits_media=splits_media, atomic_items=atomic_items, two_way=two_way)
    limits = Limits(scheduler, cache, features, blocks, max_model_len=4 * blocks)
    return Simulation(limits, max_drafts=max_drafts)


def chunks(step: SchedulerOutput) -> dict[str, tuple[int, int]]:
    """Request id -> first token and number of tokens."""
    return {chunk.request_id: (chunk.num_computed_tokens, chunk.num_scheduled_tokens) for chunk in step.chunks}


def encoded(simulation: Simulation, step: SchedulerOutput) -> list[str]:
    return [simulation.requests[each.request_id].media[each.item].key for each in step.encoder_inputs]


def image(rows: int, key: str = "a") -> tuple[str, Sequence[bool]]:
    return key, (True,) * rows


# Steps


def test_streams_come_first_then_prefills_that_have_begun_then_the_line() -> None:
    simulation = make_simulation(tokens=16)
    simulation.add(make_request("a", [[1] * 4], max_tokens=20, ignore_eos=True))
    assert chunks(simulation.step()) == {"a": (0, 4)}
    simulation.add(make_request("b", [[2] * 20]))
    simulation.add(make_request("c", [[3] * 20]))
    assert chunks(simulation.step()) == {"a": (4, 1), "b": (0, 15)}
    step = simulation.step()
    assert list(chunks(step).items()) == [("a", (5, 1)), ("b", (15, 5)), ("c", (0, 10))]
    assert [chunk.is_last for chunk in step.chunks] == [True, True, False]
    simulation.finish()


def test_all_streams_get_a_token_in_every_step_beside_a_long_prompt() -> None:
    simulation = make_simulation(tokens=8, blocks=100)
    for name in "abcd":
        simulation.add(make_request(name, [[ord(name)] * 2], max_tokens=30, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("long", [[1] * 100]))
    for _ in range(20):
        step = chunks(simulation.step())
        assert set(step) == {*"abcd", "long"}
        assert step["long"][1] == 4
    simulation.finish()


def test_more_slots_than_tokens_leave_no_stream_without_one() -> None:
    """Who gets in takes a token that no stream needed; the simulation checks that each stream has its own."""
    simulation = make_simulation(tokens=3, seqs=8)
    for name in "abcdef":
        simulation.add(make_request(name, [[ord(name)] * 2], max_tokens=5, ignore_eos=True))
    simulation.finish()
    assert max(len(step.chunks) for step in simulation.steps) == 3


def test_drafts_that_are_right_save_steps() -> None:
    simulation = make_simulation(max_drafts=4)
    for name in "abc":
        simulation.add(make_request(name, [[ord(name)] * 6], max_tokens=30, ignore_eos=True))
    simulation.finish()
    stats = simulation.scheduler.stats()
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    num_tokens = sum(len(outcome.token_ids) for outcome in simulation.outcomes.values())
    assert num_tokens == 90
    decodes = [chunk for step in simulation.steps for chunk in step.chunks if chunk.num_computed_tokens >= 6]
    assert len(decodes) + stats.num_accepted_tokens + 3 == 90, "a prompt's and a decode's token, and those on top"


def test_drafts_take_what_nobody_else_needs() -> None:
    """Tokens of a step go to streams, to prefills and then to drafts; blocks likewise, and nobody is preempted."""
    simulation = make_simulation(tokens=8, blocks=20, max_drafts=4)
    for name in "abcd":
        simulation.add(make_request(name, [[ord(name)] * 2], max_tokens=14, ignore_eos=True))
    for _ in range(3):
        simulation.step()
    simulation.add(make_request("long", [[1] * 10], max_tokens=4))
    step = simulation.step()
    assert chunks(step)["long"][1] == 4
    assert not any(chunk.draft_token_ids for chunk in step.chunks)
    simulation.finish()
    assert simulation.scheduler.stats().num_accepted_tokens > 0
    assert simulation.scheduler.stats().num_preemptions == 0


def _seconds_at(token_s: float, step: SchedulerOutput) -> tuple[float, float]:
    """Of a step in which each request has a token for the price of the step, and others cost `token_s`."""
    return 0.0, 0.04 + token_s * (step.num_scheduled_tokens - len(step.chunks))


def test_drafts_keep_to_the_token_gap() -> None:
    requests = [make_request(name, [[ord(name)] * 4], max_tokens=40, ignore_eos=True) for name in "abcd"]
    for token_s, most in ((0.01, 5), (1.0, 0), (1e-9, 16)):
        limits = make_simulation().limits
        scheduler = replace(limits.scheduler, max_token_gap_s=0.1)
        pacer = Pacer(0.1, decode_s=0.04, token_s=token_s)
        simulation = Simulation(replace(limits, scheduler=scheduler), max_drafts=4, pacer=pacer)
        simulation.worker.seconds = partial(_seconds_at, token_s)
        for request in requests:
            simulation.add(request)
        simulation.finish()
        found = max(sum(len(chunk.draft_token_ids) for chunk in step.chunks) for step in simulation.steps)
        assert found <= most
        assert (found > 0) == (most > 0)


@pytest.mark.parametrize("right", [True, False])
def test_a_request_whose_guesses_are_wrong_is_planned_ahead_again(right: bool) -> None:
    """It gets none for a while, and so needs no token to guess from."""
    limits = make_simulation().limits
    simulation = Simulation(
        replace(limits, scheduler=replace(limits.scheduler, max_steps_in_flight=2)),
        max_drafts=4,
        share_right=1.0 if right else 0.0,
    )
    simulation.add(make_request("a", [[1] * 6], max_tokens=40, ignore_eos=True))
    num_ahead = 0
    while simulation.scheduler.has_unfinished_requests():
        simulation.step()
        num_ahead += len(simulation._in_flight)
    assert num_ahead == 0 if right else num_ahead > 20
    simulation.finish()


def test_a_request_whose_layers_keep_a_state_gets_no_drafts() -> None:
    """What a state took in can't be taken back."""
    limits = make_simulation().limits
    groups = (*full_attention(64, 4), CacheGroup(CacheKind.STATE, 24, 4))
    simulation = Simulation(replace(limits, cache_groups=groups), max_drafts=4)
    simulation.add(make_request("a", [[1] * 6], max_tokens=20, ignore_eos=True))
    simulation.finish()
    assert not any(chunk.draft_token_ids for step in simulation.steps for chunk in step.chunks)


def test_others_go_on_while_a_request_with_drafts_waits_for_its_result() -> None:
    limits = make_simulation().limits
    scheduler = replace(limits.scheduler, max_steps_in_flight=3)
    simulation = Simulation(replace(limits, scheduler=scheduler), max_drafts=4)
    simulation.add(make_request("a", [[1] * 6], max_tokens=20, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("b", [[2] * 100], max_tokens=4, ignore_eos=True))
    simulation.step()
    assert [set(chunks(step)) for step in simulation.steps] == [{"a"}, {"a", "b"}, {"b"}]
    simulation.finish()


def test_a_step_without_work_is_empty_and_tells_what_to_free() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 4], max_tokens=1))
    simulation.step()
    assert simulation.scheduler.has_releases
    assert not simulation.scheduler.has_unfinished_requests()
    step = simulation.step()
    assert (step.chunks, step.freed_request_ids) == ((), ("a",))
    assert not simulation.scheduler.has_releases


# Prefix cache


def test_a_prefix_is_used_after_the_step_that_computed_it() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 30], max_tokens=1))
    simulation.step()
    simulation.add(make_request("b", [[1] * 30, [2]], max_tokens=1))
    assert chunks(simulation.step()) == {"b": (28, 3)}
    simulation.finish()
    assert simulation.outcomes["a"].final is not None
    assert simulation.outcomes["b"].final is not None
    assert simulation.outcomes["b"].final.num_cached_tokens == 28
    stats = simulation.scheduler.stats()
    assert (stats.num_prefix_hit_tokens, stats.num_prefix_query_tokens) == (28, 61)


def test_outputs_of_one_prompt_that_arrive_together_share_one_prefill() -> None:
    simulation = make_simulation(tokens=16)
    for i in range(4):
        simulation.add(make_request(f"r{i}", [[1] * 10, image(20), [2] * 7], max_tokens=3, ignore_eos=True))
    simulation.finish()
    prompt_tokens = sum(c.num_scheduled_tokens for s in simulation.steps for c in s.chunks) - 4 * 2
    assert prompt_tokens == 37 + 3 * (37 - 36), "each but the first computes what no full block holds"
    assert sum(len(step.encoder_inputs) for step in simulation.steps) == 1


def test_others_overtake_those_who_wait_for_a_prefix() -> None:
    simulation = make_simulation(tokens=16)
    simulation.add(make_request("a", [[1] * 12]))
    simulation.add(make_request("b", [[1] * 12]))
    simulation.add(make_request("c", [[2] * 4]))
    assert set(chunks(simulation.step())) == {"a", "c"}
    assert chunks(simulation.step())["b"] == (8, 4)
    simulation.finish()


@pytest.mark.parametrize(("num_same", "gets_in"), [(10, True), (30, False)])
def test_only_so_many_are_passed_over_in_a_step(num_same: int, gets_in: bool) -> None:
    simulation = make_simulation(seqs=40)
    for i in range(1 + num_same):
        simulation.add(make_request(f"same{i}", [[1] * 12], max_tokens=1))
    simulation.add(make_request("other", [[2] * 4], max_tokens=1))
    assert set(chunks(simulation.step())) == ({"same0", "other"} if gets_in else {"same0"})
    simulation.finish()


def test_media_are_part_of_a_prefix_and_swapped_lengths_share_nothing() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [image(9, "x"), image(6, "y"), [1] * 5], max_tokens=1))
    simulation.step()
    simulation.add(make_request("b", [image(6, "y"), image(9, "x"), [1] * 5], max_tokens=1))
    simulation.step()
    simulation.add(make_request("c", [image(9, "x"), image(7, "z"), [1] * 4], max_tokens=1))
    simulation.step()
    simulation.add(make_request("d", [image(9, "x"), image(6, "y"), [1] * 5], max_tokens=1))
    simulation.step()
    simulation.finish()
    cached = [outcome.final.num_cached_tokens for outcome in simulation.outcomes.values() if outcome.final]
    assert cached == [0, 0, 8, 16], "c shares the two blocks that hold x alone"


@pytest.mark.parametrize("variant", [{"splits_media": False}, {"atomic_items": True}], ids=str)
def test_a_cached_prefix_ends_inside_no_item_that_must_stay_whole(variant: dict[str, bool]) -> None:
    simulation = make_simulation(**variant)  # type: ignore[arg-type]
    simulation.add(make_request("a", [[1] * 5, image(17), [2] * 3], max_tokens=1))
    simulation.step()
    simulation.add(make_request("b", [[1] * 5, image(17), [3] * 3], max_tokens=1))
    assert chunks(simulation.step()) == {"b": (4, 21)}, "20 tokens are cached, but the item ends at 22"
    simulation.finish()


def test_blocks_of_a_span_that_sees_itself_both_ways_are_found_only_with_the_same_span() -> None:
    """A block within a span was once identified by what stands up to its end, though its KV depends on what follows.

    The first block of both prompts holds `a` alone. If they shared it, the third request would go on from the second's
    later blocks behind the first one's first.
    """
    images = frozenset({"image"})
    simulation = make_simulation(two_way=images)
    for i, key in enumerate("bccb"):
        simulation.add(make_request(f"r{i}", [image(4, "a"), image(4, key), [1] * 8], max_tokens=1, two_way=images))
        simulation.finish()
    cached = [outcome.final.num_cached_tokens for outcome in simulation.outcomes.values() if outcome.final]
    assert cached == [0, 0, 12, 12]


def test_a_prompt_that_sees_all_of_itself_goes_on_after_a_preemption_and_finds_its_equal_alone() -> None:
    prompt = frozenset({"prompt"})
    simulation = make_simulation(two_way=prompt, blocks=8, tokens=16)
    for i in range(3):
        simulation.add(make_request(f"r{i}", [[1] * (10 + i % 2)], max_tokens=12, ignore_eos=True, two_way=prompt))
    simulation.finish()
    assert simulation.scheduler.stats().num_preemptions > 0
    cached = [outcome.final.num_cached_tokens for outcome in simulation.outcomes.values() if outcome.final]
    assert cached == [0, 0, 8], "the second prompt is longer, and so it differs from its first token on"


def test_requests_with_different_salts_share_nothing() -> None:
    simulation = make_simulation()
    for i, salt in enumerate([None, "one", "two", "one"]):
        simulation.add(make_request(f"r{i}", [[1] * 30], max_tokens=1, cache_salt=salt))
        simulation.step()
    cached = [outcome.final.num_cached_tokens for outcome in simulation.outcomes.values() if outcome.final]
    assert cached == [0, 0, 0, 28]


def test_items_in_a_cached_prefix_are_not_encoded() -> None:
    simulation = make_simulation(cache_rows=0)
    for i in range(2):
        simulation.add(make_request(f"r{i}", [image(8, "x"), [i] * 5], max_tokens=1))
        simulation.step()
    assert [len(step.encoder_inputs) for step in simulation.steps] == [1, 0]
    simulation.add(make_request("half", [image(8, "x"), image(6, "y")], max_tokens=1))
    assert encoded(simulation, simulation.step()) == ["y"]
    simulation.finish()


def test_a_reset_lets_nobody_use_what_was_computed_before() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 30], max_tokens=8, ignore_eos=True))
    simulation.step()
    simulation.scheduler.reset_prefix_cache()
    simulation.finish()
    simulation.add(make_request("b", [[1] * 30], max_tokens=1))
    assert chunks(simulation.step())["b"] == (0, 30)


def test_the_answer_is_part_of_the_next_turn_s_prefix() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 6], max_tokens=7, ignore_eos=True))
    simulation.finish()
    simulation.add(make_request("b", [[1] * 6, simulation.outcomes["a"].token_ids, [5] * 3], max_tokens=1))
    assert chunks(simulation.step())["b"] == (12, 4)


# Memory


def test_the_youngest_is_preempted_keeps_its_place_and_resumes_with_its_tokens() -> None:
    simulation = make_simulation(blocks=10, seqs=3)
    for name in "abc":
        simulation.add(make_request(name, [[ord(name)] * 6], max_tokens=12, ignore_eos=True))
    simulation.finish()
    assert simulation.scheduler.stats().num_preemptions > 0
    again = [new for step in simulation.steps for new in step.new_requests if new.output_token_ids]
    assert {new.request.request_id for new in again} == {"c"}
    finished = list(dict.fromkeys(i for step in simulation.steps for i in step.freed_request_ids if i != "c"))
    assert finished == ["a", "b"], "the older ones never lose their blocks"
    arrivals = [new.request.request_id for step in simulation.steps for new in step.new_requests]
    assert arrivals[:3] == ["a", "b", "c"]


def test_a_preempted_request_goes_before_those_that_came_after_it() -> None:
    simulation = make_simulation(blocks=8, seqs=3)
    for name in "abc":
        simulation.add(make_request(name, [[ord(name)] * 6], max_tokens=12, ignore_eos=True))
    while not simulation.scheduler.stats().num_preemptions:
        simulation.step()
    simulation.add(make_request("d", [[9] * 2], max_tokens=2))
    simulation.finish()
    order = [new.request.request_id for step in simulation.steps for new in step.new_requests]
    assert order.count("c") > 1
    assert order[-1] == "d"


def test_a_preempted_request_finds_its_blocks_again_where_they_were_not_needed() -> None:
    simulation = make_simulation(blocks=16, seqs=2, policy="priority")
    simulation.add(make_request("low", [[1] * 40], max_tokens=10, ignore_eos=True, priority=1))
    simulation.step()
    simulation.add(make_request("high", [[2] * 30], max_tokens=2, ignore_eos=True, priority=0))
    simulation.finish()
    chunks_of_low = [chunks(step)["low"] for step in simulation.steps if "low" in chunks(step)]
    resumed = next(begin for i, (begin, _) in enumerate(chunks_of_low) if i and begin < sum(chunks_of_low[i - 1]))
    assert resumed >= 28, "the end of a sequence is reused before its beginning"


def test_a_prompt_is_admitted_only_where_streams_can_grow_beside_it() -> None:
    """Else it would take the last blocks, be preempted for the next token of a stream, and be prefilled again."""
    simulation = make_simulation(blocks=8)
    simulation.add(make_request("a", [[1] * 15], max_tokens=4, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("b", [[2] * 16], max_tokens=2))
    assert set(chunks(simulation.step())) == {"a"}, "four blocks are free, and b needs four"
    simulation.finish()
    assert simulation.scheduler.stats().num_preemptions == 0


def test_a_prompt_is_admitted_only_where_prefills_that_have_begun_can_end_beside_it() -> None:
    simulation = make_simulation(blocks=16, rows=8)
    simulation.add(make_request("a", [[1] * 3, image(8, "x"), image(8, "y"), [1] * 11], max_tokens=2))
    simulation.add(make_request("b", [[2] * 40], max_tokens=2))
    assert chunks(simulation.step()) == {"a": (0, 11)}, "y waits for the next step's encoder budget"
    assert "b" not in chunks(simulation.step())
    simulation.finish()
    assert simulation.scheduler.stats().num_preemptions == 0


def test_encoded_rows_may_leave_with_the_victim_that_held_them() -> None:
    """An urgent request counted on the rows of an image that the one it displaces was using: they must be encoded
    again, since a cache that is too small for them drops them with their last holder."""
    simulation = make_simulation(seqs=1, tokens=16, cache_rows=0, policy="priority")
    simulation.add(make_request("low", [image(40, "x")], priority=1))
    simulation.step()
    simulation.add(make_request("urgent", [[2] * 5, image(40, "x")], priority=0))
    step = simulation.step()
    assert (set(chunks(step)), step.free_encoder_keys, encoded(simulation, step)) == ({"urgent"}, ("x",), ["x"])
    simulation.finish()


def test_an_overtaken_request_and_an_oversized_one_never_wait_for_each_other() -> None:
    """`held` waits one step for a prefix; `big` gets in meanwhile and then needs a step for itself. `held` is the
    older one but has no room while `big` is there, so `big` must go on."""
    simulation = make_simulation(tokens=16, blocks=34, splits_media=False)
    simulation.add(make_request("first", [[1] * 12], max_tokens=1))
    simulation.add(make_request("held", [[1] * 112], max_tokens=2))
    simulation.add(make_request("big", [[2] * 3, image(40)], max_tokens=2))
    assert set(chunks(simulation.step())) == {"first", "big"}
    assert chunks(simulation.step()) == {"big": (3, 40)}
    simulation.finish()


def test_a_victim_comes_back_in_a_later_step() -> None:
    """The second victim frees enough for the first to fit again, but a slot isn't freed and taken in one step."""
    simulation = make_simulation(blocks=16, policy="priority")
    simulation.add(make_request("large", [[1] * 40], max_tokens=5, ignore_eos=True, priority=1))
    simulation.add(make_request("small", [[2] * 2], max_tokens=5, ignore_eos=True, priority=2))
    simulation.step()
    simulation.add(make_request("urgent", [[3] * 28], max_tokens=5, ignore_eos=True, priority=0))
    step = simulation.step()
    assert set(step.freed_request_ids) == {"large", "small"}
    assert set(chunks(step)) == {"urgent"}
    simulation.finish()


def test_priority_takes_slots_and_first_come_does_not() -> None:
    for policy, expected in (("priority", {"b", "urgent"}), ("fcfs", {"a", "b"})):
        simulation = make_simulation(seqs=2, policy=policy)
        simulation.add(make_request("a", [[1] * 3], max_tokens=30, ignore_eos=True, priority=2))
        simulation.add(make_request("b", [[2] * 3], max_tokens=30, ignore_eos=True, priority=1))
        simulation.step()
        simulation.add(make_request("urgent", [[3] * 3], max_tokens=30, ignore_eos=True, priority=0))
        assert set(chunks(simulation.step())) == expected
        simulation.finish()


def test_equal_priority_takes_nothing() -> None:
    simulation = make_simulation(seqs=1, policy="priority")
    simulation.add(make_request("a", [[1] * 3], max_tokens=30, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("b", [[2] * 3], max_tokens=3))
    simulation.finish()
    assert simulation.scheduler.stats().num_preemptions == 0


def test_urgent_prompts_go_before_prefills_that_have_begun() -> None:
    simulation = make_simulation(tokens=8, blocks=200, policy="priority")
    simulation.add(make_request("slow", [[1] * 200], priority=1))
    simulation.step()
    simulation.add(make_request("urgent", [[2] * 12], max_tokens=1, priority=0))
    assert chunks(simulation.step()) == {"urgent": (0, 8)}
    assert chunks(simulation.step()) == {"urgent": (8, 4), "slow": (8, 4)}
    simulation.finish()


# Encoder


def test_an_item_is_encoded_once_for_all_who_need_it() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 3, image(9)], max_tokens=2))
    simulation.add(make_request("b", [[2] * 5, image(9)], max_tokens=2))
    step = simulation.step()
    assert (set(chunks(step)), encoded(simulation, step)) == ({"a", "b"}, ["a"])
    simulation.add(make_request("c", [[3] * 7, image(9)], max_tokens=2))
    assert encoded(simulation, simulation.step()) == []
    simulation.finish()
    stats = simulation.scheduler.stats()
    assert (stats.num_encoder_queries, stats.num_encoder_hits, stats.num_encoded_rows) == (3, 2, 9)


def test_rows_stay_until_the_last_of_them_is_computed() -> None:
    simulation = make_simulation(tokens=4, cache_rows=10)
    simulation.add(make_request("a", [image(10, "x"), [1]], max_tokens=1))
    simulation.add(make_request("b", [[2], image(10, "y"), [1]], max_tokens=1))
    simulation.finish()
    assert [key for step in simulation.steps for key in encoded(simulation, step)] == ["x", "y"]
    freed = [step.step for step in simulation.steps if "x" in step.free_encoder_keys]
    assert freed == [4], "x leaves when y needs its room, after the third chunk of a"


def test_an_item_over_every_bound_is_encoded_alone() -> None:
    simulation = make_simulation(rows=5, cache_rows=8)
    simulation.add(make_request("big", [[1] * 2, image(30, "big"), image(4, "small")], max_tokens=2))
    simulation.add(make_request("other", [image(3, "other")], max_tokens=2))
    simulation.finish()
    assert next(encoded(simulation, step) for step in simulation.steps if step.encoder_inputs) == ["big"]


@pytest.mark.parametrize(
    "variant",
    [
        {"rows": 5, "cache_rows": 8},
        {"rows": 50, "cache_rows": 8},
        {"tokens": 16, "splits_media": False},
        {"tokens": 16, "atomic_items": True, "rows": 5, "cache_rows": 8},
        {"tokens": 16, "chunked": False, "rows": 5, "cache_rows": 8},
        {"tokens": 32, "splits_media": False},
    ],
    ids=str,
)
def test_an_oversized_request_is_not_overtaken_for_ever(variant: dict[str, int | bool]) -> None:
    """Small requests arrive in every step, always enough to fill it; the large one must still get through."""
    simulation = make_simulation(seqs=4, blocks=40, **variant)  # type: ignore[arg-type]
    oversized = [[1] * 3, image(30, "big"), [1] * 2, image(30, "also big"), [2] * 3]
    for i in range(120):
        simulation.add(make_request(f"small{i}", [[i] * 2, image(4, f"k{i}"), [i]], max_tokens=6, ignore_eos=True))
        if i == 5:
            simulation.add(make_request("oversized", oversized, max_tokens=3, ignore_eos=True))
        simulation.step()
        if simulation.outcomes.get("oversized") and simulation.outcomes["oversized"].final:
            break
    else:
        pytest.fail(f"starved: {simulation.scheduler.stats()}")
    simulation.finish()


@pytest.mark.parametrize("variant", [{"splits_media": False}, {"chunked": False}], ids=str)
def test_streams_have_every_other_step_beside_oversized_chunks(variant: dict[str, bool]) -> None:
    simulation = make_simulation(tokens=16, blocks=100, **variant)  # type: ignore[arg-type]
    simulation.add(make_request("stream", [[1]], max_tokens=40, ignore_eos=True))
    simulation.step()
    for i in range(6):
        simulation.add(make_request(f"big{i}", [image(30, f"k{i}"), [1]], max_tokens=1))
    steps = [chunks(simulation.step()) for _ in range(12)]
    assert all("stream" in a or "stream" in b for a, b in pairwise(steps))
    assert sum(len(step) == 1 and "stream" not in step for step in steps) >= 5
    simulation.finish()


def test_a_worse_holder_of_encoder_rows_gives_way() -> None:
    """The best request must never wait for a worse one that itself waits for blocks."""
    simulation = make_simulation(tokens=6, cache_rows=20, blocks=30, policy="priority")
    simulation.add(make_request("low", [image(20, "x"), [1] * 5], priority=1))
    simulation.step()
    simulation.add(make_request("high", [[2] * 2, image(20, "y")], max_tokens=1, priority=0))
    simulation.step()
    assert simulation.scheduler.stats().num_preemptions == 0, "two tokens of text stand before its image"
    step = simulation.step()
    assert step.freed_request_ids == ("low",)
    assert [new.request.request_id for new in step.new_requests] == [], "a victim doesn't return in the same step"
    assert set(chunks(step)) == {"high"}
    simulation.finish()


# Endings


def test_a_failure_ends_one_request_and_what_it_computed_is_used_by_nobody() -> None:
    simulation = make_simulation(tokens=16)
    simulation.add(make_request("good", [[1] * 12], max_tokens=3, ignore_eos=True))
    simulation.step()
    simulation.add(make_request("bad", [[2] * 20, image(6, "bad")], max_tokens=3))
    simulation.finish()
    assert simulation.outcomes["bad"].final is not None
    assert simulation.outcomes["bad"].final.finish_reason is FinishReason.ERROR
    assert simulation.outcomes["bad"].final.failure is not None
    simulation.add(make_request("next", [[2] * 20], max_tokens=1))
    assert chunks(simulation.step())["next"][0] == 0
    simulation.finish()


def test_an_item_whose_request_failed_is_encoded_anew() -> None:
    simulation = make_simulation(tokens=16)
    simulation.add(make_request("a", [image(6, "x"), [1] * 40], max_tokens=3))
    simulation.step()
    simulation.worker.failure_rate = 1.0
    step = simulation.step()
    assert simulation.outcomes["a"].final is not None
    assert not step.encoder_inputs
    simulation.worker.failure_rate = 0.0
    simulation.add(make_request("b", [[2], image(6, "x")], max_tokens=3))
    step = simulation.step()
    assert (step.free_encoder_keys, encoded(simulation, step)) == (("x",), ["x"])
    simulation.finish()


def test_a_lost_result_ends_the_request_instead_of_leaving_it_for_ever() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 4]))
    simulation.add(make_request("b", [[1] * 4], pooling=True))
    scheduler = simulation.scheduler
    outputs = scheduler.update(scheduler.schedule(), ModelRunnerOutput({}))
    assert [(output.request_id, output.finish_reason) for output in outputs] == [
        ("a", FinishReason.ERROR),
        ("b", FinishReason.ERROR),
    ]
    assert not scheduler.has_unfinished_requests()
    scheduler.check_idle()


def test_aborts_of_waiting_running_and_scheduled_requests() -> None:
    simulation = make_simulation(seqs=2)
    for name in "abcd":
        simulation.add(make_request(name, [[ord(name)] * 9, image(5, name)], max_tokens=30, ignore_eos=True))
    simulation.step()
    simulation.abort(["a", "d", "a", "unknown"])
    step = simulation.step(abort_in_flight=["b", "c"])
    assert set(chunks(step)) == {"b", "c"}
    assert "a" in step.freed_request_ids
    assert not simulation.scheduler.has_unfinished_requests()
    simulation.finish()


def test_an_id_may_be_used_again_at_once() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 9], max_tokens=30, ignore_eos=True))
    simulation.step()
    simulation.abort(["a"])
    simulation.add(make_request("a", [[2] * 5], max_tokens=3, ignore_eos=True))
    step = simulation.step()
    assert (step.freed_request_ids, chunks(step)) == (("a",), {"a": (0, 5)})
    simulation.finish()


def test_a_request_aborted_and_added_again_during_a_step_gets_nothing_of_that_step() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [[1] * 9], max_tokens=5, ignore_eos=True))
    step = simulation.scheduler.schedule()
    result = simulation.worker.execute(step)
    simulation.abort(["a"])
    simulation.add(make_request("a", [[2] * 5], max_tokens=3, ignore_eos=True))
    assert simulation.scheduler.update(step, result) == []
    simulation.finish()


def test_an_item_that_an_aborted_request_failed_to_encode_is_not_taken_for_encoded() -> None:
    simulation = make_simulation()
    simulation.add(make_request("a", [image(6, "bad")], max_tokens=3))
    simulation.step(abort_in_flight=["a"])
    assert simulation.scheduler.stats().num_encoder_cache_rows == 0
    simulation.finish()


def test_prompt_logprobs_go_out_once_though_the_prompt_was_computed_twice() -> None:
    simulation = make_simulation(tokens=8, blocks=12, policy="priority")
    simulation.add(make_request("a", [[1] * 30], max_tokens=2, prompt_logprobs=0, priority=1))
    for _ in range(2):
        simulation.step()
    simulation.add(make_request("urgent", [[2] * 30], max_tokens=2, ignore_eos=True, priority=0))
    simulation.finish()
    assert simulation.scheduler.stats().num_preemptions == 1
    assert len(simulation.outcomes["a"].prompt_logprobs) == 29


def test_a_pooled_vector_is_made_of_every_row_and_ends_the_request() -> None:
    simulation = make_simulation(tokens=8)
    simulation.add(make_request("text", [[1] * 30], max_tokens=1))
    simulation.run()
    simulation.add(make_request("pooled", [[1] * 30], pooling=True))
    assert chunks(simulation.step())["pooled"] == (0, 8)
    simulation.finish()
    assert simulation.outcomes["pooled"].final is not None
    assert simulation.outcomes["pooled"].final.finish_reason is FinishReason.STOP


def test_stats_are_those_of_the_moment() -> None:
    simulation = make_simulation(seqs=1)
    for name in "ab":
        simulation.add(make_request(name, [[ord(name)] * 9], max_tokens=2, ignore_eos=True))
    simulation.step()
    stats = simulation.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_steps) == (1, 1, 1)
    assert (stats.num_blocks, stats.num_free_blocks, stats.kv_cache_usage) == (64, 61, 3 / 64)
    simulation.finish()
    assert simulation.scheduler.stats().num_free_blocks == 64

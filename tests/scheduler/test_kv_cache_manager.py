"""Block tables, and prefixes that are found only when they are computed."""

from __future__ import annotations

import pytest

from sensorium.cache_spec import NO_BLOCK, CacheGroup, CacheKind
from sensorium.scheduler.kv_cache_manager import KVCacheManager, PrefixHit
from sensorium.scheduler.request import RequestState
from tests.scheduler.simulation import full_attention, make_request


def make_state(tokens: list[int], **kwargs: object) -> RequestState:
    return RequestState(make_request("r", [tokens], **kwargs), (0, 0, 0), 1000)  # type: ignore[arg-type]


def start(manager: KVCacheManager, state: RequestState) -> PrefixHit:
    """Let a request run, from its longest prefix on."""
    hit = manager.find_prefix(state)
    manager.adopt(state, hit)
    return hit


def compute(manager: KVCacheManager, state: RequestState, num_tokens: int, *, settles: bool = True) -> None:
    """What a step does that brings the request to `num_tokens` computed tokens."""
    manager.allocate(state, num_tokens)
    state.num_computed_tokens = num_tokens
    manager.submitted([state])
    if settles:
        state.num_settled_tokens = num_tokens
        manager.settled(state)


def run(manager: KVCacheManager, state: RequestState, num_tokens: int) -> RequestState:
    """A request that has computed so many tokens in one step."""
    start(manager, state)
    compute(manager, state, num_tokens)
    return state


def blocks(manager: KVCacheManager, state: RequestState) -> list[int]:
    """The request's table in the first group."""
    [paged, *_] = manager.paged
    return list(paged.block_ids(state))


def make_manager(num_blocks: int = 8, *, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(
        full_attention(num_blocks, 4),
        enable_prefix_caching=enable_prefix_caching,
        max_num_seqs=4,
        max_chunk_tokens=64,
    )


def test_blocks_are_allocated_as_tokens_need_them() -> None:
    manager, state = make_manager(), make_state([1] * 10)
    start(manager, state)
    [first] = manager.allocate(state, 4)
    assert len(first) == 1
    assert manager.allocate(state, 4) == ()
    [second] = manager.allocate(state, 5)
    assert len(second) == 1
    assert manager.max_tokens(state) == 8 * 4
    assert manager.usage == 2 / 8


def test_a_prefix_is_found_when_it_is_settled_and_not_before() -> None:
    manager, first, second = make_manager(), make_state([1] * 10), make_state([1] * 10)
    start(manager, first)
    manager.allocate(first, 10)
    assert manager.find_prefix(second).num_tokens == 0
    first.num_computed_tokens = first.num_settled_tokens = 10
    assert manager.find_prefix(second).num_tokens == 0
    manager.settled(first)
    hit = manager.find_prefix(second)
    assert hit.block_ids == (blocks(manager, first)[:2],), "two full blocks; the third is not full"
    assert hit.num_tokens == 8


def test_at_least_one_token_is_left_to_compute() -> None:
    manager = make_manager()
    run(manager, make_state([1] * 8), 8)
    assert manager.find_prefix(make_state([1] * 8)).num_blocks == 1
    assert manager.find_prefix(make_state([1] * 9)).num_blocks == 2


def test_a_shorter_prefix_than_there_is_can_be_asked_for() -> None:
    manager = make_manager()
    run(manager, make_state([1] * 12), 12)
    assert manager.find_prefix(make_state([1] * 12), max_tokens=7).num_blocks == 1


def test_prompt_logprobs_and_pooling_compute_every_row() -> None:
    manager = make_manager()
    run(manager, make_state([1] * 8), 8)
    assert manager.find_prefix(make_state([1] * 9, prompt_logprobs=0)).num_tokens == 0
    assert manager.find_prefix(make_state([1] * 9, pooling=True)).num_tokens == 0


def test_prompt_logprobs_that_went_out_need_not_be_computed_again() -> None:
    manager, state = make_manager(), make_state([1] * 14, prompt_logprobs=0)
    run(manager, state, 9)
    state.num_prompt_logprobs = 7
    manager.release(state)
    assert manager.find_prefix(state).num_blocks == 1
    state.num_prompt_logprobs = 13
    assert manager.find_prefix(state).num_blocks == 2


def test_adopted_blocks_are_shared_and_outlive_either_user() -> None:
    manager, first, second = make_manager(), make_state([1] * 10), make_state([1] * 10)
    run(manager, first, 10)
    start(manager, second)
    assert second.num_computed_tokens == 8
    [told] = manager.allocate(second, 10)
    assert list(told) == blocks(manager, second), "the worker learns of the whole table at a request's first chunk"
    assert told[:2] == tuple(blocks(manager, first)[:2])
    assert told[2] != blocks(manager, first)[2], "a block that is written is nobody else's"
    manager.release(first)
    [pool] = manager.pools
    assert pool.num_free == 8 - 3
    manager.release(second)
    assert pool.num_free == 8
    assert manager.find_prefix(make_state([1] * 10)).num_blocks == 2


def test_the_same_content_computed_twice_is_kept_once() -> None:
    manager, first, second = make_manager(), make_state([1] * 9), make_state([1] * 9)
    for state in (first, second):
        start(manager, state)
    for state in (first, second):
        compute(manager, state, 9)
    kept = blocks(manager, first)[:2]
    assert manager.find_prefix(make_state([1] * 9)).block_ids == (kept,)
    manager.release(second)
    assert manager.find_prefix(make_state([1] * 9)).block_ids == (kept,)


def test_nothing_of_a_failed_request_is_found() -> None:
    manager, state = make_manager(), make_state([1] * 10)
    run(manager, state, 10)
    manager.discard(state)
    manager.release(state)
    [pool] = manager.pools
    assert manager.find_prefix(make_state([1] * 10)).num_tokens == 0
    assert (pool.num_free, pool.num_cached) == (8, 0)


def test_a_reset_forgets_what_is_known_and_what_running_requests_will_compute() -> None:
    manager, done, running = make_manager(), make_state([1] * 10), make_state([2] * 12)
    run(manager, done, 10)
    manager.release(done)
    run(manager, running, 5)
    manager.reset_prefix_cache([running])
    compute(manager, running, 12)
    [pool] = manager.pools
    assert pool.num_cached == 0
    manager.release(running)
    run(manager, running, 4)
    assert pool.num_cached == 1, "computed anew after a preemption, it is shared again"


def test_without_prefix_caching_nothing_is_hashed() -> None:
    manager, state = make_manager(enable_prefix_caching=False), make_state([1] * 10)
    run(manager, state, 10)
    [pool] = manager.pools
    assert manager.find_prefix(make_state([1] * 10)).num_tokens == 0
    assert (state.block_hashes, pool.num_cached) == ([], 0)


def test_a_prompt_that_shares_nothing_is_hashed_no_further_than_its_first_block() -> None:
    manager, state = make_manager(), make_state([1] * 1000)
    manager.find_prefix(state)
    assert len(state.block_hashes) == 1


# Windows and states


def mixed_manager(*rules: tuple[CacheKind, int | None], num_blocks: int = 40, max_num_seqs: int = 4) -> KVCacheManager:
    groups = [CacheGroup(kind, num_blocks, 4, reach) for kind, reach in rules]
    return KVCacheManager(groups, enable_prefix_caching=True, max_num_seqs=max_num_seqs, max_chunk_tokens=64)


def test_a_hit_is_what_all_groups_have() -> None:
    """The example of the module's docstring."""
    manager = mixed_manager((CacheKind.FULL, None), (CacheKind.WINDOW, 5), (CacheKind.STATE, None))
    first = make_state([1] * 23)
    start(manager, first)
    for num_tokens in (12, 18, 23):
        compute(manager, first, num_tokens)
    full, window, state = manager.managers
    hashes = first.block_hashes
    assert [full.pool.lookup(each) is not None for each in hashes] == [True] * 5
    assert [state.pool.lookup(each) is not None for each in hashes] == [False, False, True, False, False]
    second = make_state([1] * 23)
    hit = start(manager, second)
    assert hit.num_tokens == 12
    assert hit.block_ids[1] == [NO_BLOCK, NO_BLOCK, window.pool.lookup(hashes[2])]
    window.pool.forget_content(hashes[2])
    assert manager.find_prefix(make_state([1] * 23)).num_tokens == 0, "position 12 sees block 2"


def test_a_window_is_found_without_what_stands_before_it() -> None:
    """Where nothing else keeps the beginning, a prefix counts all the same."""
    manager = mixed_manager((CacheKind.WINDOW, 5))
    [window] = manager.paged
    run(manager, make_state([1] * 23), 23)
    probe = make_state([1] * 23)
    assert manager.find_prefix(probe).num_tokens == 20
    for digest in probe.block_hashes[:4]:
        window.pool.forget_content(digest)
    assert manager.find_prefix(probe).block_ids == ([NO_BLOCK] * 4 + [window.pool.lookup(probe.block_hashes[4])],)
    window.pool.forget_content(probe.block_hashes[4])
    assert manager.find_prefix(probe).num_tokens == 0


def test_where_nothing_before_is_seen_nothing_need_be_there() -> None:
    """A model of chunks alone begins a chunk without the past, whatever that was."""
    manager = mixed_manager((CacheKind.CHUNK, 8))
    assert manager.find_prefix(make_state([1] * 23)).block_ids == ([NO_BLOCK] * 4,)


@pytest.mark.parametrize(("kind", "reach"), [(CacheKind.WINDOW, 5), (CacheKind.WINDOW, 1), (CacheKind.CHUNK, 8)])
def test_what_no_later_token_sees_goes_back_when_it_is_settled(kind: CacheKind, reach: int) -> None:
    manager = mixed_manager((kind, reach))
    [paged] = manager.paged
    state = make_state([1] * 60)
    manager.adopt(state, manager.find_prefix(state, max_tokens=0))
    for end in (9, 10, 25, 26, 27, 28, 29, 59):
        compute(manager, state, end, settles=False)
        in_flight = paged.num_held(state)
        compute(manager, state, end)
        expected = [i >= paged.group.first_visible(end) // 4 for i in range(-(-end // 4))]
        assert [block_id != NO_BLOCK for block_id in paged.block_ids(state)] == expected
        assert in_flight >= paged.num_held(state) == sum(expected)
        manager.check([state])
    manager.release(state)
    manager.check_idle()


def test_a_state_is_read_from_one_row_and_written_into_another() -> None:
    manager = mixed_manager((CacheKind.STATE, None))
    state = make_state([1] * 60)
    start(manager, state)
    row = NO_BLOCK
    for end in range(3, 60, 3):
        [(source, target)] = manager.allocate(state, end)
        assert source == row
        assert target != source
        state.num_computed_tokens = state.num_settled_tokens = end
        manager.submitted([state])
        manager.settled(state)
        row = target
    manager.check([state])
    manager.release(state)
    manager.check_idle()


def test_snapshots_never_take_the_rows_of_those_who_run() -> None:
    """With rows for nothing but running requests, none is kept; with more, no more than there are."""
    for num_rows, most in ((8, 0), (10, 2)):
        manager = mixed_manager((CacheKind.STATE, None), num_blocks=num_rows)
        states = [make_state([i] * 60) for i in range(4)]
        for state in states:
            start(manager, state)
        for end in range(4, 60, 4):
            for state in states:
                compute(manager, state, end, settles=False)
                manager.check(states)
        [pool] = manager.pools
        assert pool.num_blocks - pool.num_free == len(states) + most
        assert pool.num_cached == 0
        for state in states:
            state.num_settled_tokens = state.num_computed_tokens
            manager.settled(state)
        manager.check(states)
        assert pool.num_cached == most or most


def test_of_the_snapshots_of_an_output_the_last_stays() -> None:
    manager = mixed_manager((CacheKind.STATE, None))
    [pool] = manager.pools
    state = make_state([1] * 10)
    start(manager, state)
    compute(manager, state, 8)  # where the prompt is cut
    compute(manager, state, 10)
    for end in range(11, 40):
        state.token_ids.append(2)
        compute(manager, state, end)
    assert [pool.lookup(each) is not None for each in state.block_hashes] == [i in (1, 8) for i in range(9)]
    manager.release(state)
    resumed = make_state([*state.token_ids, 3])
    assert manager.find_prefix(resumed).num_tokens == 36
    manager.check_idle()

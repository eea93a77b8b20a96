"""Block tables, and prefixes that are found only when they are computed."""

from __future__ import annotations

from sensorium.scheduler.kv_cache_manager import KVCacheManager
from sensorium.scheduler.request import RequestState
from tests.scheduler.simulation import make_request


def make_state(tokens: list[int], **kwargs: object) -> RequestState:
    return RequestState(make_request("r", [tokens], **kwargs), (0, 0, 0), 1000)  # type: ignore[arg-type]


def compute(manager: KVCacheManager, state: RequestState, num_tokens: int) -> None:
    """What a step does that brings the request to `num_tokens` computed tokens."""
    manager.allocate(state, num_tokens)
    state.num_computed_tokens = state.num_settled_tokens = num_tokens
    manager.commit(state)


def make_manager(num_blocks: int = 8, *, enable_prefix_caching: bool = True) -> KVCacheManager:
    return KVCacheManager(num_blocks, 4, enable_prefix_caching=enable_prefix_caching)


def test_blocks_are_allocated_as_tokens_need_them() -> None:
    manager, state = make_manager(), make_state([1] * 10)
    assert len(manager.allocate(state, 4)) == 1
    assert manager.allocate(state, 4) == []
    assert len(manager.allocate(state, 5)) == 1
    assert manager.max_tokens(state) == 8 * 4
    assert manager.usage == 2 / 8


def test_a_prefix_is_found_when_it_is_committed_and_not_before() -> None:
    manager, first, second = make_manager(), make_state([1] * 10), make_state([1] * 10)
    manager.allocate(first, 10)
    assert manager.find_prefix(second) == []
    first.num_computed_tokens = first.num_settled_tokens = 10
    assert manager.find_prefix(second) == []
    manager.commit(first)
    assert manager.find_prefix(second) == first.block_ids[:2], "two full blocks; the third is not full"


def test_at_least_one_token_is_left_to_compute() -> None:
    manager, first = make_manager(), make_state([1] * 8)
    compute(manager, first, 8)
    assert len(manager.find_prefix(make_state([1] * 8))) == 1
    assert len(manager.find_prefix(make_state([1] * 9))) == 2


def test_prompt_logprobs_and_pooling_compute_every_row() -> None:
    manager, first = make_manager(), make_state([1] * 8)
    compute(manager, first, 8)
    assert manager.find_prefix(make_state([1] * 9, prompt_logprobs=0)) == []
    assert manager.find_prefix(make_state([1] * 9, pooling=True)) == []


def test_prompt_logprobs_that_went_out_need_not_be_computed_again() -> None:
    manager, state = make_manager(), make_state([1] * 14, prompt_logprobs=0)
    compute(manager, state, 9)
    state.num_prompt_logprobs = 7
    manager.release(state)
    assert len(manager.find_prefix(state)) == 1
    state.num_prompt_logprobs = 13
    assert len(manager.find_prefix(state)) == 2


def test_adopted_blocks_are_shared_and_outlive_either_user() -> None:
    manager, first, second = make_manager(), make_state([1] * 10), make_state([1] * 10)
    compute(manager, first, 10)
    prefix = manager.find_prefix(second)
    manager.adopt(second, prefix)
    assert second.num_computed_tokens == 8
    compute(manager, second, 10)
    assert second.block_ids[:2] == first.block_ids[:2]
    assert second.block_ids[2] != first.block_ids[2], "a block that is written is nobody else's"
    manager.release(first)
    assert manager.pool.num_free == 8 - 3
    manager.release(second)
    assert manager.pool.num_free == 8
    assert len(manager.find_prefix(make_state([1] * 10))) == 2


def test_the_same_content_computed_twice_is_kept_once() -> None:
    manager, first, second = make_manager(), make_state([1] * 9), make_state([1] * 9)
    for state in (first, second):
        manager.allocate(state, 9)
        state.num_computed_tokens = state.num_settled_tokens = 9
    manager.commit(first)
    manager.commit(second)
    assert manager.find_prefix(make_state([1] * 9)) == first.block_ids[:2]
    manager.release(second)
    assert manager.find_prefix(make_state([1] * 9)) == first.block_ids[:2]


def test_nothing_of_a_failed_request_is_found() -> None:
    manager, state = make_manager(), make_state([1] * 10)
    compute(manager, state, 10)
    manager.discard(state)
    assert manager.find_prefix(make_state([1] * 10)) == []
    assert (manager.pool.num_free, manager.pool.num_cached) == (8, 0)


def test_a_reset_forgets_what_is_known_and_what_running_requests_will_compute() -> None:
    manager, done, running = make_manager(), make_state([1] * 10), make_state([2] * 12)
    compute(manager, done, 10)
    manager.release(done)
    compute(manager, running, 5)
    manager.reset_prefix_cache([running])
    compute(manager, running, 12)
    assert manager.pool.num_cached == 0
    manager.release(running)
    manager.allocate(running, 4)
    running.num_computed_tokens = running.num_settled_tokens = 4
    manager.commit(running)
    assert manager.pool.num_cached == 1, "computed anew after a preemption, it is shared again"


def test_without_prefix_caching_nothing_is_hashed() -> None:
    manager, state = make_manager(enable_prefix_caching=False), make_state([1] * 10)
    compute(manager, state, 10)
    assert manager.find_prefix(make_state([1] * 10)) == []
    assert (state.block_hashes, manager.pool.num_cached) == ([], 0)


def test_a_prompt_that_shares_nothing_is_hashed_no_further_than_its_first_block() -> None:
    manager, state = make_manager(), make_state([1] * 1000)
    manager.find_prefix(state)
    assert len(state.block_hashes) == 1

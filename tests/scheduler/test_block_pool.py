"""Blocks: states, order of reuse, and an index that never names a block twice."""

from __future__ import annotations

from random import Random

import pytest

from sensorium.scheduler.block_pool import BlockPool


def digest(i: int) -> bytes:
    return i.to_bytes(32, "little")


def test_a_released_block_without_a_name_is_reused_before_one_with_known_content() -> None:
    pool = BlockPool(3)
    named, plain, _ = pool.allocate(3)
    pool.register(named, digest(1))
    pool.release([named])
    pool.release([plain])
    assert pool.allocate(1) == [plain]
    assert pool.lookup(digest(1)) == named
    assert pool.allocate(1) == [named]
    assert pool.lookup(digest(1)) is None
    assert pool.num_evictions == 1


def test_the_end_of_a_sequence_is_reused_before_its_beginning_and_the_oldest_sequence_first() -> None:
    pool = BlockPool(4)
    first, second = pool.allocate(2), pool.allocate(2)
    for block_id in (*first, *second):
        pool.register(block_id, digest(block_id))
    pool.release(first)
    pool.release(second)
    assert pool.allocate(4) == [first[1], first[0], second[1], second[0]]


def test_acquiring_a_free_block_takes_it_from_the_free_ones_and_a_used_one_does_not() -> None:
    pool = BlockPool(2)
    (block_id,) = pool.allocate(1)
    pool.register(block_id, digest(1))
    pool.acquire([block_id])
    assert pool.num_free == 1
    pool.release([block_id])
    pool.release([block_id])
    assert (pool.num_free, pool.num_unused([block_id])) == (2, 1)
    pool.acquire([block_id])
    assert (pool.num_free, pool.num_unused([block_id])) == (1, 0)
    pool.check([1, 0])


def test_content_that_is_known_stays_where_it_is() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.register(first, digest(1))
    pool.register(second, digest(1))
    assert pool.lookup(digest(1)) == first
    pool.release([second])
    pool.check([1, 0])


def test_forgotten_content_is_found_by_nobody_and_its_block_is_reused_as_any_other() -> None:
    pool = BlockPool(3)
    blocks = pool.allocate(3)
    for block_id in blocks:
        pool.register(block_id, digest(block_id))
    pool.release(blocks[1:])
    pool.forget(blocks[:2])
    assert [pool.lookup(digest(block_id)) for block_id in blocks] == [None, None, blocks[2]]
    pool.check([1, 0, 0])
    pool.forget_all()
    assert (pool.num_cached, pool.num_evictions) == (0, 0)
    pool.check([1, 0, 0])


def test_releasing_too_often_is_noticed() -> None:
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="more often"):
        pool.release(blocks)


def test_the_books_agree_through_random_use() -> None:
    rng, pool = Random(0), BlockPool(12)
    held: list[list[int]] = []
    for i in range(3000):
        action = rng.randrange(5)
        if action == 0 and pool.num_free:
            held.append(pool.allocate(rng.randint(1, pool.num_free)))
        elif action == 1 and held:
            pool.release(held.pop(rng.randrange(len(held))))
        elif action == 2 and held:
            for block_id in rng.choice(held):
                if pool._hashes[block_id] is None:
                    pool.register(block_id, digest(rng.randrange(20)))
        elif action == 3:
            found = pool.lookup(digest(rng.randrange(20)))
            if found is not None:
                pool.acquire([found])
                held.append([found])
        elif action == 4 and i % 7 == 0:
            pool.forget([rng.randrange(12)])
        pool.check([sum(blocks.count(b) for blocks in held) for b in range(12)])
    assert pool.num_evictions > 50

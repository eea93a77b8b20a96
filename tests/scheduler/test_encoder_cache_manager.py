"""Encoder entries: held while needed, then least recently used first to go."""

from __future__ import annotations

from random import Random

from sensorium.scheduler.encoder_cache_manager import EncoderCacheManager

A, B, C = ("r1", 0), ("r2", 0), ("r1", 1)


def test_an_entry_stays_after_its_last_holder_until_room_is_needed() -> None:
    cache = EncoderCacheManager(10)
    cache.hold("x", 6, A)
    cache.hold("y", 4, B)
    assert cache.num_held_rows == cache.capacity_rows
    cache.release("x", A)
    assert "x" in cache
    assert cache.num_held_rows == cache.capacity_rows - 6
    assert cache.take_freed_keys() == ()
    cache.hold("z", 5, A)
    assert "x" not in cache
    assert cache.take_freed_keys() == ("x",)
    assert cache.take_freed_keys() == ()
    cache.check()


def test_the_least_recently_used_goes_first_and_only_as_many_as_needed() -> None:
    cache = EncoderCacheManager(9)
    for key in "xyz":
        cache.hold(key, 3, A)
        cache.release(key, A)
    cache.hold("x", 3, B)
    cache.release("x", B)
    cache.hold("w", 3, A)
    assert cache.take_freed_keys() == ("y",)


def test_an_entry_with_two_holders_stays_until_both_let_go() -> None:
    cache = EncoderCacheManager(3)
    cache.hold("x", 3, A)
    cache.hold("x", 3, B)
    cache.hold("x", 3, C)
    cache.release("x", A)
    cache.release("x", C)
    assert cache.is_held("x")
    assert cache.num_held_rows == cache.capacity_rows
    assert cache.is_held_only_by("r2")
    assert not cache.is_held_only_by("r1")
    cache.release("x", B)
    assert not cache.is_held("x")
    assert cache.num_held_rows == 0
    cache.check()


def test_a_dropped_entry_is_gone_for_its_holders_and_their_release_does_nothing() -> None:
    cache = EncoderCacheManager(10)
    cache.hold("x", 3, A)
    cache.hold("y", 3, A)
    cache.release("y", A)
    cache.drop(["x", "y", "unknown"])
    assert (len(cache), cache.num_rows, cache.num_held_rows) == (0, 0, 0)
    assert cache.take_freed_keys() == ("x", "y")
    cache.release("x", A)
    cache.hold("x", 3, B)
    cache.release("x", A)
    assert cache.is_held("x"), "a holder of the old entry doesn't let go of the new one"
    cache.check()


def test_an_item_larger_than_the_cache_is_gone_when_nobody_needs_it() -> None:
    cache = EncoderCacheManager(4)
    cache.hold("x", 9, A)
    assert cache.num_rows == 9
    cache.release("x", A)
    assert "x" not in cache
    assert cache.take_freed_keys() == ("x",)


def test_the_books_agree_through_random_use() -> None:
    rng, cache = Random(0), EncoderCacheManager(20)
    rows = {key: rng.randint(1, 9) for key in "abcdefgh"}
    held: set[tuple[str, tuple[str, int]]] = set()
    kept: set[str] = set()
    for _ in range(3000):
        key, holder = rng.choice("abcdefgh"), rng.choice([A, B, C])
        action = rng.randrange(8)
        if action < 4 and (cache.is_held(key) or cache.num_held_rows + rows[key] <= cache.capacity_rows):
            kept.add(key)
            cache.hold(key, rows[key], holder)
            held.add((key, holder))
        elif action < 7:
            cache.release(key, holder)
            held.discard((key, holder))
        elif rng.random() < 0.1:
            cache.drop([key])
            held = {each for each in held if each[0] != key}
        kept -= set(cache.take_freed_keys())
        cache.check()
        assert kept == {key for key in rows if key in cache}, "the worker is told of every entry that goes"
        assert {key for key, _ in held} == {key for key in rows if cache.is_held(key)}
        assert cache.num_rows <= 20

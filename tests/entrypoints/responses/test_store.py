"""Responses kept: bounded, oldest out first, items of a conversation counted once, tenants apart."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sensorium.entrypoints.openai.responses.store import KeptItem, KeptResponse, ResponseStore, nested_bytes

ALICE, BOB = b"alice", b"bob"


def response(*given: KeptItem, earlier: tuple[KeptItem, ...] = (), text: str = "") -> KeptResponse:
    return KeptResponse({"text": text}, earlier, given, (KeptItem({"text": text}),))


def item(size: int) -> KeptItem:
    return KeptItem({"text": "x" * size})


def test_each_tenant_sees_its_own() -> None:
    store = ResponseStore(10, 10**6)
    kept = response(item(10))
    assert store.put(ALICE, "r", kept)
    assert store.get(ALICE, "r") is kept
    assert store.get(BOB, "r") is None
    assert not store.delete(BOB, "r")
    assert store.delete(ALICE, "r")
    assert (store.get(ALICE, "r"), len(store), store.num_bytes) == (None, 0, 0)


def test_items_are_found_by_their_ids_as_long_as_they_are_kept() -> None:
    store = ResponseStore(10, 10**6)
    said = KeptItem({"id": "msg_1", "text": "x"})
    first = response(said)
    store.put(ALICE, "a", first)
    store.put(ALICE, "b", response(earlier=first.conversation()))
    assert store.get_item(ALICE, "msg_1") is said
    assert store.get_item(BOB, "msg_1") is None
    store.delete(ALICE, "a")
    assert store.get_item(ALICE, "msg_1") is said
    again = KeptItem({"id": "msg_1", "text": "y"})
    store.put(ALICE, "c", response(again))
    store.delete(ALICE, "b")
    assert store.get_item(ALICE, "msg_1") is again
    store.delete(ALICE, "c")
    assert store.get_item(ALICE, "msg_1") is None


def test_the_least_recently_used_goes_first() -> None:
    store = ResponseStore(2, 10**6)
    for name in ("a", "b"):
        store.put(ALICE, name, response(item(1)))
    store.get(ALICE, "a")
    store.put(ALICE, "c", response(item(1)))
    assert [store.get(ALICE, name) is not None for name in "abc"] == [True, False, True]


def test_a_conversation_counts_its_items_once() -> None:
    """Ten turns about one large picture take little more than one."""
    store = ResponseStore(100, 2_000_000)
    kept = response(item(1_000_000))
    assert store.put(ALICE, "0", kept)
    for turn in range(1, 10):
        kept = response(item(10), earlier=kept.conversation())
        assert store.put(ALICE, str(turn), kept)
    assert len(store) == 10
    assert store.num_bytes < 1_050_000
    for turn in range(10):
        assert store.num_bytes > 1_000_000
        store.delete(ALICE, str(turn))
    assert store.num_bytes == 0


def test_what_is_larger_than_the_store_is_not_kept_and_drops_nothing() -> None:
    store = ResponseStore(10, 10_000)
    store.put(ALICE, "small", response(item(10)))
    assert not store.put(ALICE, "large", response(item(20_000)))
    assert store.get(ALICE, "small") is not None
    assert not ResponseStore(0, 10).put(ALICE, "r", response())
    assert not ResponseStore(0, 10).is_on


@given(st.data())
def test_it_never_holds_more_than_it_may_and_forgets_all_in_the_end(data: st.DataObject) -> None:
    store = ResponseStore(data.draw(st.integers(1, 5)), 20_000)
    shared = [item(size) for size in (10, 500, 3_000)]
    names = st.sampled_from("abcdefgh")
    for step in range(data.draw(st.integers(1, 30))):
        if data.draw(st.booleans()):
            earlier = tuple(data.draw(st.lists(st.sampled_from(shared), max_size=4)))
            store.put(ALICE, f"{data.draw(names)}{step}", response(item(100), earlier=earlier))
        else:
            store.delete(ALICE, data.draw(names))
        assert store.num_bytes <= 20_000
        assert len(store) <= 5
    for _, name in list(store._kept):
        store.delete(ALICE, name)
    assert store.num_bytes == 0
    assert not store._num_uses


def test_bytes_of_values() -> None:
    values: list[Any] = ["x" * 1000, "ü" * 1000, {"a": ["x" * 1000]}, 5, None]
    assert [nested_bytes(value) // 1000 for value in values] == [1, 4, 1, 0, 0]

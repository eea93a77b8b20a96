"""Block hashes: equal where, and only where, the KV is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.messages import EngineRequest, MediaItem
from sensorium.sampling_params import SamplingParams
from sensorium.scheduler.block_hash import DIGEST_BYTES, extend_block_hashes, root_hash
from sensorium.scheduler.request import RequestState
from sensorium.spans import Span
from tests.scheduler.fake_worker import TrueSequence
from tests.scheduler.simulation import PLACEHOLDER, Parts, make_request


def hashes(
    parts: Parts,
    block_size: int = 4,
    salt: str | None = None,
    adapter_id: int = 0,
    two_way: frozenset[str] = frozenset(),
) -> list[bytes]:
    message = replace(make_request("r", parts, cache_salt=salt, two_way=two_way), adapter_id=adapter_id)
    state = RequestState(message, (0, 0, 0), 10_000)
    extend_block_hashes(state, state.num_tokens // block_size, block_size)
    return state.block_hashes


def image(key: str, length: int) -> tuple[str, Sequence[bool]]:
    return key, (True,) * length


def test_the_digest_has_at_least_128_bits() -> None:
    assert DIGEST_BYTES * 8 >= 128
    assert all(len(each) == DIGEST_BYTES for each in (root_hash(None), *hashes([list(range(8))])))


def test_hashes_form_a_chain() -> None:
    plain, other_start, other_end = hashes([[1, 2, 3, 4] * 3]), hashes([[9, 2, 3, 4] + [1, 2, 3, 4] * 2]), None
    assert len(set(plain)) == 3, "equal tokens at different depths are different blocks"
    assert not set(plain) & set(other_start)
    other_end = hashes([[1, 2, 3, 4] * 2 + [1, 2, 3, 9]])
    assert plain[:2] == other_end[:2]
    assert plain[2] != other_end[2]


def test_an_adapter_shares_no_block_with_another_or_none() -> None:
    """Equal tokens give other keys and values in each adapter's layers."""
    parts: Parts = [[1, 2, 3], image("a", 6), [4] * 7]
    chains = [hashes(parts, salt=salt, adapter_id=each) for salt in (None, "s") for each in (0, 1, 2, 2**40)]
    assert all(not set(one) & set(other) for one, other in combinations(chains, 2))
    assert hashes(parts, adapter_id=2) == chains[2]


def test_a_block_in_a_span_that_sees_itself_both_ways_covers_all_of_the_span() -> None:
    """Of two prompts that begin alike and end differently, no block is shared where the beginning sees the end."""
    prompt, images = frozenset({"prompt"}), frozenset({"image"})
    plain = [hashes([[1] * length]) for length in (8, 10, 12)]
    whole = [hashes([[1] * length], two_way=prompt) for length in (8, 10, 12)]
    assert plain[0] == plain[2][:2]
    assert all(not set(one) & set(other) for one, other in combinations([*whole, plain[2]], 2))
    assert not set(hashes([[1] * 9 + [2]], two_way=prompt)) & set(whole[1])
    assert hashes([[1] * 10], two_way=prompt) == whole[1]
    first, second = ([[1] * 6, image("a", 4), image(key, 4), [1] * 4] for key in ("b", "c"))
    one, other = hashes(first, two_way=images), hashes(second, two_way=images)
    assert one[0] == other[0] == hashes(first)[0]
    assert not set(one[1:]) & set(other[1:]), "items side by side see one another"
    assert hashes(first)[1] == hashes(second)[1]


def test_a_partial_block_has_no_hash() -> None:
    assert len(hashes([[1] * 11])) == 2


def test_extending_by_steps_equals_extending_at_once() -> None:
    parts: Parts = [[1, 2, 3], image("a", 6), [4] * 5, image("b", 9), [5] * 4]
    state = RequestState(make_request("r", parts), (0, 0, 0), 10_000)
    for n in (1, 2, 2, 5, 3, 6):
        extend_block_hashes(state, n, 4)
    assert state.block_hashes == hashes(parts)[:6]


def test_ids_may_be_negative_or_beyond_the_vocabulary() -> None:
    ids = [-3, 2**40, -(2**62), 2**63 - 1]
    assert hashes([ids]) != hashes([[-3, 2**40, -(2**62), 2**63 - 2]])
    assert hashes([[-1] * 4]) != hashes([[2**32 - 1] * 4])


def test_adjacent_items_with_swapped_lengths_share_no_block() -> None:
    """Two images with one placeholder id, 3 + 2 rows against 2 + 3: equal tokens, equal keys, other rows."""
    three_two = hashes([image("a", 3), image("b", 2), [5] * 3], block_size=4)
    two_three = hashes([image("a", 2), image("b", 3), [5] * 3], block_size=4)
    assert not set(three_two) & set(two_three)
    # The same within one block, and where the boundary lies in an earlier block.
    assert hashes([image("a", 3), image("b", 5)], 8) != hashes([image("a", 5), image("b", 3)], 8)
    assert hashes([image("a", 7), image("b", 9)], 4)[3] != hashes([image("a", 6), image("b", 10)], 4)[3]


def test_one_item_against_two_with_its_key() -> None:
    assert hashes([image("a", 4), image("a", 4)]) != hashes([image("a", 8)])


def test_the_item_decides_and_not_its_place_among_the_items() -> None:
    assert hashes([image("a", 4)]) != hashes([image("b", 4)])
    assert hashes([image("a", 4)]) == hashes([image("a", 4)])
    assert hashes([image("a", 8)])[0] == hashes([image("a", 8), [1] * 4])[0]


def test_a_placeholder_without_an_item_is_not_the_item() -> None:
    assert hashes([[PLACEHOLDER] * 4]) != hashes([image("a", 4)])


def test_which_positions_are_rows_is_part_of_the_hash() -> None:
    def request(mask: tuple[bool, ...]) -> RequestState:
        message = make_request("r", [("a", mask)])
        message.prompt_token_ids[:] = [5] * 8  # type: ignore[index]
        return RequestState(message, (0, 0, 0), 100)

    first, second = request((True, True, False, False) * 2), request((True, False, True, False) * 2)
    for state in (first, second):
        extend_block_hashes(state, 2, 4)
    assert first.block_hashes != second.block_hashes


def test_a_mask_of_all_rows_is_no_mask() -> None:
    def hashed(span: Span) -> list[bytes]:
        message = EngineRequest("r", [5] * 8, SamplingParams(), media=(MediaItem("image", "a", span),))
        state = RequestState(message, (0, 0, 0), 100)
        extend_block_hashes(state, 2, 4)
        return state.block_hashes

    unmasked = hashed(Span(0, 8))
    assert unmasked == hashed(Span.of_mask(0, [True] * 8)) == hashed(Span(0, 8, np.arange(8)))
    assert unmasked != hashed(Span.of_mask(0, [True] * 7 + [False]))


def test_salts_part_everything_and_none_is_a_salt_of_its_own() -> None:
    variants = [hashes([[1] * 8], salt=salt) for salt in (None, "", "a", "none", "b")]
    flat = [each for variant in variants for each in variant]
    assert len(set(flat)) == len(flat)


def test_keys_and_positions_cannot_be_mistaken_for_each_other() -> None:
    """The encoding is unambiguous: lengths stand before what varies in length."""
    assert hashes([image("ab", 2), image("c", 2)]) != hashes([image("a", 2), image("bc", 2)])


parts_strategy = st.lists(
    st.one_of(
        st.lists(st.integers(0, 1), min_size=1, max_size=5),
        st.tuples(st.sampled_from("ab"), st.lists(st.booleans(), min_size=1, max_size=6)),
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=300, derandomize=True)
@given(first=parts_strategy, second=parts_strategy, block_size=st.sampled_from([1, 2, 3]))
def test_equal_hashes_mean_equal_inputs(first: Parts, second: Parts, block_size: int) -> None:
    """Blocks with one hash hold the same KV: tokens and rows up to their end are equal."""
    one, two = (TrueSequence(make_request("r", parts)) for parts in (first, second))
    for i, (a, b) in enumerate(zip(hashes(first, block_size), hashes(second, block_size), strict=False)):
        last = (i + 1) * block_size - 1
        if a == b:
            assert one.state(last) == two.state(last)

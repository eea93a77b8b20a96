"""Looking into the prompt: drafts are what followed the longest match, as a search over everything finds it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.config import SpeculativeConfig
from sensorium.scheduler.drafting import MAX_CANDIDATES, MAX_PAUSE, Guesses, PromptLookup

VOCAB_SIZE = 1000


def lookup(most: int = 4, longest: int = 4, least: int | None = None) -> PromptLookup:
    config = SpeculativeConfig(num_speculative_tokens=most, prompt_lookup_max=longest, prompt_lookup_min=least)
    return PromptLookup(config, VOCAB_SIZE)


def longest_match(token_ids: list[int], longest: int, least: int) -> int:
    """Where the longest match with the end of the tokens ends, the last of several; 0: there is none."""
    for length in range(longest, least - 1, -1):
        for end in range(len(token_ids) - 1, length - 1, -1):
            if token_ids[end - length : end] == token_ids[-length:]:
                return end
    return 0


@settings(max_examples=300, derandomize=True)
@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=MAX_CANDIDATES),
    st.integers(1, 5),
    st.integers(1, 5),
    st.lists(st.integers(1, 7), max_size=6),
)
def test_drafts_are_what_followed_the_longest_match(
    token_ids: list[int], longest: int, least: int, asked_before: list[int]
) -> None:
    least = min(least, longest)
    drafter = lookup(3, longest, least)
    for length in sorted(asked_before):  # tokens come in pieces of any size, and not every one is asked behind
        drafter.propose(token_ids[:length])
    drafts = drafter.propose(token_ids)
    end = longest_match(token_ids, longest, least)
    if end == 0:
        assert drafts == []
        return
    known = list(token_ids)
    for i in range(3):
        known.append(known[end + i])
    assert drafts == known[-3:]


def test_a_short_text_again_and_again_goes_on_for_as_long_as_drafts_may() -> None:
    assert lookup(7).propose([9, 1, 2, 3, 1, 2, 3, 1]) == [2, 3, 1, 2, 3, 1, 2]
    assert lookup(3).propose([5, 5, 5]) == [5, 5, 5]


def test_media_rows_are_no_guess() -> None:
    """Their ids may lie outside the vocabulary, and no embedding has a row for them."""
    for placeholder in (-3, VOCAB_SIZE):
        assert lookup().propose([1, 2, 7, placeholder, 8, 1, 2]) == [7]
        assert lookup().propose([1, 2, placeholder, 8, 1, 2]) == []


def test_no_guess_stands_for_media() -> None:
    """A model whose `forward` merges media would look for an item where its placeholder stands in a text."""
    guesses = Guesses(lookup(), media_token_ids={8})
    assert guesses.propose([1, 2, 7, 8, 9, 1, 2], 4) == (7,)
    assert guesses.propose([1, 2, 8, 9, 9, 1, 2], 4) == ()


def test_one_token_in_common_is_chance_unless_it_is_asked_for() -> None:
    assert lookup().propose([4, 1, 5, 2, 1]) == []
    assert lookup(longest=1).propose([4, 1, 5, 2, 1]) == [5, 2, 1, 5]
    assert lookup(least=1).propose([4, 1, 5, 2, 1]) == [5, 2, 1, 5]
    assert lookup(longest=3, least=3).propose([1, 2, 3, 4, 9, 2, 3]) == []
    assert lookup(longest=3, least=3).propose([1, 2, 3, 4, 1, 2, 3]) == [4, 1, 2, 3]


def test_work_is_bounded_where_everything_matches() -> None:
    token_ids = [1, 2, *[7, 1, 2] * 5000, 3, 4, 8, 1, 2]
    assert len(lookup().propose(token_ids)) == 4


class Always:
    """Guesses as much as it may."""

    def propose(self, token_ids: Sequence[int]) -> list[int]:
        return list(range(8))


def test_a_request_gets_as_many_drafts_as_the_last_were_worth() -> None:
    guesses, most = Guesses(Always()), 4
    found = []
    for num_right in (4, 2, 2, 4, 0, None, 1, 2, 4):
        drafts = guesses.propose([1], most)
        found.append(len(drafts))
        if num_right is not None:
            guesses.settle(len(drafts), num_right)
    assert found == [4, 4, 2, 4, 4, 0, 1, 2, 4]


def test_wrong_guesses_grow_rare_but_never_end() -> None:
    guesses, made = Guesses(Always()), list[int]()
    for step in range(200):
        if drafts := guesses.propose([1], 8):
            made.append(step)
            guesses.settle(len(drafts), 0)
    gaps = [later - earlier for earlier, later in pairwise(made)]
    assert gaps[:4] == [2, 4, 8, 16]
    assert set(gaps[4:]) == {MAX_PAUSE + 1}
    while not (drafts := guesses.propose([1], 8)):
        pass
    guesses.settle(len(drafts), 1)
    assert len(guesses.propose([1], 8)) == 2

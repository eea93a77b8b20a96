"""Where drafts come from: guesses of a request's next tokens, which one step checks all at once.

A draft costs a row of a step and never changes an output: after each row a token is sampled as it would be without
drafts, and those behind a wrong guess are dropped. So a drafter may be as simple as it likes, and a request whose
guesses are wrong gets fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from itertools import takewhile
from typing import Protocol

from sensorium.config import MAX_DRAFTS, SpeculativeConfig
from sensorium.messages import EngineRequest

MAX_CANDIDATES = 32
"""Places that are compared for one draft; bounds the host's work where the same tokens come again and again."""
MAX_PAUSE = 15
"""Most steps of a request in a row in which nothing is guessed, because guesses were wrong."""


class Drafter(Protocol):
    """Guesses how one request goes on."""

    def propose(self, token_ids: Sequence[int]) -> Sequence[int]:
        """What may follow these tokens, ids of the vocabulary; none where nothing is likely.

        `token_ids`: prompt and output, which only grow from call to call.
        """


class Guesses:
    """One request's drafts: as many as the last ones were worth.

    Rows of a step are cheap while the weights' way from memory decides, and dear beyond (docs/experiments.md), so wrong
    guesses aren't made again and again: after one in which nothing was right, none is made for 1, 3, 7 and at last
    `MAX_PAUSE` steps, and then one token at a time until it is right.

    Worked example of drafts and those that were right: 4 of 4, 2 of 4, 2 of 2, 4 of 4, 0 of 4, a step without, 1 of 1,
    2 of 2, 4 of 4.
    """

    __slots__ = ("_drafter", "_media_token_ids", "_num_misses", "_num_paused", "_size")

    def __init__(self, drafter: Drafter, media_token_ids: Container[int] = ()) -> None:
        """`media_token_ids` are no guess: a model may look for an item where they stand."""
        self._drafter = drafter
        self._media_token_ids = media_token_ids
        self._size = MAX_DRAFTS
        """Most drafts that the next chunk gets."""
        self._num_misses = 0
        """Times in a row that nothing was right."""
        self._num_paused = 0
        """Steps in which nothing is guessed."""

    @property
    def is_paused(self) -> bool:
        """Whether the next decode gets no drafts, so that it needn't wait for the last token."""
        return self._num_paused > 0

    def propose(self, token_ids: Sequence[int], most: int) -> Sequence[int]:
        """At most so many tokens that may follow."""
        if self._num_paused:
            self._num_paused -= 1
            return ()
        drafts = self._drafter.propose(token_ids)[: min(most, self._size)]
        return tuple(takewhile(lambda token_id: token_id not in self._media_token_ids, drafts))

    def settle(self, num_drafts: int, num_right: int) -> None:
        """Learn how drafts fared."""
        if num_right == num_drafts:
            self._size = min(max(2 * num_drafts, self._size), MAX_DRAFTS)
        else:
            self._size = max(num_right, 1)
        self._num_misses = 0 if num_right else self._num_misses + 1
        self._num_paused = 0 if num_right else min(2**self._num_misses - 1, MAX_PAUSE)


class PromptLookup:
    """Guesses that the request goes on as it did where its last tokens stood before: good for answers that repeat what
    was asked, edits of code and text, lists and tables.

    Keeps, for each n-gram of the least length, where it ended last, and for each place, where the same n-gram ended
    before: what compressors of the LZ77 family keep to find matches.

    Source: Saxena, "Prompt lookup decoding", 2023; vLLM's method "ngram".
    """

    def __init__(self, config: SpeculativeConfig, vocab_size: int) -> None:
        """`vocab_size`: ids beyond, which may stand for media in a prompt, are no guess."""
        self._num_tokens = config.num_speculative_tokens
        self._longest = config.prompt_lookup_max
        self._least = config.least_ngram
        self._vocab_size = vocab_size
        self._last_end: dict[tuple[int, ...], int] = {}
        self._end_before: list[int] = [0] * self._least
        """By the end of an n-gram: where the same ended before; 0: nowhere."""

    def propose(self, token_ids: Sequence[int]) -> list[int]:
        """See `Drafter`."""
        self._take_in(token_ids)
        end = self._best_end(token_ids)
        drafts: list[int] = []
        if end:
            distance = len(token_ids) - end
            for i in range(self._num_tokens):
                # Where the match lies this near, what it is followed by goes on in the draft itself.
                token_id = token_ids[end + i] if i < distance else drafts[i - distance]
                if not 0 <= token_id < self._vocab_size:
                    break
                drafts.append(token_id)
        return drafts

    def _take_in(self, token_ids: Sequence[int]) -> None:
        """Note all n-grams but the last, which is the one to find."""
        least, last_end, end_before = self._least, self._last_end, self._end_before
        for end in range(len(end_before), len(token_ids)):
            ngram = tuple(token_ids[end - least : end])
            end_before.append(last_end.get(ngram, 0))
            last_end[ngram] = end

    def _best_end(self, token_ids: Sequence[int]) -> int:
        """The end of the longest match with the last tokens, of several the last one; 0: there is none."""
        num_tokens, best, best_length = len(token_ids), 0, 0
        end = self._last_end.get(tuple(token_ids[num_tokens - self._least :]), 0)
        for _ in range(MAX_CANDIDATES):
            if not end:
                break
            length = self._least
            most = min(self._longest, end)
            while length < most and token_ids[end - length - 1] == token_ids[num_tokens - length - 1]:
                length += 1
            if length > best_length:
                best, best_length = end, length
            if length == self._longest:
                break
            end = self._end_before[end]
        return best


def drafters_of(config: SpeculativeConfig | None, vocab_size: int) -> Callable[[EngineRequest], Drafter | None] | None:
    """Makes the drafter of each request as the configuration says; None: there are none."""
    return None if config is None else lambda _: PromptLookup(config, vocab_size)

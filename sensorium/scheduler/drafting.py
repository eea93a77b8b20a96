"""Where drafts come from: guesses of a request's next tokens, which one step checks all at once.

A draft costs a row of a step and never changes an output: after each row a token is sampled as it would be without
drafts, and those behind a wrong guess are dropped. So a drafter may be as simple as it likes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from sensorium.config import SpeculativeConfig
from sensorium.messages import EngineRequest

MAX_CANDIDATES = 32
"""Places that are compared for one draft; bounds the host's work where the same tokens come again and again."""


class Drafter(Protocol):
    """Guesses how one request goes on."""

    def propose(self, token_ids: Sequence[int]) -> Sequence[int]:
        """What may follow these tokens, ids of the vocabulary; none where nothing is likely.

        `token_ids`: prompt and output, which only grow from call to call.
        """


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

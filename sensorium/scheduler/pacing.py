"""How much encoding and prefill may stand between two tokens of the requests that stream.

A step takes about `decode_s + tokens * token_s + rows * row_s`. The three rates are measured; from them follows how
many prefill tokens and encoder rows keep a step below the bound on the gap. However tight the bound, the first prefill
of a step gets `MIN_PREFILL_TOKENS` and its first media item is encoded, so prefill advances in every step.
"""

from __future__ import annotations

import math
import sys

MIN_PREFILL_TOKENS = 32
"""Prefill tokens that a step may always have."""
UNMEASURED_TOKENS = 128
"""Prefill tokens of a step beside streams while the cost of a token is unknown."""
MIN_SAMPLE_TOKENS = 16
"""Steps with fewer prefill tokens say more about noise than about the cost of a token."""
SAFETY = 0.9
"""Share of the gap that is planned for; the rest is for the host and for errors of the estimate."""

_WEIGHT = 0.25
_CLIP = 3.0
UNBOUNDED = sys.maxsize


class RunningRate:
    """An exponentially weighted mean of positive samples, each clipped to within `_CLIP` times the mean.

    Clipping keeps one slow step (a page fault, a first compile) from setting the pace for the next ten.
    """

    __slots__ = ("value",)

    def __init__(self, value: float | None = None) -> None:
        self.value = value

    def observe(self, sample: float) -> None:
        """Take one more sample into account."""
        if self.value is None:
            if sample > 0:
                self.value = sample
            return
        clipped = min(max(sample, self.value / _CLIP), self.value * _CLIP)
        self.value += _WEIGHT * (clipped - self.value)


class StepPace:
    """What a single step may still take in. `seconds` is the time for encoding and prefill; None: no bound."""

    __slots__ = ("_row_s", "_seconds", "_token_s", "num_rows", "num_tokens")

    def __init__(self, seconds: float | None = None, token_s: float | None = None, row_s: float | None = None) -> None:
        self._seconds = seconds
        self._token_s = token_s
        self._row_s = row_s
        self.num_tokens = 0
        """Prefill tokens in the step."""
        self.num_rows = 0
        """Encoder rows in the step."""

    def token_room(self, extra_rows: int = 0) -> int:
        """Prefill tokens that can be added if `extra_rows` encoder rows are. Few beside rows of unknown cost."""
        return max(self.spare_tokens(extra_rows), 0 if self.num_tokens else MIN_PREFILL_TOKENS)

    def spare_tokens(self, extra_rows: int = 0) -> int:
        """Tokens that nothing depends on, such as drafts, for which there is time; less than 0 if there is none."""
        if self._seconds is None:
            return UNBOUNDED
        num_rows = self.num_rows + extra_rows
        if num_rows and self._row_s is None:
            return 0
        if self._token_s is None:
            return UNMEASURED_TOKENS - self.num_tokens
        seconds = self._seconds - (self._row_s or 0.0) * num_rows
        return int(seconds / self._token_s) - self.num_tokens

    def admits_rows(self, num_rows: int, num_tokens: int) -> bool:
        """Whether `num_rows` encoder rows and `num_tokens` tokens can be added.

        While the cost of a row is unknown, a step encodes only one item. The caller adds a step's first item without
        asking.
        """
        if self._seconds is None:
            return True
        if self._row_s is None:
            return False
        seconds = self._row_s * (self.num_rows + num_rows)
        seconds += (self._token_s or 0.0) * (self.num_tokens + num_tokens)
        return seconds <= self._seconds

    def add(self, num_tokens: int, num_rows: int) -> None:
        """Count a chunk."""
        self.num_tokens += num_tokens
        self.num_rows += num_rows


class Pacer:
    """Measures what steps cost, and bounds the work of the next one. Rates in seconds may be given for tests."""

    def __init__(
        self,
        max_token_gap_s: float,
        *,
        decode_s: float | None = None,
        token_s: float | None = None,
        row_s: float | None = None,
    ) -> None:
        self._max_token_gap_s = max_token_gap_s
        self.decode_s = RunningRate(decode_s)
        """Seconds of a step's forward pass without prefill."""
        self.token_s = RunningRate(token_s)
        """Seconds that one prefill token adds."""
        self.row_s = RunningRate(row_s)
        """Seconds that one encoder row adds."""

    def begin_step(self, *, has_streams: bool) -> StepPace:
        """The pace of the next step; without streams, or with an infinite gap: no bound."""
        if not has_streams or math.isinf(self._max_token_gap_s):
            return StepPace()
        seconds = SAFETY * self._max_token_gap_s - (self.decode_s.value or 0.0)
        return StepPace(max(seconds, 0.0), self.token_s.value, self.row_s.value)

    def observe(
        self, num_prefill_tokens: int, num_rows: int, encode_s: float, forward_s: float, num_draft_tokens: int = 0
    ) -> None:
        """Learn from a step's times. A draft is taken to cost what a prefill token does."""
        forward_s -= num_draft_tokens * (self.token_s.value or 0.0)
        if num_rows:
            self.row_s.observe(encode_s / num_rows)
        if num_prefill_tokens == 0:
            self.decode_s.observe(forward_s)
        elif num_prefill_tokens >= MIN_SAMPLE_TOKENS:
            self.token_s.observe((forward_s - (self.decode_s.value or 0.0)) / num_prefill_tokens)

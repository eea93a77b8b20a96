"""One constrained output: where its grammar begins, what it allows next, when it is complete."""

from __future__ import annotations

import copy

from llguidance import LLMatcher, LLTokenizer

from sensorium.errors import InvalidRequestError
from sensorium.grammar.matchers import compile_grammar
from sensorium.grammar.reasons import told
from sensorium.structured_outputs import StructuredOutputs
from sensorium.token_masks import RowState

_MIN_TOKENS_PER_START = 32
"""A matcher that has used up its bounds is built anew, unless it lasted no longer than this."""


class RowMatcher:
    """The matcher of one output.

    A matcher that comes from a shared one shares the lexer's states with its kin, and their bound. So that no output
    depends on others, one that hits a bound goes on with a matcher of its own.
    """

    def __init__(
        self, grammar: StructuredOutputs, tokenizer: LLTokenizer, matcher: LLMatcher, *, hides_end: bool = False
    ) -> None:
        """`matcher`: at the beginning of the grammar, and this row's alone. `hides_end`: see `AddRow`."""
        self.hides_end = hides_end
        self._grammar = grammar
        self._tokenizer = tokenizer
        self._matcher = matcher
        self._token_ids: list[int] = []
        """What the grammar's part of the output consists of."""
        self._num_at_start = 0
        self._is_shared = True
        self._start = None if grammar.start_after is None else grammar.start_after.encode()
        self._tail = b""
        self.state = RowState.HELD if self._start is None else RowState.FREE
        self.error = ""

    @property
    def matcher(self) -> LLMatcher:
        """For computing masks; only while `state` is HELD."""
        return self._matcher

    def copy(self) -> RowMatcher:
        """The same output, to look ahead with: it fails where this one would be built anew."""
        other = copy.copy(self)
        other.unshare()
        return other

    def unshare(self) -> None:
        """Begin to differ from the one that this is a shallow copy of, for fewer tokens than a new matcher is for."""
        self._matcher = self._matcher.deep_copy()
        self._token_ids = []
        self._is_shared, self._num_at_start = False, 0

    def append(self, token_id: int) -> None:
        """Take one token of the output into account."""
        if self.state is RowState.FREE:
            self._look_for_start(token_id)
        elif self.state is RowState.HELD:
            self._token_ids.append(token_id)
            if not self._matcher.consume_token(token_id) and not self._start_anew():
                return
            if self._matcher.is_stopped():
                self.state = RowState.COMPLETE

    def check_mask(self) -> bool:
        """Whether the mask that was computed just now holds; if not, compute it again while `state` is HELD."""
        if self._matcher.is_error():
            self._start_anew()
            return False
        if self._matcher.is_stopped():
            self.state = RowState.COMPLETE
        return True

    def _look_for_start(self, token_id: int) -> None:
        assert self._start is not None
        self._tail += self._tokenizer.decode_bytes([token_id])
        if self._start in self._tail:
            self._tail = b""
            self.state = RowState.HELD
        else:
            self._tail = self._tail[-len(self._start) :]

    def _start_anew(self) -> bool:
        """Replace a matcher that has used up its bounds; False: there is no going on."""
        lasted = len(self._token_ids) - self._num_at_start
        if not self._is_shared and lasted < _MIN_TOKENS_PER_START:
            return self._fail(self._matcher.get_error())
        try:
            fresh = compile_grammar(self._grammar, self._tokenizer)
        except InvalidRequestError as error:
            return self._fail(error.reason or error.message)
        if not fresh.consume_tokens(self._token_ids):
            return self._fail(fresh.get_error())
        self._matcher = fresh
        self._is_shared = False
        self._num_at_start = len(self._token_ids)
        return True

    def _fail(self, reason: str) -> bool:
        self.state = RowState.FAILED
        self.error = told(reason)
        return False

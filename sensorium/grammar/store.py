"""Compiled grammars, kept so that rows can start with them at once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from llguidance import LLMatcher, LLTokenizer

from sensorium.grammar.matchers import compile_grammar
from sensorium.structured_outputs import StructuredOutputs

MAX_STORE_BYTES = 512 << 20
MIN_COST_BYTES = 1 << 20
"""Counted for every grammar, so that the number of small ones is bounded too."""
QUICK_S = 0.1
"""A grammar that compiles within this may be compiled while masks wait."""
_MAX_REMEMBERED = 4096


@dataclass(slots=True, eq=False)
class _Stored:
    matcher: LLMatcher
    cost_bytes: int


class GrammarStore:
    """Matchers at the beginning of their grammars; the least recently used leave first. Safe in several threads."""

    def __init__(self, tokenizer: LLTokenizer, max_bytes: int = MAX_STORE_BYTES) -> None:
        self.tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._stored: OrderedDict[StructuredOutputs, _Stored] = OrderedDict()
        self._num_bytes = 0
        self._compile_s: OrderedDict[int, float] = OrderedDict()
        """By hash of the grammar: how long it took, for grammars that have left too."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._stored)

    def load(self, grammar: StructuredOutputs, cost_bytes: int = 0) -> None:
        """Compile a grammar that was checked, unless it is there. Raises `InvalidRequestError`."""
        grammar = replace(grammar, start_after=None)
        with self._lock:
            if grammar in self._stored:
                self._stored.move_to_end(grammar)
                return
        begin_s = time.perf_counter()
        matcher = compile_grammar(grammar, self.tokenizer)
        seconds = time.perf_counter() - begin_s
        with self._lock:
            self._remember(grammar, seconds)
            if grammar not in self._stored:
                self._keep(grammar, _Stored(matcher, max(cost_bytes, MIN_COST_BYTES)))

    def matcher(self, grammar: StructuredOutputs) -> LLMatcher | None:
        """A matcher of the caller's own; None if the grammar has left and would take long to compile."""
        grammar = replace(grammar, start_after=None)
        with self._lock:
            stored = self._stored.get(grammar)
            if stored is not None:
                self._stored.move_to_end(grammar)
                return stored.matcher.deep_copy()
            is_quick = self._compile_s.get(hash(grammar), QUICK_S + 1) <= QUICK_S
        if not is_quick:
            return None
        self.load(grammar)
        return self.matcher(grammar)

    def _keep(self, grammar: StructuredOutputs, stored: _Stored) -> None:
        self._stored[grammar] = stored
        self._num_bytes += stored.cost_bytes
        while self._num_bytes > self._max_bytes and len(self._stored) > 1:
            _, oldest = self._stored.popitem(last=False)
            self._num_bytes -= oldest.cost_bytes

    def _remember(self, grammar: StructuredOutputs, seconds: float) -> None:
        self._compile_s[hash(grammar)] = seconds
        while len(self._compile_s) > _MAX_REMEMBERED:
            self._compile_s.popitem(last=False)

"""Compiled forms, kept so that rows can start with them at once."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from dataclasses import dataclass, replace

from llguidance import LLMatcher, LLTokenizer

from sensorium.grammar.forms import compile_form
from sensorium.structured_outputs import StructuredOutputs

MAX_STORE_BYTES = 512 << 20
MIN_COST_BYTES = 1 << 20
"""Counted for every form, so that the number of small ones is bounded too."""
QUICK_S = 0.1
"""A form that compiles within this may be compiled while masks wait."""
_MAX_REMEMBERED = 4096


@dataclass(slots=True, eq=False)
class _Stored:
    matcher: LLMatcher
    cost_bytes: int


class FormStore:
    """Matchers at the beginning of their forms; the least recently used leave first. Safe in several threads."""

    def __init__(self, tokenizer: LLTokenizer, max_bytes: int = MAX_STORE_BYTES) -> None:
        self.tokenizer = tokenizer
        self._max_bytes = max_bytes
        self._stored: OrderedDict[StructuredOutputs, _Stored] = OrderedDict()
        self._num_bytes = 0
        self._compile_s: OrderedDict[int, float] = OrderedDict()
        """By hash of the form: how long it took, for forms that have left too."""
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return len(self._stored)

    def load(self, form: StructuredOutputs, cost_bytes: int = 0) -> None:
        """Compile a form that was checked, unless it is there. Raises `InvalidRequestError`."""
        form = replace(form, start_after=None)
        with self._lock:
            if form in self._stored:
                self._stored.move_to_end(form)
                return
        begin_s = time.perf_counter()
        matcher = compile_form(form, self.tokenizer)
        seconds = time.perf_counter() - begin_s
        with self._lock:
            self._remember(form, seconds)
            if form not in self._stored:
                self._keep(form, _Stored(matcher, max(cost_bytes, MIN_COST_BYTES)))

    def matcher(self, form: StructuredOutputs) -> LLMatcher | None:
        """A matcher of the caller's own; None if the form has left and would take long to compile."""
        form = replace(form, start_after=None)
        with self._lock:
            stored = self._stored.get(form)
            if stored is not None:
                self._stored.move_to_end(form)
                return stored.matcher.deep_copy()
            is_quick = self._compile_s.get(hash(form), QUICK_S + 1) <= QUICK_S
        if not is_quick:
            return None
        self.load(form)
        return self.matcher(form)

    def _keep(self, form: StructuredOutputs, stored: _Stored) -> None:
        self._stored[form] = stored
        self._num_bytes += stored.cost_bytes
        while self._num_bytes > self._max_bytes and len(self._stored) > 1:
            _, oldest = self._stored.popitem(last=False)
            self._num_bytes -= oldest.cost_bytes

    def _remember(self, form: StructuredOutputs, seconds: float) -> None:
        self._compile_s[hash(form)] = seconds
        while len(self._compile_s) > _MAX_REMEMBERED:
            self._compile_s.popitem(last=False)

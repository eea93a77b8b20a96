"""The process that owns the matchers of all constrained outputs and computes their masks.

The main thread follows rows and computes; a second one compiles grammars, which leaves Python's lock alone. Ends when
the engine closes its end.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from multiprocessing.connection import Connection

import msgspec
import numpy as np
from llguidance import LLExecutor

from sensorium.errors import InvalidRequestError
from sensorium.grammar.messages import (
    AddRow,
    AppendToken,
    LoadGrammar,
    LookAhead,
    RowUpdate,
    RowUpdates,
    Verdict,
)
from sensorium.grammar.row_matcher import RowMatcher
from sensorium.grammar.store import GrammarStore
from sensorium.token_masks import Int32Array, MaskMemory, RowFailure, RowsDone, RowState

_MAX_THREADS = 8
_MIN_ROWS_PER_THREAD = 2
_GRAMMAR_IS_GONE = RowFailure(
    "The compiled grammar of this output had to make room for others. Send the request again.", 503
)


class MaskServer:
    """Outputs by row. Masks lie in `memory`; who samples reads them once `RowsDone` is there."""

    def __init__(self, store: GrammarStore, memory: MaskMemory, end_token_ids: Iterable[int]) -> None:
        self._store = store
        self._memory = memory
        self._outputs: dict[int, RowMatcher] = {}
        """By row."""
        self._without_ends = _mask_without(end_token_ids, memory.masks.shape[1])
        num_threads = min(max((os.cpu_count() or 1) // 4, 1), _MAX_THREADS)
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None

    def apply(self, message: RowUpdates) -> RowsDone:
        """Follow the rows, and compute the masks of those that changed."""
        failures: dict[int, RowFailure] = {}
        touched: dict[int, None] = {}
        looks = []
        for update in message.updates:
            if isinstance(update, LookAhead):
                looks.append(update)
                continue
            touched[update.row] = None
            self._update(update, failures)
        outputs = {row: self._outputs[row] for row in touched if row in self._outputs}
        self._compute({row: output for row, output in outputs.items() if output.state is RowState.HELD})
        for row, output in outputs.items():
            if output.state is RowState.FAILED:
                failures[row] = RowFailure(f"the output can't go on ({output.error}). Simplify it.")
            self._memory.states[row] = output.state
        for row in failures:
            self._memory.states[row] = RowState.FAILED
        for each in looks:
            self._look_ahead(each)
        return RowsDone(message.number, failures)

    def _look_ahead(self, look: LookAhead) -> None:
        """Masks behind drafts. Behind one that may not come there is none, since nobody gets there."""
        states, output = self._memory.states, self._outputs.get(look.row)
        states[look.row + 1 : look.row + 1 + len(look.token_ids)] = RowState.FAILED
        ahead = None if output is None or output.state is RowState.FAILED else output.copy()
        for row, token_id in enumerate(look.token_ids, look.row + 1):
            if ahead is None or not self._may_come(row - 1, token_id):
                return
            ahead.append(token_id)
            self._compute({row: ahead} if ahead.state is RowState.HELD else {})
            states[row] = ahead.state

    def _may_come(self, row: int, token_id: int) -> bool:
        """Whether a row's mask, if it has one, allows a token."""
        if self._memory.states[row] == RowState.FREE:
            return True
        if self._memory.states[row] != RowState.HELD:
            return False
        return bool(self._memory.masks[row, token_id // 32] >> token_id % 32 & 1)

    def _update(self, update: RowUpdate, failures: dict[int, RowFailure]) -> None:
        row = update.row
        if isinstance(update, AppendToken):
            if row in self._outputs:
                self._outputs[row].append(update.token_id)
            return
        self._outputs.pop(row, None)
        failures.pop(row, None)
        if not isinstance(update, AddRow):
            return
        try:
            matcher = self._store.matcher(update.grammar)
        except InvalidRequestError as error:
            failures[row] = RowFailure(error.message)
            return
        if matcher is None:
            failures[row] = _GRAMMAR_IS_GONE
            return
        output = self._outputs[row] = RowMatcher(
            update.grammar, self._store.tokenizer, matcher, hides_end=update.hides_end
        )
        for token_id in update.token_ids:
            output.append(token_id)

    def _compute(self, outputs: dict[int, RowMatcher]) -> None:
        while outputs:
            self._fill(outputs)
            outputs = {row: output for row, output in outputs.items() if not self._is_settled(row, output)}

    def _is_settled(self, row: int, output: RowMatcher) -> bool:
        if not output.check_mask() and output.state is RowState.HELD:
            return False
        if output.hides_end:
            self._memory.masks[row] &= self._without_ends
        return True

    def _fill(self, outputs: dict[int, RowMatcher]) -> None:
        masks = self._memory.masks
        row_bytes = masks.shape[1] * masks.itemsize
        if self._executor is not None and len(outputs) >= 2 * _MIN_ROWS_PER_THREAD:
            matchers = [(output.matcher, row) for row, output in outputs.items()]
            self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, row_bytes, len(masks))
            return
        for row, output in outputs.items():
            output.matcher.unsafe_compute_mask_ptr(masks.ctypes.data + row * row_bytes, row_bytes)


def serve_masks(server: MaskServer, orders: Connection, done: Connection) -> None:
    """Do what comes in `orders`, and say in `done` what is done, until either's other end closes."""
    decoder = msgspec.msgpack.Decoder(RowUpdates)
    try:
        while True:
            done.send_bytes(msgspec.msgpack.encode(server.apply(decoder.decode(orders.recv_bytes()))))
    except (EOFError, OSError):
        return


def start_loading(store: GrammarStore, connection: Connection) -> None:
    """Compile grammars in a thread of their own until the other end closes."""
    threading.Thread(target=_load, args=(store, connection), name="sensorium-grammar-loader", daemon=True).start()


def _load(store: GrammarStore, connection: Connection) -> None:
    decoder = msgspec.msgpack.Decoder(LoadGrammar)
    try:
        while True:
            order = decoder.decode(connection.recv_bytes())
            try:
                store.load(order.grammar, order.cost_bytes)
                verdict = Verdict(order.check_id)
            except InvalidRequestError as error:
                verdict = Verdict.refused(order.check_id, error)
            connection.send_bytes(msgspec.msgpack.encode(verdict))
    except (EOFError, OSError):
        return


def _mask_without(token_ids: Iterable[int], num_words: int) -> Int32Array:
    """A mask with all bits set but those of some tokens."""
    bits = np.ones(32 * num_words, dtype=np.uint8)
    bits[[token_id for token_id in token_ids if 0 <= token_id < len(bits)]] = 0
    mask: Int32Array = np.packbits(bits, bitorder="little").view(np.int32)
    return mask

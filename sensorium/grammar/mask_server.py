"""The process that owns the matchers of all constrained outputs and computes their masks.

The main thread follows rows and computes; a second one compiles forms, which leaves Python's lock alone. Ends when the
engine closes its end.
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
from sensorium.grammar.mask_memory import Int32Array, MaskMemory
from sensorium.grammar.messages import (
    AddRow,
    AppendToken,
    LoadForm,
    RowFailure,
    RowsDone,
    RowUpdate,
    RowUpdates,
    Verdict,
)
from sensorium.grammar.row_matcher import RowMatcher
from sensorium.grammar.row_state import RowState
from sensorium.grammar.store import FormStore

_MAX_THREADS = 8
_MIN_ROWS_PER_THREAD = 2
_FORM_IS_GONE = RowFailure("The compiled form of this output had to make room for others. Send the request again.", 503)


class MaskServer:
    """Rows by slot. Masks lie in `memory`; whoever asked for them reads them once `RowsDone` is there."""

    def __init__(self, store: FormStore, memory: MaskMemory, end_token_ids: Iterable[int]) -> None:
        self._store = store
        self._memory = memory
        self._rows: dict[int, RowMatcher] = {}
        self._hides_end: set[int] = set()
        self._without_ends = _mask_without(end_token_ids, memory.masks.shape[1])
        num_threads = min(max((os.cpu_count() or 1) // 4, 1), _MAX_THREADS)
        self._executor = LLExecutor(num_threads) if num_threads > 1 else None

    def apply(self, message: RowUpdates) -> RowsDone:
        """Follow the rows, and compute the masks of those that changed."""
        failures: dict[int, RowFailure] = {}
        touched: dict[int, None] = {}
        for update in message.updates:
            touched[update.slot] = None
            self._update(update, failures)
        rows = {slot: self._rows[slot] for slot in touched if slot in self._rows}
        self._compute({slot: row for slot, row in rows.items() if row.state is RowState.HELD})
        for slot, row in rows.items():
            if row.state is RowState.FAILED:
                failures[slot] = RowFailure(f"structured_outputs: the output can't go on ({row.error}). Simplify it.")
            self._memory.states[slot] = row.state
        for slot in failures:
            self._memory.states[slot] = RowState.FAILED
        return RowsDone(message.number, failures)

    def _update(self, update: RowUpdate, failures: dict[int, RowFailure]) -> None:
        slot = update.slot
        if isinstance(update, AppendToken):
            if slot in self._rows:
                self._rows[slot].append(update.token_id)
            return
        self._rows.pop(slot, None)
        self._hides_end.discard(slot)
        failures.pop(slot, None)
        if not isinstance(update, AddRow):
            return
        try:
            matcher = self._store.matcher(update.form)
        except InvalidRequestError as error:
            failures[slot] = RowFailure(str(error))
            return
        if matcher is None:
            failures[slot] = _FORM_IS_GONE
            return
        row = self._rows[slot] = RowMatcher(update.form, self._store.tokenizer, matcher)
        if update.hides_end:
            self._hides_end.add(slot)
        for token_id in update.token_ids:
            row.append(token_id)

    def _compute(self, rows: dict[int, RowMatcher]) -> None:
        while rows:
            self._fill(rows)
            rows = {slot: row for slot, row in rows.items() if not self._is_settled(slot, row)}

    def _is_settled(self, slot: int, row: RowMatcher) -> bool:
        if not row.check_mask() and row.state is RowState.HELD:
            return False
        if slot in self._hides_end:
            self._memory.masks[slot] &= self._without_ends
        return True

    def _fill(self, rows: dict[int, RowMatcher]) -> None:
        masks = self._memory.masks
        row_bytes = masks.shape[1] * masks.itemsize
        if self._executor is not None and len(rows) >= 2 * _MIN_ROWS_PER_THREAD:
            matchers = [(row.matcher, slot) for slot, row in rows.items()]
            self._executor.unsafe_compute_mask_ptr(matchers, masks.ctypes.data, row_bytes, len(masks))
            return
        for slot, row in rows.items():
            row.matcher.unsafe_compute_mask_ptr(masks.ctypes.data + slot * row_bytes, row_bytes)


def serve_masks(server: MaskServer, connection: Connection) -> None:
    """Answer until the other end closes."""
    decoder = msgspec.msgpack.Decoder(RowUpdates)
    try:
        while True:
            done = server.apply(decoder.decode(connection.recv_bytes()))
            connection.send_bytes(msgspec.msgpack.encode(done))
    except (EOFError, OSError):
        return


def start_loading(store: FormStore, connection: Connection) -> None:
    """Compile forms in a thread of their own until the other end closes."""
    threading.Thread(target=_load, args=(store, connection), name="sensorium-grammar-loader", daemon=True).start()


def _load(store: FormStore, connection: Connection) -> None:
    decoder = msgspec.msgpack.Decoder(LoadForm)
    try:
        while True:
            order = decoder.decode(connection.recv_bytes())
            try:
                store.load(order.form, order.cost_bytes)
                verdict = Verdict(order.check_id)
            except InvalidRequestError as error:
                verdict = Verdict(order.check_id, str(error))
            connection.send_bytes(msgspec.msgpack.encode(verdict))
    except (EOFError, OSError):
        return


def _mask_without(token_ids: Iterable[int], num_words: int) -> Int32Array:
    """A mask with all bits set but those of some tokens."""
    bits = np.ones(32 * num_words, dtype=np.uint8)
    bits[[token_id for token_id in token_ids if 0 <= token_id < len(bits)]] = 0
    mask: Int32Array = np.packbits(bits, bitorder="little").view(np.int32)
    return mask

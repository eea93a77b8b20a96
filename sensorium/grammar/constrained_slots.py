"""The engine's view of constrained slots: tells the mask server what was sampled, and has the masks when they are due.

Masks are computed while the model runs: whatever changes goes out at once, and only sampling waits for the answer.
Used by the thread that steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np

from sensorium.grammar.compiler import FormCompiler
from sensorium.grammar.mask_memory import Int32Array
from sensorium.grammar.messages import AddRow, AppendToken, RemoveRow, RowFailure, RowsDone, RowUpdate, RowUpdates
from sensorium.grammar.row_state import RowState
from sensorium.grammar.service import GrammarService
from sensorium.logger import get_logger
from sensorium.sampling_params import SamplingParams

logger = get_logger(__name__)

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.integer[Any]]]"

MASK_TIMEOUT_S = 10.0
"""Processes that don't answer within this are given up. Masks are bounded to a fraction of a second by the library."""
_SERVICE_ENDED = RowFailure("The engine could not hold this output to its form. Send the request again.", 500)


@dataclass(frozen=True, slots=True, eq=False)
class RowMasks:
    """What the forms say to a step's rows."""

    rows: IntArray
    """`(num_held,)`: the rows that are held to a form now."""
    words: Int32Array
    """`(num_held, num_words)`: a bit for each token that may come, the lowest first."""
    complete_rows: frozenset[int] = frozenset()
    """Rows to whose output nothing may be added."""
    failures: dict[int, RowFailure] = field(default_factory=dict)
    """By row: outputs that can't go on."""


class ConstrainedSlots:
    """Invariant: a slot is here from `add` to `remove`, whatever becomes of the processes meanwhile."""

    def __init__(self, compiler: FormCompiler) -> None:
        self._compiler = compiler
        self._service: GrammarService | None = None
        self._slots: dict[int, RowFailure | None] = {}
        self._begun: dict[int, int] = {}
        """By slot: the first message that is about its present output. What came before was another's."""
        self._updates: list[RowUpdate] = []
        self._num_sent = 0
        self._num_done = 0

    def __len__(self) -> int:
        return len(self._slots)

    def add(self, slot: int, params: SamplingParams, output_token_ids: tuple[int, ...]) -> None:
        """Hold a slot to its form, which was compiled; without one, nothing happens."""
        form = params.structured_outputs
        if form is None:
            return
        if self._compiler.service is not self._service:
            self._change_service()
        self._slots[slot] = None
        self._begun[slot] = self._num_sent + 1
        self._updates.append(AddRow(slot, form, list(output_token_ids), params.ignore_eos))

    def remove(self, slot: int) -> None:
        """Forget a slot; one that isn't here is ignored."""
        if slot in self._slots:
            del self._slots[slot], self._begun[slot]
            self._updates.append(RemoveRow(slot))

    def append_each(self, slots: IntArray, token_ids: IntArray) -> None:
        """Note the token that was sampled in each of these slots, both `(num_rows,)`."""
        if self._slots:
            self._updates += [
                AppendToken(slot, token_id)
                for slot, token_id in zip(slots.tolist(), token_ids.tolist(), strict=True)
                if slot in self._slots
            ]

    def flush(self) -> None:
        """Send what has changed, so that masks are computed from now on."""
        updates, self._updates = self._updates, []
        if not updates or self._service is None:
            return
        self._num_sent += 1
        try:
            self._service.masks.send_bytes(msgspec.msgpack.encode(RowUpdates(self._num_sent, updates)))
        except OSError:
            self._give_up("closed its end")

    def masks(self, slots: IntArray) -> RowMasks | None:
        """What holds for the rows in these slots `(num_rows,)`; None where no form does. Waits for the masks."""
        if not self._slots:
            return None
        own = [(row, slot) for row, slot in enumerate(slots.tolist()) if slot in self._slots]
        if not own:
            return None
        self.flush()
        self._wait()
        failures = {row: failure for row, slot in own if (failure := self._failure(slot)) is not None}
        held: list[tuple[int, int]] = []
        complete = []
        for row, slot in own:
            if row in failures or self._service is None:
                continue
            state = self._service.memory.states[slot]
            if state == RowState.HELD:
                held.append((row, slot))
            elif state == RowState.COMPLETE:
                complete.append(row)
        rows = np.array([row for row, _ in held], dtype=np.int64)
        masks = np.empty((0, 0), dtype=np.int32)
        if held:
            assert self._service is not None
            masks = self._service.memory.masks[[slot for _, slot in held]]
        return RowMasks(rows, masks, frozenset(complete), failures)

    def _failure(self, slot: int) -> RowFailure | None:
        return _SERVICE_ENDED if self._service is None else self._slots[slot]

    def _wait(self) -> None:
        """Take in answers until the last is there."""
        while self._service is not None and self._num_done < self._num_sent:
            try:
                if not self._service.masks.poll(MASK_TIMEOUT_S):
                    self._give_up("doesn't answer")
                    return
                done = msgspec.msgpack.decode(self._service.masks.recv_bytes(), type=RowsDone)
            except (EOFError, OSError, msgspec.MsgspecError):
                self._give_up("has ended")
                return
            self._num_done = done.number
            for slot, failure in done.failures.items():
                if slot in self._slots and done.number >= self._begun[slot]:
                    self._slots[slot] = failure

    def _change_service(self) -> None:
        """Go over to new processes; outputs that the old ones held can't go on."""
        for slot in self._slots:
            self._slots[slot] = _SERVICE_ENDED
        self._service = self._compiler.service
        self._updates = []
        self._num_sent = self._num_done = 0

    def _give_up(self, why: str) -> None:
        logger.error("the mask server %s; outputs that are held to a form fail", why)
        service, self._service = self._service, None
        if service is not None:
            self._compiler.drop(service)
        for slot in self._slots:
            self._slots[slot] = _SERVICE_ENDED

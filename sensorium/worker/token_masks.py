"""Reads the masks that a step's handle tells of, once they are there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import msgspec
import numpy as np

from sensorium.logger import get_logger
from sensorium.messages import RequestFailure
from sensorium.structured_outputs import FIELD
from sensorium.token_masks import Int32Array, MaskMemory, MaskRow, MaskSource, RowFailure, RowsDone, RowState, StepMasks

logger = get_logger(__name__)

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.integer[Any]]]"

MASK_TIMEOUT_S = 10.0
"""A source that doesn't answer within this is given up. Masks are bounded to a fraction of a second by the library."""
_LOST = RequestFailure("The engine could not hold this output to its structured_outputs. Send the request again.", 500)


@dataclass(frozen=True, slots=True, eq=False)
class RowMasks:
    """What grammars say to the rows of a pass."""

    rows: IntArray
    """`(num_held,)`: the rows that are held to a grammar now."""
    words: Int32Array
    """`(num_held, num_words)`: a bit for each token that may come, the lowest first."""
    complete_rows: frozenset[int] = frozenset()
    """Rows to whose output nothing may be added, or nothing behind a draft."""
    failures: dict[int, RequestFailure] = field(default_factory=dict)
    """By row: outputs that can't go on."""


class MaskReader:
    """The reader of one source at a time, the one that the last step named."""

    def __init__(self) -> None:
        self._source: _OpenSource | None = None
        self.given_up_id: int | None = None
        """Id of the last source that did not answer, for the engine to end it."""

    def begin_step(self, masks: StepMasks) -> None:
        """Take in what the source has said so far, so that it never waits for a reader."""
        source = masks.source
        if source is not None and source.source_id == self.given_up_id:
            source = None
        if self._source is not None and (source is None or self._source.source_id != source.source_id):
            self.close()
        if self._source is None and source is not None:
            self._source = _OpenSource(source)
        if self._source is not None:
            self._source.take_in()

    def read(
        self, masks: StepMasks, request_ids: Sequence[str], num_drafts: Sequence[int] | None = None
    ) -> RowMasks | None:
        """What holds for a pass's rows; None where none is held. Waits for masks.

        `request_ids`: each row's. `num_drafts`: how many drafts each row stands behind; None: none.
        """
        before = num_drafts or [0] * len(request_ids)
        own = [
            (row, each, before[row])
            for row, name in enumerate(request_ids)
            if (each := masks.rows.get(name)) is not None
        ]
        failures = {row: _LOST for row, name in enumerate(request_ids) if name in masks.lost_request_ids}
        if not own and not failures:
            return None
        source = self._source
        if source is not None and own and not source.wait_for(masks.number):
            self._give_up()
            source = None
        if source is None:
            return RowMasks(_NO_ROWS, _NO_WORDS, failures=failures | {row: _LOST for row, *_ in own})
        return source.masks(own, failures)

    def close(self) -> None:
        """Close the source's files."""
        if self._source is not None:
            self._source.close()
            self._source = None

    def _give_up(self) -> None:
        assert self._source is not None
        logger.error("masks of source %d don't come; constrained outputs fail", self._source.source_id)
        self.given_up_id = self._source.source_id
        self.close()


_NO_ROWS: IntArray = np.zeros(0, dtype=np.int64)
_NO_WORDS: Int32Array = np.zeros((0, 0), dtype=np.int32)


class _OpenSource:
    """A source that is mapped and listened to."""

    def __init__(self, source: MaskSource) -> None:
        self.source_id = source.source_id
        self._memory = MaskMemory(source.memory_fd, source.num_rows, source.vocab_size)
        self._done = Connection(os.dup(source.done_fd), writable=False)
        self._decoder = msgspec.msgpack.Decoder(RowsDone)
        self._num_done = 0
        self._failures: dict[int, tuple[int, RowFailure]] = {}
        """By row: the last order that failed there, and why."""
        self._has_ended = False

    def take_in(self) -> None:
        """Read what is there already."""
        while self._take_in(0.0):
            pass

    def wait_for(self, number: int) -> bool:
        """Return once this order's masks are in the memory; False: they won't be."""
        while self._num_done < number:
            if not self._take_in(MASK_TIMEOUT_S):
                return False
        return True

    def _take_in(self, timeout_s: float) -> bool:
        try:
            if self._has_ended or not self._done.poll(timeout_s):
                return False
            done = self._decoder.decode(self._done.recv_bytes())
        except (EOFError, OSError, msgspec.MsgspecError):
            self._has_ended = True
            return False
        self._num_done = done.number
        self._failures.update({row: (done.number, failure) for row, failure in done.failures.items()})
        return True

    def masks(self, own: Sequence[tuple[int, MaskRow, int]], failures: dict[int, RequestFailure]) -> RowMasks:
        """The masks of rows of a pass, given their requests' rows in the memory and how many drafts they stand
        behind."""
        held, indices, complete = [], [], []
        for row, mask_row, num_drafts in own:
            number, failure = self._failures.get(mask_row.row, (0, None))
            state = self._memory.states[mask_row.row + num_drafts]
            if failure is not None and number >= mask_row.begun:
                failures[row] = RequestFailure(failure.message, failure.status, field=FIELD)
            elif state == RowState.HELD:
                held.append(row)
                indices.append(mask_row.row + num_drafts)
            elif state == RowState.COMPLETE or (num_drafts and state == RowState.FAILED):
                complete.append(row)
        words = self._memory.masks[indices] if indices else _NO_WORDS
        return RowMasks(np.array(held, dtype=np.int64), words, frozenset(complete), failures)

    def close(self) -> None:
        self._done.close()

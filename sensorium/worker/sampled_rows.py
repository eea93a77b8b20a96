"""Rows of a pass after which tokens are sampled, before the pass and after it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sensorium.messages import ScheduledChunk
from sensorium.model_executor.layers.sampler import SamplerOutput
from sensorium.model_executor.sampling_metadata import BoolArray, DraftRows
from sensorium.worker.input_batch import Int64Array, SlotState, StepArrays
from sensorium.worker.token_masks import RowMasks


@dataclass(frozen=True, slots=True, eq=False)
class WantedRows:
    """Rows of one pass after which a token is sampled: each request has one, and one more for each draft."""

    rows: Int64Array
    """Of the batch."""
    slots: Int64Array
    positions: Int64Array
    """Where each sampled token will stand in its sequence."""
    drafts: DraftRows | None = None
    """None: there are none."""

    @classmethod
    def of(cls, chunks: Sequence[ScheduledChunk], arrays: StepArrays, sampling: Sequence[int]) -> WantedRows:
        """Those of the chunks with these indices."""
        index = slice(None) if len(sampling) == len(chunks) else np.array(sampling, dtype=np.int64)
        slots, positions = arrays.slots[index], arrays.seq_lens[index].astype(np.int64)
        rows = arrays.cu_seqlens_q[1:][index].astype(np.int64) - 1
        num_drafts = [len(chunks[i].draft_token_ids) for i in sampling]
        if not any(num_drafts):
            return cls(rows, slots, positions)
        num_rows = np.array(num_drafts) + 1
        offsets = np.concatenate([np.arange(count) for count in num_rows])
        to_last = offsets - np.repeat(num_rows - 1, num_rows)
        rows = np.repeat(rows, num_rows) + to_last
        drafts = DraftRows(offsets, arrays.token_ids[rows])
        return cls(rows, np.repeat(slots, num_rows), np.repeat(positions, num_rows) + to_last, drafts)


@dataclass(frozen=True, slots=True, eq=False)
class SampledRows:
    """Rows of one pass after which a token was sampled, and what is still on its way."""

    states: list[SlotState]
    """Of the requests, in the order of their rows."""
    wanted: WantedRows
    output: SamplerOutput
    masks: RowMasks | None

    def accepted(self) -> BoolArray | None:
        """`(num_rows,)`: which tokens count, because the drafts before them were right; None: there were no drafts."""
        if self.wanted.drafts is None:
            return None
        blocked = self.output.failed_rows
        if self.masks is not None:
            blocked = blocked | self.masks.complete_rows | self.masks.failures.keys()
        return self.wanted.drafts.accepted(self.output.token_ids, blocked)

"""Encoder outputs: computed on demand, kept until the scheduler says to drop them.

Owns the rows. The scheduler's encoder-cache manager decides what is kept; this is the memory that it decides about.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch

from sensorium.distributed import TensorParallel
from sensorium.errors import LostRankError, ProcessorError, SensoriumError
from sensorium.messages import EncoderInput
from sensorium.model_executor.drivers import EncodeJob, EncodeResult, ItemRows
from sensorium.worker.input_batch import InputBatch, MediaSlice


class EncoderRunner:
    """Invariant: `_rows` and `errors` together hold exactly the keys that were to be encoded and not freed."""

    def __init__(self, encode: Callable[[Sequence[EncodeJob]], list[EncodeResult]], group: TensorParallel) -> None:
        self._encode = encode
        self._group = group
        self._rows: dict[str, ItemRows] = {}
        self.errors: dict[str, SensoriumError] = {}
        """By key: why there are no rows. A step that was planned before that was known may still ask for them."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_rows(self) -> int:
        """Rows held in all."""
        return sum(len(rows) for rows in self._rows.values())

    def free(self, keys: Iterable[str]) -> None:
        """Drop rows, and what went wrong with them."""
        for key in keys:
            self._rows.pop(key, None)
            self.errors.pop(key, None)

    def run(self, inputs: Sequence[EncoderInput], batch: InputBatch) -> None:
        """Encode items.

        Raises:
            LostRankError: Items could not be encoded here, and other ranks did not fail with them.
        """
        if not inputs:
            return
        num_errors = len(self.errors)
        requests = [batch[each.request_id].request for each in inputs]
        jobs = [EncodeJob(request, request.media[each.item]) for each, request in zip(inputs, requests, strict=True)]
        for job, result in zip(jobs, self._encode(jobs), strict=True):
            if isinstance(result, SensoriumError):
                self.errors[job.item.key] = result
                continue
            rows = ItemRows(result) if isinstance(result, torch.Tensor) else result
            error = _row_error(job, rows)
            if error is not None:
                self.errors[job.item.key] = error
            else:
                self._rows[job.item.key] = rows
        if len(self.errors) > num_errors and not self._group.have_all_failed():
            raise LostRankError("encoding media: got a failure that not all ranks had. Restart the engine.")

    def all_rows(self, key: str) -> torch.Tensor:
        """The rows of an item that was encoded, `(num_rows, hidden_size)`."""
        return self._rows[key].rows

    def rows(self, piece: MediaSlice) -> ItemRows | None:
        """The rows of a slice; None where the item was not encoded."""
        rows = self._rows.get(piece.item.key)
        return None if rows is None else rows.part(piece.first, piece.last)


def _row_error(job: EncodeJob, rows: ItemRows) -> ProcessorError | None:
    if len(rows) == job.item.num_rows:
        return None
    if job.item.cross_rows:
        return ProcessorError(
            f"{job.item.modality} item {job.item.index}: got {len(rows)} rows from the model's encoder, expected "
            f"{job.item.cross_rows}, as get_num_encoder_rows of the model says. Correct one of them."
        )
    return ProcessorError(
        f"Attempted to assign {len(rows)} = {len(rows)} multimodal tokens to {job.item.span.num_rows} placeholders. "
        f"{job.item.modality} item {job.item.index} has another size in the prompt than in the model."
    )

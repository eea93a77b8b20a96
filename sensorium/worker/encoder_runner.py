"""Encoder outputs: computed on demand, kept until the scheduler says to drop them.

Owns the rows. The scheduler's encoder-cache manager decides what is kept; this is the memory that it decides about.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence

import torch

from sensorium.errors import ProcessorError, SensoriumError
from sensorium.messages import EncoderInput
from sensorium.model_executor.drivers import EncodeJob, ModelDriver
from sensorium.worker.input_batch import InputBatch, MediaSlice


class EncoderRunner:
    """Invariant: `_rows` holds exactly the keys that were encoded and not freed."""

    def __init__(self, driver: ModelDriver) -> None:
        self._driver = driver
        self._rows: dict[str, torch.Tensor] = {}
        self.encode_s = 0.0
        """Seconds that the last `run` took."""

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def num_rows(self) -> int:
        """Rows held in all."""
        return sum(len(rows) for rows in self._rows.values())

    def free(self, keys: Iterable[str]) -> None:
        """Drop rows. A key whose encoding failed has none, which is fine."""
        for key in keys:
            self._rows.pop(key, None)

    def run(self, inputs: Sequence[EncoderInput], batch: InputBatch) -> dict[str, SensoriumError]:
        """Encode items; returns the errors by item key."""
        self.encode_s = 0.0
        if not inputs:
            return {}
        begin = time.perf_counter()
        requests = [batch[each.request_id].request for each in inputs]
        jobs = [EncodeJob(request, request.media[each.item]) for each, request in zip(inputs, requests, strict=True)]
        errors: dict[str, SensoriumError] = {}
        for job, result in zip(jobs, self._driver.encode(jobs), strict=True):
            error = result if isinstance(result, SensoriumError) else _row_error(job, result)
            if error is not None:
                errors[job.item.key] = error
            else:
                assert isinstance(result, torch.Tensor)
                self._rows[job.item.key] = result
        self.encode_s = time.perf_counter() - begin
        return errors

    def rows(self, piece: MediaSlice) -> torch.Tensor | None:
        """The rows of a slice `(last - first, hidden_size)`; None where the item was not encoded."""
        rows = self._rows.get(piece.item.key)
        return None if rows is None else rows[piece.first : piece.last]


def _row_error(job: EncodeJob, rows: torch.Tensor) -> ProcessorError | None:
    if len(rows) == job.item.num_rows:
        return None
    return ProcessorError(
        f"Attempted to assign {len(rows)} = {len(rows)} multimodal tokens to {job.item.num_rows} placeholders. "
        f"{job.item.modality} item {job.item.index} has another size in the prompt than in the model."
    )

"""How often each token occurred in requests with penalties, counted where the tokens are sampled.

The host learns of a token only after the next step was submitted. With counts on the device, a request with penalties
needn't wait for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from sensorium.kernels.penalties import GENERATED, IN_PROMPT, penalise
from sensorium.model_executor.host_copy import to_device
from sensorium.sampling_params import SamplingParams

Array: TypeAlias = "np.ndarray[Any, np.dtype[np.integer[Any]]]"


class TokenCounts:
    """Invariant: a row counts the tokens that its request's next one is penalised by, as soon as they are sampled."""

    def __init__(self, max_num_seqs: int, vocab_size: int, device: torch.device) -> None:
        self._counts = torch.zeros(max_num_seqs, vocab_size, dtype=torch.int32, device=device)
        self._params: dict[int, tuple[int, int, int]] = {}
        """By slot: bits of the three penalties, see `penalise_reference`."""

    def __contains__(self, slot: int) -> bool:
        return slot in self._params

    def add(
        self, slot: int, params: SamplingParams, prompt_token_ids: Sequence[int], output_token_ids: Sequence[int]
    ) -> None:
        """Fill a slot, if its request has penalties."""
        if not params.has_penalties:
            return
        vocab_size, device = self._counts.shape[1], self._counts.device
        # Only the repetition penalty looks at the prompt. Media placeholders may lie outside of the vocabulary.
        prompt = np.asarray(prompt_token_ids if params.repetition_penalty != 1.0 else (), dtype=np.int64)
        prompt = np.unique(prompt[(prompt >= 0) & (prompt < vocab_size)])
        output, num_output = np.unique(np.asarray(output_token_ids, dtype=np.int64), return_counts=True)
        row = self._counts[slot].zero_()
        for ids, counts in ((prompt, np.full(len(prompt), IN_PROMPT)), (output, GENERATED * num_output)):
            if len(ids):
                row.index_add_(0, to_device(ids, device), to_device(counts.astype(np.int32), device))
        repetition = np.float32(params.repetition_penalty).view(np.int32)
        others = np.array([params.frequency_penalty, params.presence_penalty], dtype=np.float64).view(np.int64)
        self._params[slot] = (int(repetition), int(others[0]), int(others[1]))

    def remove(self, slot: int) -> None:
        """Empty a slot. Emptying an empty one does nothing."""
        self._params.pop(slot, None)

    def penalties(self, slots: Array) -> Penalties | None:
        """Those of the rows that these slots stand in, `(num_rows,)`; None if no row has any."""
        if not self._params:
            return None
        rows = [(row, slot, *self._params[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._params]
        if not rows:
            return None
        return Penalties(self._counts, to_device(np.array(rows, dtype=np.int64), self._counts.device))


class Penalties:
    """Penalties of some rows of a step."""

    def __init__(self, counts: torch.Tensor, params: torch.Tensor) -> None:
        self._counts, self._params = counts, params

    def apply_(self, logits: torch.Tensor) -> None:
        """Edit `logits` `(num_rows, vocab_size)` float32, contiguous, in place."""
        penalise(logits, self._counts, self._params)

    def count(self, token_ids: torch.Tensor) -> None:
        """Note what was sampled in the rows: `(num_rows,)` int64."""
        rows, slots = self._params[:, 0], self._params[:, 1]
        places = slots * self._counts.shape[1] + token_ids[rows]
        self._counts.view(-1).index_add_(0, places, torch.full_like(places, GENERATED, dtype=torch.int32))

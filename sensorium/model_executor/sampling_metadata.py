"""What sampling needs to know about a step's rows, and the state behind it that lasts over steps.

The worker owns one `SamplingState` with a slot for each running request, and hands `SamplingMetadata` to the
model's `compute_logits`. Model classes pass it on without looking inside.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from sensorium.model_executor.logit_edits import EditBatch, LogitEdits
from sensorium.model_executor.token_counts import Penalties, TokenCounts
from sensorium.model_executor.token_mask import TokenMask
from sensorium.sampling_params import SamplingParams, mix64

IntArray: TypeAlias = "np.ndarray[Any, np.dtype[np.integer[Any]]]"
BoolArray: TypeAlias = "np.ndarray[Any, np.dtype[np.bool_]]"
NO_LOGPROBS = -1


@dataclass(frozen=True, slots=True, eq=False)
class DraftRows:
    """Which rows stand behind drafts. A request's rows follow each other: the first behind its last token, each other
    behind one more draft.

    Worked example: a request with the drafts 5 and 6, then one without: offsets `[0, 1, 2, 0]`, token ids
    `[., 5, 6, .]`.
    """

    offsets: IntArray
    """`(num_rows,)`: drafts between the request's last token and what is sampled from the row."""
    token_ids: IntArray
    """`(num_rows,)`: the last of these; any id where there is none."""

    @property
    def first_rows(self) -> IntArray:
        """`(num_requests,)`: the first row of each request."""
        return np.flatnonzero(self.offsets == 0)

    @property
    def num_rows(self) -> IntArray:
        """`(num_requests,)`: rows of each request."""
        return np.diff(self.first_rows, append=len(self.offsets))

    def accepted(self, sampled_ids: IntArray, blocked_rows: Collection[int]) -> BoolArray:
        """`(num_rows,)`: whether what was sampled in a row counts, because all drafts before it were.

        `blocked_rows`, in which no token could be sampled, don't count, but for the first row of a request.
        """
        is_right = np.ones(len(self.offsets), dtype=np.bool_)
        is_right[1:] = self.token_ids[1:] == sampled_ids[:-1]
        if blocked_rows:
            blocked = np.fromiter(blocked_rows, dtype=np.int64)
            is_right[blocked] = False
            is_right[blocked[blocked + 1 < len(is_right)] + 1] = False
        # Wrong ones are counted from the request's first row on, which is never wrong.
        num_wrong = np.cumsum(~is_right & (self.offsets > 0))
        accepted: BoolArray = num_wrong == np.repeat(num_wrong[self.first_rows], self.num_rows)
        return accepted


class SamplingState:
    """Sampling parameters and token histories by slot. Everything lies on the host, but for `token_counts`.

    A slot that nobody added counts as plain greedy, so that profiling and padding rows need no parameters.
    What a slot samples depends on its own parameters and history alone, never on its number or its
    neighbours.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, seed: int = 0, token_counts: TokenCounts | None = None
    ) -> None:
        """`seed` starts the generator that gives requests without a seed of their own their randomness. `token_counts`:
        where tokens are counted for penalties; None: here, on the host."""
        self.vocab_size = vocab_size
        self._random = random.Random(seed)
        self._edits: dict[int, LogitEdits] = {}
        self._token_counts = token_counts
        self.is_plain = np.ones(max_num_seqs, dtype=np.bool_)
        """Greedy, no edits, no log probabilities: an argmax is all."""
        self.is_greedy = np.ones(max_num_seqs, dtype=np.bool_)
        self.temperature = np.ones(max_num_seqs, dtype=np.float32)
        self.top_k = np.zeros(max_num_seqs, dtype=np.int64)
        """0: no limit."""
        self.top_p = np.ones(max_num_seqs, dtype=np.float32)
        self.min_p = np.zeros(max_num_seqs, dtype=np.float32)
        self.num_logprobs = np.full(max_num_seqs, NO_LOGPROBS, dtype=np.int64)
        """Alternatives reported beside the sampled token, or `NO_LOGPROBS`."""
        self.key = np.zeros(max_num_seqs, dtype=np.int64)
        """Where the request's random stream starts."""
        self.num_output = np.zeros(max_num_seqs, dtype=np.int64)
        """Output tokens so far: the position in the random stream."""

    def add(
        self,
        slot: int,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int] = (),
        eos_token_ids: Collection[int] = (),
    ) -> None:
        """Fill a slot. `output_token_ids`: what a request that was preempted had generated already."""
        self.is_greedy[slot] = params.greedy
        self.temperature[slot] = params.temperature
        self.top_k[slot] = params.top_k if params.top_k < self.vocab_size else 0
        self.top_p[slot] = params.top_p
        self.min_p[slot] = params.min_p
        self.num_logprobs[slot] = NO_LOGPROBS if params.logprobs is None else params.logprobs
        seed = self._random.getrandbits(64) if params.seed is None else params.seed
        self.key[slot] = mix64(seed)
        self.num_output[slot] = len(output_token_ids)
        end_ids = params.end_token_ids(eos_token_ids)
        edits = LogitEdits(
            *(params, prompt_token_ids, output_token_ids, end_ids, self.vocab_size),
            counts_tokens=self._token_counts is None,
        )
        if self._token_counts is not None:
            self._token_counts.add(slot, params, prompt_token_ids, output_token_ids)
        self._edits[slot] = edits
        self._drop_finished_edits(slot, edits)

    def remove(self, slot: int) -> None:
        """Empty a slot. Emptying an empty one does nothing."""
        self._edits.pop(slot, None)
        if self._token_counts is not None:
            self._token_counts.remove(slot)
        self.is_greedy[slot] = True
        self.num_logprobs[slot] = NO_LOGPROBS
        self.is_plain[slot] = True

    def advance(self, slots: IntArray) -> None:
        """A token is being sampled in each of these slots `(num_rows,)`, in one that comes twice two; which ones may
        not be known yet."""
        np.add.at(self.num_output, slots, 1)
        if self._edits:
            for slot in slots.tolist():
                edits = self._edits.get(slot)
                if edits is not None:
                    edits.advance()
                    self._drop_finished_edits(slot, edits)

    def append(self, slots: IntArray, token_ids: IntArray) -> None:
        """Say what was sampled in these slots, both `(num_rows,)`.

        Where the next token depends on which ones came before (`SamplingParams.needs_sampled_tokens`), this must
        happen before it is sampled.
        """
        if self._edits:
            for slot, token_id in zip(slots.tolist(), token_ids.tolist(), strict=True):
                edits = self._edits.get(slot)
                if edits is not None:
                    edits.append(token_id)

    def edits(self, slots: IntArray, drafts: DraftRows | None = None) -> EditBatch | None:
        """The edits of the rows that these slots stand in; None if there are none."""
        if not self._edits:
            return None
        rows = [(row, self._edits[slot]) for row, slot in enumerate(slots.tolist()) if slot in self._edits]
        if drafts is not None:
            for i, (row, _) in enumerate(rows):
                if drafts.offsets[row]:
                    rows[i] = (row, rows[i - 1][1].behind(int(drafts.token_ids[row])))
        return EditBatch.gather(rows, self.vocab_size) if rows else None

    def penalties(self, slots: IntArray) -> Penalties | None:
        """Penalties of the rows that these slots stand in, from counts on the device; None if there are none."""
        return None if self._token_counts is None else self._token_counts.penalties(slots)

    def _drop_finished_edits(self, slot: int, edits: LogitEdits) -> None:
        if edits.is_over:
            del self._edits[slot]
        has_edits = slot in self._edits or (self._token_counts is not None and slot in self._token_counts)
        self.is_plain[slot] = self.is_greedy[slot] and self.num_logprobs[slot] == NO_LOGPROBS and not has_edits


@dataclass(frozen=True, slots=True, eq=False)
class SamplingMetadata:
    """How one step's logits come about and how their rows are sampled.

    The fields from `state` on are there where a `Sampler` is called as a module; the worker calls it with the
    state itself.
    """

    num_rows: int
    selected_token_indices: torch.Tensor | None = None
    """`(num_rows,)`: rows of the hidden states to compute logits for; None: all of them, chosen before."""
    state: SamplingState | None = None
    slots: IntArray | None = None
    """`(num_rows,)`: the slot of each row of the logits."""
    token_mask: TokenMask | None = None
    """Which tokens may come in rows whose output is held to a grammar; None: no row is."""

"""The sampler: from logits to a token id for each row, and the log probabilities that were asked for.

The order for each row: log probabilities are computed from the model's own logits; then logit bias, repetition penalty,
frequency and presence penalty, bad words, minimum length, the mask of allowed tokens, temperature, top-k, min-p, top-p,
draw. A greedy row takes the best token after the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.errors import ModelError
from sensorium.messages import TokenLogprobs
from sensorium.model_executor.host_copy import HostCopy, to_device
from sensorium.model_executor.sampling_metadata import (
    NO_LOGPROBS,
    DraftRows,
    IntArray,
    SamplingMetadata,
    SamplingState,
)
from sensorium.model_executor.sampling_ops import RowParams, best_tokens, draw_tokens, token_logprobs
from sensorium.model_executor.token_mask import TokenMask

__all__ = ["PromptLogprobs", "Sampler", "SamplerOutput", "SamplingState", "get_sampler"]

PROMPT_ROWS_AT_ONCE = 64
"""Bounds the memory of prompt log probabilities: a whole chunk's logits may be more than all else that a step needs."""
LOGIT_SCRATCH_BYTES = 12
"""Most bytes of each logit beside the model's own: float32, edited float32, and a term of a sum of exponentials."""


@dataclass(frozen=True, slots=True, eq=False)
class _Report:
    """Log probabilities of some rows, still on the device."""

    rows: IntArray
    num_best: IntArray
    """`(len(rows),)`: how many of the best tokens each row reports."""
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
    """As `token_logprobs` returns them."""


class SamplerOutput:
    """One step's tokens, on the device. Reading anything but `sampled_token_ids` waits for the device.

    As a sequence it has one int per row, the token id. `fetch` starts the copy to the host: reading then doesn't wait
    for work that the device gets later, and that work may overwrite the tensors.
    """

    def __init__(
        self, sampled_token_ids: torch.Tensor, best_logits: torch.Tensor, report: _Report | None = None
    ) -> None:
        self.sampled_token_ids = sampled_token_ids
        """`(num_rows,)` int64. For a row that failed, any id of the vocabulary."""
        self._best_logits = best_logits
        self._report = report
        self._copy: HostCopy | None = None

    @classmethod
    def of_another_rank(cls, num_rows: int, device: torch.device) -> SamplerOutput:
        """Buffers for tokens that another rank samples and checks."""
        token_ids = torch.zeros(num_rows, dtype=torch.int64, device=device)
        return cls(token_ids, torch.zeros(num_rows, device=device))

    def fetch(self) -> None:
        """Start the copy of everything to the host, unless it has started."""
        if self._copy is None:
            tensors = () if self._report is None else self._report.tensors
            self._copy = HostCopy([self.sampled_token_ids, self._best_logits, *tensors])

    @cached_property
    def _on_host(self) -> tuple[torch.Tensor, ...]:
        """Token ids, best logits, and the report's tensors if there is one."""
        self.fetch()
        assert self._copy is not None
        return self._copy.wait()

    @property
    def token_ids(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """`(num_rows,)`: `sampled_token_ids` on the host."""
        token_ids: np.ndarray[Any, np.dtype[np.int64]] = self._on_host[0].numpy()
        return token_ids

    @cached_property
    def failed_rows(self) -> frozenset[int]:
        """Rows from which no token can be sampled: a logit is NaN or infinite, or every token is forbidden."""
        finite = np.isfinite(self._on_host[1].numpy())
        return frozenset() if finite.all() else frozenset(np.flatnonzero(~finite).tolist())

    @cached_property
    def logprobs(self) -> list[TokenLogprobs | None] | None:
        """The log probabilities of each row's token, None for rows that don't report them; None if no row does."""
        if self._report is None:
            return None
        entries: list[TokenLogprobs | None] = [None] * len(self)
        token_ids = self.token_ids.tolist()
        rows = self._report.rows.tolist()
        messages = _messages([token_ids[row] for row in rows], self._report.num_best, self._on_host[2:])
        for row, message in zip(rows, messages, strict=True):
            entries[row] = message
        return entries

    def __len__(self) -> int:
        return len(self.sampled_token_ids)

    def __getitem__(self, row: int) -> int:
        return int(self.token_ids[row])


class Sampler(nn.Module):
    """Samples tokens. Has no state and no parameters; `SamplingState` has those of the requests."""

    def forward(self, logits: torch.Tensor, sampling_metadata: SamplingMetadata) -> SamplerOutput:
        """`sample`, as model classes of vLLM's V0 call it."""
        state, slots = sampling_metadata.state, sampling_metadata.slots
        assert state is not None
        assert slots is not None
        return self.sample(logits, state, slots, sampling_metadata.token_mask)

    @torch.inference_mode()
    def sample(
        self,
        logits: torch.Tensor,
        state: SamplingState,
        slots: IntArray,
        token_mask: TokenMask | None = None,
        drafts: DraftRows | None = None,
    ) -> SamplerOutput:
        """Sample a token for each row. It depends neither on the other rows of the batch, nor on whether the tokens
        before it were sampled or drafted.

        Args:
            logits: `(num_rows, vocab_size)`, any float type. May be changed in place.
            state: Parameters and histories by slot.
            slots: `(num_rows,)`: the slot of each row.
            token_mask: The allowed tokens of constrained rows.
            drafts: Which rows come after drafts; None if none does.

        Raises:
            ModelError: The logits are not as wide as the vocabulary.
        """
        if logits.shape[1] != state.vocab_size:
            raise ModelError(
                f"compute_logits: got logits of width {logits.shape[1]}, expected the vocabulary's "
                f"{state.vocab_size}. Make the output head as large as vocab_size of the config says."
            )
        logits = logits.detach()
        if token_mask is None and state.is_plain[slots].all():
            return SamplerOutput(*best_tokens(logits))

        logits = logits.float()
        num_best = state.num_logprobs[slots]
        reporting = np.flatnonzero(num_best != NO_LOGPROBS)
        raw = _rows_of(logits, reporting)
        edits = state.edits(slots, drafts)
        penalties = state.penalties(slots)
        if edits is not None or token_mask is not None or penalties is not None:
            logits = logits.clone() if raw is logits else logits.contiguous()
        if edits is not None:
            edits.apply_(logits, penalties)
        elif penalties is not None:
            penalties.apply_(logits)
        if token_mask is not None:
            token_mask.apply_(logits)
        token_ids, best = best_tokens(logits)
        drawing = np.flatnonzero(~state.is_greedy[slots])
        if drawing.size:
            rows = torch.from_numpy(drawing).to(logits.device)
            token_ids[rows] = draw_tokens(_rows_of(logits, drawing), _row_params(state, slots, drafts).rows(drawing))
        if penalties is not None:
            penalties.count(token_ids)
        return SamplerOutput(token_ids, best, _report(raw, token_ids, reporting, num_best))


def get_sampler() -> Sampler:
    """A new sampler, for model classes of vLLM's V0."""
    return Sampler()


class PromptLogprobs:
    """Log probabilities of prompt tokens, computed and being copied to the host.

    An id outside the vocabulary, as media placeholders have, gets rank 0 and a log probability of minus infinity.

    Args:
        compute_logits: Makes `(num_rows, vocab_size)` logits of hidden states; called for a part of the rows at a time.
        hidden: `(num_rows, hidden_size)`: row `i` predicts `token_ids[i]`.
        token_ids: What follows each row.
        num_best: How many of the best tokens are reported.
    """

    @torch.inference_mode()
    def __init__(
        self,
        compute_logits: Callable[[torch.Tensor], torch.Tensor],
        hidden: torch.Tensor,
        token_ids: Sequence[int],
        num_best: int,
    ) -> None:
        self._token_ids = list(token_ids)
        self._num_best = num_best
        self._vocab_size = 0
        self._parts: list[HostCopy] = []
        for start in range(0, len(token_ids), PROMPT_ROWS_AT_ONCE):
            part = self._token_ids[start : start + PROMPT_ROWS_AT_ONCE]
            logits = compute_logits(hidden[start : start + len(part)]).detach().float()
            self._vocab_size = vocab_size = logits.shape[1]
            known = to_device(np.array([i if 0 <= i < vocab_size else 0 for i in part]), logits.device)
            self._parts.append(HostCopy(token_logprobs(logits, known, min(num_best, vocab_size))))

    def messages(self) -> list[TokenLogprobs]:
        """One entry for each token; waits for the device."""
        entries: list[TokenLogprobs] = []
        for part in self._parts:
            token_ids = self._token_ids[len(entries) : len(entries) + PROMPT_ROWS_AT_ONCE]
            entries += _messages(token_ids, np.full(len(token_ids), self._num_best), part.wait())
        is_known = range(self._vocab_size)
        return [entry if entry.token_id in is_known else TokenLogprobs(entry.token_id, -np.inf, 0) for entry in entries]


def _rows_of(logits: torch.Tensor, rows: IntArray) -> torch.Tensor:
    """Some rows of the logits as a copy; `logits` itself if it is all of them."""
    return logits if len(rows) == len(logits) else logits[torch.from_numpy(rows).to(logits.device)]


def _row_params(state: SamplingState, slots: IntArray, drafts: DraftRows | None) -> RowParams:
    num_output = state.num_output[slots]
    return RowParams(
        temperature=state.temperature[slots],
        top_k=state.top_k[slots],
        top_p=state.top_p[slots],
        min_p=state.min_p[slots],
        key=state.key[slots],
        position=num_output if drafts is None else num_output + drafts.offsets,
    )


def _report(raw: torch.Tensor, token_ids: torch.Tensor, reporting: IntArray, num_best: IntArray) -> _Report | None:
    if not len(reporting):
        return None
    chosen = token_ids[torch.from_numpy(reporting).to(raw.device)]
    wanted = num_best[reporting]
    tensors = token_logprobs(raw, chosen, min(int(wanted.max()), raw.shape[1]))
    return _Report(reporting, wanted, tensors)


def _messages(
    token_ids: Sequence[int],
    num_best: IntArray,
    tensors: tuple[torch.Tensor, ...],
) -> list[TokenLogprobs]:
    logprobs, ranks, best_logprobs, best_ids = (tensor.tolist() for tensor in tensors)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(ids[:count]), tuple(values[:count]))
        for token_id, logprob, rank, values, ids, count in zip(
            token_ids, logprobs, ranks, best_logprobs, best_ids, num_best.tolist(), strict=True
        )
    ]

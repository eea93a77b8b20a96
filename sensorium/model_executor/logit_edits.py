"""Sparse changes to logits: biases, penalties, and tokens that may not come next.

Each touches a few entries of a row of the vocabulary's width, so they are kept on the host as index lists and
brought to the device as one flat list per step: cost grows with the number of distinct tokens of a request,
not with the vocabulary. Owned by `SamplingState`, applied by `Sampler`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from sensorium.model_executor.host_copy import to_device
from sensorium.model_executor.token_counts import Penalties
from sensorium.sampling_params import SamplingParams

Ids: TypeAlias = "np.ndarray[Any, np.dtype[np.int64]]"
Floats: TypeAlias = "np.ndarray[Any, np.dtype[np.float32]]"
_NO_IDS: Ids = np.empty(0, dtype=np.int64)
_NO_FLOATS: Floats = np.empty(0, dtype=np.float32)


class PenalisedTokens:
    """The distinct tokens of a request that penalties act on, in order of appearance; appending is amortised
    O(1).
    """

    def __init__(self, params: SamplingParams, prompt_token_ids: Sequence[int], vocab_size: int) -> None:
        self.repetition_penalty = params.repetition_penalty
        self._frequency_penalty = params.frequency_penalty
        self._presence_penalty = params.presence_penalty
        # Only the repetition penalty looks at the prompt. Media placeholders may lie outside the vocabulary.
        prompt = np.asarray(prompt_token_ids if params.repetition_penalty != 1.0 else (), dtype=np.int64)
        seen = np.unique(prompt[(prompt >= 0) & (prompt < vocab_size)])
        self._size = len(seen)
        self._index = {token_id: i for i, token_id in enumerate(seen.tolist())}
        self._counts = [0] * self._size
        self._ids: Ids = np.concatenate([seen, np.zeros(64, dtype=np.int64)])
        self._subtracted: Floats = np.zeros(len(self._ids), dtype=np.float32)

    def append(self, token_id: int) -> None:
        """Count one generated token."""
        i = self._index.setdefault(token_id, self._size)
        if i == self._size:
            self._add(token_id)
        self._counts[i] += 1
        self._subtracted[i] = self._presence_penalty + self._frequency_penalty * self._counts[i]

    def unshare(self) -> None:
        """Begin to differ from the one that this is a shallow copy of."""
        self._index, self._counts = dict(self._index), list(self._counts)
        self._ids, self._subtracted = self._ids.copy(), self._subtracted.copy()

    def _add(self, token_id: int) -> None:
        if self._size == len(self._ids):
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._subtracted = np.concatenate([self._subtracted, np.zeros_like(self._subtracted)])
        self._ids[self._size] = token_id
        self._size += 1
        self._counts.append(0)

    @property
    def ids(self) -> Ids:
        """`(num_distinct,)` int64, a view that is valid until the next append."""
        return self._ids[: self._size]

    @property
    def subtracted(self) -> Floats:
        """`(num_distinct,)`: what presence and frequency penalty take from each logit; such a view too."""
        return self._subtracted[: self._size]


class BadWords:
    """Token sequences that may not be completed, looked up by all but their last token."""

    def __init__(self, sequences: Iterable[Sequence[int]]) -> None:
        last_ids: dict[tuple[int, ...], list[int]] = {}
        for sequence in sequences:
            last_ids.setdefault(tuple(sequence[:-1]), []).append(sequence[-1])
        self._last_ids = {prefix: np.array(ids, dtype=np.int64) for prefix, ids in last_ids.items()}
        self._prefix_lens = sorted({len(prefix) for prefix in last_ids})
        self._tail: list[int] = []

    def unshare(self) -> None:
        """Begin to differ from the one that this is a shallow copy of."""
        self._tail = list(self._tail)

    def append(self, token_id: int) -> None:
        """Take one more token of prompt or output into account."""
        self._tail.append(token_id)
        del self._tail[: -max(self._prefix_lens[-1], 1)]

    def forbidden(self) -> list[Ids]:
        """Arrays of the ids that would complete a sequence now."""
        prefixes = (tuple(self._tail[len(self._tail) - n :]) for n in self._prefix_lens if n <= len(self._tail))
        return [self._last_ids[prefix] for prefix in prefixes if prefix in self._last_ids]


class LogitEdits:
    """All sparse edits of one request, for its next token."""

    __slots__ = (
        "_bad_words",
        "_begin_ids",
        "_end_ids",
        "_min_tokens",
        "_num_output",
        "_output",
        "_vocab_size",
        "allowed_ids",
        "bias_ids",
        "bias_values",
        "penalised",
        "timestamps",
    )

    def __init__(
        self,
        params: SamplingParams,
        prompt_token_ids: Sequence[int],
        output_token_ids: Sequence[int],
        end_token_ids: Iterable[int],
        vocab_size: int,
        *,
        counts_tokens: bool = True,
    ) -> None:
        """`counts_tokens`: whether penalties are applied here, and not by `TokenCounts`."""
        self._num_output = 0
        self._min_tokens = params.min_tokens
        self._end_ids: Ids = np.fromiter((i for i in end_token_ids if 0 <= i < vocab_size), dtype=np.int64)
        self._begin_ids: Ids = np.array(params.begin_suppress_tokens, dtype=np.int64)
        self.allowed_ids: Ids = np.array(params.allowed_token_ids, dtype=np.int64)
        """The only ids that may come, if there are any here."""
        self.timestamps = params.timestamps
        self._vocab_size = vocab_size
        self._output: list[int] = []
        """Tokens so far, where the rules of times look at them."""
        self.bias_ids: Ids = np.fromiter(params.logit_bias, dtype=np.int64)
        self.bias_values: Floats = np.fromiter(params.logit_bias.values(), dtype=np.float32)
        self.penalised: PenalisedTokens | None = None
        if params.has_penalties and counts_tokens:
            self.penalised = PenalisedTokens(params, prompt_token_ids, vocab_size)
        self._bad_words = BadWords(params.bad_words_token_ids) if params.bad_words_token_ids else None
        if self._bad_words is not None:
            longest = max(len(sequence) for sequence in params.bad_words_token_ids)
            for token_id in prompt_token_ids[-longest:]:
                self._bad_words.append(token_id)
        for token_id in output_token_ids:
            self.advance()
            self.append(token_id)

    def advance(self) -> None:
        """Count one generated token."""
        self._num_output += 1

    def append(self, token_id: int) -> None:
        """Take into account which token was generated."""
        if self.timestamps is not None:
            self._output.append(token_id)
        if self.penalised is not None:
            self.penalised.append(token_id)
        if self._bad_words is not None:
            self._bad_words.append(token_id)

    def behind(self, token_id: int) -> LogitEdits:
        """The edits behind a token that may be the next. These here stay as they are."""
        other = copy.copy(self)
        other.unshare()
        other.advance()
        other.append(token_id)
        return other

    def unshare(self) -> None:
        """Begin to differ from the one that this is a shallow copy of."""
        self._output = list(self._output)
        self.penalised, self._bad_words = copy.copy(self.penalised), copy.copy(self._bad_words)
        for part in (self.penalised, self._bad_words):
            if part is not None:
                part.unshare()

    @property
    def is_over(self) -> bool:
        """Whether no later token of the request can be touched any more."""
        waits = self._num_output < self._min_tokens or (self._begin_ids.size and not self._num_output)
        lasts = self.bias_ids.size or self.penalised or self._bad_words or self.allowed_ids.size or self.timestamps
        return not (waits or lasts)

    def forbidden(self) -> list[Ids]:
        """Arrays of ids that may not come next."""
        banned = self._bad_words.forbidden() if self._bad_words is not None else []
        if self._num_output < self._min_tokens:
            banned.append(self._end_ids)
        if not self._num_output:
            banned.append(self._begin_ids)
        return banned

    def forbidden_ranges(self) -> list[tuple[int, int]]:
        """Ranges of ids that may not come next, after the rules of times."""
        return [] if self.timestamps is None else self.timestamps.forbidden(self._output, self._vocab_size)


@dataclass(frozen=True, slots=True, eq=False)
class EditBatch:
    """The edits of a step's rows. An index counts in the flattened logits: `row * vocab_size + token id`."""

    bias_index: Ids
    bias: Floats
    penalty_index: Ids
    repetition_penalty: Floats
    subtracted: Floats
    forbidden_index: Ids
    allowed: Sequence[tuple[int, Ids]] = ()
    """Rows in which only some ids may come, and these."""
    times: Sequence[tuple[int, int, list[tuple[int, int]]]] = ()
    """Rows whose output tells times: the first id that is a time, and ranges of ids that may not come."""

    @classmethod
    def gather(cls, rows: Sequence[tuple[int, LogitEdits]], vocab_size: int) -> EditBatch:
        """Join the edits of several rows."""
        biased = [(row, edits) for row, edits in rows if edits.bias_ids.size]
        penalised = [(row, edits.penalised) for row, edits in rows if edits.penalised is not None]
        factors = [np.full(len(tokens.ids), tokens.repetition_penalty, dtype=np.float32) for _, tokens in penalised]
        return cls(
            bias_index=_joined([(row, edits.bias_ids) for row, edits in biased], vocab_size),
            bias=np.concatenate([_NO_FLOATS, *(edits.bias_values for _, edits in biased)]),
            penalty_index=_joined([(row, tokens.ids) for row, tokens in penalised], vocab_size),
            repetition_penalty=np.concatenate([_NO_FLOATS, *factors]),
            subtracted=np.concatenate([_NO_FLOATS, *(tokens.subtracted for _, tokens in penalised)]),
            forbidden_index=_joined([(row, ids) for row, edits in rows for ids in edits.forbidden()], vocab_size),
            allowed=[(row, edits.allowed_ids) for row, edits in rows if edits.allowed_ids.size],
            times=[
                (row, edits.timestamps.first_id, edits.forbidden_ranges())
                for row, edits in rows
                if edits.timestamps is not None
            ],
        )

    def apply_(self, logits: torch.Tensor, penalties: Penalties | None = None) -> None:
        """Edit `logits` `(num_rows, vocab_size)`, contiguous, in place: biases, penalties, those counted on the device
        included, bans, and last the rules of times, which compare what is left."""
        flat, device = logits.view(-1), logits.device
        if self.bias_index.size:
            flat.index_add_(0, to_device(self.bias_index, device), to_device(self.bias, device))
        if self.penalty_index.size:
            index = to_device(self.penalty_index, device)
            factor, value = to_device(self.repetition_penalty, device), flat.take(index)
            value = torch.where(value > 0, value / factor, value * factor)
            flat.scatter_(0, index, value - to_device(self.subtracted, device))
        if penalties is not None:
            penalties.apply_(logits)
        if self.forbidden_index.size:
            flat.index_fill_(0, to_device(self.forbidden_index, device), -torch.inf)
        for row, ids in self.allowed:
            index = to_device(ids, device)
            kept = logits[row].take(index)
            logits[row].fill_(-torch.inf).scatter_(0, index, kept)
        for row, first_time, ranges in self.times:
            _hold_to_times(logits[row], first_time, ranges)


def _hold_to_times(logits: torch.Tensor, first_time: int, ranges: Sequence[tuple[int, int]]) -> None:
    """Forbid ranges of ids in one row `(vocab_size,)`; and text, where times together are likelier than any of it."""
    for begin, end in ranges:
        logits[begin:end] = -torch.inf
    text, times = logits[:first_time], logits[first_time:]
    text.masked_fill_(times.logsumexp(dim=0) > text.max(), -torch.inf)


def _joined(parts: Sequence[tuple[int, Ids]], vocab_size: int) -> Ids:
    """Flat index of `(row, token ids)` parts."""
    return np.concatenate([_NO_IDS, *(ids + row * vocab_size for row, ids in parts)])

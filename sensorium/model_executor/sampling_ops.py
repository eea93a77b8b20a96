"""Choosing tokens from logits: the arithmetic of sampling, row by row independent, without state.

Every function takes logits `(num_rows, vocab_size)` float32 and gives the same result for a row whatever rows
stand beside it. Called by `Sampler`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch

from sensorium.kernels import largest
from sensorium.kernels.gpu import on_gpu
from sensorium.sampling_params import MIX_FACTOR_1, MIX_FACTOR_2, MIX_INCREMENT

Array: TypeAlias = "np.ndarray[Any, Any]"

MAX_NARROW_TOP_K = 1024
"""Rows with at most this top-k are cut to their candidates without looking at the rest of the row."""
NUM_CANDIDATES = 256
"""Number of best tokens among which a row's nucleus is searched before the whole row is sorted."""
GROUP_SIZE = 256
"""Token ids that share one random number in the first of the two draws of `draw_from_all`."""
_GROUP_COUNTER = 1 << 40
"""Random numbers of groups are counted from here, those of tokens from 0."""


@dataclass(frozen=True, slots=True, eq=False)
class RowParams:
    """Sampling parameters of random rows, as arrays `(num_rows,)` on the host."""

    temperature: Array
    top_k: Array
    """0: no limit."""
    top_p: Array
    min_p: Array
    key: Array
    """int64: where the request's random stream starts."""
    position: Array
    """int64: number of tokens the request has generated."""

    def rows(self, index: Array) -> RowParams:
        """The parameters of some of the rows."""
        return RowParams(
            self.temperature[index],
            self.top_k[index],
            self.top_p[index],
            self.min_p[index],
            self.key[index],
            self.position[index],
        )

    def packed(self) -> Array:
        """int64 `(num_rows, 6)` in the order of the fields, with the bits of those that are float32."""
        floats = (
            np.asarray(values, np.float32).view(np.int32) for values in (self.temperature, self.top_p, self.min_p)
        )
        temperature, top_p, min_p = floats
        fields = (temperature, self.top_k, top_p, min_p, self.key, self.position)
        return np.stack([np.asarray(field, np.int64) for field in fields], axis=1)

    @property
    def is_truncated(self) -> Array:
        """Which rows drop tokens."""
        return np.asarray((self.top_k > 0) | (self.top_p < 1) | (self.min_p > 0))


def column(values: Array, device: torch.device) -> torch.Tensor:
    """An array `(num_rows,)` as a tensor `(num_rows, 1)`."""
    return torch.from_numpy(values).to(device, non_blocking=True).unsqueeze(1)


def best_tokens(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Each row's best token id and its logit as float32, which is NaN if any logit of the row is.

    The logits may be of any float type here.

    On the CPU NumPy does it, 10 to 20 times faster than torch's own argmax there (0.2 against 2 to 5 ms for
    16 rows of a vocabulary of 152,000).
    """
    if logits.device.type != "cpu":
        return largest(logits)
    logits = logits.float()
    token_ids = torch.from_numpy(logits.numpy().argmax(axis=-1))
    return token_ids, logits.gather(1, token_ids.unsqueeze(1)).squeeze(1)


def sorted_values(logits: torch.Tensor) -> torch.Tensor:
    """Each row's logits, falling. NumPy sorts them 10 times faster on the CPU than torch does."""
    if logits.device.type != "cpu":
        return logits.sort(dim=-1, descending=True).values
    return torch.from_numpy(np.sort(logits.numpy(), axis=-1)[:, ::-1].copy())


# --- Randomness: a pure function of (request key, position, counter) ---


def mix64(values: torch.Tensor) -> torch.Tensor:
    """`sensorium.sampling_params.mix64` of each element of an int64 tensor."""
    z = values + _signed(MIX_INCREMENT)
    z = (z ^ _shifted(z, 30)) * _signed(MIX_FACTOR_1)
    z = (z ^ _shifted(z, 27)) * _signed(MIX_FACTOR_2)
    return z ^ _shifted(z, 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shifted(z: torch.Tensor, bits: int) -> torch.Tensor:
    """Right shift that fills with zeros."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def gumbel_noise(params: RowParams, counters: torch.Tensor) -> torch.Tensor:
    """Standard Gumbel noise, float64 `(num_rows, num_counters)`.

    `counters` is int64 `(num_rows, num_counters)` or `(num_counters,)`. Number `c` of a row is output `c` of
    a SplitMix64 generator that starts at a hash of the row's key and position.
    """
    device = counters.device
    start = mix64(column(params.key, device) + column(params.position, device))
    bits = mix64(start + counters * _signed(MIX_INCREMENT))
    uniform = (_shifted(bits, 12).double() + 0.5) * 2.0**-52  # within (0, 1), both ends excluded
    return uniform.log_().neg_().log_().neg_()


# --- Drawing a token ---


def draw_tokens(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """One random token id for each row: int64 `(num_rows,)`.

    A token is drawn by the Gumbel-max rule, `argmax(log p + noise)`: unlike a search in cumulated
    probabilities it is indifferent to rounding errors of the logits, unless two tokens come within such an
    error of each other.
    """
    if on_gpu(logits):
        return _draw_on_gpu(logits, params)
    token_ids = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    truncated = params.is_truncated
    narrow = (params.top_k > 0) & (params.top_k <= MAX_NARROW_TOP_K)
    for chosen, draw in (
        (~truncated, draw_from_all),
        (narrow, draw_from_top_k),
        (truncated & ~narrow, draw_from_nucleus),
    ):
        if chosen.all():
            return draw(logits, params)
        if chosen.any():
            index = np.flatnonzero(chosen)
            rows = torch.from_numpy(index).to(logits.device)
            token_ids[rows] = draw(logits[rows], params.rows(index))
    return token_ids


def _draw_on_gpu(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """The same in one launch."""
    from sensorium.kernels.gpu.sampling import draw

    return draw(
        logits,
        torch.from_numpy(params.packed()).pin_memory().to(logits.device, non_blocking=True),
        max_narrow_top_k=MAX_NARROW_TOP_K,
        num_candidates=NUM_CANDIDATES,
        group_size=GROUP_SIZE,
        first_group_counter=_GROUP_COUNTER,
    )


def draw_from_all(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Draw from whole rows in two steps: a group of neighbouring token ids, then one token of the group.

    A group's weight is the sum of its tokens' probabilities, so the result has exactly the row's
    distribution, while noise is needed for the groups and the tokens of one group only.
    """
    num_rows, vocab_size = logits.shape
    weights = (logits / column(params.temperature, logits.device)).softmax(dim=-1)
    whole = vocab_size // GROUP_SIZE * GROUP_SIZE
    sums = weights[:, :whole].reshape(num_rows, -1, GROUP_SIZE).sum(dim=-1)
    if whole < vocab_size:
        sums = torch.cat([sums, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=-1)
    counters = torch.arange(_GROUP_COUNTER, _GROUP_COUNTER + sums.shape[1], device=logits.device)
    group = (sums.double().log_() + gumbel_noise(params, counters)).argmax(dim=-1, keepdim=True)

    # Past the vocabulary's end the last token repeats: with the same noise each time, it is one candidate all the same.
    ids = (group * GROUP_SIZE + torch.arange(GROUP_SIZE, device=logits.device)).clamp_(max=vocab_size - 1)
    return _draw(weights.gather(1, ids).log_(), ids, params)


def draw_from_top_k(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Draw from rows that all have a `top_k` of at most `MAX_NARROW_TOP_K`."""
    values, ids = logits.topk(min(int(params.top_k.max()), logits.shape[1]), dim=-1)
    scores, _ = truncated(values, logits, params)
    return _draw(scores, ids, params)


def draw_from_nucleus(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Draw from rows with any truncation.

    On the CPU few rows need more than their `NUM_CANDIDATES` best tokens, and only these are sorted.
    Elsewhere all are, since asking whether a row needs more would mean to wait for the device.
    """
    if logits.device.type != "cpu":
        return _draw_from_sorted(logits, params)
    values, ids = logits.topk(min(NUM_CANDIDATES, logits.shape[1]), dim=-1)
    scores, is_complete = truncated(values, logits, params)
    token_ids = _draw(scores, ids, params)
    if not is_complete.all():
        open_rows = np.flatnonzero(~is_complete.numpy())
        token_ids[open_rows] = _draw_from_sorted(logits[open_rows], params.rows(open_rows))
    return token_ids


def _draw_from_sorted(logits: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Draw from rows of which any number of tokens may stay: the last that stays is the bound for the others."""
    values = sorted_values(logits)
    scores, _ = truncated(values, logits, params)
    num_kept = (scores > -torch.inf).count_nonzero(dim=-1)
    bounds = values.gather(1, (num_kept - 1).clamp_(min=0).unsqueeze(1))  # none is kept of a row of NaN
    return draw_from_all(logits.masked_fill(logits < bounds, -torch.inf), params)


def truncated(values: torch.Tensor, logits: torch.Tensor, params: RowParams) -> tuple[torch.Tensor, torch.Tensor]:
    """What top-k, min-p and then top-p leave of each row's best logits.

    Args:
        values: `(num_rows, count)`: the best logits of each row, falling.
        logits: The whole rows.
        params: Parameters of the rows.

    Returns:
        Scores `(num_rows, count)`: values over temperature; minus infinity where the token is dropped.
        `(num_rows,)` bool: whether all tokens beyond the `count` best are dropped. If not, the row's scores
        mean nothing.
    """
    count, vocab_size = values.shape[1], logits.shape[1]
    top_k = column(params.top_k, values.device)
    top_k = torch.where(top_k > 0, top_k, vocab_size)
    scores = values / column(params.temperature, values.device)
    least_score = scores[:, :1] + column(params.min_p, values.device).log()
    ranks = torch.arange(count, device=values.device)
    scores = scores.masked_fill_((ranks >= top_k) | (scores < least_score), -torch.inf)
    is_complete = (top_k <= count) | torch.isneginf(scores[:, -1:])
    log_total = scores.logsumexp(dim=-1, keepdim=True)
    if count < vocab_size and not is_complete.all():
        log_total = torch.where(is_complete, log_total, _log_total(logits, params, least_score))
    scores = _in_top_p(scores, log_total, params)
    # A row whose top-k lies beyond `count` stays open: its total is that of too many tokens.
    is_complete |= (top_k == vocab_size) & torch.isneginf(scores[:, -1:])
    return scores, is_complete.squeeze(1)


def _log_total(logits: torch.Tensor, params: RowParams, least_score: torch.Tensor) -> torch.Tensor:
    """Log of the summed exponentials of all scores that reach the least one: `(num_rows, 1)`."""
    scores = logits / column(params.temperature, logits.device)
    if params.min_p.any():
        scores.masked_fill_(scores < least_score, -torch.inf)
    return scores.logsumexp(dim=-1, keepdim=True)


def _in_top_p(scores: torch.Tensor, log_total: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Drop every token that has at least the share `top_p` of the probability before it."""
    probs = (scores - log_total).exp_().double()
    before = probs.cumsum(dim=-1) - probs
    bounds = np.where(params.top_p < 1, params.top_p, np.inf)  # rounding must not drop tokens where there's no bound
    return scores.masked_fill(before >= column(bounds, scores.device), -torch.inf)


def _draw(scores: torch.Tensor, ids: torch.Tensor, params: RowParams) -> torch.Tensor:
    """Draw one of `ids` `(num_rows, count)`, with probabilities like the exponentials of the scores."""
    chosen = (scores.double() + gumbel_noise(params, ids)).argmax(dim=-1, keepdim=True)
    return ids.gather(1, chosen).squeeze(1)


# --- Log probabilities ---


def token_logprobs(
    logits: torch.Tensor, token_ids: torch.Tensor, num_best: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log probabilities by softmax of float32 logits `(num_rows, vocab_size)`.

    `token_ids`: int64 `(num_rows,)`, each within the vocabulary.

    Returns:
        `(num_rows,)`: log probability of each row's token.
        `(num_rows,)` int64: its rank, 1 plus the number of tokens that are better.
        `(num_rows, num_best)`: log probabilities of the row's best tokens, falling.
        `(num_rows, num_best)` int64: their ids.
    """
    log_total = logits.logsumexp(dim=-1, keepdim=True)
    chosen = logits.gather(1, token_ids.unsqueeze(1))
    rank = (logits > chosen).count_nonzero(dim=-1) + 1
    values, ids = logits.topk(num_best, dim=-1)
    return (chosen - log_total).squeeze(1), rank, values - log_total, ids

"""Random attention steps, and what must come out: a dense softmax in float64 under a mask that is spelled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sensorium.attention import AttentionMetadata, compute_row_spans, compute_slot_mapping
from sensorium.kernels import AttentionRules, split_cache

Lens = list[tuple[int, int]]
"""`(query_len, key_len)` of each sequence."""
Spans = list[list[tuple[int, int]]]
"""Of each sequence, where its spans begin and end."""

RULES: list[AttentionRules] = [
    AttentionRules(0.25),
    AttentionRules(0.25, window=1),
    AttentionRules(0.2, window=20, softcap=5.0),
    AttentionRules(0.2, window=100),
    AttentionRules(0.25, chunk=1),
    AttentionRules(0.25, chunk=24),
    AttentionRules(0.25, chunk=40, window=30),
    AttentionRules(0.25, chunk=1000),
]
"""Causal rules, alone and together, with edges in and between blocks and tiles."""
LENS: list[Lens] = [
    [(1, 1)],
    [(1, 9), (1, 200), (1, 64), (1, 65)],
    [(7, 7), (70, 70)],
    [(3, 3), (1, 12), (0, 5), (30, 50), (1, 1), (8, 150)],
]
SPANS: list[Spans] = [
    [[]],
    [[(3, 9)], [(100, 200)], [], [(40, 64), (64, 65)]],
    [[(0, 7)], [(5, 37), (37, 70)]],
    [[(0, 1)], [(2, 12)], [], [(10, 30), (33, 45)], [], [(20, 146)]],
]
"""For each of `LENS`: a span may begin before a step's rows, but never ends behind them."""


def sees(query: int, key: int, rules: AttentionRules, spans: list[tuple[int, int]]) -> bool:
    """Whether the position `query` sees the position `key`.

    Source: `transformers.masking_utils`, whose `or_masks` joins `blockwise_overlay` (here: spans) to the `and_masks` of
    the others.
    """
    is_seen = True
    if rules.causal:
        is_seen &= key <= query
    if rules.window is not None:
        is_seen &= abs(query - key) < rules.window
    if rules.chunk is not None:
        is_seen &= key // rules.chunk == query // rules.chunk
    return is_seen or any(begin <= query < end and begin <= key < end for begin, end in spans)


def mask_of(num_queries: int, num_keys: int, rules: AttentionRules, spans: list[tuple[int, int]]) -> torch.Tensor:
    """`(num_queries, num_keys)` bool; if causal the queries are the last positions, otherwise the first."""
    first = num_keys - num_queries if rules.causal else 0
    rows = [[sees(first + q, k, rules, spans) for k in range(num_keys)] for q in range(num_queries)]
    return torch.tensor(rows, dtype=torch.bool).view(num_queries, num_keys)


def dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    rules: AttentionRules,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`(Q, H, Dv)` of one sequence, head by head: no running maximum, no tiles, nothing shared with the kernels."""
    group = query.shape[1] // key.shape[1]
    out = torch.zeros(len(query), query.shape[1], value.shape[2], dtype=torch.float64)
    for head in range(query.shape[1]):
        scores = query[:, head].double() @ key[:, head // group].double().T * rules.scale
        if rules.softcap is not None:
            scores = rules.softcap * torch.tanh(scores / rules.softcap)
        powers = torch.exp(scores) * mask
        total = powers.sum(1, keepdim=True) + (0 if sinks is None else torch.exp(sinks[head].double()))
        out[:, head] = torch.where(total > 0, powers / total, 0) @ value[:, head // group].double()
    return out.to(query.dtype)


@dataclass(frozen=True)
class PagedStep:
    """Arguments of `paged_attention`, and its result."""

    query: torch.Tensor
    cache: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    metadata: AttentionMetadata
    rules: AttentionRules
    sinks: torch.Tensor | None
    expected: torch.Tensor

    @property
    def arguments(self) -> tuple[Any, ...]:
        """All in order."""
        return self.query, self.keys, self.values, self.metadata, self.rules, self.sinks


def paged_step(
    lens: Lens,
    rules: AttentionRules,
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    value_size: int | None = None,
    values_in_keys: bool = False,
    block_size: int = 4,
    dtype: torch.dtype = torch.float32,
    spans: Spans | None = None,
    has_sinks: bool = False,
    device: str = "cpu",
) -> PagedStep:
    """Shuffled blocks. Whatever no row may see is NaN, and the table's entries of blocks of that point elsewhere."""
    torch.manual_seed(sum(k for _, k in lens))
    value_size = head_size if value_size is None else value_size
    spans = spans or [[] for _ in lens]
    query_lens, key_lens = (np.array(x, dtype=np.int32) for x in zip(*lens, strict=True))
    counts = -(-key_lens // block_size)
    num_blocks = int(counts.sum()) + 3
    if value_size == head_size:
        cache = torch.full((2, num_blocks, block_size, heads[1], head_size), torch.nan)
    else:
        width = head_size if values_in_keys else head_size + value_size
        cache = torch.full((num_blocks, block_size, heads[1], width), torch.nan)
    cache = cache.to(dtype)
    keys, values = split_cache(cache, head_size, value_size)
    free = torch.randperm(num_blocks).tolist()
    nobody = free.pop()
    table = np.full((len(lens), int(counts.max()) + 1), nobody, dtype=np.int32)
    query = torch.randn(int(query_lens.sum()), heads[0], head_size).to(dtype)
    sinks = torch.randn(heads[0]) * 2 if has_sinks else None
    results, row = [], 0
    for i, (num_queries, num_keys) in enumerate(lens):
        key = torch.randn(num_keys, heads[1], head_size).to(dtype)
        value = torch.randn(num_keys, heads[1], value_size).to(dtype)
        value = key[..., :value_size] if values_in_keys else value
        mask = mask_of(num_queries, num_keys, rules, spans[i])
        for position in mask.any(0).nonzero().flatten().tolist():
            block, offset = divmod(position, block_size)
            if table[i, block] == nobody:
                table[i, block] = free.pop()
            keys[table[i, block], offset], values[table[i, block], offset] = key[position], value[position]
        results.append(dense(query[row : row + num_queries], key, value, mask, rules, sinks))
        row += num_queries
    metadata = AttentionMetadata.from_numpy(
        *(query_lens, key_lens, table),
        compute_slot_mapping(table, query_lens, key_lens, block_size) if rules.causal else np.zeros(0, dtype=np.int64),
        row_spans=compute_row_spans(spans, query_lens, key_lens),
        device=device,
    )
    cache = cache.to(device)
    return PagedStep(
        *(query.to(device), cache, *split_cache(cache, head_size, value_size), metadata, rules),
        None if sinks is None else sinks.to(device),
        torch.cat(results).to(device),
    )


@dataclass(frozen=True)
class VarlenStep:
    """Arguments of `varlen_attention`, and its result."""

    arguments: tuple[Any, ...]
    options: dict[str, torch.Tensor | None]
    expected: torch.Tensor


def varlen_step(
    lens: list[int],
    rules: AttentionRules,
    *,
    heads: tuple[int, int] = (4, 2),
    head_size: int = 16,
    value_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    spans: Spans | None = None,
    key_lens: list[int] | None = None,
    has_sinks: bool = False,
    device: str = "cpu",
) -> VarlenStep:
    """Whole sequences without a cache; rows of padding, with `key_lens`, have keys and values of NaN."""
    torch.manual_seed(sum(lens))
    sizes = [(heads[0], head_size), (heads[1], head_size), (heads[1], value_size or head_size)]
    query, key, value = (torch.randn(sum(lens), *size).to(dtype) for size in sizes)
    sinks = torch.randn(heads[0]) * 2 if has_sinks else None
    spans = spans or [[] for _ in lens]
    results, begin = [], 0
    for i, length in enumerate(lens):
        count = length if key_lens is None else key_lens[i]
        key[begin + count : begin + length] = value[begin + count : begin + length] = torch.nan
        mask = mask_of(length, count, rules, spans[i])
        rows, seen = slice(begin, begin + length), slice(begin, begin + count)
        results.append(dense(query[rows], key[seen], value[seen], mask, rules, sinks))
        begin += length
    starts = torch.tensor([0, *lens]).cumsum(0).to(torch.int32)
    row_spans = compute_row_spans(spans, np.array(lens), np.array(lens))
    options = {
        "sinks": sinks,
        "row_spans": None if row_spans is None else torch.from_numpy(row_spans),
        "key_lens": None if key_lens is None else torch.tensor(key_lens, dtype=torch.int32),
    }
    return VarlenStep(
        (*(x.to(device) for x in (query, key, value, starts)), rules),
        {name: None if x is None else x.to(device) for name, x in options.items()},
        torch.cat(results).to(device),
    )

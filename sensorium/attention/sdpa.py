"""Attention through `torch.nn.functional.scaled_dot_product_attention`, on any device.

Decoding sequences are gathered from their blocks, padded to the longest and attended to in one call; each
prefill chunk is a call of its own, without padding. The functions have the signatures of their twins in
`sensorium.kernels.attention`, and no soft cap.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import NamedTuple

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from sensorium.kernels.attention import AttentionRules, PagedBatch, cached_rows, key_ranges


class _Sight(NamedTuple):
    """Which keys the queries of one sequence see."""

    first: int
    last: int
    """Some query sees the first, some the one before the last."""
    seen: torch.Tensor | None
    """`(Q, last - first)` bool, true where a query sees a key; `None`: everywhere, or as `is_causal` says."""
    is_causal: bool
    """Whether this is plain causal attention, and the first query belongs to the first key."""


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    rules: AttentionRules,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.paged_attention_reference`."""
    heads = query.view(len(query), -1, keys.shape[3])
    out = heads.new_zeros(*heads.shape[:2], values.shape[3])
    starts = [0, *accumulate(batch.query_lens_host)]
    decodes = [i for i, count in enumerate(batch.query_lens_host) if count == 1]
    if decodes:
        rows = torch.tensor([starts[i] for i in decodes], device=query.device)
        seqs = torch.tensor(decodes, device=query.device)
        out[rows] = _attend_decodes(heads, rows, keys, values, batch, seqs, rules, sinks)
    block_size = keys.shape[1]
    for i, (begin, end) in enumerate(pairwise(starts)):
        if end - begin <= 1:
            continue
        sight = _sight(end - begin, batch.seq_lens_host[i], rules, _columns(batch.row_spans, begin, end))
        if sight.first < sight.last:
            positions = torch.arange(sight.first, sight.last, device=query.device)
            places = batch.block_table[i, positions // block_size].long(), positions % block_size
            q, (k, v) = heads[begin:end], (cached_rows(part, places).to(query.dtype) for part in (keys, values))
            out[begin:end] = _sdpa(q[None], k[None], v[None], rules, sight, sinks)[0]
    return out if query.dim() == 3 else out.flatten(1)


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    rules: AttentionRules,
    *,
    key_lens: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    row_spans: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `attention.varlen_attention_reference`."""
    starts = cu_seqlens.tolist()
    lens = [end - begin for begin, end in pairwise(starts)]
    if key_lens is None and row_spans is None and len(set(lens)) == 1 and lens[0] > 0:
        q, k, v = (x.reshape(len(lens), lens[0], *x.shape[1:]) for x in (query, key, value))
        return _sdpa(q, k, v, rules, _sight(lens[0], lens[0], rules), sinks).flatten(0, 1)
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    key_counts = lens if key_lens is None else key_lens.tolist()
    for (begin, end), num_keys in zip(pairwise(starts), key_counts, strict=True):
        sight = _sight(end - begin, num_keys, rules, _columns(row_spans, begin, end))
        if sight.first < sight.last:
            seen = slice(begin + sight.first, begin + sight.last)
            q, k, v = query[begin:end], key[seen], value[seen]
            out[begin:end] = _sdpa(q[None], k[None], v[None], rules, sight, sinks)[0]
    return out


def _attend_decodes(
    query: torch.Tensor,
    rows: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    seqs: torch.Tensor,
    rules: AttentionRules,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`(S, H, Dv)` of the queries `rows` `(S,)`, one for each of the sequences `seqs` `(S,)`."""
    key_lens = batch.seq_lens[seqs].long()
    positions = key_lens - 1 if rules.causal else torch.zeros_like(key_lens)
    spans = None if batch.row_spans is None else batch.row_spans[:, rows]
    low, high = key_ranges(positions, key_lens, rules, spans)
    num_blocks = -(-max(*batch.seq_lens_host, 1) // keys.shape[1])
    blocks = batch.block_table[seqs, :num_blocks].long()
    every = torch.arange(num_blocks * keys.shape[1], device=query.device)
    seen = (every >= low[:, None]) & (every < high[:, None])
    # Padding shows other sequences' blocks: a NaN there times a weight of zero would still be a NaN here.
    key, value = (
        cached_rows(part, blocks).to(query.dtype).flatten(1, 2).masked_fill(~seen[..., None, None], 0)
        for part in (keys, values)
    )
    return _sdpa(query[rows][:, None], key, value, rules, _Sight(0, len(every), seen[:, None], False), sinks)[:, 0]


def _columns(row_spans: torch.Tensor | None, begin: int, end: int) -> torch.Tensor | None:
    return None if row_spans is None else row_spans[:, begin:end].cpu()


def _sight(num_queries: int, num_keys: int, rules: AttentionRules, row_spans: torch.Tensor | None = None) -> _Sight:
    longest = max(num_queries, num_keys)
    hides = any(limit is not None and limit < longest for limit in (rules.window, rules.chunk))
    if not num_queries or not num_keys:
        return _Sight(0, 0, None, False)
    if not hides and row_spans is None and (not rules.causal or num_queries in (1, num_keys)):
        return _Sight(0, num_keys, None, rules.causal and num_queries > 1)
    offset = num_keys - num_queries if rules.causal else 0
    low, high = key_ranges(torch.arange(offset, offset + num_queries), num_keys, rules, row_spans)
    first, last = int(low.min()), int(high.max())
    keys = torch.arange(first, last)
    return _Sight(first, last, (keys >= low[:, None]) & (keys < high[:, None]), False)


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    rules: AttentionRules,
    sight: _Sight,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """`(B, Q, H, D)` against `(B, K, Hkv, D)`, of which the queries see what `sight` says: `(B, Q, H, Dv)`."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    seen = None if sight.seen is None else sight.seen.to(query.device)
    mask = None if seen is None else seen.view(-1, 1, *seen.shape[-2:])
    is_causal = sight.is_causal
    if sinks is not None:
        # One more key of zeros, whose scores are the sinks.
        k, v, mask, is_causal = pad(k, (0, 0, 0, 1)), pad(v, (0, 0, 0, 1)), _mask_with(sinks, q, k, sight, mask), False
    out = scaled_dot_product_attention(
        *(q, k, v),
        attn_mask=mask,
        is_causal=is_causal,
        scale=rules.scale * rules.k_scale,
        enable_gqa=q.shape[1] != k.shape[1],
    ).transpose(1, 2)
    out = out if rules.v_scale == 1.0 else out * rules.v_scale
    return out if seen is None else out.masked_fill(~seen.any(-1)[..., None, None], 0)


def _mask_with(
    sinks: torch.Tensor, query: torch.Tensor, key: torch.Tensor, sight: _Sight, mask: torch.Tensor | None
) -> torch.Tensor:
    """What is added to scores: `(B, H, Q, K + 1)` for `query` `(B, H, Q, D)` and `key` `(B, Hkv, K, D)`."""
    shape = (*query.shape[:3], key.shape[2])
    if mask is None:
        mask = torch.ones(shape[2:], dtype=torch.bool, device=query.device)
        mask = mask.tril() if sight.is_causal else mask
    bias = torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, float("-inf"))
    column = sinks.to(query.dtype)[:, None, None].expand(*shape[:3], 1)
    return torch.cat((bias.expand(shape), column), dim=-1)

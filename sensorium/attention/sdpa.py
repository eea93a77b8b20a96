"""Attention through `torch.nn.functional.scaled_dot_product_attention`, on any device.

Decoding sequences are gathered from their blocks, padded to the longest and attended to in one call; each
prefill chunk is a call of its own, without padding.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention

from sensorium.attention.backend import AttentionSpec
from sensorium.attention.metadata import AttentionMetadata


class SdpaBackend:
    """Torch's own fused attention over keys and values gathered from the blocks."""

    name = "torch SDPA"

    def refusal(self, spec: AttentionSpec, device_type: str, dtype: torch.dtype) -> str | None:
        """Soft caps are beyond torch's function."""
        return None if spec.softcap is None else "it has no soft cap"

    def paged(
        self,
        query: torch.Tensor,
        kv_cache: torch.Tensor,
        metadata: AttentionMetadata,
        spec: AttentionSpec,
    ) -> torch.Tensor:
        """See `AttentionBackend.paged`."""
        shape = query.shape
        query = query.reshape(shape[0], spec.num_heads, spec.head_size)
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        query_lens = np.asarray(metadata.query_lens_host)
        starts = np.cumsum(query_lens) - query_lens
        decodes = np.flatnonzero(query_lens == 1)
        if decodes.size:
            seqs = torch.from_numpy(decodes).to(query.device)
            rows = torch.from_numpy(starts[decodes]).to(query.device)
            out[rows] = _attend_decodes(query[rows], kv_cache, metadata, seqs, spec)
        for i in np.flatnonzero(query_lens > 1).tolist():
            begin, end = int(starts[i]), int(starts[i] + query_lens[i])
            out[begin:end] = _attend_chunk(query[begin:end], kv_cache, metadata, i, spec)
        return out.view(shape)

    def varlen(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        spec: AttentionSpec,
        *,
        causal: bool,
        key_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `AttentionBackend.varlen`."""
        starts = cu_seqlens.tolist()
        lens = [end - begin for begin, end in pairwise(starts)]
        if key_lens is None and lens and all(n == lens[0] for n in lens) and lens[0] > 0:
            shape = (len(lens), lens[0], -1, spec.head_size)
            q, k, v = (x.reshape(shape) for x in (query, key, value))
            return _sdpa(q, k, v, spec, causal=causal, mask=None).reshape(query.shape)
        key_counts = lens if key_lens is None else key_lens.tolist()
        out = torch.zeros_like(query, memory_format=torch.contiguous_format)
        for begin, num_queries, num_keys in zip(starts, lens, key_counts, strict=False):
            if num_queries == 0 or num_keys == 0:
                continue
            q = query[begin : begin + num_queries]
            k, v = key[begin : begin + num_keys], value[begin : begin + num_keys]
            out[begin : begin + num_queries] = _sdpa(q[None], k[None], v[None], spec, causal=causal, mask=None)[0]
        return out


def _attend_decodes(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    seqs: torch.Tensor,
    spec: AttentionSpec,
) -> torch.Tensor:
    """`query` `(S, H, D)`, one row for each of the sequences `seqs` `(S,)`."""
    block_size, num_kv_heads, head_size = kv_cache.shape[2:]
    num_blocks = -(-metadata.max_seq_len // block_size)
    seq_lens = metadata.seq_lens[seqs, None]
    blocks = metadata.block_table[seqs, :num_blocks].long()
    kv = kv_cache[:, blocks].view(2, len(seqs), num_blocks * block_size, num_kv_heads, head_size)
    positions = torch.arange(num_blocks * block_size, device=query.device)
    seen = positions < seq_lens
    # Padding shows other sequences' blocks: a NaN there times a weight of zero would still be a NaN here.
    key, value = kv.masked_fill(~seen[None, :, :, None, None], 0).unbind()
    if spec.window is not None:
        seen = seen & (positions >= seq_lens - spec.window)
    return _sdpa(query[:, None], key, value, spec, causal=False, mask=seen[:, None, None])[:, 0]


def _attend_chunk(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    metadata: AttentionMetadata,
    seq: int,
    spec: AttentionSpec,
) -> torch.Tensor:
    """`query` `(Q, H, D)`: the last `Q` positions of sequence `seq`."""
    block_size, num_kv_heads, head_size = kv_cache.shape[2:]
    seq_len = metadata.seq_lens_host[seq]
    blocks = metadata.block_table[seq, : -(-seq_len // block_size)].long()
    kv = kv_cache[:, blocks].view(2, 1, -1, num_kv_heads, head_size)[:, :, :seq_len]
    return _sdpa(query[None], kv[0], kv[1], spec, causal=True, mask=None)[0]


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    spec: AttentionSpec,
    *,
    causal: bool,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """`(B, Q, H, D)` against `(B, K, Hkv, D)`; if causal, the queries are the last `Q` of the `K` positions."""
    num_queries, num_keys = query.shape[1], key.shape[1]
    is_causal = causal and num_queries == num_keys and spec.window is None and num_queries > 1
    # With a window of at least the sequence's length nothing is hidden.
    windowed = spec.window is not None and spec.window < num_keys
    if mask is None and not is_causal and (windowed or (causal and num_queries > 1)):
        mask = _position_mask(num_queries, num_keys, causal, spec.window, query.device)
    out = scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=is_causal,
        scale=spec.scale,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)


def _position_mask(
    num_queries: int, num_keys: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor:
    """`(Q, K)` bool, true where a query sees a key."""
    distance = (
        torch.arange(num_keys - num_queries, num_keys, device=device)[:, None]
        - torch.arange(num_keys, device=device)[None, :]
    )
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen if window is None else seen & (distance.abs() < window)

"""Attention over paged and over flat keys and values, and the writing of the paged cache.

Each `*_reference` is the plain-torch twin: documentation, oracle and fallback. Scores, soft cap, softmax and
the weighted sum are computed in float32 whatever the storage type, and rounded once at the end.

Conventions: `H` query heads share `Hkv` key/value heads (`H % Hkv == 0`, query head `h` reads key/value head
`h // (H // Hkv)`); a cache is one layer's `(2, num_blocks, block_size, Hkv, D)`, keys first; a token's slot
is `block id * block_size + offset`. Beside a cache, which tells the head size, queries, keys and
values may also come flat, `(T, H * D)`; the result has the query's form.
"""

from __future__ import annotations

import itertools

import torch

from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, native_for, token_rows


def write_kv_reference(
    key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Store `key` and `value`, `(T, Hkv, D)` or `(T, Hkv * D)`, at `slot_mapping` `(T,)`; negative slots are
    skipped.

    The one kernel that changes an argument: `kv_cache`.
    """
    num_kv_heads, head_size = kv_cache.shape[3:]
    slots = kv_cache.view(2, -1, num_kv_heads, head_size)
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    targets = slot_mapping[rows]
    for which, source in enumerate((key, value)):
        slots[which][targets] = source.reshape(-1, num_kv_heads, head_size)[rows].to(kv_cache.dtype)


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """One sequence: the last `Q` of `K` positions attend to all `K`. Returns `(Q, H, D)` in the query's
    dtype.

    Args:
        query: `(Q, H, D)`.
        key: `(K, Hkv, D)`.
        value: `(K, Hkv, D)`.
        scale: Factor on the scores.
        causal: Whether a position sees only itself and earlier ones.
        window: How many positions back a position sees, itself included (`None`: all); if not causal, also
            forward.
        softcap: `c` in `c * tanh(score / c)`, `None` for none.
    """
    num_queries, num_keys = query.shape[0], key.shape[0]
    group = query.shape[1] // key.shape[1]
    q = query.float().transpose(0, 1)
    k = key.float().repeat_interleave(group, dim=1).transpose(0, 1)
    v = value.float().repeat_interleave(group, dim=1).transpose(0, 1)
    scores = q @ k.transpose(1, 2) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    distance = (
        torch.arange(num_keys - num_queries, num_keys, device=query.device)[:, None]
        - torch.arange(num_keys, device=query.device)[None, :]
    )
    hidden = distance < 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if window is not None:
        hidden = hidden | (distance.abs() >= window)
    weights = torch.softmax(scores.masked_fill(hidden, float("-inf")), dim=-1)
    return (weights @ v).transpose(0, 1).to(query.dtype)


def paged_attention_reference(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of `query` over each sequence's cached positions, its own rows included.

    Args:
        query: `(T, H, D)` or `(T, H * D)`; sequence `i` owns rows `cu_seqlens_q[i]:cu_seqlens_q[i + 1]`, which are its
            last positions.
        kv_cache: `(2, num_blocks, block_size, Hkv, D)`, already holding this step's keys and values.
        block_table: `(num_seqs, max_blocks)` int32.
        cu_seqlens_q: `(num_seqs + 1,)` int32.
        seq_lens: `(num_seqs,)` int32, cached positions including this step's.
        scale: Factor on the scores.
        window: Positions that a position sees, itself included; `None` for all.
        softcap: See `attend_reference`.

    Returns:
        A tensor like `query`.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    block_size, num_kv_heads, head_size = kv_cache.shape[2:]
    heads = query if query.dim() == 3 else query.view(len(query), -1, head_size)
    starts = cu_seqlens_q.tolist()
    for i, seq_len in enumerate(seq_lens.tolist()):
        begin, end = starts[i], starts[i + 1]
        if begin == end:
            continue
        blocks = block_table[i, : -(-seq_len // block_size)].long()
        key, value = kv_cache[:, blocks].view(2, -1, num_kv_heads, head_size)[:, :seq_len].unbind()
        attended = attend_reference(
            heads[begin:end], key, value, scale=scale, causal=True, window=window, softcap=softcap
        )
        out[begin:end] = attended.reshape(end - begin, *query.shape[1:])
    return out


def varlen_attention_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    key_lens: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention within each sequence of a flat batch: rows `cu_seqlens[i]:cu_seqlens[i + 1]` see only one
    another.

    Args:
        query: `(T, H, D)`.
        key: `(T, Hkv, D)`.
        value: `(T, Hkv, D)`.
        cu_seqlens: `(num_seqs + 1,)` int32.
        scale: Factor on the scores.
        causal: Whether a row sees only itself and earlier rows of its sequence.
        key_lens: `(num_seqs,)` int32, how many leading rows of each sequence hold real keys (the rest is
            padding); `None` for all. Not with `causal`. Where it is 0 the output is 0.
        window: See `attend_reference`.
        softcap: See `attend_reference`.

    Returns:
        `(T, H, D)` in the query's dtype.
    """
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    starts = cu_seqlens.tolist()
    lens = None if key_lens is None else key_lens.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(starts)):
        if begin == end:
            continue
        key_end = end if lens is None else begin + lens[i]
        if key_end == begin:
            out[begin:end] = 0
            continue
        out[begin:end] = attend_reference(
            query[begin:end],
            key[begin:key_end],
            value[begin:key_end],
            scale=scale,
            causal=causal,
            window=window,
            softcap=softcap,
        )
    return out


def write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    """See `write_kv_reference`."""
    native = native_for(kv_cache)
    if native is None or key.dtype != kv_cache.dtype or value.dtype != kv_cache.dtype:
        write = _gpu_write_kv if on_gpu(kv_cache) else write_kv_reference
        write(key, value, kv_cache, slot_mapping)
        return
    assert slot_mapping.dtype == torch.int64
    key, value, slots = token_rows(key), token_rows(value), slot_mapping.contiguous()
    keys, values, slot_size = _cache_halves(kv_cache)
    size = kv_cache.element_size()
    native.write_kv(
        *(keys, values, key.data_ptr(), value.data_ptr(), slots.data_ptr(), len(slots)),
        *(slot_size * size, key.stride(0) * size, value.stride(0) * size, torch.get_num_threads()),
    )


def _gpu_write_kv(key: torch.Tensor, value: torch.Tensor, kv_cache: torch.Tensor, slot_mapping: torch.Tensor) -> None:
    from sensorium.kernels.gpu.attention import write_kv

    write_kv(key, value, kv_cache, slot_mapping)


def _cache_halves(kv_cache: torch.Tensor) -> tuple[int, int, int]:
    """The addresses of a layer's keys and values, and the elements of one slot."""
    _, _, block_size, num_kv_heads, head_size = kv_cache.shape
    half, block, slot, _, _ = kv_cache.stride()
    assert slot == num_kv_heads * head_size, "the heads of a slot must lie side by side"
    assert block == block_size * slot, "the slots of a layer must lie side by side"
    address = kv_cache.data_ptr()
    return address, address + half * kv_cache.element_size(), slot


def paged_attention(
    query: torch.Tensor,
    kv_cache: torch.Tensor,
    block_table: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `paged_attention_reference`."""
    native = native_for(query)
    if native is None or kv_cache.dtype != query.dtype:
        return paged_attention_reference(
            query,
            kv_cache,
            block_table,
            cu_seqlens_q,
            seq_lens,
            scale=scale,
            window=window,
            softcap=softcap,
        )
    assert block_table.dtype == cu_seqlens_q.dtype == seq_lens.dtype == torch.int32
    query = token_rows(query)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    _, _, block_size, num_kv_heads, head_size = kv_cache.shape
    keys, values, slot_size = _cache_halves(kv_cache)
    num_heads = query.shape[1] if query.dim() == 3 else query.shape[1] // head_size
    native.attention(
        *(out.data_ptr(), query.data_ptr(), keys, values, block_table.data_ptr()),
        *(cu_seqlens_q.data_ptr(), seq_lens.data_ptr(), len(seq_lens)),
        *(num_heads, num_kv_heads, head_size, query.stride(0), slot_size, slot_size),
        *(block_size, block_table.stride(0), window or 0, scale, softcap or 0.0),
        *(True, DTYPE_CODES[query.dtype], torch.get_num_threads()),
    )
    return out


def varlen_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    scale: float,
    causal: bool,
    key_lens: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """See `varlen_attention_reference`."""
    native = native_for(query)
    if native is None or not key.dtype == value.dtype == query.dtype:
        return varlen_attention_reference(
            query,
            key,
            value,
            cu_seqlens,
            scale=scale,
            causal=causal,
            key_lens=key_lens,
            window=window,
            softcap=softcap,
        )
    assert cu_seqlens.dtype == torch.int32
    assert key_lens is None or key_lens.dtype == torch.int32
    query, key, value = token_rows(query), token_rows(key), token_rows(value)
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    native.attention(
        *(out.data_ptr(), query.data_ptr(), key.data_ptr(), value.data_ptr(), 0, cu_seqlens.data_ptr()),
        *(0 if key_lens is None else key_lens.data_ptr(), len(cu_seqlens) - 1),
        *(query.shape[1], key.shape[1], query.shape[2], query.stride(0), key.stride(0), value.stride(0)),
        *(0, 0, window or 0, scale, softcap or 0.0),
        *(causal, DTYPE_CODES[query.dtype], torch.get_num_threads()),
    )
    return out

"""Attention over paged or flat keys and values, and writes to the paged cache.

Each `*_reference` is the plain-torch twin: documentation, oracle and fallback. Scores, soft cap, softmax and
the weighted sum are computed in float32 whatever the storage type, and rounded once at the end.

Conventions: `H` query heads share `Hkv` key/value heads (`H % Hkv == 0`, query head `h` reads key/value head
`h // (H // Hkv)`). Queries and keys have heads of `D` channels, values and outputs of `Dv`, mostly equal to `D`. Cached
keys and values are two views, `(num_blocks, block_size, Hkv, D)` and `(num_blocks, block_size, Hkv, Dv)`
(`split_cache`), of one layer's cache; a token's slot is `block id * block_size + offset`. With a cache, whose shape
tells the head sizes, queries, keys and values may also be flat, `(T, H * D)`; the result has the query's form.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Protocol

import torch

from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, NativeLibrary, native_for, token_rows


@dataclass(frozen=True, slots=True)
class AttentionRules:
    """A layer's constants: which keys a position sees, and how scores are scaled and capped.

    A position sees a contiguous range of keys, see `key_ranges`. Keys outside the ranges of all of a sequence's rows
    are never read: their blocks may hold anything, and their entries in the block table may be any block's.
    """

    scale: float
    """Factor on the scores."""
    window: int | None = None
    """How many positions back a position sees, itself included; if not causal, as many forward. `None`: all."""
    softcap: float | None = None
    """`c` in `c * tanh(score / c)`; `None` for none."""
    chunk: int | None = None
    """A position sees only those of its own chunk: positions `i` with the same `i // chunk`. `None`: all."""
    causal: bool = True
    """Whether a position sees only itself and earlier ones, and the queries are a sequence's last positions."""
    k_scale: float = 1.0
    """What the numbers of cached keys are multiplied by to be the keys; not 1 only for a cache of 8-bit floats."""
    v_scale: float = 1.0
    """The same of cached values."""

    @property
    def is_plain(self) -> bool:
        """Whether causality is the only rule."""
        return self.causal and self.window is None and self.softcap is None and self.chunk is None


class PagedBatch(Protocol):
    """A step's sequences, and where their keys are in the cache. `sensorium.attention.AttentionMetadata` is one."""

    @property
    def block_table(self) -> torch.Tensor:
        """`(num_seqs, max_blocks)` int32 block ids."""

    @property
    def cu_seqlens_q(self) -> torch.Tensor:
        """`(num_seqs + 1,)` int32: sequence `i` has the query rows `cu_seqlens_q[i]:cu_seqlens_q[i + 1]`."""

    @property
    def seq_lens(self) -> torch.Tensor:
        """`(num_seqs,)` int32: cached positions, this step's included."""

    @property
    def row_spans(self) -> torch.Tensor | None:
        """See `key_ranges`."""

    @property
    def has_decodes(self) -> bool:
        """Whether a sequence may have exactly one query."""

    @property
    def max_seqlen_q(self) -> int:
        """An upper bound on a sequence's number of queries."""

    @property
    def is_recorded(self) -> bool:
        """Whether the step is recorded, to be replayed with other lengths."""

    @property
    def query_lens_host(self) -> tuple[int, ...]:
        """The number of queries of each sequence. Not available in a recorded step."""

    @property
    def seq_lens_host(self) -> tuple[int, ...]:
        """`seq_lens` on the host. Not available in a recorded step."""


def split_cache(kv_cache: torch.Tensor, head_size: int, value_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of a layer's keys `(num_blocks, block_size, Hkv, D)` and values `(num_blocks, block_size, Hkv, Dv)`.

    A cache has one of three layouts:

    - `(2, num_blocks, block_size, Hkv, D)`, keys first, where values are as large as keys; -
    `(num_blocks, block_size, Hkv, D + Dv)`, a head's key before its value; - `(num_blocks, block_size, Hkv, D)` with
    `Dv < D`: the values are the keys' first channels, as in multi-head latent attention.
    """
    if kv_cache.dim() == 5:
        keys, values = kv_cache.unbind()
        return keys, values
    width = kv_cache.shape[3]
    assert width in (head_size, head_size + value_size), "a cache for heads of other sizes"
    first = 0 if width == head_size else head_size
    return kv_cache[..., :head_size], kv_cache[..., first : first + value_size]


def write_kv_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Store `key`, `(T, Hkv, D)` or `(T, Hkv * D)`, and `value` likewise, at `slot_mapping` `(T,)` int64; negative
    slots are skipped.

    Changes its arguments `keys` and `values`, the parts of a cache. A cache of 8-bit floats stores the result of
    `to_fp8` for the rows and `k_scale` or `v_scale`.
    """
    rows = (slot_mapping >= 0).nonzero().squeeze(1)
    block, offset = slot_mapping[rows] // keys.shape[1], slot_mapping[rows] % keys.shape[1]
    for cached, source, scale in ((keys, key, k_scale), (values, value, v_scale)):
        taken = source.reshape(-1, *cached.shape[2:])[rows]
        if is_fp8(cached):  # as bytes, since not every device has 8-bit floats for operations with indices
            cached.view(torch.uint8)[block, offset] = to_fp8(taken, cached.dtype, scale).view(torch.uint8)
        else:
            cached[block, offset] = taken.to(cached.dtype)


def is_fp8(part: torch.Tensor) -> bool:
    """Whether a part of a cache has 8-bit floats."""
    return part.dtype in (torch.float8_e4m3fn, torch.float8_e5m2)


def to_fp8(x: torch.Tensor, dtype: torch.dtype, scale: float) -> torch.Tensor:
    """`x / scale` in 8-bit floats. What is too large becomes the largest number that they have; NaN stays NaN."""
    largest = torch.finfo(dtype).max
    return (x.float() * (1.0 / scale)).clamp(-largest, largest).to(dtype)


def key_ranges(
    positions: torch.Tensor, num_keys: int | torch.Tensor, rules: AttentionRules, row_spans: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys that queries see: `low` and `high`, `(Q,)` each; a query sees the positions `low:high`.

    Args:
        positions: `(Q,)` positions of the queries.
        num_keys: The number of keys, or `(Q,)` one number for each query.
        rules: The layer's.
        row_spans: `(2, Q)`: first position, and last position + 1, of the two-way span around each query, whose
            positions see one another whatever the rules say. For a query without one: zeros, or any range that ends
            before it.
    """
    low, high = torch.zeros_like(positions), torch.zeros_like(positions) + num_keys
    if rules.causal:
        high = positions + 1
    if rules.window is not None:
        low = positions - (rules.window - 1)
        high = high if rules.causal else positions + rules.window
    if rules.chunk is not None:
        first = positions // rules.chunk * rules.chunk
        low, high = torch.maximum(low, first), torch.minimum(high, first + rules.chunk)
    if row_spans is not None:
        begin, end = row_spans.to(positions.dtype)
        low = torch.where(end > positions, torch.minimum(low, begin), low)
        high = torch.where(end > positions, torch.maximum(high, end), high)
    return low.clamp(min=0), torch.minimum(high, torch.zeros_like(high) + num_keys)


def attend_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    hidden: torch.Tensor,
    rules: AttentionRules,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of one sequence over the keys that aren't hidden; returns `(Q, H, Dv)` in the query's dtype.

    Args:
        query: `(Q, H, D)`.
        key: `(K, Hkv, D)`.
        value: `(K, Hkv, Dv)`.
        hidden: `(Q, K)` bool, True for keys that a query doesn't see. A query that sees none gets zeros.
        rules: Only those of the scores apply.
        sinks: `(H,)`: for each head the score of an additional key that every query sees and whose value is zero
            (`transformers` `GptOssAttention`). It is neither scaled nor capped.
    """
    group = query.shape[1] // key.shape[1]
    q = query.float().transpose(0, 1)
    k = key.float().repeat_interleave(group, dim=1).transpose(0, 1)
    v = value.float().repeat_interleave(group, dim=1).transpose(0, 1)
    scores = q @ k.transpose(1, 2) * (rules.scale * rules.k_scale)
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.float()[:, None, None].expand(-1, len(query), 1)), dim=-1)
    weights = torch.softmax(scores, dim=-1)[..., : len(key)].masked_fill(hidden, 0)
    return (weights @ v * rules.v_scale).transpose(0, 1).to(query.dtype)


def paged_attention_reference(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    rules: AttentionRules,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of `query` over each sequence's cached positions.

    Args:
        query: `(T, H, D)` or `(T, H * D)`; sequence `i` owns rows `cu_seqlens_q[i]:cu_seqlens_q[i + 1]`. If causal,
            they are its last positions. If not, they need not be positions of the sequence at all (cross-attention).
        keys: `(num_blocks, block_size, Hkv, D)`, this step's keys included.
        values: `(num_blocks, block_size, Hkv, Dv)`, likewise.
        batch: The sequences. Its `row_spans` has a column for each of the query's rows.
        rules: The layer's.
        sinks: See `attend_reference`.

    Returns:
        `(T, H, Dv)` or `(T, H * Dv)`, as `query` is. Rows of a sequence without keys are 0.
    """
    block_size, _, head_size = keys.shape[1:]
    heads = query if query.dim() == 3 else query.view(len(query), -1, head_size)
    out = heads.new_zeros(*heads.shape[:2], values.shape[3])
    starts = batch.cu_seqlens_q.tolist()
    for i, num_keys in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        sight = _sight(rows, num_keys, rules, batch.row_spans, query.device)
        if sight is None:
            continue
        positions, hidden = sight
        blocks, offsets = batch.block_table[i, positions // block_size].long(), positions % block_size
        found = cached_rows(keys, (blocks, offsets)), cached_rows(values, (blocks, offsets))
        out[rows] = attend_reference(heads[rows], *found, hidden, rules, sinks)
    return out if query.dim() == 3 else out.flatten(1)


def varlen_attention_reference(
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
    """Attention within each sequence of a flat batch: sequence `i` is rows `cu_seqlens[i]:cu_seqlens[i + 1]`.

    Args:
        query: `(T, H, D)`.
        key: `(T, Hkv, D)`.
        value: `(T, Hkv, Dv)`.
        cu_seqlens: `(num_seqs + 1,)` int32.
        rules: The layer's.
        key_lens: `(num_seqs,)` int32: how many leading rows of each sequence have real keys, the rest being padding;
            `None` for all. Only if not causal. A sequence with 0 of them gets zeros.
        sinks: See `attend_reference`.
        row_spans: See `key_ranges`; `(2, T)` int32.

    Returns:
        `(T, H, Dv)` in the query's dtype.
    """
    out = query.new_zeros(*query.shape[:2], value.shape[2])
    lens = None if key_lens is None else key_lens.tolist()
    for i, (begin, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        rows = slice(begin, end)
        sight = _sight(rows, end - begin if lens is None else lens[i], rules, row_spans, query.device)
        if sight is None:
            continue
        positions, hidden = sight
        found = key[begin + positions], value[begin + positions]
        out[rows] = attend_reference(query[rows], *found, hidden, rules, sinks)
    return out


def _sight(
    rows: slice, num_keys: int, rules: AttentionRules, row_spans: torch.Tensor | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The positions `(K,)` of the keys that any of a sequence's rows sees, and `(Q, K)` which of them each row doesn't
    see."""
    num_queries = rows.stop - rows.start
    offset = num_keys - num_queries if rules.causal else 0
    positions = torch.arange(offset, offset + num_queries, device=device)
    spans = None if row_spans is None else row_spans[:, rows]
    low, high = key_ranges(positions, num_keys, rules, spans)
    first, last = (int(low.min()), int(high.max())) if num_queries else (0, 0)
    if first >= last:
        return None
    seen = torch.arange(first, last, device=device)
    return seen, (seen < low[:, None]) | (seen >= high[:, None])


def cached_rows(part: torch.Tensor, places: torch.Tensor | tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """What stands at `places`: blocks, or blocks and offsets of one shape."""
    if is_fp8(part):  # see `write_kv_reference`
        return part.view(torch.uint8)[places].view(part.dtype)
    return part[places]


def write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """See `write_kv_reference`."""
    native = native_for(keys)
    if native is None or not key.dtype == value.dtype == keys.dtype:
        write = _gpu_write_kv if on_gpu(key) else write_kv_reference
        write(key, value, keys, values, slot_mapping, k_scale, v_scale)
        return
    assert slot_mapping.dtype == torch.int64
    num_rows = slot_mapping.shape[0]  # `len` of a tensor is a call in Python
    assert key.shape[0] == value.shape[0] == num_rows, "a slot for each key and value"
    key, value, slots = token_rows(key), token_rows(value), slot_mapping.contiguous()
    size = keys.element_size()
    (key_slot, key_head), (value_slot, value_head) = cache_strides(keys), cache_strides(values)
    num_heads, key_size = keys.shape[2:]
    value_size = values.shape[3]
    if key_head == key_size and value_head == value_size:  # a slot's heads in one piece
        key_size, value_size, num_heads = num_heads * key_size, num_heads * value_size, 1
    native.write_kv(
        *(keys.data_ptr(), values.data_ptr(), key.data_ptr(), value.data_ptr(), slots.data_ptr()),
        *(num_rows, num_heads, key_size * size, value_size * size),
        *(key_slot * size, value_slot * size, key_head * size, value_head * size),
        *(key.stride(0) * size, value.stride(0) * size, torch.get_num_threads()),
    )


def _gpu_write_kv(
    key: torch.Tensor,
    value: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    slot_mapping: torch.Tensor,
    k_scale: float,
    v_scale: float,
) -> None:
    from sensorium.kernels.gpu.attention import write_kv

    write_kv(key, value, keys, values, slot_mapping, k_scale, v_scale)


def cache_strides(part: torch.Tensor) -> tuple[int, int]:
    """Elements from one slot of a part of a cache to the next, and from one head to the next."""
    block, slot, head, channel = part.stride()
    assert block == part.shape[1] * slot, "the slots of a layer must lie at equal distances"
    assert channel == 1, "the channels of a head must lie side by side"
    return slot, head


def paged_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    batch: PagedBatch,
    rules: AttentionRules,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """See `paged_attention_reference`."""
    native = native_for(query)
    if native is None or keys.dtype != query.dtype:
        return paged_attention_reference(query, keys, values, batch, rules, sinks)
    table, starts, seq_lens = batch.block_table, batch.cu_seqlens_q, batch.seq_lens
    assert table.dtype == starts.dtype == seq_lens.dtype == torch.int32
    query = token_rows(query)
    head_size, value_size = keys.shape[3], values.shape[3]
    num_heads = query.shape[1] if query.dim() == 3 else query.shape[1] // head_size
    shape = (num_heads, value_size) if query.dim() == 3 else (num_heads * value_size,)
    out = query.new_empty(query.shape[0], *shape)
    _attend(
        native,
        *(out, query, keys, values, starts, seq_lens.shape[0], seq_lens, num_heads),
        *(cache_strides(keys), cache_strides(values), (table.data_ptr(), keys.shape[1], table.stride(0))),
        *(rules, sinks, batch.row_spans),
    )
    return out


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
    """See `varlen_attention_reference`."""
    native = native_for(query)
    if native is None or not key.dtype == value.dtype == query.dtype:
        return varlen_attention_reference(
            query, key, value, cu_seqlens, rules, key_lens=key_lens, sinks=sinks, row_spans=row_spans
        )
    assert cu_seqlens.dtype == torch.int32
    assert key_lens is None or key_lens.dtype == torch.int32
    query, key, value = token_rows(query), token_rows(key), token_rows(value)
    num_heads, value_size = query.shape[1], value.shape[2]
    out = query.new_empty(len(query), num_heads, value_size)
    _attend(
        native,
        *(out, query, key, value, cu_seqlens, len(cu_seqlens) - 1, key_lens, num_heads),
        *((key.stride(0), key.shape[2]), (value.stride(0), value_size), (0, 0, 0)),
        *(rules, sinks, row_spans),
    )
    return out


def _attend(
    native: NativeLibrary,
    out: torch.Tensor,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    num_seqs: int,
    key_lens: torch.Tensor | None,
    num_heads: int,
    key_strides: tuple[int, int],
    value_strides: tuple[int, int],
    table: tuple[int, int, int],
    rules: AttentionRules,
    sinks: torch.Tensor | None,
    row_spans: torch.Tensor | None,
) -> None:
    """Call the native kernel. Strides are those of slots (or rows) and of heads. `table`: address, block size,
    width."""
    sinks = None if sinks is None else sinks.float().contiguous()
    assert row_spans is None or (row_spans.dtype == torch.int32 and row_spans.stride(1) == 1)
    spans = (0, 0) if row_spans is None else (row_spans[0].data_ptr(), row_spans[1].data_ptr())
    address, block_size, max_blocks = table
    native.attention(
        *(out.data_ptr(), query.data_ptr(), keys.data_ptr(), values.data_ptr(), address, starts.data_ptr()),
        *(0 if key_lens is None else key_lens.data_ptr(), 0 if sinks is None else sinks.data_ptr(), *spans),
        *(num_seqs, num_heads, keys.shape[-2], keys.shape[-1], values.shape[-1]),
        *(query.stride(0), *key_strides, *value_strides, block_size, max_blocks),
        *(rules.window or 0, rules.chunk or 0, rules.scale, rules.softcap or 0.0),
        *(rules.causal, DTYPE_CODES[query.dtype], torch.get_num_threads()),
    )

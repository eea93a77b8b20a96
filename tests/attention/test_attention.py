"""The attention layers: every backend against the oracle, whole against chunked, batched against alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import nn

from sensorium.attention import (
    NO_SLOT,
    Attention,
    AttentionMetadata,
    AttentionType,
    MultiHeadAttention,
    choose_backends,
    compute_row_spans,
    compute_slot_mapping,
)
from sensorium.attention.backend import (
    BACKENDS,
    REFERENCE,
    SDPA,
    TRITON,
    AttentionBackend,
    AttentionSpec,
    select_backend,
)
from sensorium.cache_spec import (
    CacheSpec,
    ChunkedAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    SharedCacheSpec,
    SlidingWindowSpec,
    SpanRule,
)
from sensorium.config import AttentionBackendName
from sensorium.errors import ConfigError, ModelError
from sensorium.kernels import Rotation, rotary_embedding
from tests.helpers.attention import dense, mask_of


class Batch:
    """A random step over a random cache: `(query_len, seq_len)` pairs, blocks dealt out in random order."""

    def __init__(
        self,
        lens: list[tuple[int, int]],
        *,
        block_size: int = 4,
        heads: int = 4,
        kv_heads: int = 2,
        head_size: int = 16,
        dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        rng = np.random.default_rng(seed)
        torch.manual_seed(seed)
        self.query_lens = np.array([q for q, _ in lens], dtype=np.int32)
        self.seq_lens = np.array([s for _, s in lens], dtype=np.int32)
        counts = -(-self.seq_lens // block_size)
        num_blocks = int(counts.sum()) + 3
        free = rng.permutation(num_blocks)
        self.block_table = np.zeros((len(lens), max(int(counts.max(initial=0)), 1)), dtype=np.int32)
        for i, count in enumerate(counts):
            self.block_table[i, :count], free = free[:count], free[count:]
        slots = compute_slot_mapping(self.block_table, self.query_lens, self.seq_lens, block_size)
        self.metadata = AttentionMetadata.from_numpy(self.query_lens, self.seq_lens, self.block_table, slots)
        tokens = int(self.query_lens.sum())
        self.cache = torch.randn(2, num_blocks, block_size, kv_heads, head_size).to(dtype)
        self.q = torch.randn(tokens, heads * head_size).to(dtype)
        self.k = torch.randn(tokens, kv_heads * head_size).to(dtype)
        self.v = torch.randn(tokens, kv_heads * head_size).to(dtype)
        self.layer = Attention(heads, head_size, head_size**-0.5, kv_heads)


MIXES = [
    [(1, 1)],
    [(1, 9), (1, 4), (1, 5)],
    [(7, 7)],
    [(3, 3), (1, 12), (5, 9), (1, 1), (8, 8)],
    [(4, 100), (1, 257), (2, 2)],
]


def _use(layer: Attention | MultiHeadAttention, backend: AttentionBackend, q: torch.Tensor) -> None:
    layer._backend, layer._backend_key = backend, (q.device.type, q.dtype)


@pytest.mark.parametrize("lens", MIXES)
@pytest.mark.parametrize("window", [None, 1, 3, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sdpa_equals_oracle(lens: list[tuple[int, int]], window: int | None, dtype: torch.dtype) -> None:
    batch = Batch(lens, dtype=dtype)
    layer = Attention(4, 16, 0.25, 2, per_layer_sliding_window=window)
    outs, caches = [], []
    for backend in (REFERENCE, SDPA):
        _use(layer, backend, batch.q)
        cache = batch.cache.clone()
        outs.append(layer(batch.q, batch.k, batch.v, cache, batch.metadata))
        caches.append(cache)
    assert torch.equal(caches[0], caches[1])
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(outs[0], outs[1], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_oracle_equals_a_loop_over_rows(softcap: float | None) -> None:
    """The oracle against scalar arithmetic that shares no code with it."""
    batch = Batch([(3, 6), (1, 5)], head_size=8)
    layer = Attention(4, 8, 0.3, 2, logits_soft_cap=softcap, per_layer_sliding_window=4)
    _use(layer, REFERENCE, batch.q)
    out = layer(batch.q, batch.k, batch.v, batch.cache, batch.metadata).view(-1, 4, 8)
    row = 0
    for i, (query_len, seq_len) in enumerate(zip(batch.query_lens, batch.seq_lens, strict=True)):
        for position in range(seq_len - query_len, seq_len):
            for head in range(4):
                seen = range(max(0, position - 3), position + 1)
                cells = [(batch.block_table[i, p // 4], p % 4, head // 2) for p in seen]
                scores = torch.stack([0.3 * batch.q[row].view(4, 8)[head] @ batch.cache[0][cell] for cell in cells])
                if softcap is not None:
                    scores = softcap * torch.tanh(scores / softcap)
                weights = torch.softmax(scores, 0)
                want = sum(w * batch.cache[1][cell] for w, cell in zip(weights, cells, strict=True))
                torch.testing.assert_close(out[row, head], want, atol=1e-5, rtol=1e-5)
            row += 1


def test_slots_marked_as_none_are_not_written() -> None:
    batch = Batch([(3, 3), (2, 6)])
    slots = batch.metadata.slot_mapping.clone()
    slots[1], slots[4] = NO_SLOT, NO_SLOT
    before = batch.cache.clone()
    batch.layer(batch.q, batch.k, batch.v, batch.cache, replace(batch.metadata, slot_mapping=slots))
    flat, old = batch.cache.view(2, -1, 2, 16), before.view(2, -1, 2, 16)
    written = set(batch.metadata.slot_mapping[[0, 2, 3]].tolist())
    for slot in range(flat.shape[1]):
        assert torch.equal(flat[:, slot], old[:, slot]) == (slot not in written)
    token, slot = 2, int(batch.metadata.slot_mapping[2])
    assert torch.equal(flat[0, slot].flatten(), batch.k[token])
    assert torch.equal(flat[1, slot].flatten(), batch.v[token])


@pytest.mark.parametrize("empty", [None, torch.empty(0)])
def test_without_a_cache_rows_see_their_own_sequence(empty: torch.Tensor | None) -> None:
    """Profiling: the same result as a cached run of whole sequences, and nothing to write to."""
    batch = Batch([(5, 5), (1, 1), (9, 9)])
    want = batch.layer(batch.q, batch.k, batch.v, batch.cache, batch.metadata)
    profiling = AttentionMetadata.without_cache([5, 1, 9])
    assert profiling.slot_mapping.tolist() == [NO_SLOT] * 15
    got = batch.layer(batch.q, batch.k, batch.v, empty, profiling)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_chunks_equal_the_whole() -> None:
    whole = Batch([(40, 40)])
    want = whole.layer(whole.q, whole.k, whole.v, whole.cache.clone(), whole.metadata)
    cache, parts = whole.cache.clone(), []
    for begin, end in ((0, 1), (1, 7), (7, 8), (8, 33), (33, 40)):
        query_lens, seq_lens = np.array([end - begin]), np.array([end])
        slots = compute_slot_mapping(whole.block_table, query_lens, seq_lens, 4)
        step = AttentionMetadata.from_numpy(query_lens, seq_lens, whole.block_table, slots)
        q, k, v = (x[begin:end] for x in (whole.q, whole.k, whole.v))
        parts.append(whole.layer(q, k, v, cache, step))
    torch.testing.assert_close(torch.cat(parts), want, atol=1e-5, rtol=1e-5)


def test_another_sequences_nan_stays_there() -> None:
    """Padded block-table entries show foreign blocks; a NaN in one must not leak through a weight of zero."""
    batch = Batch([(1, 3), (1, 30), (4, 6)])
    want = batch.layer(batch.q, batch.k, batch.v, batch.cache.clone(), batch.metadata)
    foreign = sorted(set(range(batch.cache.shape[1])) - set(batch.block_table[0, :1]) - set(batch.block_table[2, :2]))
    poisoned = batch.cache.clone()
    poisoned[:, foreign] = float("nan")
    got = batch.layer(batch.q, batch.k, batch.v, poisoned, batch.metadata)
    rows = [0, 2, 3, 4, 5]
    assert torch.isfinite(got[rows]).all()
    torch.testing.assert_close(got[rows], want[rows], atol=1e-5, rtol=1e-5)


def test_rows_of_a_fused_projection_are_accepted() -> None:
    batch = Batch([(2, 5), (1, 4)])
    fused = torch.cat((batch.q, batch.k, batch.v), dim=1)
    q, k, v = fused.split([64, 32, 32], dim=1)
    assert not q.is_contiguous()
    want = batch.layer(batch.q, batch.k, batch.v, batch.cache.clone(), batch.metadata)
    assert torch.equal(batch.layer(q, k, v, batch.cache.clone(), batch.metadata), want)


@pytest.mark.parametrize("backend", [None, SDPA, REFERENCE])
def test_heads_may_come_as_an_axis(backend: AttentionBackend | None) -> None:
    batch = Batch([(2, 5), (1, 4)])
    if backend is not None:
        _use(batch.layer, backend, batch.q)
    want = batch.layer(batch.q, batch.k, batch.v, batch.cache.clone(), batch.metadata)
    q, k, v = batch.q.view(3, 4, 16), batch.k.view(3, 2, 16), batch.v.view(3, 2, 16)
    assert torch.equal(batch.layer(q, k, v, batch.cache.clone(), batch.metadata), want)


def test_encoder_type_sees_both_ways() -> None:
    batch = Batch([(3, 3), (4, 4)])
    got = batch.layer(batch.q, batch.k, batch.v, None, batch.metadata, AttentionType.ENCODER_ONLY)
    encoder = MultiHeadAttention(4, 16, 16**-0.5, 2)
    torch.testing.assert_close(got, encoder(batch.q, batch.k, batch.v, cu_seqlens=[0, 3, 7]))


def test_empty_batch() -> None:
    batch = Batch([(1, 1)])
    none = AttentionMetadata.without_cache([])
    rows = (batch.q[:0], batch.k[:0], batch.v[:0])
    assert batch.layer(*rows, None, none).shape == (0, 64)
    assert batch.layer(*rows, batch.cache, none).shape == (0, 64)
    assert MultiHeadAttention(4, 16, 0.25, 2)(*rows, cu_seqlens=[0]).shape == (0, 64)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("backend", [None, SDPA, REFERENCE])
def test_encoder_forms_agree(kv_heads: int, backend: AttentionBackend | None) -> None:
    """Padded with `key_lens`, block-diagonal with `cu_seqlens`, and one by one: the same rows."""
    torch.manual_seed(1)
    layer = MultiHeadAttention(4, 24, 24**-0.5, kv_heads)
    lens = [5, 9, 1]
    if backend is not None:
        _use(layer, backend, torch.empty(0))
    q = torch.randn(3, 9, 96)
    k, v = torch.randn(2, 3, 9, 24 * kv_heads).unbind()
    padded = layer(q, k, v, key_lens=lens)
    flat = layer(*(torch.cat([x[i, :n] for i, n in enumerate(lens)]) for x in (q, k, v)), cu_seqlens=[0, 5, 14, 15])
    begin = 0
    for i, n in enumerate(lens):
        alone = layer(q[i : i + 1, :n], k[i : i + 1, :n], v[i : i + 1, :n])[0]
        torch.testing.assert_close(padded[i, :n], alone, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(flat[begin : begin + n], alone, atol=1e-5, rtol=1e-5)
        begin += n
    assert not layer(q, k, v, key_lens=[0, 9, 9])[0].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"alibi_slopes": [0.5] * 4}, "alibi_slopes"),
        ({"blocksparse_params": {}}, "blocksparse_params"),
        ({"per_layer_sliding_window": 0}, "per_layer_sliding_window"),
        ({"num_kv_heads": 3}, "num_kv_heads"),
        ({"attention_chunk_size": 0}, "attention_chunk_size"),
    ],
)
def test_unsupported_options_are_refused(options: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        Attention(4, 16, 0.25, **options)  # type: ignore[arg-type]


def test_softcap_finds_a_backend_that_has_it() -> None:
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=512, scale=0.25, softcap=30.0)
    assert select_backend(spec, "cuda", torch.float32) is REFERENCE


def test_cuda_runs_by_triton() -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=64, scale=0.25)
    assert select_backend(spec, "cuda", torch.bfloat16) is TRITON


def test_metadata_from_numpy() -> None:
    """The example in the module's docstring."""
    table = np.array([[7, 2], [5, 0]], dtype=np.int32)
    query_lens, seq_lens = np.array([1, 3], dtype=np.int32), np.array([6, 3], dtype=np.int32)
    slots = compute_slot_mapping(table, query_lens, seq_lens, 4)
    assert slots.tolist() == [9, 20, 21, 22]
    metadata = AttentionMetadata.from_numpy(query_lens, seq_lens, table, slots)
    assert metadata.cu_seqlens_q.tolist() == [0, 1, 4]
    assert (metadata.num_tokens, metadata.num_seqs) == (4, 2)
    assert (metadata.num_prefill_tokens, metadata.num_decode_tokens) == (3, 1)
    assert (metadata.max_seqlen_q, metadata.max_seq_len) == (3, 6)
    assert metadata.block_table.data_ptr() == table.ctypes.data
    assert [t.dtype for t in (metadata.cu_seqlens_q, metadata.seq_lens, metadata.block_table)] == [torch.int32] * 3


def test_a_layer_that_shares_a_cache_reads_it() -> None:
    """Without keys and values of its own it sees what the other layer wrote, and writes nothing."""
    batch = Batch([(3, 6), (1, 5)])
    want = batch.layer(batch.q, batch.k, batch.v, batch.cache, batch.metadata)
    before = batch.cache.clone()
    sharing = Attention(4, 16, 0.25, 2)
    assert torch.equal(sharing(batch.q, None, None, batch.cache, batch.metadata), want)
    angles = torch.rand(4, 8)
    rotation = Rotation(angles.cos(), angles.sin())
    heads = batch.q.view(4, 4, 16)
    rotated, _ = rotary_embedding(heads, heads, *rotation)
    got = sharing(heads, None, None, batch.cache, batch.metadata, rotation=rotation)
    assert torch.equal(got, sharing(rotated, None, None, batch.cache, batch.metadata))
    assert torch.equal(batch.cache, before)
    with pytest.raises(ModelError, match="neither a cache nor keys and values"):
        sharing(batch.q, None, None, None, batch.metadata)


@pytest.mark.parametrize("head_size_v", [None, 8])
def test_cross_attention(head_size_v: int | None) -> None:
    """New items' rows are written and seen; later steps only see them; without a cache the result is the same."""
    torch.manual_seed(0)
    layer = Attention(4, 16, 0.25, 2, head_size_v=head_size_v)
    size = head_size_v or 16
    key_lens, query_lens = np.array([9, 0, 5], dtype=np.int32), np.array([2, 1, 3], dtype=np.int32)
    table = np.array([[4, 1, 3], [0, 0, 0], [2, 5, 0]], dtype=np.int32)
    slots = compute_slot_mapping(table, key_lens, key_lens, 4)
    step = AttentionMetadata.from_numpy(query_lens, key_lens, table, slots)
    query, key, value = torch.randn(6, 64), torch.randn(14, 32), torch.randn(14, 2 * size)
    shape = (2, 6, 4, 2, 16) if head_size_v is None else (6, 4, 2, 24)
    cache = torch.full(shape, torch.nan)
    kind = AttentionType.ENCODER_DECODER
    first = layer(query, key, value, cache, step, kind)
    assert first.shape == (6, 4 * size)
    assert not first[2].any()  # the one without an item
    alone = layer(query[3:], key[9:], value[9:], None, AttentionMetadata.from_numpy(*_one(3, 5)), kind)
    torch.testing.assert_close(first[3:], alone, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(layer(query, key, value, None, step, kind), first, atol=1e-6, rtol=1e-6)
    again = replace(step, slot_mapping=step.slot_mapping[:0])
    assert torch.equal(layer(query, None, None, cache, again, kind), first)


def _one(num_queries: int, num_keys: int) -> tuple[np.ndarray, ...]:
    lens = (np.array([n], dtype=np.int32) for n in (num_queries, num_keys))
    return *lens, np.zeros((1, 0), dtype=np.int32), np.zeros(0, dtype=np.int64)


def test_rules_reach_the_backend() -> None:
    """A layer's chunk and sinks, and a step's spans, with a cache and without."""
    batch = Batch([(12, 12), (1, 12)])
    spans = compute_row_spans([[(2, 7)], []], batch.query_lens, batch.seq_lens)
    metadata = replace(batch.metadata, row_spans=torch.from_numpy(spans))
    layer, sinks = Attention(4, 16, 0.25, 2, attention_chunk_size=5), torch.randn(4)
    heads = batch.q.view(-1, 4, 16), batch.k.view(-1, 2, 16), batch.v.view(-1, 2, 16)
    mask = mask_of(12, 12, layer.spec, [(2, 7)])
    want = dense(*(x[:12] for x in heads), mask, layer.spec, sinks).flatten(1)
    got = layer(batch.q, batch.k, batch.v, batch.cache, metadata, sinks=sinks)
    torch.testing.assert_close(got[:12], want, atol=1e-5, rtol=1e-5)
    alone = AttentionMetadata.without_cache([12], row_spans=spans[:, :12])
    got = layer(batch.q[:12], batch.k[:12], batch.v[:12], None, alone, sinks=sinks)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("rule", list(SpanRule))
def test_a_layer_without_a_cache_keeps_its_rule_of_spans(rule: SpanRule) -> None:
    """With one, the worker gives the layer's group the spans as they are to be seen."""
    batch = Batch([(3, 3), (12, 12)])
    layer = Attention(4, 16, 0.25, 2, per_layer_sliding_window=4, spans=rule)
    assert layer.cache_spec().spans is rule
    spans = compute_row_spans([[], [(2, 9)]], batch.query_lens, batch.seq_lens)
    heads = batch.q.view(-1, 4, 16), batch.k.view(-1, 2, 16), batch.v.view(-1, 2, 16)
    mask = mask_of(12, 12, layer.spec, [] if rule is SpanRule.IGNORED else [(2, 9)])
    if rule is SpanRule.WITHIN_REACH:  # what `sliding_window_overlay` of `transformers` hides
        mask &= ~torch.ones(12, 12, dtype=torch.bool).tril(-4)
    want = dense(*(x[3:] for x in heads), mask, layer.spec, None).flatten(1)
    alone = AttentionMetadata.without_cache([3, 12], row_spans=spans)
    got = layer(batch.q, batch.k, batch.v, None, alone)
    torch.testing.assert_close(got[3:], want, atol=1e-5, rtol=1e-5)


def test_unknown_attention_type() -> None:
    batch = Batch([(1, 1)])
    with pytest.raises(ModelError, match="'sideways', expected one of 'decoder'"):
        batch.layer(batch.q, batch.k, batch.v, batch.cache, batch.metadata, "sideways")


def test_row_spans() -> None:
    """The example in the docstring, and spans that a step doesn't reach."""
    rows = compute_row_spans([[(3, 6)], []], np.array([4, 1]), np.array([6, 9]))
    assert rows is not None
    assert rows.tolist() == [[0, 3, 3, 3, 0], [0, 6, 6, 6, 0]]
    assert compute_row_spans([[(0, 2)], [(9, 12)]], np.array([4, 1]), np.array([6, 9])) is None
    assert compute_row_spans([[], []], np.array([4, 1]), np.array([6, 9])) is None


def test_a_forced_backend_serves_or_is_refused() -> None:
    """By the setting's name, each of which is a backend; a refusal says which layer and why."""
    assert tuple(BACKENDS) == get_args(AttentionBackendName)
    model = nn.ModuleList([Attention(4, 16, 0.25), MultiHeadAttention(4, 24, 0.25)])
    choose_backends(model, "cpu", torch.float32, "torch_reference")
    assert {layer._backend for layer in model} == {REFERENCE}
    assert model[0]._backend_for(torch.empty(1, dtype=torch.bfloat16)) is REFERENCE
    choose_backends(model, "cpu", torch.float32)
    assert REFERENCE not in {layer._backend for layer in model}
    with pytest.raises(ConfigError, match=r"'triton' for a layer with 4 heads of 16 channels.*it needs CUDA"):
        choose_backends(model, "cpu", torch.float32, "triton")
    capped = nn.ModuleList([Attention(4, 16, 0.25, logits_soft_cap=30.0)])
    with pytest.raises(ConfigError, match="it has no soft cap"):
        choose_backends(capped, "cpu", torch.float32, "torch_sdpa")


def test_a_sink_for_each_head() -> None:
    """Fewer would have been read behind the tensor's end."""
    batch = Batch([(1, 5)])
    with pytest.raises(ModelError, match=r"sinks of attention layer .*: got a tensor of shape \(2,\), expected \(4,\)"):
        batch.layer(batch.q, batch.k, batch.v, batch.cache, batch.metadata, sinks=torch.zeros(2))


@pytest.mark.parametrize(
    ("options", "spec"),
    [
        ({}, FullAttentionSpec(2, 16, 16)),
        ({"head_size_v": 8}, FullAttentionSpec(2, 16, 8)),
        ({"per_layer_sliding_window": 7}, SlidingWindowSpec(2, 16, 16, 7)),
        ({"attention_chunk_size": 9}, ChunkedAttentionSpec(2, 16, 16, 9)),
        ({"attn_type": AttentionType.ENCODER_DECODER}, CrossAttentionSpec(2, 16, 16)),
        ({"kv_sharing_target_layer_name": "layers.0.attn"}, SharedCacheSpec("layers.0.attn")),
    ],
)
def test_what_a_layer_keeps(options: dict[str, Any], spec: CacheSpec) -> None:
    assert Attention(4, 16, 0.25, 2, **options).cache_spec() == spec


def test_a_layer_that_shares_a_cache_never_writes() -> None:
    """Also where it is given keys, which a pass without a cache needs."""
    batch = Batch([(3, 6), (1, 5)])
    sharing = Attention(4, 16, 0.25, 2, kv_sharing_target_layer_name="layers.0.attn")
    before = batch.cache.clone()
    got = sharing(batch.q, batch.k + 1, batch.v + 1, batch.cache, batch.metadata)
    assert torch.equal(batch.cache, before)
    assert torch.equal(got, sharing(batch.q, None, None, batch.cache, batch.metadata))

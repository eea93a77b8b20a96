"""Native attention against its twin, and bit for bit against itself in other company."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.attention import AttentionMetadata, AttentionSpec, compute_row_spans
from sensorium.attention.backend import NATIVE_CPU, SDPA, select_backend
from sensorium.kernels import native
from sensorium.kernels.attention import (
    AttentionRules,
    paged_attention,
    paged_attention_reference,
    varlen_attention,
    varlen_attention_reference,
)

pytestmark = pytest.mark.usefixtures("native_kernels")

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}
Step = list[tuple[int, int]]
"""`(query_len, seq_len)` of each sequence."""


class PagedBatch:
    """Sequences whose cached keys and values lie in shuffled blocks."""

    def __init__(
        self,
        lens: Step,
        *,
        heads: tuple[int, int] = (4, 2),
        head_size: int = 16,
        block_size: int = 16,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        torch.manual_seed(sum(s for _, s in lens))
        counts = [-(-s // block_size) for _, s in lens]
        ids = torch.randperm(sum(counts) + 2, dtype=torch.int32)
        self.block_table = torch.zeros(len(lens), max(counts, default=0) + 1, dtype=torch.int32)
        begin = 0
        for i, count in enumerate(counts):
            self.block_table[i, :count] = ids[begin : begin + count]
            begin += count
        self.seq_lens = torch.tensor([s for _, s in lens], dtype=torch.int32)
        self.cu_seqlens = _starts([q for q, _ in lens])
        num_heads, self.num_kv_heads = heads
        self.query = torch.randn(int(self.cu_seqlens[-1]), num_heads, head_size).to(dtype)
        self.cache = torch.randn(2, len(ids), block_size, self.num_kv_heads, head_size).to(dtype)
        self.scale = head_size**-0.5

    def arguments(self) -> tuple[Any, ...]:
        return self.query, *self.cache, _metadata(self.cu_seqlens.diff(), self.seq_lens, self.block_table)

    def only(self, seq: int, last: int | None = None) -> tuple[Any, ...]:
        """The arguments with one sequence alone, or only its last rows."""
        begin, end = self.cu_seqlens[seq : seq + 2].tolist()
        query = self.query[begin if last is None else end - last : end]
        lens = torch.tensor([len(query)]), self.seq_lens[seq : seq + 1]
        return query, *self.cache, _metadata(*lens, self.block_table[seq : seq + 1])


def _metadata(query_lens: torch.Tensor, seq_lens: torch.Tensor, block_table: torch.Tensor) -> AttentionMetadata:
    slots = torch.zeros(0, dtype=torch.int64)
    return AttentionMetadata.from_numpy(*(x.numpy() for x in (query_lens, seq_lens, block_table, slots)))


def _starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *lens]).cumsum(0).to(torch.int32)


MIXES: list[Step] = [
    [(1, 1)],
    [(1, 16), (1, 17), (1, 15), (1, 300)],
    [(64, 64), (63, 64), (65, 129), (1, 64)],
    [(100, 230), (1, 2), (30, 30), (0, 5), (17, 400)],
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(1, 1), (4, 4), (6, 2), (14, 2), (100, 1)])
@pytest.mark.parametrize("lens", MIXES)
def test_paged(lens: Step, heads: tuple[int, int], dtype: torch.dtype) -> None:
    batch = PagedBatch(lens, heads=heads, dtype=dtype)
    _compare_paged(batch)


@pytest.mark.parametrize("head_size", [2, 16, 24, 40, 64, 72, 80, 96, 128, 256])
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_head_and_block_sizes(head_size: int, block_size: int, dtype: torch.dtype, tiles: bool) -> None:
    _compare_paged(PagedBatch([(3, 70), (1, 33)], head_size=head_size, block_size=block_size, dtype=dtype))


@pytest.mark.parametrize("window", [1, 2, 63, 64, 65, 200, 10_000])
@pytest.mark.parametrize("softcap", [None, 0.7, 30.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_paged_window_and_softcap(window: int, softcap: float | None, dtype: torch.dtype) -> None:
    _compare_paged(PagedBatch(MIXES[3], dtype=dtype), window=window, softcap=softcap)


def _compare_paged(batch: PagedBatch, window: int | None = None, softcap: float | None = None) -> None:
    rules = AttentionRules(batch.scale, window, softcap)
    got = paged_attention(*batch.arguments(), rules)
    want = paged_attention_reference(*batch.arguments(), rules)
    tolerance = TOLERANCE[got.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "rules", [AttentionRules(0.2), AttentionRules(0.2, window=50), AttentionRules(0.2, chunk=90, window=70)]
)
@pytest.mark.parametrize("has_extras", [False, True])
def test_rows_do_not_depend_on_batch_or_chunk(
    dtype: torch.dtype, rules: AttentionRules, has_extras: bool, num_threads: int, tiles: bool
) -> None:
    """Batched = alone and chunked = whole, bit for bit: exactness of greedy tokens rests on it."""
    batch = PagedBatch([(100, 230), (1, 2), (30, 30), (1, 400)], heads=(14, 2), head_size=24, dtype=dtype)
    spans = [[(20, 140), (210, 225)], [], [(0, 12), (24, 30)], [(300, 400)]] if has_extras else [[]] * 4
    sinks = torch.randn(14) if has_extras else None

    def attend(arguments: tuple[Any, ...], own: list[list[tuple[int, int]]]) -> torch.Tensor:
        *parts, metadata = arguments
        row_spans = compute_row_spans(own, np.array(metadata.query_lens_host), np.array(metadata.seq_lens_host))
        row_spans = None if row_spans is None else torch.from_numpy(row_spans)
        return paged_attention(*parts, replace(metadata, row_spans=row_spans), rules, sinks)

    whole = attend(batch.arguments(), spans)
    for seq in range(4):
        begin, end = batch.cu_seqlens[seq : seq + 2].tolist()
        assert torch.equal(attend(batch.only(seq), [spans[seq]]), whole[begin:end])
        for last in (1, 7, 20):
            if last <= end - begin:
                assert torch.equal(attend(batch.only(seq, last), [spans[seq]]), whole[end - last : end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unreadable_cells_are_never_seen(dtype: torch.dtype, tiles: bool) -> None:
    """Cells past a sequence's end, and blocks of others, may hold anything."""
    batch = PagedBatch([(1, 5), (3, 20)], block_size=16, dtype=dtype)
    want = paged_attention(*batch.arguments(), AttentionRules(0.25))
    used = torch.zeros(batch.cache.shape[1:3], dtype=torch.bool)
    for table, seq_len in zip(batch.block_table, batch.seq_lens.tolist(), strict=True):
        for position in range(seq_len):
            used[table[position // 16], position % 16] = True
    batch.cache[:, ~used] = torch.nan
    assert torch.equal(paged_attention(*batch.arguments(), AttentionRules(0.25)), want)


VARLEN: list[list[int]] = [[1], [64, 1, 65], [100, 0, 3, 257], [96] * 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lens", VARLEN)
@pytest.mark.parametrize(("heads", "head_size"), [((4, 4), 64), ((6, 2), 72), ((12, 12), 20)])
def test_varlen(lens: list[int], causal: bool, heads: tuple[int, int], head_size: int, dtype: torch.dtype) -> None:
    torch.manual_seed(len(lens))
    tokens, starts = sum(lens), _starts(lens)
    fused = torch.randn(tokens, sum(heads) + heads[1], head_size).to(dtype)
    query, key, value = fused.split([*heads, heads[1]], dim=1)
    for window, softcap in ((None, None), (10, None), (None, 2.0)):
        got, want = (
            function(query, key, value, starts, AttentionRules(0.1, window, softcap, causal=causal))
            for function in (varlen_attention, varlen_attention_reference)
        )
        tolerance = TOLERANCE[dtype]
        torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def test_varlen_key_lens() -> None:
    torch.manual_seed(0)
    starts = _starts([70, 70, 5, 70])
    key_lens = torch.tensor([70, 33, 0, 1], dtype=torch.int32)
    query, key, value = torch.randn(3, 215, 4, 32).unbind()
    key[70 + 33 : 140] = torch.nan
    value[140:145] = torch.nan
    rules = AttentionRules(0.2, causal=False)
    got = varlen_attention(query, key, value, starts, rules, key_lens=key_lens)
    want = varlen_attention_reference(query, key, value, starts, rules, key_lens=key_lens)
    assert not got[140:145].any()
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-6)


def test_varlen_equals_paged() -> None:
    """A prompt's whole run without cache (profiling, or a first chunk) gives the rows of a cached run, bit for bit."""
    torch.manual_seed(0)
    query, key, value = torch.randn(100, 4, 16), torch.randn(100, 2, 16), torch.randn(100, 2, 16)
    cache = torch.zeros(2, 10, 10, 2, 16)
    cache.view(2, 100, 2, 16).copy_(torch.stack((key, value)))
    table, lens = torch.arange(10, dtype=torch.int32)[None], torch.tensor([100], dtype=torch.int32)
    paged = paged_attention(query, *cache, _metadata(lens, lens, table), AttentionRules(0.25))
    flat = varlen_attention(query, key, value, _starts([100]), AttentionRules(0.25))
    assert torch.equal(paged, flat)


def test_large_scores_do_not_overflow() -> None:
    query = torch.full((2, 1, 16), 1e18)
    key = torch.tensor([1e18, -1e18])[:, None, None].expand(2, 1, 16).contiguous()
    value = torch.tensor([3.0, 5.0])[:, None, None].expand(2, 1, 16).contiguous()
    got = varlen_attention(query, key, value, _starts([2]), AttentionRules(1.0, causal=False))
    assert torch.equal(got, torch.full_like(got, 3.0))


def test_without_native(without_native: None) -> None:
    batch = PagedBatch([(3, 9)])
    assert torch.equal(
        paged_attention(*batch.arguments(), AttentionRules(0.25)),
        paged_attention_reference(*batch.arguments(), AttentionRules(0.25)),
    )


def test_a_choice_is_made_anew(without_native: None) -> None:
    """It was kept for the process: a layer made after a test without native kernels ran without them, too."""
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=0.25)
    assert select_backend(spec, "cpu", torch.float32) is SDPA
    native._load.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SENSORIUM_NATIVE")
        assert select_backend(spec, "cpu", torch.float32) is NATIVE_CPU

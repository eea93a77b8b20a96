"""Attention and cache writes against the oracle."""

from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
import torch

from sensorium.kernels.attention import (
    paged_attention_reference,
    varlen_attention_reference,
    write_kv_reference,
)
from sensorium.kernels.gpu import attention, chunk_attention, decode_attention, gathered_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES = [
    [(1, 1)],
    [(3, 3), (1, 12), (30, 50), (0, 0), (1, 1), (8, 8)],
    [(4, 90), (1, 130), (2, 2)],
]
DECODES = [[9, 130, 5], [200, 1, 64, 65, 63]]
HEADS = [(4, 2, 16), (7, 1, 64), (2, 2, 80)]
RULES: list[dict[str, Any]] = [{}, {"window": 1}, {"window": 20, "softcap": 5.0}, {"window": 100}]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if DEVICE == "cuda":  # the interpreter multiplies the bits of bfloat16 as integers
    TOLERANCE[torch.bfloat16] = 2e-2


def starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=DEVICE)


def paged(lens: list[tuple[int, int]], heads: tuple[int, int, int], block_size: int, dtype: torch.dtype) -> Any:
    num_heads, num_kv_heads, head_size = heads
    seq_lens = torch.tensor([k for _, k in lens], dtype=torch.int32)
    counts = -(-seq_lens // block_size)
    num_blocks = int(counts.sum()) + 2
    free = torch.randperm(num_blocks).tolist()
    table = torch.zeros(len(lens), max(int(counts.max()), 1), dtype=torch.int32)
    for i, count in enumerate(counts.tolist()):
        table[i, :count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    cache = torch.randn(2, num_blocks, block_size, num_kv_heads, head_size).to(dtype)
    cache[:, free] = torch.nan  # blocks of nobody
    query = torch.randn(sum(q for q, _ in lens), num_heads * head_size).to(dtype)
    return query.to(DEVICE), cache.to(DEVICE), table.to(DEVICE), starts([q for q, _ in lens]), seq_lens.to(DEVICE)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("lens", MIXES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rules", RULES)
def test_chunks(lens: list[tuple[int, int]], heads: tuple[int, int, int], rules: dict[str, Any]) -> None:
    arguments = paged(lens, heads, 16, torch.float32)
    got = attention.paged_attention(*arguments, scale=0.2, has_decodes=False, **rules)
    close(got, paged_attention_reference(*arguments, scale=0.2, **rules))


@pytest.mark.parametrize("lens", DECODES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rules", RULES)
def test_decodes(lens: list[int], heads: tuple[int, int, int], rules: dict[str, Any]) -> None:
    arguments = paged([(1, n) for n in lens], heads, 16, torch.float32)
    got = attention.paged_attention(*arguments, scale=0.2, has_chunks=False, **rules)
    close(got, paged_attention_reference(*arguments, scale=0.2, **rules))


@pytest.mark.parametrize("most", [1, 2, 3, 7])
def test_any_number_of_shares_gives_the_same(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a share is empty, and where a sequence has no key or no query at all, as in padding of a graph."""
    monkeypatch.setattr(decode_attention, "num_splits_for", lambda *_: most)
    query, cache, table, cu_seqlens, seq_lens = paged(
        [(1, 100), (1, 33), (0, 40), (1, 1), (1, 300)], (3, 1, 16), 16, torch.float32
    )
    want = paged_attention_reference(query, cache, table, cu_seqlens, seq_lens, scale=0.2)
    seq_lens[3], want[2] = 0, 0
    close(attention.paged_attention(query, cache, table, cu_seqlens, seq_lens, scale=0.2, has_chunks=False), want)


@pytest.mark.parametrize("rules", RULES)
def test_decodes_among_chunks(rules: dict[str, Any]) -> None:
    """In any order, and without that the host knows which is which, as in a recorded pass; padding has no rows."""
    arguments = paged([(1, 40), (12, 40), (1, 100), (1, 5), (9, 9), (0, 0)], (3, 1, 32), 16, torch.float32)
    want = paged_attention_reference(*arguments, scale=0.2, **rules)
    close(attention.paged_attention(*arguments, scale=0.2, **rules), want)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [4, 48, 64])
@pytest.mark.parametrize("has_decodes", [False, True])
def test_storage_types_and_block_sizes(dtype: torch.dtype, block_size: int, has_decodes: bool) -> None:
    arguments = paged([(1, 12), (1, 90), (40, 70), (1, 1)], (4, 1, 32), block_size, dtype)
    got = attention.paged_attention(*arguments, scale=0.2, has_decodes=has_decodes)
    close(got, paged_attention_reference(*arguments, scale=0.2))


@pytest.mark.parametrize("head_size", [8, 48, 72, 96, 112, 192, 256])
def test_head_sizes(head_size: int) -> None:
    dtype = list(TOLERANCE)[-1]
    arguments = paged([(1, 70), (40, 100)], (2, 1, head_size), 16, dtype)
    got = attention.paged_attention(*arguments, scale=head_size**-0.5)
    close(got, paged_attention_reference(*arguments, scale=head_size**-0.5))


def test_head_parts() -> None:
    assert [chunk_attention.head_parts(n) for n in (8, 64, 80, 96, 112, 128, 192, 256)] == [
        *((16, 0), (64, 0), (64, 16), (64, 32), (128, 0), (128, 0), (128, 64), (256, 0))
    ]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lens", [[5], [40, 1, 0, 70]])
@pytest.mark.parametrize("window", [None, 7])
def test_varlen(lens: list[int], causal: bool, window: int | None) -> None:
    query, key, value = (torch.randn(sum(lens), count, 24, device=DEVICE) for count in (4, 2, 2))
    rules: dict[str, Any] = {"scale": 0.3, "causal": causal, "window": window}
    got = attention.varlen_attention(query, key, value, starts(lens), **rules)
    close(got, varlen_attention_reference(query, key, value, starts(lens), **rules))


def test_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are looked at together to find that of a tile."""
    monkeypatch.setattr(chunk_attention, "_SEARCHED", 4)
    lens = [1, 3, 0, 2, 20, 1, 1, 0, 5]
    query, key, value = (torch.randn(sum(lens), 1, 16, device=DEVICE) for _ in range(3))
    got = attention.varlen_attention(query, key, value, starts(lens), scale=0.3, causal=True)
    close(got, varlen_attention_reference(query, key, value, starts(lens), scale=0.3, causal=True))


def test_padded_keys_are_never_seen() -> None:
    lens, key_lens = [6, 6, 6], torch.tensor([6, 2, 0], dtype=torch.int32, device=DEVICE)
    query, key, value = (torch.randn(18, 2, 16, device=DEVICE) for _ in range(3))
    key[8:12] = value[8:12] = torch.nan
    rules: dict[str, Any] = {"scale": 0.25, "causal": False, "key_lens": key_lens}
    got = attention.varlen_attention(query, key, value, starts(lens), **rules)
    close(got, varlen_attention_reference(query, key, value, starts(lens), **rules))


def test_parts_of_one_projection_are_read_in_place() -> None:
    """Queries, keys and values as slices of wider rows, with the heads as an axis or flat."""
    qkv = torch.randn(9, 8, 16, device=DEVICE)
    query, key, value = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    rules: dict[str, Any] = {"scale": 0.3, "causal": True}
    got = attention.varlen_attention(query, key, value, starts([9]), **rules)
    close(got, varlen_attention_reference(query, key, value, starts([9]), **rules))


@pytest.mark.parametrize("form", ["flat", "heads", "strided"])
def test_written_slots(form: str) -> None:
    slots = torch.tensor([7, -1, 0, 21], device=DEVICE)
    rows = torch.randn(2, 4, 3, 20, device=DEVICE)
    key, value = rows if form == "heads" else rows.flatten(2)
    if form == "strided":
        key, value = rows.flatten(2).permute(1, 0, 2).contiguous().unbind(1)
    caches = [torch.zeros(2, 6, 4, 3, 20, device=DEVICE) for _ in range(2)]
    attention.write_kv(key, value, caches[0], slots)
    write_kv_reference(key, value, caches[1], slots)
    assert torch.equal(*caches)


def gathered(arguments: Any, least_queries: int, num_spare_tiles: int = 0) -> torch.Tensor:
    query, _, _, cu_seqlens, seq_lens = arguments
    out = torch.full_like(query, -7.0)
    num_queries = cu_seqlens.diff()
    key_lens = seq_lens[num_queries >= least_queries].tolist()
    gathered_attention.attend_gathered(
        *(out, *arguments),
        num_tiles=gathered_attention.num_tiles_of(key_lens) + num_spare_tiles,
        least_queries=least_queries,
        scale=0.2,
    )
    return out


@pytest.mark.parametrize("lens", [*MIXES, [(200, 300), (1, 40), (64, 64), (130, 700)]])
@pytest.mark.parametrize("heads", [(4, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("searched", [2, 128])
def test_gathered_keys(
    lens: list[tuple[int, int]], heads: tuple[int, int, int], searched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of nobody are NaN, and what stands behind a sequence's end isn't read."""
    monkeypatch.setattr(gathered_attention, "_SEARCHED", searched)
    arguments = paged([pair for pair in lens if pair[0]], heads, 16, torch.float16)
    close(gathered(arguments, 1), paged_attention_reference(*arguments, scale=0.2))


def test_gathering_passes_over_decodes() -> None:
    """Their rows stay as they were, and where there are fewer tiles than programs the others find nothing to do."""
    lens = [(1, 300), (40, 200), (1, 1), (9, 9), (1, 130)]
    arguments = paged(lens, (4, 2, 64), 16, torch.float16)
    got = gathered(arguments, 2, num_spare_tiles=5)
    want = paged_attention_reference(*arguments, scale=0.2)
    is_decode = torch.tensor([q == 1 for q, _ in lens]).repeat_interleave(torch.tensor([q for q, _ in lens]))
    assert bool((got[is_decode] == -7).all())
    close(got[~is_decode], want[~is_decode])


def test_long_chunks_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that fits, and the host knows the lengths."""
    arguments = paged([(1, 90), (150, 210), (70, 70)], (16, 2, 64), 16, torch.float16)
    want = paged_attention_reference(*arguments, scale=0.1)
    seen: list[Any] = []
    plain = gathered_attention.attend_gathered
    monkeypatch.setattr(gathered_attention, "fits", lambda *args: bool(seen.append(args)) or True)
    monkeypatch.setattr(
        gathered_attention, "attend_gathered", lambda *args, **rules: seen.append(plain(*args, **rules))
    )
    close(attention.paged_attention(*arguments, scale=0.1, key_lens=[90, 210, 70]), want)
    assert [args and args[1:] for args in seen] == [(64, 8, [90, 210, 70]), None]
    for rules in ({}, {"key_lens": [90, 210, 70], "window": 400}):
        close(attention.paged_attention(*arguments, scale=0.1, **rules), want)
    assert len(seen) == 2


def test_when_gathering_pays() -> None:
    """Many rows, and not too many keys for them; and only where there are descriptors."""
    rows = torch.empty(600, 16 * 128, dtype=torch.bfloat16, device=DEVICE)
    is_possible = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] >= 9
    assert gathered_attention.fits(rows, 128, 8, [4000, 800]) is is_possible
    assert not gathered_attention.fits(rows, 128, 8, [4000, 801])
    assert not gathered_attention.fits(rows[:511], 128, 8, [600])
    assert not gathered_attention.fits(rows.float(), 128, 8, [600])
    assert not gathered_attention.fits(rows, 80, 8, [600])

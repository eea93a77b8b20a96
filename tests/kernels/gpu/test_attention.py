"""Attention and cache writes against the oracle."""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import Any

import pytest
import torch

from sensorium.attention.backend import AttentionSpec
from sensorium.kernels.attention import (
    AttentionRules,
    paged_attention_reference,
    split_cache,
    to_fp8,
    varlen_attention_reference,
    write_kv_reference,
)
from sensorium.kernels.gpu import attention, chunk_attention, decode_attention, gathered_attention
from tests.helpers.attention import RULES, PagedStep, paged_step, varlen_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MIXES = [
    [(1, 1)],
    [(3, 3), (1, 12), (30, 50), (0, 0), (1, 1), (8, 8)],
    [(4, 90), (1, 130), (2, 2)],
]
DECODES = [[9, 130, 5], [200, 1, 64, 65, 63]]
HEADS = [(4, 2, 16), (7, 1, 64), (2, 2, 80)]
PLAIN = AttentionRules(0.2)
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if DEVICE == "cuda":  # the interpreter multiplies the bits of bfloat16 as integers
    TOLERANCE[torch.bfloat16] = 2e-2


def starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lens)], dtype=torch.int32, device=DEVICE)


def paged(
    lens: Any, rules: AttentionRules = PLAIN, heads: tuple[int, int, int] = (4, 2, 16), **options: Any
) -> PagedStep:
    options = {"block_size": 16, **options}
    return paged_step(lens, rules, heads=heads[:2], head_size=heads[2], device=DEVICE, **options)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


def check(step: PagedStep, **hints: bool) -> None:
    """`hints`: what the metadata says of the batch."""
    query, keys, values, metadata, *rest = step.arguments
    close(attention.paged_attention(query, keys, values, replace(metadata, **hints), *rest), step.expected)


@pytest.mark.parametrize("lens", MIXES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rules", RULES[:4])
def test_chunks(lens: list[tuple[int, int]], heads: tuple[int, int, int], rules: AttentionRules) -> None:
    check(paged(lens, rules, heads), has_decodes=False)


@pytest.mark.parametrize("lens", DECODES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("rules", RULES[:4])
def test_decodes(lens: list[int], heads: tuple[int, int, int], rules: AttentionRules) -> None:
    check(paged([(1, n) for n in lens], rules, heads))


@pytest.mark.parametrize("most", [1, 3])
@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("has_extras", [False, True])
def test_any_number_of_shares_gives_the_same(
    most: int, rules: AttentionRules, has_extras: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a share is empty, and where a sequence has no key or no query at all, as in padding of a graph."""
    monkeypatch.setattr(decode_attention, "num_splits_for", lambda *_: most)
    spans = [[(30, 100)], [], [], [(0, 1)], [(250, 300)], []] if has_extras else None
    lens = [(1, 100), (1, 33), (0, 40), (1, 1), (1, 300), (1, 0)]
    check(paged(lens, rules, (3, 1, 16), spans=spans, has_sinks=has_extras))


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("has_extras", [False, True])
def test_decodes_among_chunks(rules: AttentionRules, has_extras: bool) -> None:
    """In any order, and without that the host knows which is which, as in a recorded pass; padding has no rows."""
    lens = [(1, 40), (12, 40), (1, 100), (1, 5), (9, 9), (0, 0)]
    spans = [[(20, 40)], [(25, 37)], [], [(0, 5)], [(0, 4), (4, 9)], []] if has_extras else None
    check(paged(lens, rules, (3, 1, 32), spans=spans, has_sinks=has_extras))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [4, 48, 64])
@pytest.mark.parametrize("has_decodes", [False, True])
def test_storage_types_and_block_sizes(dtype: torch.dtype, block_size: int, has_decodes: bool) -> None:
    lens = [(1, 12), (1, 90), (40, 70), (1, 1)]
    options: dict[str, Any] = {"spans": [[], [], [(35, 60)], []], "has_sinks": True}
    check(paged(lens, heads=(4, 1, 32), block_size=block_size, dtype=dtype), has_decodes=has_decodes)
    check(paged(lens, RULES[3], (4, 1, 32), block_size=block_size, dtype=dtype, **options), has_decodes=has_decodes)


@pytest.mark.parametrize("head_size", [8, 48, 72, 96, 112, 192, 256])
def test_head_sizes(head_size: int) -> None:
    check(paged([(1, 70), (40, 100)], AttentionRules(head_size**-0.5), (2, 1, head_size), dtype=list(TOLERANCE)[-1]))


@pytest.mark.parametrize(
    ("head_size", "value_size", "in_keys"), [(192, 128, False), (40, 24, True), (24, 80, False), (16, 5, False)]
)
def test_value_sizes(head_size: int, value_size: int, in_keys: bool) -> None:
    rules, lens = AttentionRules(head_size**-0.5), [(1, 170), (40, 100), (1, 3)]
    check(paged(lens, rules, (4, 2, head_size), value_size=value_size, values_in_keys=in_keys))
    if not in_keys:
        step = varlen_step([40, 1, 70], rules, head_size=head_size, value_size=value_size, device=DEVICE)
        close(attention.varlen_attention(*step.arguments, **step.options), step.expected)


@pytest.mark.parametrize("rules", [AttentionRules(0.25, causal=False), AttentionRules(0.25, causal=False, window=9)])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_cross_attention(rules: AttentionRules, has_sinks: bool) -> None:
    """Queries of a decoder over an item's rows, of which there may be fewer, more or none."""
    check(paged([(1, 150), (5, 90), (1, 0), (40, 3), (0, 8), (7, 0), (1, 1)], rules, has_sinks=has_sinks))


def test_head_parts() -> None:
    assert [chunk_attention.head_parts(n) for n in (8, 64, 80, 96, 112, 128, 192, 256)] == [
        *((16, 0), (64, 0), (64, 16), (64, 32), (128, 0), (128, 0), (128, 64), (256, 0))
    ]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("has_extras", [False, True])
def test_varlen(rules: AttentionRules, has_extras: bool) -> None:
    spans = [[(3, 30), (30, 31)], [(0, 1)], [], [(10, 70)]] if has_extras else None
    options: dict[str, Any] = {"head_size": 24, "has_sinks": has_extras, "device": DEVICE}
    step = varlen_step([40, 1, 0, 70], rules, spans=spans, **options)
    close(attention.varlen_attention(*step.arguments, **step.options), step.expected)
    step = varlen_step([40, 1, 0, 70], replace(rules, causal=False), **options)
    close(attention.varlen_attention(*step.arguments, **step.options), step.expected)


def test_many_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """More than are looked at together to find that of a tile."""
    monkeypatch.setattr(chunk_attention, "_SEARCHED", 4)
    step = varlen_step([1, 3, 0, 2, 20, 1, 1, 0, 5], AttentionRules(0.3), heads=(1, 1), device=DEVICE)
    close(attention.varlen_attention(*step.arguments), step.expected)


def test_padded_keys_are_never_seen() -> None:
    step = varlen_step([6, 6, 6], AttentionRules(0.25, causal=False), key_lens=[6, 2, 0], device=DEVICE)
    close(attention.varlen_attention(*step.arguments, **step.options), step.expected)


def test_parts_of_one_projection_are_read_in_place() -> None:
    """Queries, keys and values as slices of wider rows, with the heads as an axis or flat."""
    qkv = torch.randn(9, 8, 16, device=DEVICE)
    query, key, value = qkv[:, :4], qkv[:, 4:6], qkv[:, 6:]
    got = attention.varlen_attention(query, key, value, starts([9]), PLAIN)
    close(got, varlen_attention_reference(query, key, value, starts([9]), PLAIN))


@pytest.mark.parametrize("form", ["flat", "heads", "strided"])
def test_written_slots(form: str) -> None:
    slots = torch.tensor([7, -1, 0, 21], device=DEVICE)
    rows = torch.randn(2, 4, 3, 20, device=DEVICE)
    key, value = rows if form == "heads" else rows.flatten(2)
    if form == "strided":
        key, value = rows.flatten(2).permute(1, 0, 2).contiguous().unbind(1)
    caches = [torch.zeros(2, 6, 4, 3, 20, device=DEVICE) for _ in range(2)]
    attention.write_kv(key, value, *caches[0], slots)
    write_kv_reference(key, value, *caches[1], slots)
    assert torch.equal(*caches)


def test_written_slots_of_values_of_another_size() -> None:
    slots = torch.tensor([7, -1, 0, 21], device=DEVICE)
    key, value = torch.randn(4, 3, 20, device=DEVICE), torch.randn(4, 3, 7, device=DEVICE)
    caches = [torch.zeros(6, 4, 3, 27, device=DEVICE) for _ in range(2)]
    attention.write_kv(key, value, *split_cache(caches[0], 20, 7), slots)
    write_kv_reference(key, value, *split_cache(caches[1], 20, 7), slots)
    assert torch.equal(*caches)


FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def in_fp8(step: PagedStep, dtype: torch.dtype) -> PagedStep:
    """The step over a cache of 8-bit floats with scales, and what the twin makes of it."""
    rules = replace(step.rules, k_scale=0.05, v_scale=0.4)
    sizes = step.keys.shape[3], step.values.shape[3]
    cache = torch.empty_like(step.cache, dtype=dtype)
    parts = split_cache(cache, *sizes)
    for kept, part, scale in zip(parts, (step.keys, step.values), (0.05, 0.4), strict=True):
        kept.copy_(to_fp8(part, dtype, scale))
    expected = paged_attention_reference(step.query, *parts, step.metadata, rules, step.sinks)
    return replace(step, cache=cache, keys=parts[0], values=parts[1], rules=rules, expected=expected)


@pytest.mark.parametrize("dtype", FP8)
@pytest.mark.parametrize("rules", [PLAIN, AttentionRules(0.2, window=20, softcap=5.0)])
@pytest.mark.parametrize("row_dtype", [torch.float32, torch.float16])
def test_a_cache_of_8_bits(dtype: torch.dtype, rules: AttentionRules, row_dtype: torch.dtype) -> None:
    """Chunks and decodes read what the twin reads, which is near the keys and values that were rounded."""
    plain = paged([(1, 40), (12, 40), (1, 130)], rules, (4, 2, 80), dtype=row_dtype, has_sinks=True)
    step = in_fp8(plain, dtype)
    check(step)
    check(step, has_decodes=False)
    assert 1e-3 < (step.expected - plain.expected).abs().max() < 0.5


def test_gathered_keys_of_8_bits() -> None:
    step = in_fp8(paged([(20, 20), (30, 70)], heads=(4, 2, 64), dtype=torch.float16), FP8[0])
    close(gathered(step, 1), step.expected)


def near_fp8(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Numbers up to two hundredths larger than ones of 8 bits, which they are rounded to."""
    return x.to(dtype).float() * (1 + torch.rand_like(x) / 50)


@pytest.mark.parametrize("dtype", FP8)
def test_cache_writes_in_8_bits(dtype: torch.dtype) -> None:
    """Bit for bit the twin's: rounded to nearest, bounded by the largest number, NaN kept; also beside one another.

    The interpreter loses the carry where rounding up reaches the next power of two, and makes a number of NaN, so that
    only a GPU sees such.
    """
    key, value = (near_fp8(torch.randn(6, 3, 20, device=DEVICE) * size, dtype) for size in (300, 2))
    if DEVICE == "cuda":
        key, value = torch.randn_like(key) * 300, torch.randn_like(value) * 2
        key[2, 1, 2] = torch.nan
    key, value = key * 0.03, value * 0.5
    key[2, 1, :2] = torch.tensor([1e9, -1e9])
    slots = torch.tensor([5, -1, 0, 23, 9, 8], device=DEVICE)
    for value_size, shape in ((20, (2, 6, 4, 3, 20)), (7, (6, 4, 3, 27))):
        caches = [torch.zeros(shape, device=DEVICE).to(dtype) for _ in range(2)]
        attention.write_kv(key, value[..., :value_size], *split_cache(caches[0], 20, value_size), slots, 0.03, 0.5)
        write_kv_reference(key, value[..., :value_size], *split_cache(caches[1], 20, value_size), slots, 0.03, 0.5)
        assert torch.equal(*(cache.view(torch.uint8) for cache in caches))
        largest = torch.finfo(dtype).max
        assert split_cache(caches[0], 20, value_size)[0][0, 0, 1, :2].tolist() == [largest, -largest]


def gathered(step: PagedStep, least_queries: int, num_spare_tiles: int = 0) -> torch.Tensor:
    metadata = step.metadata
    out = torch.full_like(step.query, -7.0).flatten(1)
    key_lens = metadata.seq_lens[metadata.cu_seqlens_q.diff() >= least_queries].tolist()
    gathered_attention.attend_gathered(
        *(out, step.query.flatten(1), step.keys, step.values),
        *(metadata.block_table, metadata.cu_seqlens_q, metadata.seq_lens),
        num_tiles=gathered_attention.num_tiles_of(key_lens) + num_spare_tiles,
        least_queries=least_queries,
        scale=step.rules.scale * step.rules.k_scale,
        value_scale=step.rules.v_scale,
    )
    return out.view(step.query.shape)


@pytest.mark.parametrize("lens", [*MIXES, [(200, 300), (1, 40), (64, 64), (130, 700)]])
@pytest.mark.parametrize("heads", [(4, 2, 64), (7, 1, 128)])
@pytest.mark.parametrize("searched", [2, 128])
def test_gathered_keys(
    lens: list[tuple[int, int]], heads: tuple[int, int, int], searched: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks of nobody are NaN, and what stands behind a sequence's end isn't read."""
    monkeypatch.setattr(gathered_attention, "_SEARCHED", searched)
    step = paged([pair for pair in lens if pair[0]], heads=heads, dtype=torch.float16)
    close(gathered(step, 1), step.expected)


def test_gathering_passes_over_decodes() -> None:
    """Their rows stay as they were, and where there are fewer tiles than programs the others find nothing to do."""
    lens = [(1, 300), (40, 200), (1, 1), (9, 9), (1, 130)]
    step = paged(lens, heads=(4, 2, 64), dtype=torch.float16)
    got = gathered(step, 2, num_spare_tiles=5)
    is_decode = torch.tensor([q == 1 for q, _ in lens]).repeat_interleave(torch.tensor([q for q, _ in lens]))
    assert bool((got[is_decode] == -7).all())
    close(got[~is_decode], step.expected[~is_decode])


def test_long_chunks_are_gathered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where that fits, the host knows the lengths, and no rule forbids it."""
    seen: list[Any] = []
    plain = gathered_attention.attend_gathered
    monkeypatch.setattr(gathered_attention, "fits", lambda *args: bool(seen.append(args)) or True)
    monkeypatch.setattr(
        gathered_attention, "attend_gathered", lambda *args, **rules: seen.append(plain(*args, **rules))
    )
    options: dict[str, Any] = {"heads": (4, 2, 64), "dtype": torch.float16}
    lens = [(1, 40), (30, 60), (20, 20)]
    check(paged(lens, **options))
    assert [args and args[1:] for args in seen] == [(64, 2, (40, 60, 20)), None]
    # A layer's rules are an `AttentionSpec`, which no `AttentionRules` equals: layers once never got here.
    check(paged(lens, AttentionSpec(0.2, num_heads=4, num_kv_heads=2, head_size=64), **options))
    assert len(seen) == 4
    check(paged(lens, **options), is_recorded=True)
    for rules in (AttentionRules(0.2, window=400), AttentionRules(0.2, chunk=400), AttentionRules(0.2, softcap=9.0)):
        check(paged(lens, rules, **options))
    for extras in ({"has_sinks": True}, {"spans": [[], [(40, 50)], []]}, {"value_size": 32}):
        check(paged(lens, **options, **extras))
    assert len(seen) == 4


def test_when_gathering_pays() -> None:
    """Many rows, and not too many keys for them; and only where there are descriptors."""
    rows = torch.empty(600, 16 * 128, dtype=torch.bfloat16, device=DEVICE)
    is_possible = DEVICE == "cuda" and torch.cuda.get_device_capability()[0] >= 9
    assert gathered_attention.fits(rows, 128, 8, [4000, 800]) is is_possible
    assert not gathered_attention.fits(rows, 128, 8, [4000, 801])
    assert not gathered_attention.fits(rows[:511], 128, 8, [600])
    assert not gathered_attention.fits(rows.float(), 128, 8, [600])
    assert not gathered_attention.fits(rows, 80, 8, [600])

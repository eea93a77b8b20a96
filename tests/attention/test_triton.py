"""The Triton kernel against the oracle.

On a GPU if there is one, else by Triton's interpreter, which runs the same code.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"
triton = pytest.importorskip("triton", reason="Triton is not installed")
if DEVICE == "cpu" and tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7):
    pytest.skip("the interpreter of this Triton doesn't work with today's numpy", allow_module_level=True)

from sensorium.kernels import triton_attention  # noqa: E402
from sensorium.kernels.attention import (  # noqa: E402
    paged_attention_reference,
    varlen_attention_reference,
    write_kv_reference,
)

MIXES = [
    [(1, 1)],
    [(1, 9), (1, 130), (1, 5)],
    [(3, 3), (1, 12), (70, 90), (0, 0), (1, 1), (8, 8)],
    [(4, 100), (1, 257), (2, 2)],
]
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3}
if DEVICE == "cuda":  # the interpreter multiplies the bits of bfloat16 as integers
    TOLERANCE[torch.bfloat16] = 2e-2


def starts(lens: list[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lens).cumsum(0).tolist()], dtype=torch.int32, device=DEVICE)


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
    query = torch.randn(sum(q for q, _ in lens), num_heads * head_size).to(dtype)
    return query.to(DEVICE), cache.to(DEVICE), table.to(DEVICE), starts([q for q, _ in lens]), seq_lens.to(DEVICE)


@pytest.mark.parametrize("lens", MIXES)
@pytest.mark.parametrize("heads", [(4, 2, 16), (14, 2, 64), (3, 3, 80)])
@pytest.mark.parametrize(("window", "softcap"), [(None, None), (1, None), (20, 5.0)])
def test_paged_equals_the_oracle(
    lens: list[tuple[int, int]], heads: tuple[int, int, int], window: int | None, softcap: float | None
) -> None:
    arguments = paged(lens, heads, 16, torch.float32)
    rules: dict[str, Any] = {"scale": 0.2, "window": window, "softcap": softcap}
    got = triton_attention.paged_attention(*arguments, **rules, max_seqlen_q=max(q for q, _ in lens))
    torch.testing.assert_close(got, paged_attention_reference(*arguments, **rules), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("block_size", [4, 16, 48])
def test_storage_types_and_block_sizes(dtype: torch.dtype, block_size: int) -> None:
    arguments = paged(MIXES[2], (8, 2, 32), block_size, dtype)
    got = triton_attention.paged_attention(*arguments, scale=0.2, max_seqlen_q=70)
    want = paged_attention_reference(*arguments, scale=0.2)
    torch.testing.assert_close(got, want, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lens", [[5], [64, 1, 0, 130], [16, 16, 16]])
@pytest.mark.parametrize("window", [None, 7])
def test_varlen_equals_the_oracle(lens: list[int], causal: bool, window: int | None) -> None:
    query, key, value = (torch.randn(sum(lens), heads, 24, device=DEVICE) for heads in (4, 2, 2))
    rules: dict[str, Any] = {"scale": 0.3, "causal": causal, "window": window}
    got = triton_attention.varlen_attention(query, key, value, starts(lens), **rules)
    want = varlen_attention_reference(query, key, value, starts(lens), **rules)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


def test_padded_keys_are_never_seen() -> None:
    lens, key_lens = [6, 6, 6], torch.tensor([6, 2, 0], dtype=torch.int32, device=DEVICE)
    query, key, value = (torch.randn(18, 2, 16, device=DEVICE) for _ in range(3))
    key[8:12] = value[8:12] = torch.nan
    got = triton_attention.varlen_attention(
        query, key, value, starts(lens), scale=0.25, causal=False, key_lens=key_lens
    )
    want = varlen_attention_reference(query, key, value, starts(lens), scale=0.25, causal=False, key_lens=key_lens)
    torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("form", ["flat", "heads", "strided"])
def test_written_slots(form: str) -> None:
    slots = torch.tensor([7, -1, 0, 21], device=DEVICE)
    rows = torch.randn(2, 4, 3, 20, device=DEVICE)
    key, value = rows if form == "heads" else rows.flatten(2)
    if form == "strided":
        key, value = rows.flatten(2).permute(1, 0, 2).contiguous().unbind(1)
    caches = [torch.zeros(2, 6, 4, 3, 20, device=DEVICE) for _ in range(2)]
    triton_attention.write_kv(key, value, caches[0], slots)
    write_kv_reference(key, value, caches[1], slots)
    assert torch.equal(*caches)

"""Every rule of attention, by every backend: against a dense softmax under a mask that is spelled out.

In all of these, what no row may see is NaN, and its blocks stand nowhere in the block table: a cache whose old blocks
were given back looks like that.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from sensorium.attention.backend import BACKENDS, AttentionBackend, AttentionSpec
from sensorium.kernels import AttentionRules
from tests.helpers.attention import LENS, RULES, SPANS, Lens, Spans, mask_of, paged_step, varlen_step

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}
DTYPES = list(TOLERANCE)
STEPS = list(zip(LENS, SPANS, strict=True))


@pytest.fixture(params=[name for name in BACKENDS if name != "triton"])
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    """Those that run on a CPU; Triton's are tested with the kernels."""
    found = BACKENDS[request.param]
    spec = AttentionSpec(num_heads=4, num_kv_heads=2, head_size=16, scale=1.0)
    reason = found.refusal(spec, "cpu", torch.float32)
    if reason is not None:
        pytest.skip(reason)
    return found


def supports(backend: AttentionBackend, rules: AttentionRules) -> bool:
    return backend.name != "torch_sdpa" or rules.softcap is None


def check(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, atol=TOLERANCE[want.dtype], rtol=TOLERANCE[want.dtype])


def check_paged(backend: AttentionBackend, lens: Lens, rules: AttentionRules, **options: Any) -> None:
    if supports(backend, rules):
        step = paged_step(lens, rules, **options)
        check(backend.paged(*step.arguments), step.expected)


def check_varlen(backend: AttentionBackend, lens: list[int], rules: AttentionRules, **options: Any) -> None:
    if supports(backend, rules):
        step = varlen_step(lens, rules, **options)
        check(backend.varlen(*step.arguments, **step.options), step.expected)


@pytest.mark.parametrize(("lens", "spans"), STEPS)
@pytest.mark.parametrize("has_spans", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_paged(
    backend: AttentionBackend, lens: Lens, spans: Spans, has_spans: bool, has_sinks: bool, rules: AttentionRules
) -> None:
    check_paged(backend, lens, rules, spans=spans if has_spans else None, has_sinks=has_sinks)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 48])
@pytest.mark.parametrize("rules", [RULES[0], RULES[3], RULES[6]])
def test_storage_types_and_block_sizes(
    backend: AttentionBackend, dtype: torch.dtype, block_size: int, rules: AttentionRules
) -> None:
    options: dict[str, Any] = {"dtype": dtype, "block_size": block_size, "spans": SPANS[3], "has_sinks": True}
    check_paged(backend, LENS[3], rules, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "head_size", "value_size", "values_in_keys"),
    [
        ((4, 4), 192, 128, False),
        ((16, 1), 576, 512, True),
        ((16, 1), 576, 512, False),
        ((6, 2), 80, 96, False),
        ((4, 2), 24, 7, False),
        ((3, 3), 5, 5, False),
        ((2, 2), 112, 112, False),
    ],
)
def test_head_and_value_sizes(
    backend: AttentionBackend,
    heads: tuple[int, int],
    head_size: int,
    value_size: int,
    values_in_keys: bool,
    dtype: torch.dtype,
) -> None:
    """Multi-head latent attention, expanded and absorbed, among others."""
    sizes: dict[str, Any] = {"heads": heads, "head_size": head_size, "value_size": value_size, "dtype": dtype}
    rules = AttentionRules(head_size**-0.5)
    for own in (rules, replace(rules, window=20)):
        check_paged(backend, [(1, 70), (9, 100)], own, values_in_keys=values_in_keys, block_size=16, **sizes)
    if not values_in_keys:
        check_varlen(backend, [70, 1, 9], rules, **sizes)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rules", [AttentionRules(0.25, causal=False), AttentionRules(0.25, causal=False, window=9)])
def test_cross_attention(backend: AttentionBackend, rules: AttentionRules, has_sinks: bool, dtype: torch.dtype) -> None:
    """Queries of a decoder over an item's rows, of which there may be fewer, more or none."""
    lens = [(1, 150), (5, 90), (1, 0), (40, 3), (0, 8), (7, 0), (1, 1)]
    check_paged(backend, lens, rules, has_sinks=has_sinks, dtype=dtype)


@pytest.mark.parametrize("has_spans", [False, True])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_varlen(backend: AttentionBackend, has_spans: bool, has_sinks: bool, rules: AttentionRules) -> None:
    spans: Spans = [[(3, 30), (30, 31)], [], [(0, 1)], [], [(50, 130)]]
    check_varlen(backend, [40, 0, 1, 70, 130], rules, spans=spans if has_spans else None, has_sinks=has_sinks)


@pytest.mark.parametrize("lens", [[5, 70, 1], [33, 33, 33]])
@pytest.mark.parametrize("has_sinks", [False, True])
@pytest.mark.parametrize("rules", RULES)
def test_both_ways(backend: AttentionBackend, lens: list[int], has_sinks: bool, rules: AttentionRules) -> None:
    """An encoder's, with windows and chunks that reach forward."""
    check_varlen(backend, lens, replace(rules, causal=False), has_sinks=has_sinks)
    if rules.window is None and rules.chunk is None:
        key_lens = [n // 3 for n in lens]
        check_varlen(backend, lens, replace(rules, causal=False), has_sinks=has_sinks, key_lens=key_lens)


def test_a_sink_of_minus_infinity_is_none(backend: AttentionBackend) -> None:
    step = paged_step([(3, 9), (1, 80)], RULES[0])
    sinks = torch.full((4,), -torch.inf)
    check(backend.paged(*step.arguments[:-1], sinks), step.expected)


@pytest.mark.parametrize("window", [None, 5, 12])
def test_spans_are_those_of_hugging_face(window: int | None) -> None:
    """The mask that the tests spell out is the one of `transformers`, a window narrower than the span included."""
    from transformers import masking_utils as hf

    spans = [(3, 11), (11, 14)]
    groups = torch.full((1, 20), -1)
    for i, (begin, end) in enumerate(spans):
        groups[0, begin:end] = i
    base = hf.causal_mask_function if window is None else hf.sliding_window_causal_mask_function(window)
    rule = hf.or_masks(base, hf.blockwise_overlay(groups))
    at = torch.arange(20)
    want = rule(0, 0, at[:, None], at[None, :])
    assert torch.equal(mask_of(20, 20, AttentionRules(1.0, window=window), spans), want)


@pytest.mark.parametrize("size", [4, 7])
def test_chunks_are_those_of_hugging_face(size: int) -> None:
    from transformers import masking_utils as hf

    rule = hf.chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    at = torch.arange(20)
    want = rule(0, 0, at[:, None], at[None, :])
    assert torch.equal(mask_of(20, 20, AttentionRules(1.0, chunk=size), []), want)

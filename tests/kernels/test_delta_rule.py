"""The gated delta rule in chunks, step by step, and as Hugging Face has it, is one."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule

from sensorium.kernels.delta_rule import CHUNK, gated_delta_chunks, gated_delta_step

HEADS, KEY, VALUE = 3, 8, 5


def inputs(num_tokens: int, *, seed: int = 0, strength: float = 0.1) -> tuple[torch.Tensor, ...]:
    """Query, key, value, decay, rate and a state."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((num_tokens, HEADS, KEY), (num_tokens, HEADS, KEY), (num_tokens, HEADS, VALUE))
    query, key, value = (torch.randn(shape, generator=generator) for shape in shapes)
    decay = -strength * torch.rand(num_tokens, HEADS, generator=generator)
    rate = torch.rand(num_tokens, HEADS, generator=generator)
    return query, key, value, decay, rate, torch.randn(HEADS, KEY, VALUE, generator=generator)


def by_steps(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
    decay, rate, state = rest
    states, outs = state[None], []
    for t in range(len(query)):
        token = (each[t, None] for each in (query, key, value, decay, rate))
        out, states = gated_delta_step(*token, states)
        outs.append(out)
    return [torch.cat(outs), states[0]]


@pytest.mark.parametrize("num_tokens", [1, 2, 63, CHUNK, CHUNK + 1, 200])
@pytest.mark.parametrize("strength", [0.0, 0.1, 30.0])
def test_chunks_are_steps(num_tokens: int, strength: float) -> None:
    given = inputs(num_tokens, strength=strength)
    for got, expected in zip(gated_delta_chunks(*given), by_steps(*given), strict=True):
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 50, 130])
def test_both_are_hugging_faces(num_tokens: int) -> None:
    query, key, value, decay, rate, state = inputs(num_tokens)
    for reference in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        out, last = reference(
            *(each[None] for each in (query, key, value)),
            g=decay[None],
            beta=rate[None],
            initial_state=state[None],
            output_final_state=True,
            use_qk_l2norm_in_kernel=True,
        )
        given = (query, key, value, decay, rate, state)
        for got in (gated_delta_chunks(*given), by_steps(*given)):
            torch.testing.assert_close(got[0], out[0], atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(got[1], last[0], atol=1e-5, rtol=1e-5)


def test_a_sequence_may_be_cut_anywhere() -> None:
    *rows, state = inputs(150)
    whole, last = gated_delta_chunks(*rows, state)
    outs = []
    for begin, end in itertools.pairwise((0, 1, 17, 81, 150)):
        out, state = gated_delta_chunks(*(each[begin:end] for each in rows), state)
        outs.append(out)
    torch.testing.assert_close(torch.cat(outs), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, last, atol=1e-5, rtol=1e-5)


def test_narrow_rows_are_computed_in_float32() -> None:
    *rows, state = inputs(40)
    narrow = [each.bfloat16() for each in rows[:3]]
    out, last = gated_delta_chunks(*narrow, *rows[3:], state)
    exact, exact_last = gated_delta_chunks(*(each.float() for each in narrow), *rows[3:], state)
    assert (out.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(out, exact.bfloat16())
    assert torch.equal(last, exact_last)

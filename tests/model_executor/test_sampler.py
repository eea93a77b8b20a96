"""The sampler: equal to Hugging Face's logits processors, indifferent to the batch, and safe with broken rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sensorium.errors import ModelError
from sensorium.model_executor import sampling_ops
from sensorium.model_executor.layers.sampler import PromptLogprobs, Sampler, SamplerOutput, get_sampler
from sensorium.model_executor.logit_edits import LogitEdits
from sensorium.model_executor.sampling_metadata import DraftRows, SamplingMetadata, SamplingState
from sensorium.model_executor.token_counts import TokenCounts
from sensorium.model_executor.token_mask import TokenMask
from sensorium.sampling_params import SamplingParams, mix64
from sensorium.timestamps import TimestampRules

VOCAB = 61
EOS = 2
GREEDY = SamplingParams(temperature=0)


def _append(state: SamplingState, slot: int, token_ids: Sequence[int]) -> None:
    """These tokens were sampled in a slot, one after the other."""
    for token_id in token_ids:
        state.advance(np.array([slot]))
        state.append(np.array([slot]), np.array([token_id]))


def _logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _state(*params: SamplingParams, vocab_size: int = VOCAB, seed: int = 0) -> SamplingState:
    state = SamplingState(len(params), vocab_size, seed=seed)
    for slot, one in enumerate(params):
        state.add(slot, one, prompt_token_ids=[1, 2, 3], eos_token_ids=[EOS])
    return state


def _mask(allowed: dict[int, list[int]]) -> TokenMask:
    """A mask of the rows that are keys, which allows the tokens that are their values."""
    bits = np.zeros((len(allowed), 32 * -(-VOCAB // 32)), dtype=np.uint8)
    for i, token_ids in enumerate(allowed.values()):
        bits[i, token_ids] = 1
    return TokenMask(np.array(list(allowed)), np.packbits(bits, axis=1, bitorder="little").view(np.int32))


def _sample(logits: torch.Tensor, state: SamplingState, slots: Any = None, **kwargs: Any) -> SamplerOutput:
    slots = np.arange(len(logits)) if slots is None else np.asarray(slots)
    return Sampler().sample(logits, state, slots, **kwargs)


def _warpers(params: SamplingParams) -> LogitsProcessorList:
    processors = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        processors.append(TopKLogitsWarper(params.top_k))
    if params.min_p:
        processors.append(MinPLogitsWarper(params.min_p))
    if params.top_p < 1:
        processors.append(TopPLogitsWarper(params.top_p))
    return processors


def _draws(logits: torch.Tensor, params: SamplingParams, count: int, seed: int = 0) -> torch.Tensor:
    """`count` draws from one row of logits, as rows of one batch with keys of their own."""
    state = SamplingState(count, logits.shape[0], seed=seed)
    for slot in range(count):
        state.add(slot, params, [])
    return _sample(logits.expand(count, -1).clone(), state).sampled_token_ids


# --- Greedy rows, and rows that can't be sampled ---


def test_greedy_takes_the_best_token() -> None:
    logits = _logits(5, VOCAB)
    output = _sample(logits, _state(*[GREEDY] * 5))
    assert output.sampled_token_ids.tolist() == logits.argmax(-1).tolist()
    assert list(output) == logits.argmax(-1).tolist()
    assert output.failed_rows == frozenset()
    assert output.logprobs is None


def test_slots_that_nobody_filled_are_greedy() -> None:
    logits = _logits(3, VOCAB)
    assert list(_sample(logits, SamplingState(3, VOCAB))) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(temperature=0, repetition_penalty=1.1),
        SamplingParams(),
        SamplingParams(top_k=5, top_p=0.9),
        SamplingParams(top_p=0.9, logprobs=3),
        SamplingParams(min_p=0.1),
    ],
    ids=["greedy", "penalty", "plain", "top_k", "top_p", "min_p"],
)
@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_a_broken_row_fails_alone(params: SamplingParams, bad: float) -> None:
    clean = _logits(4, VOCAB)
    expected = _sample(clean.clone(), _state(*[params] * 4)).sampled_token_ids
    broken = clean.clone()
    broken[1, 40] = bad
    broken[3] = -math.inf
    output = _sample(broken, _state(*[params] * 4))
    assert output.failed_rows == {1, 3}
    assert output.sampled_token_ids[[0, 2]].tolist() == expected[[0, 2]].tolist()
    assert all(0 <= token_id < VOCAB for token_id in output)
    output.logprobs  # reporting must survive the broken rows too


def test_forbidding_every_token_fails_the_row() -> None:
    params = SamplingParams(temperature=0, bad_words_token_ids=[[i] for i in range(VOCAB)])
    assert _sample(_logits(2, VOCAB), _state(params, GREEDY)).failed_rows == {0}


def test_logits_of_another_width_are_a_fault_of_the_model() -> None:
    with pytest.raises(ModelError, match="width 60"):
        _sample(_logits(1, 60), _state(GREEDY))


@pytest.mark.parametrize(
    "params", [GREEDY, SamplingParams(temperature=0, logit_bias={3: 100.0}), SamplingParams(seed=1)]
)
def test_padded_and_half_precision_logits(params: SamplingParams) -> None:
    """Heads are padded to round sizes; cutting the padding off leaves rows that aren't contiguous."""
    padded = _logits(3, VOCAB + 3).bfloat16()
    rows = padded[:, :VOCAB]
    assert not rows.is_contiguous()
    expected = _sample(rows.float().contiguous(), _state(*[params] * 3))
    assert list(_sample(rows, _state(*[params] * 3))) == list(expected)


def test_models_of_v0_call_the_sampler_with_metadata() -> None:
    logits = _logits(2, VOCAB)
    metadata = SamplingMetadata(2, state=_state(GREEDY, GREEDY), slots=np.arange(2))
    assert list(get_sampler()(logits, metadata)) == logits.argmax(-1).tolist()


# --- Equal to Hugging Face's processors ---

TRUNCATIONS = [
    SamplingParams(temperature=0.7, top_k=1),
    SamplingParams(temperature=0.7, top_k=7),
    SamplingParams(top_k=VOCAB + 5),
    SamplingParams(top_p=0.5),
    SamplingParams(top_p=0.9, temperature=2.0),
    SamplingParams(top_p=1e-9),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=1.0),
    SamplingParams(top_k=10, top_p=0.8, temperature=1.3),
    SamplingParams(top_k=20, min_p=0.05, top_p=0.7),
    SamplingParams(min_p=0.02, top_p=0.95, temperature=1.5),
]


@pytest.mark.parametrize("params", TRUNCATIONS, ids=lambda p: f"T{p.temperature}-k{p.top_k}-p{p.top_p}-m{p.min_p}")
def test_the_same_tokens_stay_as_in_hugging_face(params: SamplingParams) -> None:
    """Every token that Hugging Face keeps is drawn from a flat row, and no other."""
    logits = _logits(VOCAB, seed=3, scale=0.7)
    kept = torch.isfinite(_warpers(params)(torch.zeros(1, 1, dtype=torch.long), logits[None]))[0]
    drawn = torch.bincount(_draws(logits, params, 6000), minlength=VOCAB) > 0
    assert drawn.nonzero().flatten().tolist() == kept.nonzero().flatten().tolist()


@settings(max_examples=80)
@given(
    seed=st.integers(0, 2**16),
    scale=st.sampled_from([0.2, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 50, 300, 700]),
    top_p=st.sampled_from([1.0, 0.99, 0.9, 0.5, 0.01]),
    min_p=st.sampled_from([0.0, 0.001, 0.1]),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
)
def test_truncation_equals_hugging_face(
    seed: int, scale: float, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    vocab_size = 600
    params = SamplingParams(top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature)
    logits = _logits(1, vocab_size, seed=seed, scale=scale)
    expected = _warpers(params)(torch.zeros(1, 1, dtype=torch.long), logits)
    values, ids = logits.sort(descending=True)
    row = _row_params(params, vocab_size)
    scores, is_complete = sampling_ops.truncated(values, logits, row)
    assert is_complete.all()
    ours = torch.full_like(logits, -math.inf).scatter_(1, ids, scores)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    few, is_complete = sampling_ops.truncated(values[:, :256], logits, row)
    if is_complete.all():
        torch.testing.assert_close(few, scores[:, :256])
        assert torch.isneginf(scores[:, 256:]).all()
    else:
        assert not torch.isneginf(scores[:, 255:]).all() or 256 < params.top_k < vocab_size


@pytest.mark.parametrize(
    "params",
    [SamplingParams(top_p=0.97), SamplingParams(min_p=0.62), SamplingParams(top_k=290), SamplingParams(top_k=299)],
    ids=["top_p", "min_p", "top_k", "more_top_k"],
)
def test_the_same_tokens_stay_in_rows_too_flat_for_the_candidates(
    params: SamplingParams, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_ops, "MAX_NARROW_TOP_K", 100)
    logits = torch.linspace(0.5, 0.0, 300)[torch.randperm(300, generator=torch.Generator().manual_seed(1))]
    kept = torch.isfinite(_warpers(params)(torch.zeros(1, 1, dtype=torch.long), logits[None]))[0]
    assert sampling_ops.NUM_CANDIDATES < kept.sum() < 300
    drawn = torch.bincount(_draws(logits, params, 4000), minlength=300) > 0
    assert torch.equal(drawn, kept)


def test_the_two_steps_of_a_draw_are_independent() -> None:
    """If groups shared random numbers with tokens, a token of its group's number would come twice as often."""
    counts = torch.bincount(_draws(torch.zeros(512), SamplingParams(), 20_000), minlength=512).double()
    expected = 20_000 / 512
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_positions_of_a_request_have_randomness_of_their_own() -> None:
    state, tokens = _state(SamplingParams(seed=3), vocab_size=1000), list[int]()
    for _ in range(10):
        tokens += _sample(torch.zeros(1, 1000), state)
        _append(state, 0, tokens[-1:])
    assert len(set(tokens)) > 7


def _row_params(params: SamplingParams, vocab_size: int) -> sampling_ops.RowParams:
    state = SamplingState(1, vocab_size)
    state.add(0, params, [])
    return sampling_ops.RowParams(state.temperature, state.top_k, state.top_p, state.min_p, state.key, state.num_output)


@pytest.mark.parametrize(
    ("params", "scale"),
    [
        (SamplingParams(temperature=1.2), 2.0),
        (SamplingParams(top_k=40), 2.0),
        (SamplingParams(top_p=0.9), 4.0),
        (SamplingParams(top_p=0.97), 0.3),
        (SamplingParams(top_k=600, top_p=0.95), 0.5),
        (SamplingParams(min_p=0.3), 0.3),
    ],
    ids=["all", "top_k", "top_p_few", "top_p_many", "large_top_k", "min_p_many"],
)
def test_draws_follow_the_distribution(params: SamplingParams, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chi-square of 10,000 draws against Hugging Face's probabilities, on every path that a row can take."""
    monkeypatch.setattr(sampling_ops, "MAX_NARROW_TOP_K", 100)
    vocab_size, count = 700, 10_000
    logits = _logits(vocab_size, seed=11, scale=scale)
    probs = _warpers(params)(torch.zeros(1, 1, dtype=torch.long), logits[None])[0].softmax(-1).double()
    drawn = torch.cat([_draws(logits, params, 500, seed=i) for i in range(count // 500)])
    observed = torch.bincount(drawn, minlength=vocab_size).double()
    assert observed[probs == 0].sum() == 0
    order = probs.argsort(descending=True)
    # Bins of neighbours in the order of probability, each expecting at least 20 draws.
    bins = ((probs[order] * count).cumsum(0) / 20).floor().clamp_(max=count // 20 - 1).long()
    expected = torch.zeros(count // 20, dtype=torch.double).index_add_(0, bins, probs[order] * count)
    found = torch.zeros(count // 20, dtype=torch.double).index_add_(0, bins, observed[order])
    used = expected > 5
    chi_square = ((found - expected)[used] ** 2 / expected[used]).sum().item()
    freedom = int(used.sum()) - 1
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom)


def _edited(logits: torch.Tensor, state: SamplingState) -> torch.Tensor:
    edited = logits.clone()
    edits = state.edits(np.arange(len(logits)))
    assert edits is not None
    edits.apply_(edited)
    return edited


@settings(max_examples=40)
@given(
    prompt=st.lists(st.integers(-3, VOCAB + 4), max_size=30),
    output=st.lists(st.integers(0, VOCAB - 1), max_size=200),
    penalty=st.sampled_from([0.5, 1.05, 1.9]),
    penalises_more=st.booleans(),
)
def test_penalties_equal_their_definition(
    prompt: list[int], output: list[int], penalty: float, penalises_more: bool
) -> None:
    """Placeholders of media outside the vocabulary are no tokens that a penalty could act on."""
    frequency, presence = (0.7, -0.3) if penalises_more else (0.0, 0.0)
    params = SamplingParams(repetition_penalty=penalty, frequency_penalty=frequency, presence_penalty=presence)
    state = SamplingState(2, VOCAB)
    state.add(0, GREEDY, prompt)
    state.add(1, params, prompt, output[:5])
    _append(state, 1, output[5:])
    logits = _logits(2, VOCAB)
    edited = _edited(logits, state)
    assert torch.equal(edited[0], logits[0])

    ids = torch.tensor([[i for i in prompt if 0 <= i < VOCAB] + output], dtype=torch.long)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits[1:].clone())[0]
    counts = torch.bincount(torch.tensor(output, dtype=torch.long), minlength=VOCAB)
    expected = expected - frequency * counts - presence * (counts > 0)
    torch.testing.assert_close(edited[1], expected)


def test_presence_and_frequency_penalties_leave_the_prompt_alone() -> None:
    state = SamplingState(1, VOCAB)
    state.add(0, SamplingParams(presence_penalty=1.0), prompt_token_ids=[4, 5])
    _append(state, 0, [6])
    logits = _logits(1, VOCAB)
    assert (_edited(logits, state) != logits).nonzero()[:, 1].tolist() == [6]


def test_logit_bias_equals_hugging_face() -> None:
    bias = {0: 1.5, 7: -100.0, VOCAB - 1: 3.0}
    logits = _logits(1, VOCAB)
    processor = SequenceBiasLogitsProcessor({(token_id,): value for token_id, value in bias.items()})
    expected = processor(torch.tensor([[1]]), logits)
    torch.testing.assert_close(_edited(logits, _state(SamplingParams(logit_bias=bias))), expected)


@settings(max_examples=60)
@given(
    words=st.lists(st.lists(st.integers(3, 6), min_size=1, max_size=4), min_size=1, max_size=6),
    prompt=st.lists(st.integers(3, 6), min_size=1, max_size=6),
    output=st.lists(st.integers(3, 6), max_size=8),
)
def test_bad_words_equal_hugging_face(words: list[list[int]], prompt: list[int], output: list[int]) -> None:
    state = SamplingState(1, VOCAB)
    half = len(output) // 2
    state.add(0, SamplingParams(bad_words_token_ids=words), prompt, output[:half])
    for token_id in output[half:]:
        _append(state, 0, [token_id])
    logits = _logits(1, VOCAB)
    expected = NoBadWordsLogitsProcessor(words)(torch.tensor([prompt + output]), logits.clone())
    assert torch.equal(_edited(logits, state), expected)


def test_min_tokens_equals_hugging_face() -> None:
    params = SamplingParams(min_tokens=3, stop_token_ids=[9], temperature=0)
    state = _state(params)
    logits = _logits(1, VOCAB)
    processor = MinNewTokensLengthLogitsProcessor(3, 3, [EOS, 9], device="cpu")
    for num_output in range(3):
        expected = processor(torch.ones(1, 3 + num_output, dtype=torch.long), logits)
        assert torch.equal(_edited(logits, state), expected)
        _append(state, 0, [1])
    assert state.edits(np.arange(1)) is None
    assert state.is_plain[0]  # from here on an argmax is all again


def test_min_tokens_bans_only_what_would_end_the_output() -> None:
    state = _state(SamplingParams(min_tokens=3, ignore_eos=True, stop_token_ids=[9]))
    assert torch.isneginf(_edited(_logits(1, VOCAB), state)[0]).nonzero().flatten().tolist() == [9]


def test_the_mask_wins_over_a_bias() -> None:
    state = _state(SamplingParams(temperature=0, logit_bias={5: 100.0}), SamplingParams(seed=1))
    assert set(_sample(_logits(2, VOCAB), state, token_mask=_mask({0: [4, 8], 1: [4, 8]}))) <= {4, 8}
    assert _sample(_logits(1, VOCAB), _state(GREEDY), token_mask=_mask({0: [4, 8]}))[0] in (4, 8)


def test_a_mask_leaves_other_rows_alone() -> None:
    logits = _logits(3, VOCAB)
    state = _state(GREEDY, GREEDY, GREEDY)
    free = list(_sample(logits.clone(), state))
    masked = list(_sample(logits.clone(), state, token_mask=_mask({1: [3]})))
    assert masked == [free[0], 3, free[2]]


def test_log_probabilities_are_those_before_the_mask() -> None:
    logits = _logits(1, VOCAB)
    state = _state(SamplingParams(temperature=0, logprobs=2))
    output = _sample(logits.clone(), state, token_mask=_mask({0: [6]}))
    assert output.logprobs is not None
    assert output.logprobs[0] is not None
    assert output.logprobs[0].token_id == 6
    assert output.logprobs[0].logprob == pytest.approx(float(logits[0].log_softmax(-1)[6]), abs=1e-5)
    assert output.logprobs[0].top_token_ids == tuple(logits[0].topk(2).indices.tolist())


def test_a_mask_that_allows_nothing_fails_its_row_only() -> None:
    output = _sample(_logits(2, VOCAB), _state(GREEDY, GREEDY), token_mask=_mask({0: []}))
    assert output.failed_rows == {0}


@given(st.integers(1, 200), st.integers(0, 2**32 - 1))
def test_masks_on_the_host_and_on_a_device_are_one(vocab_size: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    words = generator.integers(-(2**31), 2**31, size=(2, -(-vocab_size // 32)), dtype=np.int32)
    mask = TokenMask(np.array([0, 2]), words)
    logits = torch.from_numpy(generator.standard_normal((3, vocab_size), dtype=np.float32))
    expected = logits.clone()
    for row, bits in zip((0, 2), words, strict=True):
        for token_id in range(vocab_size):
            if not (int(bits[token_id // 32]) >> (token_id % 32)) & 1:
                expected[row, token_id] = -torch.inf
    on_host, as_on_device = logits.clone(), logits.clone()
    mask.apply_(on_host)
    mask.apply_on_device_(as_on_device)
    assert torch.equal(on_host, expected)
    assert torch.equal(as_on_device, expected)


# --- Randomness ---


def test_mix64_is_splitmix64() -> None:
    """First outputs of the reference generator from seed 0, and the tensor version against the scalar one."""
    increment = 0x9E3779B97F4A7C15
    outputs = [mix64(i * increment) % 2**64 for i in range(3)]
    assert outputs == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    values = [0, 1, -1, 2**63 - 1, -(2**63), 12345678901234567]
    assert sampling_ops.mix64(torch.tensor(values)).tolist() == [mix64(value) for value in values]


def test_gumbel_noise_has_the_moments_of_gumbel() -> None:
    params = _row_params(SamplingParams(seed=5), VOCAB)
    noise = sampling_ops.gumbel_noise(params, torch.arange(200_000))
    assert noise.isfinite().all()
    assert noise.mean().item() == pytest.approx(0.5772, abs=0.02)
    assert noise.var().item() == pytest.approx(math.pi**2 / 6, abs=0.03)


_ANY_PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.8, 1.0]),
    top_k=st.sampled_from([0, 4, 1200]),
    top_p=st.sampled_from([1.0, 0.9, 0.3]),
    min_p=st.sampled_from([0.0, 0.05]),
    repetition_penalty=st.sampled_from([1.0, 1.2]),
    presence_penalty=st.sampled_from([0.0, 0.5]),
    min_tokens=st.sampled_from([0, 3]),
    logprobs=st.sampled_from([None, 2]),
    bad_words_token_ids=st.sampled_from([(), ((3, 4), (5,))]),
    seed=st.integers(0, 100),
)


@settings(max_examples=25)
@given(params=st.lists(_ANY_PARAMS, min_size=1, max_size=6), order=st.randoms(use_true_random=False), data=st.data())
def test_tokens_depend_on_the_request_alone(params: list[SamplingParams], order: Any, data: Any) -> None:
    """Alone from start to end, or in any slot and any row beside others, preempted on the way: the same tokens.

    The vocabulary is large enough for all paths of the draw.
    """
    vocab_size, num_steps = 1500, 5
    tables = [_logits(num_steps, vocab_size, seed=i, scale=1.0 + i % 3) for i in range(len(params))]

    def alone(i: int) -> list[int]:
        state, tokens = SamplingState(1, vocab_size), list[int]()
        state.add(0, params[i], [7, 8, i], eos_token_ids=[EOS])
        for step in range(num_steps):
            tokens += _sample(tables[i][step : step + 1].clone(), state)
            _append(state, 0, tokens[-1:])
        return tokens

    state = SamplingState(16, vocab_size, seed=9)
    slots = order.sample(range(16), len(params))
    outputs: list[list[int]] = [[] for _ in params]
    for i, slot in enumerate(slots):
        state.add(slot, params[i], [7, 8, i], eos_token_ids=[EOS])
    while any(len(tokens) < num_steps for tokens in outputs):
        running = [i for i, tokens in enumerate(outputs) if len(tokens) < num_steps]
        running = data.draw(st.permutations(running))[: data.draw(st.integers(1, len(running)))]
        logits = torch.stack([tables[i][len(outputs[i])] for i in running])
        for i, token_id in zip(running, _sample(logits, state, [slots[i] for i in running]), strict=True):
            outputs[i].append(token_id)
            _append(state, slots[i], [token_id])
        if data.draw(st.booleans()):
            i = order.randrange(len(params))
            state.remove(slots[i])
            state.add(slots[i], params[i], [7, 8, i], outputs[i], eos_token_ids=[EOS])
    assert outputs == [alone(i) for i in range(len(params))]


def test_rounding_of_logits_does_not_change_a_seeded_draw() -> None:
    """Batch shapes change matrix products in their last bits; a seed must survive that.

    A search in cumulated probabilities would not: there an error adds up over thousands of bounds.
    """
    count, vocab_size = 2000, 3000
    logits = _logits(1, vocab_size, scale=0.5).expand(count, -1)
    state = SamplingState(count, vocab_size)
    for slot in range(count):
        state.add(slot, SamplingParams(seed=slot), [])
    exact = _sample(logits.clone(), state).sampled_token_ids
    noisy = _sample(logits * (1 + 1e-6 * _logits(count, vocab_size, seed=1, scale=1.0)), state).sampled_token_ids
    assert (exact != noisy).sum() <= 1


def test_requests_without_seed_differ_from_each_other_but_not_from_run_to_run() -> None:
    logits = torch.zeros(8, 1000)
    state = [_state(*[SamplingParams()] * 8, vocab_size=1000, seed=seed) for seed in (0, 0, 1)]
    first, again, other = (list(_sample(logits.clone(), one)) for one in state)
    assert len(set(first)) > 6
    assert first == again
    assert first != other


def test_outputs_of_one_request_differ_and_the_first_is_that_of_n_1() -> None:
    params = SamplingParams(n=3, seed=4)
    children = [params.for_output(i) for i in range(3)]
    logits = torch.zeros(4, 1000)
    tokens = list(_sample(logits, _state(*children, SamplingParams(seed=4), vocab_size=1000)))
    assert tokens[0] == tokens[3]
    assert len(set(tokens)) == 3


def test_a_removed_request_leaves_nothing_in_its_slot() -> None:
    """Neither where an argmax does for all rows, nor beside a row that needs more."""
    stale = SamplingParams(seed=1, logit_bias={3: 100.0}, logprobs=2, min_tokens=5)
    state = _state(stale, SamplingParams(temperature=0, logprobs=0))
    state.remove(0)
    state.remove(0)
    logits = torch.zeros(2, VOCAB)
    logits[:, 7] = 0.1
    for slots in ([0], [0, 1]):
        output = _sample(logits[: len(slots)].clone(), state, slots)
        assert set(output) == {7}
        assert output.logprobs is None or output.logprobs[0] is None


# --- Log probabilities ---


def test_logprobs_are_those_of_the_untouched_logits() -> None:
    """Each row reports as many alternatives as it asked for, whatever edits turned the choice elsewhere."""
    params = [
        SamplingParams(temperature=0, logprobs=3, logit_bias={50: 100.0}),
        GREEDY,
        SamplingParams(temperature=5.0, top_k=30, logprobs=0, seed=2),
        SamplingParams(temperature=0, logprobs=1, repetition_penalty=2.0),
    ]
    logits = _logits(4, VOCAB)
    output = _sample(logits.clone(), _state(*params))
    reports = output.logprobs
    assert reports is not None
    assert reports[1] is None
    assert output[0] == 50
    for row in (0, 2, 3):
        report, expected = reports[row], logits[row].log_softmax(-1)
        assert report is not None
        assert report.token_id == output[row]
        assert report.logprob == pytest.approx(expected[output[row]].item(), abs=1e-5)
        assert report.rank == int((expected > expected[output[row]]).sum()) + 1
        best = expected.topk(params[row].logprobs or 0)
        assert list(report.top_token_ids) == best.indices.tolist()
        assert list(report.top_logprobs) == pytest.approx(best.values.tolist(), abs=1e-5)


def test_logprobs_of_all_rows_survive_edits_in_place() -> None:
    params = SamplingParams(temperature=0, logprobs=1, logit_bias={50: 100.0})
    logits = _logits(2, VOCAB)
    reports = _sample(logits.clone(), _state(params, params)).logprobs
    assert reports is not None
    expected = logits.log_softmax(-1)[:, 50].tolist()
    assert [report.logprob for report in reports if report] == pytest.approx(expected, abs=1e-5)


def test_more_alternatives_than_tokens() -> None:
    reports = _sample(_logits(1, 5), _state(SamplingParams(temperature=0, logprobs=20), vocab_size=5)).logprobs
    assert reports is not None
    assert reports[0] is not None
    assert sorted(reports[0].top_token_ids) == [0, 1, 2, 3, 4]


def test_prompt_logprobs() -> None:
    """Ids outside the vocabulary, which stand where media goes, have no probability: rank 0."""
    token_ids = [*range(70), -3, VOCAB]
    token_ids[61:70] = [5] * 9
    logits = _logits(len(token_ids), VOCAB)
    sizes = list[int]()

    def few_rows(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows

    reports = PromptLogprobs(few_rows, logits, token_ids, 2).messages()
    assert sizes == [64, len(token_ids) - 64], "logits of a whole chunk were made at once"
    assert [report.token_id for report in reports] == token_ids
    expected = logits.log_softmax(-1)
    for i in range(70):
        assert reports[i].logprob == pytest.approx(expected[i, token_ids[i]].item(), abs=1e-5)
        assert list(reports[i].top_token_ids) == expected[i].topk(2).indices.tolist()
    assert [(report.rank, report.logprob) for report in reports[70:]] == [(0, -math.inf)] * 2


DRAFTED = [
    GREEDY,
    SamplingParams(temperature=1.0, seed=1, logprobs=2),
    SamplingParams(temperature=0.7, seed=2, top_p=0.9, presence_penalty=1.5, frequency_penalty=0.5),
    SamplingParams(temperature=0, repetition_penalty=1.8, min_tokens=4, logit_bias={EOS: 30.0}),
    SamplingParams(temperature=1.0, seed=3, top_k=9, bad_words_token_ids=[[4], [5, 6], [6, 5, 7]]),
    SamplingParams(temperature=1.0, seed=4, timestamps=TimestampRules(first_id=30, end_id=25, max_first=20)),
    SamplingParams(temperature=1.0, seed=5, allowed_token_ids=[7, 8, 9, 10], begin_suppress_tokens=[8]),
]


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_a_token_is_what_it_is_without_drafts(num_drafts: int) -> None:
    """Rows of a request behind drafts, beside those of others, give the tokens, reports and edits that they give one
    after the other; a draft that was wrong leaves no trace."""
    tables = [_logits(12, VOCAB, seed=i, scale=3.0) for i in range(len(DRAFTED))]
    alone, reports = list[list[int]](), list[list[Any]]()
    for params, table in zip(DRAFTED, tables, strict=True):
        state = _state(params)
        alone.append([])
        reports.append([])
        for row in table:
            output = _sample(row[None].clone(), state)
            alone[-1].append(output[0])
            reports[-1].append(output.logprobs and output.logprobs[0])
            _append(state, 0, [output[0]])

    rng, state = np.random.default_rng(0), _state(*DRAFTED)
    tokens: list[list[int]] = [[] for _ in DRAFTED]
    num_right = 0
    while any(len(each) < 12 for each in tokens):
        slots, offsets, ids, rows = list[int](), list[int](), list[int](), list[torch.Tensor]()
        for slot, done in enumerate(tokens):
            if len(done) == 12:
                continue
            right = alone[slot][len(done) : len(done) + int(rng.integers(0, num_drafts + 1))]
            drafts = [each if rng.random() < 0.8 else (each + 1) % VOCAB for each in right][: 11 - len(done)]
            for offset, token_id in enumerate([-1, *drafts]):
                slots.append(slot)
                offsets.append(offset)
                ids.append(token_id)
                rows.append(tables[slot][len(done) + offset])
        drafted = DraftRows(np.array(offsets), np.array(ids))
        output = _sample(torch.stack(rows), state, slots, drafts=drafted)
        accepted = drafted.accepted(output.token_ids, ())
        for row in np.flatnonzero(accepted).tolist():
            slot, position = slots[row], len(tokens[slots[row]])
            tokens[slot].append(output[row])
            num_right += offsets[row] > 0
            theirs, mine = reports[slot][position], output.logprobs and output.logprobs[row]
            if theirs is None:
                assert mine is None
            else:
                assert mine.rank == theirs.rank
                assert mine.top_token_ids == theirs.top_token_ids
            _append(state, slot, [output[row]])
    assert tokens == alone
    assert num_right > 5


@pytest.mark.parametrize("params", DRAFTED, ids=range(len(DRAFTED)))
def test_edits_behind_a_draft_leave_no_trace(params: SamplingParams) -> None:
    """What a draft appended would stay: the rules of times kept a list that the copy shared."""
    edits = LogitEdits(params, [1, 2, 3], [30, 4, 5], [EOS], VOCAB)

    def state_of(part: Any) -> Any:
        names = getattr(part, "__slots__", None) or getattr(part, "__dict__", ())
        if names and not isinstance(part, TimestampRules):
            return {name: state_of(getattr(part, name)) for name in names}
        return part.tolist() if isinstance(part, np.ndarray) else copy.deepcopy(part)

    before = str(state_of(edits))
    behind = edits.behind(6).behind(31)
    assert str(state_of(edits)) == before
    straight = LogitEdits(params, [1, 2, 3], [30, 4, 5, 6, 31], [EOS], VOCAB)
    assert str(state_of(behind)) == str(state_of(straight))


def test_tokens_count_up_to_the_first_wrong_guess() -> None:
    drafts = DraftRows(np.array([0, 1, 2, 0, 0, 1, 2, 3]), np.array([0, 5, 6, 0, 0, 7, 8, 9]))
    sampled = np.array([5, 6, 1, 3, 7, 2, 9, 4])
    assert drafts.num_rows.tolist() == [3, 1, 4]
    assert drafts.accepted(sampled, ()).tolist() == [True] * 3 + [True] + [True, True, False, False]
    sampled[5] = 8
    assert drafts.accepted(sampled, ()).tolist() == [True] * 8


def test_no_token_counts_from_a_row_on_that_has_none() -> None:
    """A row whose logits aren't numbers, or whose grammar is complete; the first of a request is its result."""
    drafts = DraftRows(np.array([0, 1, 2, 0, 1]), np.array([0, 5, 6, 0, 7]))
    sampled = np.array([5, 6, 1, 7, 7])
    assert drafts.accepted(sampled, {1}).tolist() == [True, False, False, True, True]
    assert drafts.accepted(sampled, {0, 3}).tolist() == [True, False, False, True, False]
    assert drafts.accepted(sampled, {2, 4}).tolist() == [True, True, False, True, False]


PENALISED = [
    SamplingParams(temperature=0, repetition_penalty=1.3),
    SamplingParams(temperature=0, frequency_penalty=0.4, presence_penalty=-0.1),
    SamplingParams(temperature=0),
    SamplingParams(temperature=1.5, seed=3, presence_penalty=1.1, logit_bias={4: 2.0}, logprobs=2),
    SamplingParams(temperature=0.7, seed=4, repetition_penalty=0.8, frequency_penalty=0.3, bad_words_token_ids=((5,),)),
    SamplingParams(temperature=0, repetition_penalty=2.0, min_tokens=9),
]


def test_penalties_by_counts_on_the_device_are_those_of_the_host() -> None:
    """Token by token, with rows in any order, a prompt with placeholders outside of the vocabulary, and a request that
    comes back after it was preempted. The counted ones needn't be told which tokens were sampled."""
    count = len(PENALISED)
    on_host = SamplingState(count, VOCAB)
    counted = SamplingState(count, VOCAB, token_counts=TokenCounts(count, VOCAB, torch.device("cpu")))
    prompt, outputs = [1, 2, 3, 3, VOCAB + 5], [list[int]() for _ in range(count)]
    for slot, params in enumerate(PENALISED):
        for state in (on_host, counted):
            state.add(slot, params, prompt, eos_token_ids=[EOS])
    needs_tokens = np.array([params.needs_sampled_tokens for params in PENALISED])
    order = np.random.default_rng(0)
    for step in range(40):
        slots = order.permutation(count)[: count - step % 3]
        logits = _logits(len(slots), VOCAB, seed=step)
        results = []
        for state in (on_host, counted):
            output = _sample(logits.clone(), state, slots)
            state.advance(slots)
            told = np.ones(len(slots), dtype=np.bool_) if state is on_host else needs_tokens[slots]
            state.append(slots[told], output.token_ids[told])
            results.append((output.token_ids.tolist(), output.logprobs))
        assert results[0] == results[1]
        for slot, token_id in zip(slots, results[0][0], strict=True):
            outputs[slot].append(token_id)
        if step == 20:
            for slot in (1, 5):
                for state in (on_host, counted):
                    state.remove(slot)
                    state.add(slot, PENALISED[slot], prompt, outputs[slot], eos_token_ids=[EOS])
    assert not counted.is_plain[[0, 1, 3, 4, 5]].any()
    assert counted.is_plain[2]
    for slot in range(count):
        counted.remove(slot)
    assert counted.is_plain.all()
    assert counted.penalties(np.arange(count)) is None

"""Drafts change no output: whatever is guessed, every request gets what it gets without guesses, in fewer steps."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from sensorium import LLMEngine, SamplingParams, StructuredOutputs
from sensorium.outputs import CompletionOutput
from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.device import TEST_DEVICE
from tests.helpers.graphs import HostReplay
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import Planned, Served, make_engine, quiet_engine, serve

NGRAM = {"method": "ngram", "num_speculative_tokens": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
FIELDS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "end of sequence": {"ignore_eos": False, "logit_bias": {2: 1.0}, "min_tokens": 5},
    "seeded": {"temperature": 1.0, "seed": 5},
    "top-k": {"temperature": 0.7, "seed": 6, "top_k": 20},
    "nucleus": {"temperature": 0.8, "seed": 7, "top_p": 0.8, "min_p": 0.01},
    "log probabilities": {"logprobs": 3, "prompt_logprobs": 1},
    "penalties": {"temperature": 0.5, "seed": 8, "presence_penalty": 0.8, "frequency_penalty": 0.3},
    "repetition": {"repetition_penalty": 1.2, "logprobs": 0},
    "bad words": {"bad_words_token_ids": [[70], [71, 72], [90], [100, 101]], "temperature": 0.3, "seed": 9},
    "two tokens": {"logit_bias": {80: 100.0, 81: 100.0}, "temperature": 1.0, "seed": 10},
    "stop token": {"logit_bias": {80: 90.0, 81: 88.0}, "temperature": 1.0, "seed": 11, "stop_token_ids": [81]},
    "stop string": {"logit_bias": {ord("a"): 1.0}, "stop": ["aa", "e", "ba"], "min_tokens": 6},
    "stop string, kept": {"temperature": 1.0, "seed": 12, "stop": ["o"], "include_stop_str_in_output": True},
    "JSON": {
        "temperature": 1.0,
        "seed": 13,
        "structured_outputs": StructuredOutputs(
            json={"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 5}
        ),
    },
    "expression": {"structured_outputs": StructuredOutputs(regex="[ab]{25}(c|dd)"), "ignore_eos": False},
    "held later": {
        "temperature": 1.0,
        "seed": 14,
        "logit_bias": {ord("."): 20.0},
        "structured_outputs": StructuredOutputs(choice=["yes, yes, yes", "no, no, no"], start_after="..."),
    },
}
"""What a request may ask of its tokens."""


class Knowing:
    """A drafter that has seen the output, and says it with a wrong token now and then."""

    def __init__(self, output: Sequence[int], num_prompt_tokens: int, vocab_size: int, rng: random.Random) -> None:
        self._output, self._num_prompt_tokens, self._vocab_size, self._rng = output, num_prompt_tokens, vocab_size, rng

    def propose(self, token_ids: Sequence[int]) -> list[int]:
        begin = len(token_ids) - self._num_prompt_tokens
        drafts = list(self._output[begin : begin + self._rng.randint(0, 4)])
        return [each if self._rng.random() < 0.8 else self._rng.randrange(self._vocab_size) for each in drafts]


def knowing(engine: LLMEngine, expected: dict[str, CompletionOutput]) -> None:
    """Let the engine's requests have drafters that know what they get."""
    rng, vocab_size = random.Random(1), engine.config.model_config.vocab_size
    engine.core.scheduler._make_drafter = lambda request: Knowing(
        expected[request.request_id].token_ids, len(request.prompt_token_ids), vocab_size, rng
    )


def outputs(served: Served) -> dict[str, CompletionOutput]:
    return {name: each.outputs[0] for name, each in served.outputs.items()}


def check(got: Served, plan: list[Planned], expected: dict[str, CompletionOutput]) -> None:
    assert {each.request_id for each in plan if each.abort_step is None} <= got.outputs.keys()
    for name, each in outputs(got).items():
        assert got.outputs[name].error is None
        assert each.token_ids == expected[name].token_ids, name
        assert (each.text, each.finish_reason, each.stop_reason) == (
            expected[name].text,
            expected[name].finish_reason,
            expected[name].stop_reason,
        ), name
        assert (each.logprobs is None) == (expected[name].logprobs is None)
        for mine, theirs in zip(each.logprobs or (), expected[name].logprobs or (), strict=True):
            assert mine.keys() == theirs.keys()
            for token_id, entry in mine.items():
                assert entry.logprob == pytest.approx(theirs[token_id].logprob, abs=1e-4)
                assert entry.rank == theirs[token_id].rank


@cache
def plan_and_reference(family: str) -> tuple[list[Planned], dict[str, CompletionOutput]]:
    """Prompts with media, each with one kind of sampling, and what they get from an engine that guesses nothing."""
    plan = random_plan(family, 2 * len(FIELDS), random.Random(family), spread=25, aborts=0.1, max_tokens=45)
    plan = [
        replace(
            each,
            params=replace(each.params, max_tokens=8 + (each.params.max_tokens or 0), **fields),
            request_id=f"{each.request_id} {name}",
        )
        for each, (name, fields) in zip(plan, [*FIELDS.items()] * 2, strict=True)
    ]
    engine = quiet_engine(make_checkpoint(family), limit_mm_per_prompt=limits(family))
    alone = {
        name: output
        for each in plan
        for name, output in outputs(serve(engine, [replace(each, abort_step=None)])).items()
    }
    engine.shutdown()
    return plan, alone


SETTINGS: dict[str, dict[str, Any]] = {
    "chunks, small pool": {"max_num_batched_tokens": 40, "num_blocks": 40, "scheduling_policy": "priority"},
    "steps in flight, passes replayed": {"max_steps_in_flight": 3, "num_blocks": 64},
}


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("family", ["qwen2_vl", "gemma3"])
def test_outputs_are_those_without_drafts(family: str, settings: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside each other, in chunks, preempted, aborted, with cached prefixes; once by a drafter that is often right,
    and once by looking into the prompt."""
    plan, expected = plan_and_reference(family)
    if "replayed" in settings and TEST_DEVICE == "cpu":
        monkeypatch.setattr(Worker, "_graph_capture", lambda worker: HostReplay())
    engine = make_engine(
        make_checkpoint(family),
        limit_mm_per_prompt=limits(family),
        block_size=8,
        speculative_config=NGRAM,
        **SETTINGS[settings],
    )
    check(serve(engine, plan), plan, expected)
    looked_up = engine.core.stats()
    assert looked_up.num_draft_tokens > 50
    knowing(engine, expected)
    check(serve(engine, plan), plan, expected)
    stats = engine.core.stats()
    assert stats.num_accepted_tokens - looked_up.num_accepted_tokens > 200
    assert stats.num_preemptions > 0 or "small" not in settings
    engine.step()
    engine.core.scheduler.check_idle()
    engine.shutdown()

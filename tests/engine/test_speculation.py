"""Drafts change no output: whatever is guessed, every request gets what it gets without guesses, in fewer steps."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

from sensorium import EngineArgs, LLMEngine, SamplingParams, StructuredOutputs
from sensorium.config import SpeculativeConfig
from sensorium.errors import ConfigError
from sensorium.outputs import CompletionOutput
from sensorium.pooling_params import PoolingParams
from sensorium.scheduler.drafting import PromptLookup
from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import VOCAB_SIZE, make_checkpoint
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


KINDS: dict[str, dict[str, Any]] = {
    "whisper": {},
    "gpt_oss": {},
    "llava": {"mm_split": "off"},
    "qwen3": {"model_impl": "transformers"},
    "qwen3_5": {},
}
"""Rows of an encoder in a cache of their own; experts, sinks and windows; items within `forward`; modules of
transformers over a flat batch; and states, which get no drafts."""


@pytest.mark.parametrize("family", KINDS)
def test_every_kind_of_model_checks_drafts(family: str) -> None:
    options = {"limit_mm_per_prompt": limits(family)} if limits(family) else {}
    plan = random_plan(family, 8, random.Random(family), spread=4, aborts=0, max_tokens=16)
    plan = [replace(each, params=replace(each.params, max_tokens=16)) for each in plan]
    engine = make_engine(make_checkpoint(family), block_size=8, speculative_config=NGRAM, **options, **KINDS[family])
    make_drafter, engine.core.scheduler._make_drafter = engine.core.scheduler._make_drafter, None
    expected = {name: each for request in plan for name, each in outputs(serve(engine, [request])).items()}
    assert engine.core.stats().num_draft_tokens == 0
    keeps_state = family == "qwen3_5"
    assert (make_drafter is None) == keeps_state
    assert any(
        line.startswith("drafts: none: " if keeps_state else "drafts: up to 4") for line in engine.report.lines()
    )
    if keeps_state:
        return
    knowing(engine, expected)
    check(serve(engine, plan), plan, expected)
    assert engine.core.stats().num_accepted_tokens > 30
    engine.shutdown()


@pytest.fixture(scope="module")
def small() -> Iterator[tuple[LLMEngine, list[Planned], dict[str, CompletionOutput]]]:
    """An engine whose requests have drafters that know what they get, and what that is."""
    engine = make_engine(make_checkpoint("llama"), block_size=8, speculative_config=NGRAM)
    plan = [Planned(f"{i}", "say " * i + "hello", GREEDY, arrival_step=i) for i in range(4)]
    reference = quiet_engine(make_checkpoint("llama"))
    expected = outputs(serve(reference, plan))
    reference.shutdown()
    knowing(engine, expected)
    yield engine, plan, expected
    engine.shutdown()


def test_no_guess_makes_a_request_fail(
    small: tuple[LLMEngine, list[Planned], dict[str, CompletionOutput]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass that raises is repeated request by request, and where there were drafts, without them."""
    engine, plan, expected = small
    said = {token_id for each in expected.values() for token_id in each.token_ids}
    breaking = next(i for i in range(20, 300) if i not in said)
    driver = engine.core.executor.worker.runner.passes._driver  # type: ignore[attr-defined]
    forward, num_failed = driver.forward, 0

    def fails_on_a_guess(inputs: Any) -> Any:
        nonlocal num_failed
        if breaking in inputs.input_ids:
            num_failed += 1
            raise RuntimeError("this token breaks the model")
        return forward(inputs)

    monkeypatch.setattr(driver, "forward", fails_on_a_guess)
    monkeypatch.setattr(Knowing, "propose", lambda drafter, token_ids: [*[1] * (len(token_ids) % 2), breaking])
    check(serve(engine, plan), plan, expected)
    assert num_failed > 8
    engine.step()
    engine.core.scheduler.check_idle()


def test_aborts_while_drafts_are_in_flight(
    small: tuple[LLMEngine, list[Planned], dict[str, CompletionOutput]],
) -> None:
    engine, plan, expected = small
    core = engine.core
    for each in plan:
        engine.add_request(each.request_id, each.prompt, each.params)
    while not any(chunk.draft_token_ids for step, _ in core._in_flight for chunk in step.chunks):
        while core._in_flight:
            core._collect()
        core._submit()
    engine.abort_request("1")
    engine.abort_request("2")
    core.scheduler.check()
    while engine.has_unfinished_requests():
        engine.step()
    engine.step()
    core.scheduler.check_idle()
    check(serve(engine, plan), plan, expected)


def test_outputs_of_one_prompt_and_vectors_beside_them(
    small: tuple[LLMEngine, list[Planned], dict[str, CompletionOutput]],
) -> None:
    engine, _, _ = small
    engine.core.scheduler._make_drafter = lambda _: PromptLookup(SpeculativeConfig(), VOCAB_SIZE)
    params = replace(GREEDY, n=3, temperature=0.4, seed=3)
    quiet = quiet_engine(make_checkpoint("llama"), max_num_seqs=3)
    [alone] = serve(quiet, [Planned("a", "one two one two one", params)]).outputs.values()
    engine.add_processed(engine.preprocess("vector", "one two one two one", SamplingParams(), pooling=PoolingParams()))
    engine.add_request("a", "one two one two one", params)
    found = {}
    while engine.has_unfinished_requests():
        found |= {each.request_id: each for each in engine.step() if each.finished}
    assert [each.token_ids for each in found["a"].outputs] == [each.token_ids for each in alone.outputs]
    assert found["vector"].error is None
    quiet.shutdown()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"method": "eagle"},
            r"speculative_config\['method'\]: got 'eagle', expected 'ngram'. Set .*--speculative-con",
        ),
        ({"num_speculative_tokens": 0}, r"\['num_speculative_tokens'\]: got 0, expected 1 to 64"),
        ({"num_speculative_tokens": "4"}, r"\['num_speculative_tokens'\]: got '4', expected a whole number"),
        ({"prompt_lookup_min": 5}, r"\['prompt_lookup_min'\]: got 5, expected at most prompt_lookup_max \(4\)"),
        ({"model": "draft"}, r"\['model'\]: got 'draft', expected one of method, num_speculative_tokens, prompt_"),
        ("ngram", "speculative_config: got 'ngram', expected a mapping"),
    ],
)
def test_settings_that_mean_nothing_are_refused(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        EngineArgs("demo", speculative_config=given).create_engine_config()

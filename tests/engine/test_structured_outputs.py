"""Structured outputs through the whole engine: held to, whatever stands beside them and whatever happens to them."""

from __future__ import annotations

import asyncio
import json
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from sensorium import LLM, LLMEngine, SamplingParams, StructuredOutputs
from sensorium.engine.args import EngineArgs
from sensorium.errors import InvalidRequestError, RequestAbortedError, RequestError, UnsupportedFeatureError
from tests.engine.async_helpers import last, running, settled
from tests.grammar.schemas import check, random_object_schema
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture

SETTINGS: dict[str, Any] = {"device": "cpu", "num_blocks": 512, "max_num_seqs": 16, "max_model_len": 1024}
ENDLESS = {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 30)]}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2")


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> Iterator[LLM]:
    llm = LLM(str(checkpoint), **SETTINGS)
    yield llm
    llm.shutdown()


def held(form: dict[str, Any] | StructuredOutputs, **fields: Any) -> SamplingParams:
    structured = form if isinstance(form, StructuredOutputs) else StructuredOutputs(json=form)
    return SamplingParams(**{"max_tokens": 300, "temperature": 1.0, "structured_outputs": structured, **fields})


def free(i: int) -> SamplingParams:
    return SamplingParams(max_tokens=20 + i % 9, temperature=0.7 * (i % 2), seed=i, ignore_eos=True)


def test_random_schemas_hold_and_free_requests_beside_them_do_not_notice(llm: LLM) -> None:
    rng = random.Random(11)
    schemas = [random_object_schema(rng) for _ in range(40)]
    prompts = [f"Prompt number {i}" for i in range(12)]
    quiet = llm.generate(prompts, [free(i) for i in range(12)])
    jobs: list[tuple[str, SamplingParams, Any]] = [
        (f"Schema {i}", held(schema, seed=i, temperature=float(i % 3)), schema) for i, schema in enumerate(schemas)
    ]
    jobs += [(prompt, free(i), None) for i, prompt in enumerate(prompts)]
    rng.shuffle(jobs)
    outputs = llm.generate([job[0] for job in jobs], [job[1] for job in jobs])
    num_ended = 0
    for output, (_, _, schema) in zip(outputs, jobs, strict=True):
        (each,) = output.outputs
        if schema is not None and each.finish_reason == "stop":
            num_ended += 1
            check(each.text, schema)
    assert num_ended >= 38
    texts = {prompt: output.outputs[0].token_ids for (prompt, _, _), output in zip(jobs, outputs, strict=True)}
    assert [texts[prompt] for prompt in prompts] == [each.outputs[0].token_ids for each in quiet]


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choice": ["north", "south", "nowhere"]}, "north|south|nowhere"),
        ({"regex": "[a-z]{3}-[0-9]{2}"}, "[a-z]{3}-[0-9]{2}"),
        ({"grammar": 'start: "<" %json {"enum": [1, 22]} ">"'}, "<(1|22)>"),
    ],
)
def test_every_form_ends_by_itself(llm: LLM, form: dict[str, Any], pattern: str) -> None:
    for fields in ({}, {"ignore_eos": True}, {"min_tokens": 50}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}):
        (output,) = llm.generate("Go", held(StructuredOutputs(**form), **fields))[0].outputs
        assert re.fullmatch(pattern, output.text)
        assert output.finish_reason == "stop"
        assert output.stop_reason is None


def test_a_json_object_is_one(llm: LLM) -> None:
    outputs = llm.generate(["a", "b", "c"], held(StructuredOutputs(json_object=True), max_tokens=900, seed=3))
    for each in outputs:
        if each.outputs[0].finish_reason == "stop":
            assert isinstance(json.loads(each.outputs[0].text), dict)
        assert each.outputs[0].text.startswith("{")


def test_n_outputs_each_hold(llm: LLM) -> None:
    outputs = llm.generate("Go", held(PERSON, n=4, seed=5))[0].outputs
    assert len({each.text for each in outputs}) > 1
    for each in outputs:
        jsonschema.validate(json.loads(each.text), PERSON)


def test_bans_and_biases_work_within_the_form(llm: LLM) -> None:
    tokenizer = llm.get_tokenizer()
    a, b = (tokenizer.convert_tokens_to_ids(char) for char in "ab")
    form = StructuredOutputs(regex="[abc]{12}")
    (output,) = llm.generate("Go", held(form, logit_bias={a: 100.0}))[0].outputs
    assert output.text == "a" * 12
    (output,) = llm.generate("Go", held(form, bad_words_token_ids=[[a]], logit_bias={b: -100.0}))[0].outputs
    assert output.text == "c" * 12
    (output,) = llm.generate("Go", held(form, repetition_penalty=50.0, temperature=0.0))[0].outputs
    assert set(output.text) == set("abc")


def test_a_form_that_a_ban_leaves_nothing_of_is_a_clear_error(llm: LLM) -> None:
    a = llm.get_tokenizer().convert_tokens_to_ids("a")
    with pytest.raises(RequestError, match="got one that allows no token that bad_words") as error:
        llm.generate("Go", held(StructuredOutputs(regex="ab"), bad_words_token_ids=[[a]]))
    assert error.value.status == 400


def test_log_probabilities_are_the_models_own(llm: LLM) -> None:
    form = StructuredOutputs(choice=["zz"])
    (output,) = llm.generate("Go", held(form, logprobs=3))[0].outputs
    (unheld,) = llm.generate("Go", SamplingParams(temperature=0.0, max_tokens=1, logprobs=3))[0].outputs
    assert output.logprobs is not None
    assert unheld.logprobs is not None
    z = output.token_ids[0]
    assert output.logprobs[0][z].rank > 1
    best = next(token_id for token_id, entry in unheld.logprobs[0].items() if entry.rank == 1)
    assert output.logprobs[0][best].logprob == pytest.approx(unheld.logprobs[0][best].logprob, abs=1e-4)


def test_stop_strings_and_lengths_end_an_output_early(llm: LLM) -> None:
    form = StructuredOutputs(regex="x{5}(END|end)x{50}")
    (output,) = llm.generate("Go", held(form, stop=["END", "end"]))[0].outputs
    assert (output.text, output.finish_reason) == ("xxxxx", "stop")
    (output,) = llm.generate("Go", held(form, max_tokens=3))[0].outputs
    assert (output.text, output.finish_reason) == ("xxx", "length")


def test_a_form_may_begin_later(llm: LLM) -> None:
    prompt, reasoning = "Think", "so</th"
    tokenizer = llm.get_tokenizer()
    forced = {tokenizer.convert_tokens_to_ids("."): 100.0}
    form = StructuredOutputs(choice=["yes", "no"], start_after="...")
    (output,) = llm.generate(prompt + reasoning, held(form, logit_bias=forced))[0].outputs
    assert output.text in ("...yes", "...no")
    (output,) = llm.generate(prompt, held(form, max_tokens=5, bad_words=["."], seed=1))[0].outputs
    assert output.finish_reason in ("length", "stop")


def test_preempted_and_chunked_outputs_equal_undisturbed_ones(checkpoint: Path, llm: LLM) -> None:
    forms: list[StructuredOutputs] = [
        StructuredOutputs(regex="[a-z ]{60}!"),
        StructuredOutputs(json={**PERSON, "properties": {**PERSON["properties"], "name": {"type": "string"}}}),
        StructuredOutputs(choice=["north " * 9, "south " * 9]),
        StructuredOutputs(regex="[0-9]{70}", start_after="a"),
    ]
    prompts = [f"{i} " + "long prompt " * (2 + i % 3) for i in range(12)]
    params = [held(forms[i % 4], seed=i, max_tokens=90, temperature=0.8) for i in range(12)]
    params += [free(i) for i in range(4)]
    prompts += [f"free {i}" for i in range(4)]
    expected = [[each.token_ids for each in output.outputs] for output in llm.generate(prompts, params)]
    narrow = LLM(str(checkpoint), **{**SETTINGS, "num_blocks": 30, "max_num_batched_tokens": 24})
    outputs = narrow.generate(prompts, params)
    assert narrow.engine.core.stats().num_preemptions > 0
    narrow.shutdown()
    assert [[each.token_ids for each in output.outputs] for output in outputs] == expected


def test_a_picture_may_stand_in_the_prompt() -> None:
    llm = LLM(str(make_checkpoint("qwen2_vl")), **SETTINGS)
    image = {"type": "image", "image": picture(1)}
    chat = [{"role": "user", "content": [image, {"type": "text", "text": "Who is it?"}]}]
    (output,) = llm.chat([chat, chat], held(PERSON, seed=1))[1].outputs
    jsonschema.validate(json.loads(output.text), PERSON)
    llm.shutdown()


def test_a_bad_form_is_that_requests_error_alone(llm: LLM) -> None:
    forms = [
        held(StructuredOutputs(regex="(?=a)b")),
        held({"type": "array", "uniqueItems": True}),
        free(1),
        held(PERSON),
    ]
    outputs = llm.generate(["a", "b", "c", "d"], forms, return_errors=True)
    assert [(each.error is None) for each in outputs] == [False, False, True, True]
    assert "look-around" in str(outputs[0].error)
    assert "uniqueItems" in str(outputs[1].error)
    with pytest.raises(RequestError, match="uniqueItems"):
        llm.generate("b", forms[1])


def test_requests_wait_for_forms_apart_and_leave_when_aborted(checkpoint: Path) -> None:
    args = EngineArgs(str(checkpoint), **SETTINGS, max_grammar_compile_s=30.0)
    engine = LLMEngine.from_engine_args(args)
    engine.add_request("held", "a", held(ENDLESS))
    engine.add_request("free", "b", SamplingParams(max_tokens=5, ignore_eos=True))
    with pytest.raises(InvalidRequestError, match="request_id"):
        engine.add_request("held", "c", held(PERSON))
    finished = []
    while not finished:
        finished = [output for output in engine.step() if output.finished]
    assert [output.request_id for output in finished] == ["free"]
    assert engine.core.stats().num_waiting == 1
    assert engine.has_unfinished_requests()
    engine.abort_request("held")
    assert not engine.has_unfinished_requests()
    assert engine.core.stats().num_waiting == 0
    engine.shutdown()


def test_without_a_tokenizer_it_is_refused(checkpoint: Path) -> None:
    engine = LLMEngine.from_engine_args(EngineArgs(str(checkpoint), **SETTINGS, skip_tokenizer_init=True))
    with pytest.raises(UnsupportedFeatureError, match="structured_outputs: got some, but the engine has no tokenizer"):
        engine.add_request("a", [1, 2], held(PERSON, detokenize=False))
    engine.shutdown()


def test_streams_over_the_process_boundary_run_on_beside_a_form_that_does_not_compile(checkpoint: Path) -> None:
    async def run() -> None:
        async with running(checkpoint, in_process=False, max_grammar_compile_s=5.0) as engine:
            begun = asyncio.Event()

            async def stream() -> list[int]:
                token_ids: list[int] = []
                async for output in engine.generate(
                    "Hi", SamplingParams(max_tokens=150, temperature=0, ignore_eos=True)
                ):
                    token_ids = list(output.outputs[0].token_ids)
                    begun.set()
                return token_ids

            quiet = await stream()
            begun.clear()
            streaming = asyncio.create_task(stream())
            await begun.wait()
            good = asyncio.create_task(last(engine.generate("a", held(PERSON, seed=1))))
            with pytest.raises(RequestError, match="compiling it takes more than 5 s") as error:
                await last(engine.generate("a", held(ENDLESS)))
            assert error.value.status == 400
            jsonschema.validate(json.loads((await good).outputs[0].text), PERSON)
            assert await streaming == quiet
            name = "to abort"
            task = asyncio.create_task(last(engine.generate("a", held({**ENDLESS, "title": "x"}), name)))
            await asyncio.sleep(0.1)
            engine.abort(name)
            with pytest.raises(RequestAbortedError):
                await task
            await settled(engine)

    asyncio.run(run())

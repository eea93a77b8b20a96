"""`/v1/responses` through the official client: whole and streamed, kept and gone back to, refused by name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from sensorium import LLM, SamplingParams
from tests.entrypoints.served import SETTINGS, Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import HANG_S

KEYS = ("first-key", "second-key")
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "max_output_tokens": 12}
ENDLESS: dict[str, Any] = {**GREEDY, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    store = {"max_stored_responses": 50, "max_stored_response_bytes": 200_000}
    with served(checkpoint, {"api_key": KEYS, **store}, limit_mm_per_prompt={"image": 4}) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    headers = {"Authorization": f"Bearer {KEYS[0]}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=HANG_S, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), **SETTINGS)


def expected(llm: LLM, *messages: tuple[str, Any]) -> str:
    chat = [{"role": role, "content": content} for role, content in messages]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return llm.chat(chat, params)[0].outputs[0].text


def image_input(seed: int = 1) -> list[Any]:
    part = {"type": "input_image", "image_url": data_url(picture(seed)), "detail": "auto"}
    return [{"role": "user", "content": [part, {"type": "input_text", "text": "What is it?"}]}]


def image_content(seed: int = 1) -> list[Any]:
    return [{"type": "image", "image": picture(seed)}, {"type": "text", "text": "What is it?"}]


def test_an_effort_that_can_t_be_had_is_passed_over_by_its_own_name(client: openai.OpenAI) -> None:
    warned = client.responses.with_raw_response.create(**GREEDY, input="Hi", reasoning={"effort": "low"})
    assert warned.headers["Warning"].startswith('299 sensorium "reasoning.effort was ignored: ')
    assert "Warning" not in client.responses.with_raw_response.create(**GREEDY, input="Hi").headers
    counted = client.responses.input_tokens.with_raw_response.count(
        model="tiny", input="Hi", reasoning={"effort": "low"}
    )
    assert "reasoning.effort" in counted.headers["Warning"]


def test_a_response_says_what_the_engine_says(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.responses.create(input="Hello", instructions="Be kind.", metadata={"a": "b"}, user="me", **ENDLESS)
    assert answer.output_text == expected(llm, ("system", "Be kind."), ("user", "Hello"))
    assert (answer.status, answer.incomplete_details and answer.incomplete_details.reason) == (
        "incomplete",
        "max_output_tokens",
    )
    assert (answer.instructions, answer.metadata, answer.user) == ("Be kind.", {"a": "b"}, "me")
    assert answer.usage is not None
    assert (answer.usage.output_tokens, answer.usage.output_tokens_details.reasoning_tokens) == (12, 0)
    again = client.responses.create(input="Hello", instructions="Be kind.", **ENDLESS)
    assert again.usage is not None
    assert 0 < again.usage.input_tokens_details.cached_tokens < again.usage.input_tokens
    assert again.usage.total_tokens == again.usage.input_tokens + 12


def test_pictures(client: openai.OpenAI, llm: LLM) -> None:
    answer = client.responses.create(input=image_input(), **ENDLESS)
    assert answer.output_text == expected(llm, ("user", image_content()))
    assert answer.usage is not None
    counted = client.responses.input_tokens.count(model="tiny", input=image_input())
    assert counted.input_tokens == answer.usage.input_tokens


def test_a_stream_is_the_response_in_pieces(server: Served) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEYS[0], max_retries=0) as client:
            whole = await client.responses.create(input="Hello", **ENDLESS)
            stream = await client.responses.create(input="Hello", stream=True, **ENDLESS)
            events = [event async for event in stream]
        assert [event.sequence_number for event in events] == list(range(len(events)))
        names = [event.type for event in events]
        deltas = names.count("response.output_text.delta")
        assert deltas > 1
        assert names == [
            *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
            *["response.output_text.delta"] * deltas,
            *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
            "response.incomplete",
        ]
        text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        last = events[-1]
        assert last.type == "response.incomplete"
        assert text == last.response.output_text == whole.output_text
        assert last.response.usage == whole.usage or last.response.usage is not None

    asyncio.run(run())


def test_the_clients_own_accumulator_agrees(client: openai.OpenAI) -> None:
    whole = client.responses.create(input="Hello", **ENDLESS)
    stop = {"stop": [whole.output_text[2:]], "ignore_eos": True}
    with client.responses.stream(input="Hello", **{**GREEDY, "extra_body": stop}) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.status == "completed"
    assert final.output_text == whole.output_text[:2]
    assert final.output[0].status == "completed"  # type: ignore[union-attr]


def test_log_probabilities(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Hello", include=["message.output_text.logprobs"], top_logprobs=3, **ENDLESS)
    (message,) = answer.output
    assert message.type == "message"
    (part,) = message.content
    assert part.type == "output_text"
    assert part.logprobs is not None
    assert len(part.logprobs) == 12
    for token in part.logprobs:
        assert token.logprob == token.top_logprobs[0].logprob, "greedy"
        assert len(token.top_logprobs) == 3
    streamed = []
    for event in client.responses.create(input="Hello", top_logprobs=3, stream=True, **ENDLESS):
        if event.type == "response.output_text.delta":
            streamed += event.logprobs
    assert [each.token for each in streamed] == [each.token for each in part.logprobs]


# Kept


def test_a_conversation_goes_on_from_what_is_kept(client: openai.OpenAI, llm: LLM) -> None:
    first = client.responses.create(input=image_input(), instructions="Be kind.", **ENDLESS)
    second = client.responses.create(input="And?", previous_response_id=first.id, **ENDLESS)
    turns = (("user", image_content()), ("assistant", first.output_text), ("user", "And?"))
    assert second.output_text == expected(llm, *turns), "instructions are not carried over"
    third = client.responses.create(
        input="So?", previous_response_id=second.id, instructions="Be brief.", store=False, **ENDLESS
    )
    more = (("assistant", second.output_text), ("user", "So?"))
    assert third.output_text == expected(llm, ("system", "Be brief."), *turns, *more)
    by_hand = [*image_input(), *first.output, {"role": "user", "content": "And?"}]
    assert client.responses.create(input=by_hand, **ENDLESS).output_text == second.output_text  # type: ignore[arg-type]


def test_what_is_kept_can_be_had_again_and_deleted(client: openai.OpenAI) -> None:
    first = client.responses.create(input=image_input(), **GREEDY)
    kept = client.responses.create(input="And?", previous_response_id=first.id, **GREEDY)
    assert client.responses.retrieve(kept.id) == kept
    items = list(client.responses.input_items.list(kept.id, limit=1))
    assert [item.type for item in items] == ["message"] * 3
    assert items == list(client.responses.input_items.list(kept.id, order="asc"))[::-1]
    assert items[0].content[0].text == "And?"  # type: ignore[union-attr]
    client.responses.delete(kept.id)
    for gone in (
        lambda: client.responses.retrieve(kept.id),
        lambda: client.responses.delete(kept.id),
        lambda: client.responses.input_items.list(kept.id),
        lambda: client.responses.create(input="x", previous_response_id=kept.id, **GREEDY),
    ):
        with pytest.raises(openai.NotFoundError, match="expected the id of a response that is kept"):
            gone()
    assert client.responses.retrieve(first.id) == first


def test_what_is_not_stored_is_not_kept(client: openai.OpenAI) -> None:
    answer = client.responses.create(input="Hello", store=False, **GREEDY)
    assert answer.to_dict()["store"] is False
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    large = client.responses.create(input="Hello", metadata={"a": "b"}, safety_identifier="x" * 300_000, **GREEDY)
    assert large.to_dict()["store"] is False, "larger than the store"
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(large.id)


def test_another_key_sees_nothing(client: openai.OpenAI, server: Served) -> None:
    mine = client.responses.create(input="Hello", **GREEDY)
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEYS[1], max_retries=0) as other:
        for reach in (
            lambda: other.responses.retrieve(mine.id),
            lambda: other.responses.delete(mine.id),
            lambda: other.responses.create(input="x", previous_response_id=mine.id, **GREEDY),
        ):
            with pytest.raises(openai.NotFoundError):
                reach()
    assert client.responses.retrieve(mine.id) == mine


def test_only_so_many_are_kept(client: openai.OpenAI) -> None:
    first = client.responses.create(input="Hello", **{**GREEDY, "max_output_tokens": 1})
    for _ in range(50):
        client.responses.create(input="Hello", **{**GREEDY, "max_output_tokens": 1})
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(first.id)


def test_items_may_be_named_where_they_are_kept(client: openai.OpenAI, http: httpx.Client) -> None:
    """As a client does by default that knows the ids of what was said before."""
    first = client.responses.create(input="Hello", **GREEDY)
    said, more = first.output[0], {"role": "user", "content": "More"}
    hello = {"role": "user", "content": "Hello"}
    inputs: list[Any] = [
        [hello, {"type": "item_reference", "id": said.id}, more],
        [hello, {"id": said.id}, more],
        [hello, {"type": None, "id": said.id}, more],
        [hello, said.model_dump(), more],
    ]
    answers = [client.responses.create(input=each, **GREEDY) for each in inputs]
    answers.append(client.responses.create(input="More", previous_response_id=first.id, **GREEDY))
    assert len({answer.output_text for answer in answers}) == 1
    assert len({answer.usage.input_tokens for answer in answers if answer.usage}) == 1
    response = http.post("/v1/responses", json={"input": [{"type": "item_reference", "id": "msg_x"}]})
    assert response.status_code == 404
    error = response.json()["error"]
    assert (error["code"], error["param"]) == ("item_not_found", "input[0].id")


def test_what_may_be_included_is_taken_with_what_is_kept(client: openai.OpenAI) -> None:
    first = client.responses.create(input="Hello", **GREEDY)
    again = client.responses.retrieve(first.id, include=["reasoning.encrypted_content"], stream=False)
    assert again.output_text == first.output_text
    items = client.responses.input_items.list(first.id, include=["message.input_image.image_url"], limit=5, order="asc")
    assert len(items.data) == 1


# Refused


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"input": None}, "input: got nothing"),
        ({"input": []}, "input: got nothing"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].image_url.url"),
        ({"input": "<|image_pad|>"}, "image"),
        ({"input": "x" * 50_000}, "too long"),
        ({"background": True}, "background: got True"),
        ({"truncation": "auto"}, "truncation: got 'auto'"),
        ({"service_tier": "flex"}, "service_tier: got 'flex'"),
        ({"conversation": "c"}, "conversation: got 'c', expected null"),
        ({"prompt": {"id": "p"}}, "prompt: got {'id': 'p'}, expected null"),
        ({"max_tool_calls": -3}, "max_tool_calls: got -3"),
        ({"include": ["reasoning.plain_content"]}, "include: got 'reasoning.plain_content'"),
        ({"text": {"verbosity": "none"}}, "text.verbosity: got 'none'"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type: got 'yaml'"),
        ({"text": {"format": {"type": "json_schema", "name": "x"}}}, "text.format.schema: got nothing"),
        ({"top_logprobs": 21}, "top_logprobs: got 21"),
        ({"max_output_tokens": 0}, "max_output_tokens: got 0"),
        ({"temperature": -1}, "temperature: got -1"),
        ({"metadata": {"k" * 65: "v"}}, "metadata: got a key of 65"),
        ({"metadata": {"k": 5}}, "metadata"),
        ({"metadata": {str(number): "v" for number in range(17)}}, "metadata: got 17"),
        ({"stream_options": {"include_everything": True}}, "stream_options.include_everything: got a field"),
        ({"mm_processor_kwargs": {"max_pixels": 10**9}}, "mm_processor_kwargs"),
        ({"priority": 5}, "priority"),
        ({"made_up": 1}, "made_up: got a field"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_bad_field_is_refused_by_name(http: httpx.Client, fields: dict[str, Any], text: str, stream: bool) -> None:
    body = {"model": "tiny", "input": "Hi", "max_output_tokens": 3, "stream": stream, **fields}
    response = http.post("/v1/responses", json=body)
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("?stream=true", "stream"),
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=101", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=x", "after"),
        ("/input_items?made_up=1", "made_up"),
        ("/input_items?limit=5&limit=6", "limit: got it twice"),
        ("/input_items?include=made.up", "include"),
        ("?starting_after=5", "starting_after"),
        ("?include_obfuscation=true", "include_obfuscation"),
        ("?include[]=made.up", "include"),
    ],
)
def test_bad_parameters_are_refused(client: openai.OpenAI, http: httpx.Client, path: str, text: str) -> None:
    answer = client.responses.create(input="Hello", **GREEDY)
    response = http.get(f"/v1/responses/{answer.id}{path}")
    assert response.status_code == 400
    assert response.json()["error"]["message"].startswith(text)


def test_a_stream_that_breaks_off_ends_with_a_failure(checkpoint: Path) -> None:
    with served(checkpoint) as running:
        client = httpx.Client(base_url=running.url, timeout=HANG_S, trust_env=False)
        body = {"input": "Hi", "stream": True, "ignore_eos": True}
        with client, client.stream("POST", "/v1/responses", json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == "event: response.created"
            running.loop.call_soon_threadsafe(_kill, running.engine)
            rest = list(lines)
        assert "event: response.failed" in rest
        last = json.loads(rest[rest.index("event: response.failed") + 1].removeprefix("data: "))
        assert last["response"]["status"] == "failed"
        assert last["response"]["error"]["code"] == "server_error"
        assert not any("[DONE]" in line for line in rest)


def _kill(engine: Any) -> None:
    engine._core._client._closed()  # what the channel calls when the other end is gone


def test_a_stream_that_is_closed_early_leaves_nothing(client: openai.OpenAI, server: Served) -> None:
    stream = client.responses.create(
        model="tiny", input=image_input(), max_output_tokens=800, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    server.settle()

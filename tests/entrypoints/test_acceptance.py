"""Every route through the official client: sync and async, streaming and whole, typed, all saying the same.

The bundled model answers, so the answers can be judged: it sees, it hears, and it pools.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai._base_client import AsyncPaginator
from openai.pagination import SyncPage
from openai.types import Completion, CreateEmbeddingResponse
from openai.types.audio import Transcription
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response
from PIL import Image, ImageDraw
from pydantic import BaseModel, Field

from sensorium import LLM, SamplingParams
from sensorium.kernels import native_refusal
from sensorium.media.encode import encode_audio, encode_video
from tests.entrypoints.served import SETTINGS, Served, data_url, served
from training.speech import SAMPLE_RATE, SpeechBank

VARYING = ("id", "created", "created_at", "completed_at", "usage", "item_id", "call_id", "system_fingerprint")
"""Fields that differ from one request to the next."""


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("demo", max_model_len=2048, limit_mm_per_prompt={"image": 2, "audio": 1}) as running:
        yield running


@pytest.fixture(scope="module")
def llm(server: Served) -> LLM:
    return LLM("demo", **{**SETTINGS, "max_model_len": 2048})


def offline(llm: LLM, chat: list[Any]) -> str:
    return llm.chat(chat, SamplingParams(temperature=0.0, max_tokens=200))[0].outputs[0].text


@pytest.fixture(scope="module")
def scene() -> str:
    """A red circle."""
    picture = Image.new("RGB", (160, 160), "white")
    ImageDraw.Draw(picture).ellipse((50, 50, 110, 110), fill="red")
    return data_url(picture)


@pytest.fixture(scope="module")
def sound() -> bytes:
    """ "Seven three." """
    bank = SpeechBank.load(Path(__file__).parents[1] / "training" / "spoken_words.npz")
    pause = np.zeros(SAMPLE_RATE // 10, np.float32)
    pieces = [piece for word in ("seven", "three") for piece in (bank.waveforms[word][0], pause)]
    return encode_audio(np.concatenate([pause, *pieces]), SAMPLE_RATE, "wav")


def both(server: Served, call: Callable[[Any], Any]) -> Any:
    """What a call brings with the one client, a stream as a list; with the other one it brings the same."""
    settings = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    with openai.OpenAI(**settings) as client:  # type: ignore[arg-type]
        result = call(client)
        result = list(result) if isinstance(result, openai.Stream | SyncPage) else result

    async def run() -> Any:
        async with openai.AsyncOpenAI(**settings) as client:  # type: ignore[arg-type]
            answer = call(client)
            answer = answer if isinstance(answer, AsyncPaginator) else await answer
            is_many = isinstance(answer, openai.AsyncStream | AsyncPaginator)
            return [each async for each in answer] if is_many else answer

    other = asyncio.run(run())
    assert type(other) is type(result)
    if not isinstance(result, list):  # streams are cut as it happens
        assert steady(other) == steady(result, about=native_refusal() is not None)
    return result


def steady(value: Any, *, about: bool = False) -> Any:
    """A value without what varies. By plain torch, as the load report says, log probabilities are `about` the same."""
    if isinstance(value, BaseModel):
        value = value.model_dump(warnings=False)
    if isinstance(value, dict):
        return {key: steady(each, about=about) for key, each in value.items() if key not in VARYING}
    if isinstance(value, list):
        return [steady(each, about=about) for each in value]
    return pytest.approx(value, rel=1e-3, abs=1e-4) if about and isinstance(value, float) else value


def chat_of(*parts: Any, question: str) -> list[Any]:
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def joined(chunks: list[ChatCompletionChunk], index: int = 0) -> str:
    choices = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
    return "".join(choice.delta.content or "" for choice in choices)


def test_models(server: Served) -> None:
    assert [model.id for model in both(server, lambda client: client.models.list())] == ["tiny"]
    model = both(server, lambda client: client.models.retrieve("tiny"))
    assert (model.id, model.object, model.owned_by) == ("tiny", "model", "sensorium")


def test_chat_with_a_picture(server: Served, llm: LLM, scene: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": scene}}
    asked = {"model": "tiny", "messages": chat_of(picture, question="How many shapes are there?"), "temperature": 0}
    whole = both(server, lambda client: client.chat.completions.create(**asked))
    assert isinstance(whole, ChatCompletion)
    assert whole.choices[0].message.content == offline(llm, asked["messages"])
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = both(server, lambda client: client.chat.completions.create(**asked, **options))
    assert joined(chunks) == whole.choices[0].message.content
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    item = {"type": "input_image", "image_url": scene, "detail": "auto"}
    given = [{"role": "user", "content": [item, {"type": "input_text", "text": "How many shapes are there?"}]}]
    response = both(server, lambda client: client.responses.create(model="tiny", input=given, temperature=0))
    assert isinstance(response, Response)
    assert (response.output_text, response.status) == (whole.choices[0].message.content, "completed")
    events = both(server, lambda client: client.responses.create(model="tiny", input=given, temperature=0, stream=True))
    assert events[-1].type == "response.completed"
    assert events[-1].response.output_text == response.output_text


def test_chat_and_transcription_of_a_sound(server: Served, sound: bytes) -> None:
    part = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound).decode(), "format": "wav"}}
    asked = chat_of(part, question="Which digits are spoken?")
    whole = both(server, lambda client: client.chat.completions.create(model="tiny", messages=asked, temperature=0))
    assert "7 3" in whole.choices[0].message.content
    given: list[Any] = [{"role": "user", "content": [part, {"type": "input_text", "text": "Which digits are spoken?"}]}]
    response = both(server, lambda client: client.responses.create(model="tiny", input=given, temperature=0))
    assert response.output_text == whole.choices[0].message.content
    file = ("speech.wav", sound)
    transcription = both(server, lambda client: client.audio.transcriptions.create(model="tiny", file=file))
    assert isinstance(transcription, Transcription)
    assert transcription.text == "seven three"
    events = both(server, lambda client: client.audio.transcriptions.create(model="tiny", file=file, stream=True))
    assert (events[-1].type, events[-1].text) == ("transcript.text.done", "seven three")


def test_chat_with_a_clip(server: Served, llm: LLM) -> None:
    frames = np.full((8, 112, 112, 3), 255, np.uint8)
    for index, frame in enumerate(frames):
        frame[40:64, 8 + 10 * index : 32 + 10 * index] = (255, 0, 0)
    url = "data:video/mp4;base64," + base64.b64encode(encode_video(frames, 2.0, "mp4")).decode()
    asked = chat_of({"type": "video_url", "video_url": {"url": url}}, question="Which way does the red square move?")
    whole = both(server, lambda client: client.chat.completions.create(model="tiny", messages=asked, temperature=0))
    assert whole.choices[0].message.content == offline(llm, asked)
    parts = [{"type": "input_video", "video_url": url}, {"type": "input_text", "text": asked[0]["content"][1]["text"]}]
    given: list[Any] = [{"role": "user", "content": parts}]
    response = both(server, lambda client: client.responses.create(model="tiny", input=given, temperature=0))
    assert response.output_text == whole.choices[0].message.content


def test_chat_options(server: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": chat_of(question="What is said?"), "seed": 3, "n": 2}
    asked |= {"max_completion_tokens": 6, "logprobs": True, "top_logprobs": 2, "temperature": 1.5}
    whole = both(server, lambda client: client.chat.completions.create(**asked))
    assert [choice.index for choice in whole.choices] == [0, 1]
    chunks = both(server, lambda client: client.chat.completions.create(**asked, stream=True))
    for choice in whole.choices:
        assert joined(chunks, choice.index) == choice.message.content
        streamed = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        entries = [entry for each in streamed if each.logprobs for entry in each.logprobs.content]
        assert [entry.token for entry in entries] == [entry.token for entry in choice.logprobs.content]
        assert all(len(entry.top_logprobs) == 2 for entry in entries)


def test_completions(server: Served) -> None:
    asked: dict[str, Any] = {"model": "tiny", "prompt": ["I hear", "There is"], "max_tokens": 6, "n": 2, "seed": 1}
    asked |= {"logprobs": 2, "temperature": 1.0}
    whole = both(server, lambda client: client.completions.create(**asked))
    assert isinstance(whole, Completion)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert whole.usage is not None
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = both(server, lambda client: client.completions.create(**asked, **options))
    for choice in whole.choices:
        streamed = [each for chunk in chunks for each in chunk.choices if each.index == choice.index]
        assert "".join(each.text for each in streamed) == choice.text
        assert choice.logprobs is not None
        tokens = [token for each in streamed if each.logprobs for token in each.logprobs.tokens]
        assert tokens == choice.logprobs.tokens
    assert chunks[-1].usage == whole.usage
    greedy: dict[str, Any] = {"model": "tiny", "prompt": "I hear", "temperature": 0, "max_tokens": 8}
    plain = both(server, lambda client: client.completions.create(**greedy))
    text = plain.choices[0].text
    stopped = both(server, lambda client: client.completions.create(**greedy, stop=[text[3:5]]))
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (text[:3], "stop")
    first = whole.choices[0].logprobs.tokens[0]
    ids = both(server, lambda client: client.post("/../tokenize", cast_to=dict, body={"prompt": first}))["tokens"]
    biased = both(server, lambda client: client.completions.create(**greedy, logit_bias={str(ids[0]): 100}))
    assert len(set(biased.choices[0].text.split())) == 1


class Count(BaseModel):
    """A form of the answer."""

    count: int = Field(ge=0, le=99)
    certain: bool


def test_answers_of_a_form(server: Served, scene: str) -> None:
    picture = {"type": "image_url", "image_url": {"url": scene}}
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 200}
    asked["messages"] = chat_of(picture, question="How many shapes are there? Answer in JSON.")
    parsed = both(server, lambda client: client.chat.completions.parse(**asked, response_format=Count))
    assert isinstance(parsed.choices[0].message.parsed, Count)
    content = parsed.choices[0].message.content
    form = {"type": "json_schema", "json_schema": {"name": "count", "schema": Count.model_json_schema()}}
    chunks = both(server, lambda client: client.chat.completions.create(**asked, response_format=form, stream=True))
    assert joined(chunks) == content
    item = {"type": "input_image", "image_url": scene, "detail": "auto"}
    parts = [item, {"type": "input_text", "text": "How many shapes are there? Answer in JSON."}]
    given: dict[str, Any] = {"model": "tiny", "temperature": 0, "input": [{"role": "user", "content": parts}]}
    response = both(server, lambda client: client.responses.parse(**given, text_format=Count))
    assert response.output_parsed == parsed.choices[0].message.parsed
    prompt = {"model": "tiny", "prompt": "I see", "temperature": 0, "max_tokens": 200}
    whole = both(server, lambda client: client.completions.create(**prompt, extra_body={"response_format": form}))
    assert Count.model_validate_json(whole.choices[0].text)
    plain = both(
        server, lambda client: client.chat.completions.create(**asked, response_format={"type": "json_object"})
    )
    assert isinstance(json.loads(plain.choices[0].message.content), dict)


def test_calls_of_functions(server: Served) -> None:
    """The model never learnt to call: it is held to it."""
    tool: Any = openai.pydantic_function_tool(Count, name="report")
    asked: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_tokens": 300, "tools": [tool]}
    asked |= {"messages": chat_of(question="How many?"), "tool_choice": "required", "parallel_tool_calls": False}
    whole = both(server, lambda client: client.chat.completions.create(**asked, seed=1))
    (call,) = whole.choices[0].message.tool_calls
    assert call.function.name == "report"
    assert Count.model_validate_json(call.function.arguments)
    chunks = both(server, lambda client: client.chat.completions.create(**asked, seed=1, stream=True))
    deltas = [delta for chunk in chunks for delta in chunk.choices[0].delta.tool_calls or []]
    assert "".join(delta.function.arguments or "" for delta in deltas) == call.function.arguments
    flat: Any = {"type": "function", **tool["function"]}
    given: dict[str, Any] = {"model": "tiny", "temperature": 0, "max_output_tokens": 300, "tools": [flat]}
    given |= {"input": "How many?", "tool_choice": "required", "parallel_tool_calls": False}
    response = both(server, lambda client: client.responses.create(**given))
    (item,) = response.output
    assert (item.type, item.name, item.arguments) == ("function_call", "report", call.function.arguments)
    events = both(server, lambda client: client.responses.create(**given, stream=True))
    assert [event.arguments for event in events if event.type == "response.function_call_arguments.done"] == [
        call.function.arguments
    ]


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_embeddings(server: Served, encoding: str) -> None:
    asked = {"model": "tiny", "input": ["red circle", "blue ring"], "encoding_format": encoding}
    answer = both(server, lambda client: client.embeddings.create(**asked))
    assert isinstance(answer, CreateEmbeddingResponse)
    assert [each.index for each in answer.data] == [0, 1]
    plain = both(server, lambda client: client.embeddings.create(model="tiny", input="red circle"))
    assert len(plain.data[0].embedding) == 256


def test_a_conversation_is_kept(server: Served) -> None:
    def turns(client: openai.OpenAI) -> list[str]:
        first = client.responses.create(model="tiny", input="What is said?", temperature=0)
        second = client.responses.create(model="tiny", input="And?", previous_response_id=first.id, temperature=0)
        assert client.responses.retrieve(second.id) == second
        assert len(list(client.responses.input_items.list(second.id))) == 3
        client.responses.delete(first.id)
        return [first.output_text, second.output_text]

    async def same() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            first = await client.responses.create(model="tiny", input="What is said?", temperature=0)
            second = await client.responses.create(
                model="tiny", input="And?", previous_response_id=first.id, temperature=0
            )
            assert await client.responses.retrieve(second.id) == second
            assert len([item async for item in client.responses.input_items.list(second.id)]) == 3
            await client.responses.delete(first.id)
            return [first.output_text, second.output_text]

    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert turns(client) == asyncio.run(same())


@pytest.mark.parametrize(
    "call",
    [
        lambda client: client.chat.completions.create(model="other", messages=[{"role": "user", "content": "?"}]),
        lambda client: client.completions.create(model="other", prompt="?"),
        lambda client: client.responses.create(model="other", input="?"),
        lambda client: client.embeddings.create(model="other", input="?"),
        lambda client: client.audio.transcriptions.create(model="other", file=b"RIFF"),
        lambda client: client.models.retrieve("other"),
        lambda client: client.responses.retrieve("resp_other"),
    ],
    ids=["chat", "completions", "responses", "embeddings", "transcriptions", "models", "response"],
)
def test_errors_are_typed(server: Served, call: Callable[[Any], Any]) -> None:
    with pytest.raises(openai.NotFoundError) as raised:
        both(server, call)
    assert raised.value.type == "not_found_error"

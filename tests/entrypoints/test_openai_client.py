"""The official client, typed, sync and async, streaming and not: what it gets is what the engine says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from sensorium import LLM, SamplingParams
from tests.entrypoints.served import SETTINGS, Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture

TEXT_CHAT: list[Any] = [{"role": "user", "content": "Say something"}]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


def image_chat(seed: int = 1, **fields: Any) -> list[Any]:
    image = {"type": "image_url", "image_url": {"url": data_url(picture(seed))}, **fields}
    return [{"role": "user", "content": [image, {"type": "text", "text": "What is it?"}]}]


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    with served(checkpoint) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), **SETTINGS)


def expected(llm: LLM, chat: list[Any]) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    return llm.chat(chat, params)[0].outputs[0].text


@pytest.mark.parametrize("chat", [TEXT_CHAT, image_chat(1), image_chat(2, uuid="two")], ids=["text", "image", "uuid"])
def test_a_chat_whole_and_streamed_says_what_the_engine_says(client: openai.OpenAI, llm: LLM, chat: list[Any]) -> None:
    whole = client.chat.completions.create(model="tiny", messages=chat, **GREEDY)
    assert whole.choices[0].message.content == expected(llm, [{**chat[0], "content": _without_uuid(chat)}])
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        model="tiny", messages=chat, stream=True, stream_options={"include_usage": True}, **GREEDY
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == whole.choices[0].message.content
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    usage = chunks[-1].usage
    assert usage is not None
    assert (usage.prompt_tokens, usage.completion_tokens) == (whole.usage.prompt_tokens, 12)


def _without_uuid(chat: list[Any]) -> Any:
    content = chat[0]["content"]
    if isinstance(content, str):
        return content
    return [{key: value for key, value in part.items() if key != "uuid"} for part in content]


def test_n_logprobs_seed_stop_and_bias(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=TEXT_CHAT, n=3, seed=7, logprobs=True, top_logprobs=2, max_completion_tokens=5
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    again = client.chat.completions.create(
        model="tiny", messages=TEXT_CHAT, n=3, seed=7, max_completion_tokens=5, stream=True
    )
    texts = ["", "", ""]
    for chunk in again:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in answer.choices]
    for choice in answer.choices:
        assert choice.logprobs is not None
        for token in choice.logprobs.content or []:
            assert len(token.top_logprobs) == 2
            assert token.top_logprobs[0].logprob >= token.top_logprobs[1].logprob >= -100
            assert token.logprob <= token.top_logprobs[0].logprob
    forced = client.chat.completions.create(
        model="tiny", messages=TEXT_CHAT, temperature=0, max_tokens=4, logit_bias={"33": 100}
    )
    text = forced.choices[0].message.content or ""
    assert len(set(text)) == 1
    stopped = client.chat.completions.create(
        model="tiny", messages=TEXT_CHAT, temperature=0, max_tokens=4, logit_bias={"33": 100}, stop=[text[:2]]
    )
    assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == ("", "stop")


def test_completions_of_several_prompts(client: openai.OpenAI, llm: LLM) -> None:
    prompts = ["Once", "There was", "A"]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    texts = [output.outputs[0].text for output in llm.generate(prompts, params)]
    whole = client.completions.create(model="tiny", prompt=prompts, n=2, logprobs=1, **GREEDY)
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert [choice.text for choice in whole.choices] == [text for text in texts for _ in range(2)]
    assert whole.choices[0].logprobs is not None
    assert len(whole.choices[0].logprobs.tokens or []) == 12
    streamed = ["", "", ""]
    for chunk in client.completions.create(model="tiny", prompt=prompts, stream=True, **GREEDY):
        streamed[chunk.choices[0].index] += chunk.choices[0].text
    assert streamed == texts
    ids = client.completions.create(model="tiny", prompt=[79, 110, 99, 101], max_tokens=1)
    assert ids.usage is not None
    assert ids.usage.prompt_tokens == 4


def test_the_async_client_and_models(server: Served, llm: LLM) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            assert [model.id async for model in client.models.list()] == ["tiny"]
            assert (await client.models.retrieve("tiny")).id == "tiny"
            chats = [image_chat(seed) for seed in range(4)]
            answers = await asyncio.gather(
                *(client.chat.completions.create(model="tiny", messages=chat, **GREEDY) for chat in chats)
            )
            for chat, answer in zip(chats, answers, strict=True):
                assert answer.choices[0].message.content == expected(llm, chat)
            text = ""
            stream = await client.chat.completions.create(model="tiny", messages=chats[0], stream=True, **GREEDY)
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
            assert text == answers[0].choices[0].message.content

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["float", "base64"])
def test_embeddings_are_those_of_the_engine(client: openai.OpenAI, llm: LLM, kind: Any) -> None:
    answer = client.embeddings.create(model="tiny", input=["One", "Another"], encoding_format=kind)
    outputs = llm.encode(["One", "Another"])
    for each, output in zip(answer.data, outputs, strict=True):
        assert output.outputs is not None
        got = each.embedding
        if isinstance(got, str):
            import base64

            import numpy as np

            got = np.frombuffer(base64.b64decode(got), "<f4").tolist()
        assert got == pytest.approx(output.outputs.embedding.tolist(), abs=1e-6)


def test_as_many_texts_are_pooled_as_clients_send_at_once(client: openai.OpenAI, server: Served) -> None:
    """Clients cut long lists into pieces of 1,000 or 2,048."""
    texts = [f"{number}" for number in range(1000)]
    answer = client.embeddings.create(model="tiny", input=texts)
    assert [each.index for each in answer.data] == list(range(1000))
    assert answer.usage.prompt_tokens == sum(map(len, texts))
    (alone,) = client.embeddings.create(model="tiny", input=texts[777]).data
    assert answer.data[777].embedding == pytest.approx(alone.embedding, abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="got 2049 inputs, expected 1 to 2048"):
        client.embeddings.create(model="tiny", input=["a"] * 2049)
    server.settle()


def test_a_stream_that_is_closed_early_leaves_nothing(client: openai.OpenAI, server: Served) -> None:
    stream = client.chat.completions.create(
        model="tiny", messages=image_chat(), max_tokens=800, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    assert server.engine.load().num_open == 1
    stream.close()
    server.settle()


def test_a_request_given_up_before_its_answer_leaves_nothing(server: Served) -> None:
    settings: dict[str, Any] = {"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0}
    with (
        openai.OpenAI(**settings, timeout=0.15) as client,  # gives up on purpose
        pytest.raises(openai.APITimeoutError),
    ):
        client.chat.completions.create(
            model="tiny", messages=image_chat(), max_tokens=900, extra_body={"ignore_eos": True}
        )
    server.settle()

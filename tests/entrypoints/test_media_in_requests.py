"""Media in requests over HTTP: sent once and named after, put where the user says, processed as the request says."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from sensorium import LLM, SamplingParams
from tests.entrypoints.served import SETTINGS, Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture

KEYS = ("first-key", "second-key")
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}
PLACEHOLDER = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return make_checkpoint("qwen2_vl")


@pytest.fixture(scope="module")
def server(checkpoint: Path) -> Iterator[Served]:
    settings = {"api_key": KEYS, "allow_mm_processor_kwargs": True}
    with served(checkpoint, settings, limit_mm_per_prompt={"image": 3}) as running:
        yield running


@pytest.fixture
def clients(server: Served) -> Iterator[list[openai.OpenAI]]:
    made = [openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0) for key in KEYS]
    yield made
    for client in made:
        client.close()


@pytest.fixture(scope="module")
def llm(checkpoint: Path) -> LLM:
    return LLM(str(checkpoint), **SETTINGS, limit_mm_per_prompt={"image": 3})


def image(seed: int | None = None, uuid: str | None = None) -> dict[str, Any]:
    content = {} if seed is None else {"image_url": {"url": data_url(picture(seed))}}
    return {"type": "image_url", **content, **({} if uuid is None else {"uuid": uuid})}


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def ask(client: openai.OpenAI, *parts: dict[str, Any], **extra: Any) -> str:
    body = {**GREEDY, "extra_body": {**GREEDY["extra_body"], **extra}}
    messages: list[Any] = [{"role": "user", "content": list(parts)}]
    return client.chat.completions.create(messages=messages, **body).choices[0].message.content or ""


def expected(llm: LLM, *parts: dict[str, Any], **kwargs: Any) -> str:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    chat = [{"role": "user", "content": list(parts)}]
    return llm.chat(chat, params, **kwargs)[0].outputs[0].text


def test_media_sent_once_need_not_be_sent_again(clients: list[openai.OpenAI], server: Served, llm: LLM) -> None:
    client = clients[0]
    first = ask(client, image(1, "cat"), text("What is it?"))
    assert first == expected(llm, image(1), text("What is it?"))
    encoded = server.engine.stats.num_encoded_rows  # type: ignore[union-attr]
    assert ask(client, image(uuid="cat"), text("What is it?")) == first
    assert ask(client, image(uuid="cat"), text("And?")) == expected(llm, image(1), text("And?"))
    assert server.engine.stats.num_encoded_rows == encoded  # type: ignore[union-attr]
    both = ask(client, image(uuid="cat"), image(2, "dog"), image(uuid="dog"))
    assert both == expected(llm, image(1), image(2), image(2))
    part = {"type": "input_image", "uuid": "cat"}
    answer = client.responses.create(
        model="tiny",
        input=[{"role": "user", "content": [part, {"type": "input_text", "text": "And?"}]}],  # type: ignore[list-item, misc]
        temperature=0.0,
        max_output_tokens=12,
        extra_body={"ignore_eos": True},
    )
    assert answer.output_text == expected(llm, image(1), text("And?"))


def test_a_name_decides_nothing(clients: list[openai.OpenAI], llm: LLM) -> None:
    """Whoever takes another's name gets neither its picture nor its cached rows."""
    mine, other = clients
    assert ask(mine, image(1, "shared"), text("?")) == expected(llm, image(1), text("?"))
    with pytest.raises(openai.APIStatusError, match="uuid: got 'shared' without content") as raised:
        ask(other, image(uuid="shared"), text("?"))
    assert raised.value.status_code == 424
    assert ask(other, image(2, "shared"), text("?")) == expected(llm, image(2), text("?"))
    assert ask(mine, image(uuid="shared"), text("?")) == expected(llm, image(1), text("?"))
    assert ask(mine, image(2, "shared"), text("?")) == expected(llm, image(2), text("?"))
    assert ask(mine, image(uuid="shared"), text("?")) == expected(llm, image(2), text("?"))


@pytest.mark.parametrize(
    "parts",
    [
        [text("before"), image(1), text("after")],
        [image(1), text("first"), image(2), text("second")],
        [image(1), text(f"Look: {PLACEHOLDER} and say.")],
        [image(1), image(2), text(f"One {PLACEHOLDER} and two {PLACEHOLDER}.")],
        [image(1), image(2), text(f"The last one: {PLACEHOLDER}.")],
    ],
    ids=["between", "twice", "placeholder", "placeholders", "mixed"],
)
def test_media_stand_where_they_are_put(clients: list[openai.OpenAI], llm: LLM, parts: list[dict[str, Any]]) -> None:
    """The same prompt as the text with placeholders where the media stand."""
    images = [part for part in parts if part["type"] == "image_url"]
    texts = [part["text"] for part in parts if part["type"] == "text"]
    num_written = "".join(texts).count(PLACEHOLDER)
    left = iter([True] * (len(images) - num_written) + [False] * num_written)
    body = "".join(part["text"] if part["type"] == "text" else PLACEHOLDER if next(left) else "" for part in parts)
    prompt = f"<|im_start|>user\n{body}<|im_end|>\n<|im_start|>assistant\n"
    seeds = [1, 2][: len(images)]
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    request = {"prompt": prompt, "multi_modal_data": {"image": [picture(seed) for seed in seeds]}}
    assert ask(clients[0], *parts) == llm.generate(request, params)[0].outputs[0].text


def test_a_request_says_how_its_media_are_processed(clients: list[openai.OpenAI], llm: LLM) -> None:
    parts = image(1), text("?")
    small = {"max_pixels": 4 * 28 * 28}
    assert ask(clients[0], *parts, mm_processor_kwargs=small) == expected(llm, *parts, mm_processor_kwargs=small)
    costs = [
        clients[0].post("/chat/token_cost", cast_to=dict[str, Any], body={"messages": messages, **fields})
        for messages in [[{"role": "user", "content": list(parts)}]]
        for fields in ({}, {"mm_processor_kwargs": small})
    ]
    assert costs[1]["media_tokens"]["image"][0] <= 4 < costs[0]["media_tokens"]["image"][0]
    assert ask(clients[0], *parts) == expected(llm, *parts)
    with pytest.raises(openai.BadRequestError):
        ask(clients[0], *parts, mm_processor_kwargs={"max_pixels": -1})

"""Structured outputs over HTTP: through the official client, as a body may ask for them, and from the bundled model."""

from __future__ import annotations

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import openai
import pytest
from PIL import Image, ImageDraw
from pydantic import BaseModel, Field

from tests.entrypoints.served import Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S

CHAT: list[Any] = [{"role": "user", "content": "Who is it?"}]
ENDLESS = {"allOf": [{"type": "string", "pattern": f".*a.{{{i}}}b.*"} for i in range(1, 30)]}


class Pet(BaseModel):
    """What is asked for. Bounds keep a model with random weights from writing for ever."""

    kind: Literal["cat", "dog"]
    age: int = Field(ge=0, le=30)
    is_tame: bool


class Home(BaseModel):
    """With a list and a part of its own."""

    street: str = Field(max_length=10)
    pets: list[Pet] = Field(max_length=2)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("qwen2_vl"), max_grammar_compile_s=5.0) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_pydantic_model_comes_back_parsed(client: openai.OpenAI) -> None:
    for seed in range(3):
        answer = client.chat.completions.parse(model="tiny", messages=CHAT, response_format=Home, seed=seed)
        home = answer.choices[0].message.parsed
        assert isinstance(home, Home)
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.content is not None
        assert Home.model_validate_json(answer.choices[0].message.content) == home


def test_a_pydantic_model_comes_back_from_a_stream(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model="tiny", messages=CHAT, response_format=Pet, seed=1) as stream:
        kinds = {event.type for event in stream}
        pet = stream.get_final_completion().choices[0].message.parsed
    assert isinstance(pet, Pet)
    assert "content.delta" in kinds


def test_the_asynchronous_client_and_responses(server: Served) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answer = await client.chat.completions.parse(model="tiny", messages=CHAT, response_format=Pet, seed=2)
            assert isinstance(answer.choices[0].message.parsed, Pet)
            response = await client.responses.parse(model="tiny", input="Who?", text_format=Pet, temperature=0)
            assert isinstance(response.output_parsed, Pet)

    asyncio.run(run())


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"response_format": {"type": "json_object"}}, r"\{.*"),
        ({"response_format": {"type": "text"}, "guided_choice": ["red", "blue"]}, "red|blue"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"const": 7}}}}, "7"),
        ({"structured_outputs": {"json": {"enum": [1, 22]}}}, "1|22"),
        ({"structured_outputs": {"json": '{"const": "a"}'}}, '"a"'),
        ({"structured_outputs": {"json_object": True}}, r"\{.*"),
        ({"structured_outputs": {"regex": "[ab]{4}"}}, "[ab]{4}"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "yes|no"),
        ({"structured_outputs": {"grammar": 'start: "x" /[0-9]/'}}, "x[0-9]"),
        ({"structured_outputs": {"grammar": 'root ::= "y" [0-9]'}}, "y[0-9]"),
        ({"guided_json": {"const": True}}, "true"),
        ({"guided_regex": "[0-9]{2}"}, "[0-9]{2}"),
        ({"guided_grammar": 'start: "z"'}, "z"),
    ],
    ids=str,
)
def test_bodies_ask_for_forms(server: Served, fields: dict[str, Any], pattern: str, stream: bool) -> None:
    common = {"model": "tiny", "max_tokens": 40, "seed": 1, "stream": stream, **fields}
    for route, prompt in (("chat/completions", {"messages": CHAT}), ("completions", {"prompt": "Go"})):
        answer = httpx.post(f"{server.url}/v1/{route}", json={**common, **prompt}, timeout=HANG_S)
        assert answer.status_code == 200, answer.text
        assert re.fullmatch(pattern, _text(answer.text, stream), re.DOTALL)


def _text(body: str, stream: bool) -> str:
    if not stream:
        choice = json.loads(body)["choices"][0]
        return str(choice["text"] if "text" in choice else choice["message"]["content"])
    lines = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line)["choices"]]
    return "".join(choice.get("text") or choice.get("delta", {}).get("content") or "" for choice in choices)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("schema", "text"),
    [
        ({"type": "array", "uniqueItems": True, "contains": {}}, 'Unimplemented keys: ["contains", "uniqueItems"]'),
        ({"type": "string", "pattern": "(?=a)"}, "look-around"),
        ({"type": "integer", "multipleOf": 999_983}, "takes more than 5 s"),
        ({"$ref": "https://example.com/x"}, "$ref names 'https://example.com/x', which is not in the schema"),
    ],
    ids=str,
)
def test_a_schema_that_is_not_served_is_a_400(server: Served, schema: dict[str, Any], text: str, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    body = {"messages": CHAT, "stream": stream, "response_format": form}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG_S)
    assert answer.status_code == 400
    assert text in answer.json()["error"]["message"]


def test_a_stream_runs_on_beside_hostile_grammars(server: Served) -> None:
    chain = "start: a0\n" + "\n".join(f"a{i}: a{i + 1}" for i in range(9000)) + '\na9000: "x"'
    hostile: list[dict[str, Any]] = [
        {"structured_outputs": {"grammar": chain}},
        {"structured_outputs": {"json": ENDLESS}},
        {"structured_outputs": {"json": {"type": "integer", "multipleOf": 999_979}}},
        {"structured_outputs": {"regex": "(" * 100 + "a" + "){1,9}" * 100}},
        {"structured_outputs": {"json": {**ENDLESS, "title": "another"}}},
    ]
    plain = {"messages": CHAT, "max_tokens": 200, "temperature": 0, "ignore_eos": True}
    quiet = httpx.post(f"{server.url}/v1/chat/completions", json=plain, timeout=HANG_S).json()
    answers, begun = [], threading.Event()

    def stream() -> str:
        pieces = []
        body = {**plain, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=HANG_S) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    begun.set()
                    pieces += [choice["delta"].get("content") or "" for choice in json.loads(line[6:])["choices"]]
        return "".join(pieces)

    texts: list[str] = []
    streaming = threading.Thread(target=lambda: texts.append(stream()))
    streaming.start()
    assert begun.wait(HANG_S)
    for fields in hostile:
        body = {"messages": CHAT, "max_tokens": 3, **fields}
        answers.append(httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG_S))
    streaming.join()
    assert [each.status_code for each in answers[:3]] == [400, 400, 400]
    assert answers[4].status_code == 400
    assert texts == [quiet["choices"][0]["message"]["content"]]
    server.settle()


# --- The bundled model ---


@pytest.fixture(scope="module")
def demo() -> Iterator[Served]:
    with served("demo") as running:
        yield running


class Shape(BaseModel):
    """What stands in a picture."""

    color: Literal["red", "green", "blue", "yellow", "orange", "purple", "black"]
    kind: Literal["circle", "square", "triangle", "star"]


class Number(BaseModel):
    """How many there are."""

    count: int = Field(ge=0, le=9)


def _picture(*shapes: tuple[str, tuple[int, int, int], int]) -> str:
    image = Image.new("RGB", (112, 112), (245, 245, 240))
    draw = ImageDraw.Draw(image)
    for kind, color, left in shapes:
        box = (left, 40, left + 32, 72)
        (draw.ellipse if kind == "circle" else draw.rectangle)(box, fill=color)
    return data_url(image)


RED, BLUE, GREEN = (220, 40, 40), (40, 70, 220), (40, 160, 60)


@pytest.mark.parametrize(
    ("shapes", "question", "expected"),
    [
        ([("circle", RED, 40)], "Describe the circle in JSON.", Shape(color="red", kind="circle")),
        ([("square", BLUE, 40)], "Describe the square in JSON.", Shape(color="blue", kind="square")),
        ([("circle", GREEN, 40)], "Describe the circle in JSON.", Shape(color="green", kind="circle")),
        ([("circle", RED, 10), ("square", BLUE, 60)], "How many shapes are there? Answer in JSON.", Number(count=2)),
    ],
    ids=str,
)
def test_the_bundled_model_tells_of_a_picture_in_json(
    demo: Served, shapes: list[Any], question: str, expected: BaseModel
) -> None:
    parts = [{"type": "image_url", "image_url": {"url": _picture(*shapes)}}, {"type": "text", "text": question}]
    chat: list[Any] = [{"role": "user", "content": parts}]
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.parse(
            model="tiny", messages=chat, response_format=type(expected), temperature=0
        )
    assert answer.choices[0].message.parsed == expected


NOT_HELD = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}


@pytest.mark.parametrize(
    ("route", "fields", "named", "step"),
    [
        ("chat/completions", {"response_format": NOT_HELD},
         "response_format.json_schema.schema: ", "Change schema."),
        ("completions", {"response_format": NOT_HELD},
         "response_format.json_schema.schema: ", "Change schema."),
        ("responses", {"text": {"format": {"type": "json_schema", "name": "x", "schema": {"not": {}}}}},
         "text.format.schema: ", "Change schema."),
        ("chat/completions", {"guided_json": {"not": {}}}, "guided_json: ", "Change guided_json."),
        ("completions", {"guided_regex": "(?=a)"}, "guided_regex: ", "Change guided_regex."),
        ("chat/completions", {"guided_grammar": "start: x"}, "guided_grammar: ", "Change guided_grammar."),
        ("chat/completions", {"guided_regex": "(" * 200}, "guided_regex: ", "Simplify guided_regex."),
        ("completions", {"structured_outputs": {"json": {"not": {}}}}, "structured_outputs.json: ", "Change json."),
        ("responses", {"structured_outputs": {"regex": "(?=a)"}}, "structured_outputs.regex: ", "Change regex."),
        ("chat/completions", {"structured_outputs": {"json": {"oneOf": [{"type": "integer"}, {}]}}},
         "structured_outputs.json: ", "Change json."),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_forms_name_the_field_that_was_sent(
    server: Served, route: str, fields: dict[str, Any], named: str, step: str, stream: bool
) -> None:
    """They spoke of structured_outputs, which most clients have never sent, and of options of the library."""
    asked = {"chat/completions": {"messages": CHAT}, "completions": {"prompt": "Hi"}, "responses": {"input": "Hi"}}
    answer = httpx.post(f"{server.url}/v1/{route}", json={**asked[route], **fields, "stream": stream}, timeout=HANG_S)
    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert message.startswith(named)
    assert message.endswith(step)
    assert ("structured_outputs" in message) == ("structured_outputs" in fields)
    assert not re.search("coerce|[Ee]nable", message)


def test_several_answers_of_a_form_that_had_a_dead_end_are_whole(server: Served) -> None:
    """Some of them broke off in the middle: behind a comma nothing could follow."""
    schema = {
        "type": "object",
        "properties": {"score": {"enum": [1, 1234567890123456789]}},
        "required": ["score"],
        "additionalProperties": False,
        "patternProperties": {"^score$": {"type": "integer"}},
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        body = {
            "messages": CHAT,
            "response_format": form,
            "n": 6,
            "temperature": 1.6,
            "stream": stream,
            "max_tokens": 150,
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=HANG_S)
        assert answer.status_code == 200
        assert '"error"' not in answer.text
        if not stream:
            for choice in answer.json()["choices"]:
                assert json.loads(choice["message"]["content"])["score"] in (1, 1234567890123456789)

"""Bodies with very many mistakes, or of very many elements.

A body of 0.9 MB, `{"prompt": [{}, {}, ...]}`, once kept the event loop busy for 23 s: each element was tried as each of
the types that a prompt may have, each failure became an object, and a report was made of all of them to tell the first.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from sensorium.chat.content import parse_messages
from sensorium.entrypoints.openai import http
from sensorium.entrypoints.openai.body import Body
from sensorium.entrypoints.openai.http import MAX_CONTAINERS, MAX_ELEMENTS, MAX_MEMBERS, _parse
from sensorium.entrypoints.openai.protocol import ChatBody, CompletionBody
from sensorium.entrypoints.openai.responses.body import ResponseBody
from sensorium.entrypoints.openai.responses.items import read_items
from sensorium.errors import InvalidRequestError
from sensorium.json_size import is_within
from sensorium.structured_outputs import StructuredOutputs

NUM_WRONG = 3000
MOST_MISTAKES = 400
"""A few for each field: of a union, each type has one."""
WRONG: dict[str, Any] = {
    "objects": [{}] * NUM_WRONG,
    "nulls": [None] * NUM_WRONG,
    "mixed": [1, "a", [], {}, 0.5] * (NUM_WRONG // 5),
    "lists": [[{}] * 3] * NUM_WRONG,
    "a late one": [1] * NUM_WRONG + [{}],
    "an object": {str(index): {} for index in range(NUM_WRONG)},
    "an object of lists": {f"key{index}": [None] for index in range(NUM_WRONG)},
    "a nested object": {"type": "function", "function": {f"key{index}": 1 for index in range(NUM_WRONG)}},
}


def kinds(base: type[Body] = Body) -> Iterator[type[Body]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


FIELDS = [(kind, field.alias or name) for kind in dict.fromkeys(kinds()) for name, field in kind.model_fields.items()]


def num_mistakes(kind: type[Body], given: dict[str, Any]) -> int:
    try:
        kind.model_validate(given)
    except ValidationError as error:
        return error.error_count()
    return 0


@pytest.mark.parametrize(("kind", "name"), FIELDS, ids=lambda value: getattr(value, "__name__", value))
def test_no_field_of_any_body_makes_a_report_of_many_mistakes(kind: type[Body], name: str) -> None:
    assert max(num_mistakes(kind, {name: value}) for value in WRONG.values()) <= MOST_MISTAKES


@pytest.mark.parametrize("kind", list(dict.fromkeys(kinds())), ids=lambda kind: kind.__name__)
def test_many_unknown_fields_are_one_mistake(kind: type[Body]) -> None:
    with pytest.raises(ValidationError) as caught:
        TypeAdapter(kind).validate_python({f"made_up_{index}": 1 for index in range(NUM_WRONG)})
    assert caught.value.error_count() == 1
    assert caught.value.errors()[0]["type"] == "extra_forbidden"
    assert caught.value.errors()[0]["loc"] == ("made_up_0",)


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (b"[" + b"{}," * (1 << 20) + b"{}]", "lists and objects"),
        (b"[" + b"[]," * (1 << 20) + b"[]]", "lists and objects"),
        (b'{"prompt":[' + b"0," * (MAX_ELEMENTS + 1) + b"0]}", "elements"),
        (b"{" + b'"a":1,' * (1 << 18) + b'"b":1}', "members"),
    ],
    ids=["objects", "lists", "numbers", "members"],
)
def test_a_body_of_too_many_elements_is_refused_before_any_is_made(
    body: bytes, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http.msgspec.json, "decode", lambda _: pytest.fail("it was decoded"))
    with pytest.raises(InvalidRequestError, match=text):
        _parse(body)


def test_lists_and_objects_are_counted_and_brackets_in_texts_are_not() -> None:
    with pytest.raises(InvalidRequestError, match="lists and objects"):
        _parse(b'{"messages":[' + b"{}," * MAX_CONTAINERS + b"{}]}")
    with pytest.raises(InvalidRequestError, match="an object of 65537 members"):
        _parse(json.dumps({"logit_bias": {str(index): 1 for index in range(MAX_MEMBERS + 1)}}).encode())
    text = "{[" * MAX_CONTAINERS
    assert _parse(json.dumps({"prompt": text}).encode()) == {"prompt": text}


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "a" * 65, "content": "x"}], "role: got 65 characters"),
        ([{"role": f"role{index}", "content": "x"} for index in range(17)], "got 17 roles"),
    ],
)
def test_roles_are_few_and_short(messages: list[dict[str, str]], text: str) -> None:
    """A role of 60 MB kept a thread for 48 s: what the template does with it was tried out."""
    with pytest.raises(InvalidRequestError, match=text):
        parse_messages(messages)


@pytest.mark.parametrize(
    "read",
    [
        lambda: parse_messages([{}] * 4097),
        lambda: parse_messages([{"role": "user", "content": [{}] * 4097}]),
        lambda: read_items([{}] * 4097),
        lambda: read_items([{"role": "user", "content": [{}] * 4097}]),
        lambda: CompletionBody(prompt=["a"] * 257).prompts(),
        lambda: CompletionBody(prompt="a", stop=[""] * 65).params(),
        lambda: CompletionBody(prompt="a", stop_token_ids=[-1] * 1025).params(),
        lambda: CompletionBody(prompt="a", bad_words=[""] * 257).params(),
        lambda: CompletionBody(prompt="a", logit_bias={str(-index): 0.0 for index in range(1025)}).params(),
        lambda: CompletionBody(prompt="a", guided_choice=[""] * 1025).params(),
        lambda: ChatBody.model_validate({"messages": [], "tools": [_tool("x")] * 129}).tool_request(),
        lambda: ResponseBody.model_validate({"tools": [{}] * 129}).tool_request(),
        lambda: ResponseBody.model_validate({"metadata": {str(index): "" for index in range(17)}}).check(),
    ],
)
def test_lengths_are_looked_at_before_contents(read: Any) -> None:
    """Each of these is too long, and has contents that would be another error."""
    with pytest.raises(InvalidRequestError, match=r"got (4097|257|65|1025|129|17)\b.* expected at most|expected 1 to"):
        read()


def test_what_is_too_long_is_not_written_out_to_be_measured() -> None:
    assert is_within({"a": [1, 2, {"b": "c"}]}, 100)
    assert not is_within({"a": "x" * 100}, 100)
    endless: list[Any] = []
    endless.append(endless)
    assert not is_within(endless, 1000)
    with pytest.raises(InvalidRequestError, match="more than 131072 characters"):
        StructuredOutputs(json={"enum": ["x" * 1000] * 200})
    body = ChatBody.model_validate({"messages": [], "tools": [_tool("x" * 200_000)]})
    with pytest.raises(InvalidRequestError, match="more than 131072 characters"):
        body.tool_request()


def _tool(description: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "a", "description": description}}

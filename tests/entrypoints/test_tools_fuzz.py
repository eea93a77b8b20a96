"""Whatever a body says about tools, and whatever a model says of calls: an answer or a 400."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.entrypoints.scripted import Script, checkpoint_with_marks
from tests.entrypoints.served import Served, served
from tests.helpers.tool_templates import TEMPLATES
from tests.helpers.waiting import HANG_S
from tests.parsing.test_properties import SNIPPETS

USER: dict[str, Any] = {"role": "user", "content": "a"}
PARAMETERS: dict[str, Any] = {
    "type": "object",
    "properties": {"s": {"type": "string"}, "e": {"enum": ["a", 1]}, "r": {"$ref": "#/$defs/D"}},
    "required": ["s"],
    "$defs": {"D": {"type": "integer"}},
}
FUNCTION = {"name": "f", "description": "d", "parameters": PARAMETERS, "strict": True}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "f", "arguments": '{"s": "x"}'}}
BODY: dict[str, Any] = {
    "messages": [
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "b"},
    ],
    "tools": [{"type": "function", "function": FUNCTION}],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "parallel_tool_calls": True,
    "response_format": {"type": "json_object"},
    "stream": False,
}
JUNK: list[Any] = [
    *(None, True, 0, -1, 1.5, 10**30, "", "x", "\x00", "😀", "<tool_call>", "{", "f", "auto", "required", "object"),
    *([], {}, [[]], [{}], {"type": "function"}, {"name": "f"}, ["s"], {"a": {"b": [1]}}, {"$ref": "#"}),
    *({"type": ["string", "null"]}, {"enum": []}, {"enum": "ab"}, {"type": 3}, "x" * 3000),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = checkpoint_with_marks(tmp_path_factory.mktemp("fuzz"))
    options = {"trust_request_chat_template": True}
    with served(path, options, chat_template=TEMPLATES["hermes_thinking"]) as running:
        yield running


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every place within a value: what holds it, and its key there."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def damaged(body: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same body with something else, or nothing, in a random place."""
    changed = copy.deepcopy(body)
    holder, key = rng.choice(places(changed))
    if rng.random() < 0.2:
        del holder[key]
    else:
        holder[key] = rng.choice(JUNK)
    return changed


@pytest.mark.parametrize("template", TEMPLATES)
def test_damaged_bodies_are_answered_or_refused(server: Served, template: str) -> None:
    script = Script(texts=['<tool_call>{"name": "f", "arguments": {}}</tool_call>'])
    script.install(server)
    rng = random.Random(template)
    statuses = set()
    with httpx.Client(base_url=server.url, timeout=HANG_S) as client:
        for _ in range(200):
            body = damaged(BODY, rng)
            response = client.post("/v1/chat/completions", json={**body, "chat_template": TEMPLATES[template]})
            statuses.add(response.status_code)
            assert response.status_code in (200, 400), (body, response.text)
            if response.status_code == 400:
                assert response.json()["error"]["message"]
    assert statuses == {200, 400}
    del server.engine.generate  # type: ignore[method-assign]


def test_whatever_a_model_says_is_an_answer(server: Served) -> None:
    script = Script()
    script.install(server)
    rng = random.Random(0)
    with httpx.Client(base_url=server.url, timeout=HANG_S) as client:
        for number in range(120):
            script.texts = ["".join(rng.choice(SNIPPETS) for _ in range(rng.randrange(30)))]
            script.tokens_at_once = rng.randrange(1, 8)
            template = rng.choice(list(TEMPLATES))
            body = {"messages": [USER], "tools": BODY["tools"], "chat_template": TEMPLATES[template]}
            response = client.post("/v1/chat/completions", json={**body, "stream": number % 2 == 0})
            assert response.status_code == 200, (script.texts, response.text)
            assert "server_error" not in response.text
    del server.engine.generate  # type: ignore[method-assign]

"""Calls of functions and reasoning in responses: what the client reads is what the model said, and goes back to it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pydantic
import pytest

from sensorium.structured_outputs import StructuredOutputs
from tests.entrypoints.scripted import Script, checkpoint_with_marks
from tests.entrypoints.served import Served, served
from tests.helpers.tool_templates import TEMPLATES

WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "strict": False,
}
NOW: Any = {"type": "function", "name": "now", "parameters": None, "strict": None}
TOOLS: list[Any] = [WEATHER, NOW]
ARGUMENTS = '{"city": "Paris", "days": 3}'
CALLS = (
    f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = checkpoint_with_marks(tmp_path_factory.mktemp("tools"))
    with served(path, chat_template=TEMPLATES["hermes_thinking"]) as running:
        yield running


@pytest.fixture
def script(server: Served) -> Iterator[Script]:
    script = Script()
    script.install(server)
    yield script
    del server.engine.generate  # type: ignore[method-assign]


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, **options: Any) -> Any:
    return client.responses.create(**{"model": "tiny", "input": "Weather in Paris?", **options})


def test_calls_whole_and_streamed(client: openai.OpenAI, script: Script) -> None:
    script.texts = [f"I look.\n{CALLS}"]
    whole = ask(client, tools=TOOLS)
    assert [item.type for item in whole.output] == ["message", "function_call", "function_call"]
    message, weather, now = whole.output
    assert message.content[0].text == "I look."
    assert [(call.name, json.loads(call.arguments), call.status) for call in (weather, now)] == [
        ("weather", json.loads(ARGUMENTS), "completed"),
        ("now", {}, "completed"),
    ]
    assert len({weather.call_id, now.call_id, weather.id, now.id}) == 4
    assert (whole.status, whole.tool_choice, whole.parallel_tool_calls) == ("completed", "auto", True)
    assert [tool.name for tool in whole.tools] == ["weather", "now"]
    events = list(ask(client, tools=TOOLS, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    pieces = [event for event in events if event.type == "response.function_call_arguments.delta"]
    assert len(pieces) > 3
    done = [event for event in events if event.type == "response.function_call_arguments.done"]
    assert [(event.name, event.arguments) for event in done] == [(c.name, c.arguments) for c in (weather, now)]
    for event in done:
        assert "".join(each.delta for each in pieces if each.item_id == event.item_id) == event.arguments
    kinds = [event.type.removeprefix("response.") for event in events if "delta" not in event.type]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "function_call_arguments.done", "output_item.done") * 2,
        "completed",
    ]


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: str
    days: int


@pytest.mark.parametrize("tokens_at_once", [1, 4, 1000])
def test_the_clients_own_helpers_read_the_same(client: openai.OpenAI, script: Script, tokens_at_once: int) -> None:
    script.texts, script.tokens_at_once = [f"<think>Hm.</think>\n\nI look.\n{CALLS}"], tokens_at_once
    tool = openai.pydantic_function_tool(Weather, name="weather")["function"]
    tools: list[Any] = [{"type": "function", **tool}, NOW]
    with client.responses.stream(model="tiny", input="Weather?", tools=tools) as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    parsed = client.responses.parse(model="tiny", input="Weather?", tools=tools)
    for response in (final, parsed):
        assert [item.type for item in response.output] == ["reasoning", "message", "function_call", "function_call"]
        assert response.output[0].content[0].text == "Hm."  # type: ignore[union-attr, index]
        assert response.output_text == "I look."
        assert json.loads(response.output[2].arguments) == json.loads(ARGUMENTS)  # type: ignore[union-attr]


def test_what_was_called_goes_back_with_its_result(client: openai.OpenAI, script: Script) -> None:
    """By hand or from what is kept: the same prompt as the chat with these messages."""
    script.texts = [f"<think>Hm.</think>\n\n{CALLS}"]
    first = ask(client, tools=TOOLS)
    results: list[Any] = [
        {"type": "function_call_output", "call_id": item.call_id, "output": "sunny"}
        for item in first.output
        if item.type == "function_call"
    ]
    script.texts = ["It is sunny."]
    kept = ask(client, input=results, previous_response_id=first.id, tools=TOOLS)
    assert kept.output_text == "It is sunny."
    by_hand = [{"role": "user", "content": "Weather in Paris?"}, *first.output, *results]
    ask(client, input=by_hand, tools=TOOLS)
    calls = [
        {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
        for item in first.output
        if item.type == "function_call"
    ]
    messages: list[Any] = [
        {"role": "user", "content": "Weather in Paris?"},
        {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": calls},
        *({"role": "tool", "tool_call_id": each["call_id"], "content": "sunny"} for each in results),
    ]
    tools: list[Any] = [
        {"type": "function", "function": {key: value for key, value in tool.items() if key != "type"}} for tool in TOOLS
    ]
    client.chat.completions.create(model="tiny", messages=messages, tools=tools)
    by_memory, by_items, by_chat = script.prompts[-3:]
    assert by_memory == by_items == by_chat
    assert "sunny" in by_chat
    with pytest.raises(openai.BadRequestError, match=r"input\[0\]\.call_id: got 'call_other'"):
        ask(client, input=[{**results[0], "call_id": "call_other"}], previous_response_id=first.id)


def test_reasoning_is_apart_and_counted(client: openai.OpenAI, script: Script) -> None:
    script.texts = ["<think>\nHm, hm.\n</think>\n\nYes."]
    whole = ask(client, include=["message.output_text.logprobs"])
    reasoning, message = whole.output
    assert (reasoning.type, reasoning.content[0].text, reasoning.summary) == ("reasoning", "Hm, hm.", [])
    assert message.content[0].text == whole.output_text == "Yes."
    assert whole.usage.output_tokens_details.reasoning_tokens == len("\nHm, hm.\n") + 2  # a token for each mark
    assert 4 <= len(message.content[0].logprobs) < whole.usage.output_tokens
    events = list(ask(client, stream=True))
    kinds = [event.type.removeprefix("response.") for event in events if "delta" not in event.type]
    assert kinds == [
        *("created", "in_progress"),
        *("output_item.added", "content_part.added", "reasoning_text.done", "content_part.done", "output_item.done"),
        *("output_item.added", "content_part.added", "output_text.done", "content_part.done", "output_item.done"),
        "completed",
    ]
    assert "".join(event.delta for event in events if event.type == "response.reasoning_text.delta") == "Hm, hm."
    script.texts, script.finish_reason = ["<think>Hm, and"], "length"
    cut = ask(client)
    assert (cut.status, cut.output[0].type, cut.output_text) == ("incomplete", "reasoning", "")


def test_the_setting_of_reasoning_reaches_the_template(client: openai.OpenAI, script: Script) -> None:
    script.texts = ["Yes."]
    answer = ask(client, reasoning={"effort": "none"})
    assert answer.reasoning.effort == "none"
    assert script.prompts[-1].endswith("<think>\n\n</think>\n\n")
    ask(client, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
    assert script.prompts[-1].endswith("<think>\n\n</think>\n\n")
    ask(client, reasoning={"effort": "high", "summary": None})
    assert "<think>" not in script.prompts[-1]


def form_of(client: openai.OpenAI, script: Script, **options: Any) -> Any:
    script.texts = [CALLS]
    ask(client, **options)
    return script.params[-1].structured_outputs


def test_what_must_be_called_is_held_to_by_a_grammar(client: openai.OpenAI, script: Script) -> None:
    assert form_of(client, script, tools=TOOLS) is None
    required = form_of(client, script, tools=TOOLS, tool_choice="required")
    assert "weather" in required.grammar
    assert "now" in required.grammar
    named = form_of(client, script, tools=TOOLS, tool_choice={"type": "function", "name": "now"})
    allowed = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "now"}]}
    for form in (named, form_of(client, script, tools=TOOLS, tool_choice=allowed)):
        assert "weather" not in form.grammar
        assert "weather" in script.prompts[-1], "the model knows all"
    assert form_of(client, script, tools=TOOLS, tool_choice={**allowed, "mode": "auto"}) is None
    assert form_of(client, script, tools=TOOLS, tool_choice="none") is None
    assert "weather" not in script.prompts[-1]
    assert form_of(client, script, tools=[{**WEATHER, "strict": True}]) is not None


def test_one_call_at_a_time(client: openai.OpenAI, script: Script) -> None:
    script.texts = [CALLS]
    answer = ask(client, tools=TOOLS, parallel_tool_calls=False)
    assert [item.name for item in answer.output] == ["weather"]
    assert answer.parallel_tool_calls is False


def test_a_schema_that_cannot_be_held_to_is_named_in_terms_of_the_body(client: openai.OpenAI) -> None:
    """The engine tells of a grammar that the client never sent."""
    odd = {"type": "string", "not": {"const": "odd"}, "maxLength": 2}
    parameters = {"type": "object", "properties": {"a": odd}, "required": ["a"], "additionalProperties": False}
    strict = {"type": "function", "name": "f", "parameters": parameters, "strict": True}
    with pytest.raises(openai.BadRequestError, match="tools: calls can't be held to the functions' parameters") as told:
        ask(client, tools=[strict])
    assert 'Unimplemented keys: ["not"]' in str(told.value)
    assert "structured_outputs" not in str(told.value)
    asked: Any = {"format": {"type": "json_schema", "name": "x", "schema": odd}}
    with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema: got a schema that can't be held to"):
        ask(client, text=asked)


def test_formats_become_the_form_of_the_output(client: openai.OpenAI, script: Script) -> None:
    script.texts = ["{}"]
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    asked: dict[str, Any] = {"type": "json_schema", "name": "x", "schema": schema, "strict": True}
    answer = ask(client, text={"format": asked})
    # The model may reason before it answers, so what holds it is a grammar around the schema.
    form = script.params[-1].structured_outputs
    assert '%json {"type": "object", "properties": {"a": {"type": "integer"}}' in form.grammar
    assert answer.text.format.to_dict() == asked
    ask(client, text={"format": {"type": "json_object"}})
    form = script.params[-1].structured_outputs
    assert '%json {"type": "object"' in form.grammar
    assert "properties" not in form.grammar
    ask(client, text={"format": {"type": "text"}})
    assert script.params[-1].structured_outputs is None
    ask(client, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert script.params[-1].structured_outputs == StructuredOutputs(choice=["yes", "no"])
    with pytest.raises(openai.BadRequestError, match=r"structured_outputs: got text\.format too"):
        ask(client, text={"format": asked}, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": "weather"}, "tools: got a value of type str"),
    ({"tools": [3]}, r"tools\[0\]\.type: got None"),
    ({"tools": [{"type": "web_search"}]}, r"tools\[0\]\.type: got 'web_search'.*runs no tools"),
    ({"tools": [{"type": "function"}]}, r"tools\[0\]\.name: got nothing"),
    ({"tools": [{"type": "function", "name": "a b"}]}, r"tools\[0\]\.name: got 'a b'"),
    ({"tools": [{**NOW, "defer_loading": True}]}, r"tools\[0\]\.defer_loading: got True, expected false"),
    ({"tools": [NOW, NOW]}, r"tools\[1\]\.name: got 'now', expected a name that no other has"),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice: got 'any'"),
    ({"tools": TOOLS, "tool_choice": 3}, "tool_choice: got a value of type int"),
    ({"tools": TOOLS, "tool_choice": {"type": "mcp"}}, r"tool_choice\.type: got 'mcp'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice: got something else"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "b"}}, "tool_choice: got the function 'b'"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "name": "now", "x": 1}}, r"tool_choice\.x: got"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "all"}}, r"tool_choice\.mode: got 'all'"),
    ({"tools": TOOLS, "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, r"tool_choice\.tools: got none"),
    (
        {
            "tools": TOOLS,
            "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "function", "name": "b"}]},
        },
        r"tool_choice\.tools: got 'b'",
    ),
    ({"tool_choice": "required"}, "tool_choice: got 'required' without tools"),
    ({"reasoning": {"summary": "long"}}, r"reasoning\.summary: got 'long', expected 'auto'"),
    ({"reasoning": {"effort": "endless"}}, r"reasoning\.effort: got 'endless'"),
    ({"reasoning": {"mode": "pro"}}, r"reasoning\.mode: got 'pro', expected 'standard'"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_named(client: openai.OpenAI, script: Script, options: dict[str, Any], message: str) -> None:
    script.texts = ["Yes."]
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **options)
    assert not script.prompts

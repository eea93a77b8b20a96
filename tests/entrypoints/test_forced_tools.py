"""Calls that must be made, by a model that has no idea of them: the grammar alone brings them about."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.entrypoints.scripted import checkpoint_with_marks
from tests.entrypoints.served import Served, served
from tests.helpers.tool_templates import TEMPLATES

CHAT: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"type": "string", "enum": ["Paris", "Rome"]}, "days": {"type": "integer", "enum": [1, 3]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS, "strict": True}}
NOW: Any = {
    "type": "function",
    "function": {"name": "now", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}},
}
NAMED: Any = {"type": "function", "function": {"name": "weather"}}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path = checkpoint_with_marks(tmp_path_factory.mktemp("tools"))
    with served(path, {"trust_request_chat_template": True}, chat_template=TEMPLATES["hermes"]) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, template: str, **options: Any) -> Any:
    extra = {"chat_template": TEMPLATES[template], **options.pop("extra_body", {})}
    fields = {"model": "tiny", "messages": CHAT, "tools": [WEATHER, NOW], "max_tokens": 900, "seed": 1}
    return client.chat.completions.create(**{**fields, "extra_body": extra, **options})


def check(calls: Any) -> None:
    for call in calls:
        arguments = json.loads(call.function.arguments)
        if call.function.name == "weather":
            assert arguments["city"] in ("Paris", "Rome")
            assert arguments["days"] in (1, 3)
        else:
            assert (call.function.name, arguments) == ("now", {})


@pytest.mark.parametrize("template", ["hermes", "qwen3_coder", "glm", "mistral", "llama3", "json"])
def test_a_call_that_is_required_or_named_is_made(client: openai.OpenAI, template: str) -> None:
    required = ask(client, template, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert (required.finish_reason, required.message.content, len(required.message.tool_calls)) == (
        "tool_calls",
        None,
        1,
    )
    check(required.message.tool_calls)
    named = ask(client, template, tool_choice=NAMED).choices[0]
    assert [call.function.name for call in named.message.tool_calls] == ["weather"]
    check(named.message.tool_calls)
    with client.chat.completions.stream(
        model="tiny",
        messages=CHAT,
        tools=[WEATHER],
        tool_choice=NAMED,
        max_tokens=900,
        seed=1,
        extra_body={"chat_template": TEMPLATES[template]},
    ) as stream:
        final = stream.get_final_completion().choices[0]
    assert final.finish_reason == "tool_calls"
    check(final.message.tool_calls)


def test_several_required_calls(client: openai.OpenAI) -> None:
    choices = ask(client, "hermes", tool_choice="required", n=4).choices
    for choice in choices:
        assert choice.message.tool_calls
        check(choice.message.tool_calls)


def test_a_model_that_may_reason_first_still_calls(client: openai.OpenAI) -> None:
    choice = ask(client, "hermes_thinking", tool_choice=NAMED, logit_bias={"0": 0}).choices[0]
    assert choice.message.tool_calls or choice.finish_reason == "length"


def test_strict_functions_leave_text_free(client: openai.OpenAI) -> None:
    choice = ask(client, "hermes", max_tokens=40, temperature=0.0).choices[0]
    check(choice.message.tool_calls or [])
    assert choice.message.content or choice.message.tool_calls


def test_json_or_calls(client: openai.OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["blue", "grey"]}},
        "required": ["sky"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    kinds = set()
    for choice in ask(client, "hermes", response_format=form, n=8).choices:
        calls = choice.message.tool_calls
        kinds.add(bool(calls))
        check(calls or [])
        if not calls:
            assert json.loads(choice.message.content)["sky"] in ("blue", "grey")
    assert kinds


def test_json_behind_reasoning(client: openai.OpenAI) -> None:
    """The model may write reasoning first, whether it begins it itself or the prompt did; the JSON is the content."""
    schema = {
        "type": "object",
        "properties": {"sky": {"enum": ["blue"]}},
        "required": ["sky"],
        "additionalProperties": False,
    }
    form: Any = {"type": "json_schema", "json_schema": {"name": "sky", "schema": schema}}
    options: dict[str, Any] = {"response_format": form, "tools": openai.omit, "temperature": 0.0}
    for template, biased in (
        ("hermes_thinking", ("{",)),
        ("hermes_thinking", ("<think>", "</think>")),
        ("hermes_open", ("</think>",)),
    ):
        bias = {str(client_token(client, each)): 40.0 for each in biased}
        choice = ask(client, template, logit_bias=bias, logprobs=True, **options).choices[0]
        assert json.loads(choice.message.content) == {"sky": "blue"}
        assert ("</think>" in [each.token for each in choice.logprobs.content]) == ("</think>" in biased)
    bad: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "string", "not": {}}}}
    with pytest.raises(
        openai.BadRequestError, match=r"response_format\.json_schema\.schema: got a schema that can't be held to"
    ):
        ask(client, "hermes_thinking", response_format=bad, tools=openai.omit)


def client_token(client: openai.OpenAI, text: str) -> int:
    """The id of a token."""
    url = str(client.base_url).replace("/v1/", "/tokenize")
    (token_id,) = client.post(url, body={"prompt": text, "add_special_tokens": False}, cast_to=dict[str, Any])["tokens"]
    return int(token_id)


def test_a_schema_that_cannot_be_held_to_is_named_for_strict_functions_only(client: openai.OpenAI) -> None:
    odd = {
        "type": "object",
        "properties": {"a": {"type": "string", "not": {"const": "x"}, "maxLength": 2}},
        "additionalProperties": False,
    }
    function = {"name": "f", "parameters": odd}
    strict: Any = [{"type": "function", "function": {**function, "strict": True}}]
    with pytest.raises(openai.BadRequestError, match="tools: calls can't be held to the functions' parameters"):
        ask(client, "hermes", tools=strict)
    loose: Any = [{"type": "function", "function": function}]
    choice = ask(client, "hermes", tools=loose, tool_choice="required", parallel_tool_calls=False).choices[0]
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


NOTHING = {
    "left out": {},
    "null": {"parameters": None},
    "empty": {"parameters": {}},
    "an object": {"parameters": {"type": "object"}},
    "no properties": {"parameters": {"type": "object", "properties": {}, "required": []}},
    "closed": {"parameters": {"type": "object", "properties": {}, "additionalProperties": False, "title": "Now"}},
}


@pytest.mark.parametrize("template", ["hermes", "qwen3_coder", "glm", "mistral", "llama3", "json"])
@pytest.mark.parametrize("case", NOTHING)
def test_a_forced_function_without_parameters_gets_an_empty_object(
    client: openai.OpenAI, template: str, case: str
) -> None:
    """Its arguments were made up, such as `{"e": "sw"}`, strict or not: a schema that names none was any object."""
    named: Any = {"type": "function", "function": {"name": "noon"}}
    for strict, choice in ((True, "required"), (False, "required"), (None, named)):
        tools: Any = [{"type": "function", "function": {"name": "noon", "strict": strict, **NOTHING[case]}}]
        answer = ask(client, template, tools=tools, tool_choice=choice, parallel_tool_calls=False, temperature=1.3)
        (call,) = answer.choices[0].message.tool_calls
        assert (call.function.name, json.loads(call.function.arguments)) == ("noon", {})
    chunks = ask(client, template, tools=tools, tool_choice=named, stream=True, temperature=1.3)
    pieces = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert json.loads("".join(each.function.arguments for each in pieces)) == {}


@pytest.mark.parametrize("case", NOTHING)
def test_a_function_without_parameters_on_the_responses_route(client: openai.OpenAI, case: str) -> None:
    for choice in ("required", {"type": "function", "name": "noon"}):
        options: Any = {"tools": [{"type": "function", "name": "noon", **NOTHING[case]}], "tool_choice": choice}
        response = client.responses.create(model="tiny", input="Hi", parallel_tool_calls=False, **options)
        (call,) = response.output
        assert (call.type, call.name, json.loads(call.arguments)) == ("function_call", "noon", {})


def test_an_answer_cut_at_any_token_of_a_forced_call_has_no_content(client: openai.OpenAI) -> None:
    """Pieces of marks were content, whole and streamed, where `max_tokens` fell into one."""
    for template in ("hermes", "qwen3_coder", "glm", "mistral", "llama3"):
        whole = ask(client, template, tool_choice=NAMED, temperature=0.0)
        for cut in range(1, min(whole.usage.completion_tokens, 90), 3):
            options: dict[str, Any] = {"tool_choice": NAMED, "temperature": 0.0, "max_tokens": cut}
            assert not ask(client, template, **options).choices[0].message.content
            chunks = ask(client, template, stream=True, **options)
            assert not "".join(chunk.choices[0].delta.content or "" for chunk in chunks)


def test_a_stop_string_within_a_mark_leaves_no_content(client: openai.OpenAI) -> None:
    answer = ask(client, "hermes", tool_choice=NAMED, stop=["_call>"], temperature=0.0).choices[0]
    assert not answer.message.content

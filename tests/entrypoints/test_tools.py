"""Calls of functions and reasoning, through the official client: what it reads is what the model said."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pydantic
import pytest

from sensorium import SamplingParams
from tests.entrypoints.scripted import Script, checkpoint_with_marks
from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.tool_templates import TEMPLATES


class Weather(pydantic.BaseModel):
    """Tells the weather."""

    city: str
    days: int


WEATHER: Any = openai.pydantic_function_tool(Weather, name="weather")
LOOSE: Any = {"type": "function", "function": {**WEATHER["function"], "strict": False}}
NOW: Any = {"type": "function", "function": {"name": "now"}}
TOOLS: list[Any] = [LOOSE, NOW]
CHAT: list[Any] = [{"role": "user", "content": "Weather in Paris?"}]
ARGUMENTS = '{"city": "Paris", "days": 3}'
ANSWERS = {
    "hermes": f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>\n'
    '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>",
    "mistral": f"[TOOL_CALLS]weather[ARGS]{ARGUMENTS}[TOOL_CALLS]now[ARGS]{{}}",
    "llama3": f'<|python_tag|>{{"name": "weather", "parameters": {ARGUMENTS}}}; {{"name": "now", "parameters": {{}}}}',
    "json": f'[{{"name": "weather", "arguments": {ARGUMENTS}}}, {{"name": "now", "arguments": {{}}}}]',
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    path: Path = checkpoint_with_marks(tmp_path_factory.mktemp("tools"))
    options = {"trust_request_chat_template": True}
    with served(path, options, chat_template=TEMPLATES["hermes_thinking"]) as running:
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


def ask(client: openai.OpenAI, template: str | None = None, **options: Any) -> Any:
    extra = {} if template is None else {"chat_template": TEMPLATES[template]}
    extra |= options.pop("extra_body", {})
    return client.chat.completions.create(model="tiny", **{"messages": CHAT, "extra_body": extra, **options})


@pytest.mark.parametrize("name", ANSWERS)
def test_calls_whole_and_streamed(client: openai.OpenAI, script: Script, name: str) -> None:
    script.texts = [ANSWERS[name]]
    whole = ask(client, name, tools=TOOLS)
    (choice,) = whole.choices
    assert (choice.finish_reason, choice.message.content) == ("tool_calls", None)
    calls = choice.message.tool_calls
    assert [(call.type, call.function.name) for call in calls] == [("function", "weather"), ("function", "now")]
    assert [json.loads(call.function.arguments) for call in calls] == [json.loads(ARGUMENTS), {}]
    form = r"[a-zA-Z0-9]{9}" if name == "mistral" else r"call_[a-zA-Z0-9]{24}"
    assert all(re.fullmatch(form, call.id) for call in calls)
    assert len({call.id for call in calls}) == 2

    chunks = list(ask(client, name, tools=TOOLS, stream=True))
    deltas = [chunk.choices[0].delta for chunk in chunks]
    assert (deltas[0].role, deltas[0].content, deltas[0].tool_calls) == ("assistant", None, None)
    pieces = [each for delta in deltas for each in delta.tool_calls or []]
    first = [each for each in pieces if each.id]
    assert [(each.index, each.type, each.function.name) for each in first] == [
        (0, "function", "weather"),
        (1, "function", "now"),
    ]
    assert all(each.function.arguments == "" for each in first)
    assert all(each.type is None and each.function.name is None for each in pieces if not each.id)
    for index, call in enumerate(calls):
        streamed = "".join(each.function.arguments for each in pieces if each.index == index)
        assert streamed == call.function.arguments
    assert len([each for each in pieces if each.index == 0]) > 3
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "tool_calls"
    assert {chunk.choices[0].finish_reason for chunk in chunks[:-1]} == {None}
    # What the client got goes back to the model, with the result.
    history = [*CHAT, choice.message, *({"role": "tool", "tool_call_id": c.id, "content": "sunny"} for c in calls)]
    script.texts = ["It is sunny."]
    answer = ask(client, name, messages=history, tools=TOOLS)
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == ("It is sunny.", "stop")
    assert answer.choices[0].message.tool_calls is None
    assert "Paris" in script.prompts[-1].removeprefix(script.prompts[0])
    assert "sunny" in script.prompts[-1]


@pytest.mark.parametrize("tokens_at_once", [1, 4, 1000])
def test_the_stream_helper_makes_the_same_answer(client: openai.OpenAI, script: Script, tokens_at_once: int) -> None:
    script.texts = [f"<think>Hm.</think>\n\nI look.\n{ANSWERS['hermes']}"]
    script.tokens_at_once = tokens_at_once
    with client.chat.completions.stream(model="tiny", messages=CHAT, tools=[WEATHER, NOW]) as stream:
        events = list(stream)
        final = stream.get_final_completion()
    message: Any = final.choices[0].message
    assert message.content == "I look."
    assert message.reasoning_content == message.reasoning == "Hm."
    assert message.tool_calls[0].function.parsed_arguments == Weather(city="Paris", days=3)
    assert final.choices[0].finish_reason == "tool_calls"
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name) for event in done] == [(0, "weather"), (1, "now")]
    parsed: Any = client.chat.completions.parse(model="tiny", messages=CHAT, tools=[WEATHER])
    assert parsed.choices[0].message.tool_calls[0].function.parsed_arguments == Weather(city="Paris", days=3)


def test_the_async_client_and_several_choices(server: Served, script: Script) -> None:
    script.texts = [ANSWERS["hermes"], "No call.", "<think>Hm.</think>Yes."]

    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            answer = await client.chat.completions.create(model="tiny", messages=CHAT, tools=TOOLS, n=3)
            reasons = [choice.finish_reason for choice in answer.choices]
            assert reasons == ["tool_calls", "stop", "stop"]
            assert [choice.message.content for choice in answer.choices] == [None, "No call.", "Yes."]
            async with client.chat.completions.stream(model="tiny", messages=CHAT, tools=TOOLS, n=3) as stream:
                final = await stream.get_final_completion()
            assert [choice.finish_reason for choice in final.choices] == reasons
            assert [choice.message.content for choice in final.choices] == [None, "No call.", "Yes."]
            ids = [call.id for choice in answer.choices for call in choice.message.tool_calls or []]
            assert len(set(ids)) == len(ids) == 2

    asyncio.run(run())


def test_reasoning_is_apart_and_counted(client: openai.OpenAI, script: Script) -> None:
    script.texts = ["<think>\nHm, hm.\n</think>\n\nYes."]
    whole = ask(client)
    message = whole.choices[0].message
    assert (message.content, message.reasoning_content, message.reasoning) == ("Yes.", "Hm, hm.", "Hm, hm.")
    details = whole.usage.completion_tokens_details
    assert details.reasoning_tokens == len("\nHm, hm.\n") + 2  # a token for each mark
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    deltas = [chunk.choices[0].delta for chunk in chunks if chunk.choices]
    assert "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas) == "Hm, hm."
    assert "".join(delta.content or "" for delta in deltas) == "Yes."
    assert chunks[-1].usage.completion_tokens_details.reasoning_tokens == details.reasoning_tokens
    without = ask(client, extra_body={"include_reasoning": False})
    assert without.choices[0].message.content == "Yes."
    assert not hasattr(without.choices[0].message, "reasoning")
    assert without.usage.completion_tokens_details.reasoning_tokens == details.reasoning_tokens


def test_a_prompt_that_opens_reasoning(client: openai.OpenAI, script: Script) -> None:
    script.texts = ["Hm.\n</think>\n\nYes."]
    message = ask(client, "hermes_open").choices[0].message
    assert (message.content, message.reasoning) == ("Yes.", "Hm.")
    script.finish_reason, script.texts = "length", ["Hm, and"]
    choice = ask(client, "hermes_open").choices[0]
    assert (choice.message.content, choice.message.reasoning, choice.finish_reason) == ("", "Hm, and", "length")


def test_an_answer_that_goes_on_within_reasoning(client: openai.OpenAI, script: Script) -> None:
    script.texts = [" and so.</think>Yes."]
    begun = [*CHAT, {"role": "assistant", "content": "<think>Hm,"}]
    options = {"continue_final_message": True, "add_generation_prompt": False}
    message = ask(client, messages=begun, extra_body=options).choices[0].message
    assert (message.content, message.reasoning) == ("Yes.", "and so.")


WITHOUT_SETTING = "the model's chat template has no setting for it."


def test_an_effort_that_a_template_has_no_setting_for_is_passed_over_with_a_warning(
    client: openai.OpenAI, script: Script
) -> None:
    """Clients send it to every model, and couldn't use those that don't reason."""
    chats, responses = client.chat.completions.with_raw_response, client.responses.with_raw_response
    body: dict[str, Any] = {"model": "tiny", "messages": CHAT, "extra_body": {"chat_template": TEMPLATES["llama3"]}}
    for stream in (False, True):
        script.texts = ["Yes."]
        answer = chats.create(**body, reasoning_effort="low", stream=stream)
        assert answer.headers["Warning"] == f'299 sensorium "reasoning_effort was ignored: {WITHOUT_SETTING}"'
        assert "Warning" not in chats.create(**body, stream=stream).headers
    cost = client.post("/chat/token_cost", cast_to=dict[str, Any], body={**body.pop("extra_body"), **body})
    with pytest.raises(openai.BadRequestError, match="reasoning_effort: got 'endless'"):
        ask(client, "llama3", reasoning_effort="endless")
    assert cost["prompt_tokens"]
    assert "Warning" not in responses.create(model="tiny", input="Hi", reasoning={"effort": "low"}).headers


def test_a_strict_server_refuses_an_effort_that_can_t_be_had() -> None:
    with (
        served(make_checkpoint("llava"), {"strict_reasoning_effort": True}) as strict,
        openai.OpenAI(base_url=f"{strict.url}/v1", api_key="none", max_retries=0) as client,
    ):
        with pytest.raises(openai.BadRequestError, match="reasoning_effort: got 'low', expected none"):
            client.chat.completions.create(model="tiny", messages=CHAT, reasoning_effort="low")
        with pytest.raises(openai.BadRequestError, match=r"reasoning\.effort: got 'low', expected none"):
            client.responses.create(model="tiny", input="Hi", reasoning={"effort": "low"})


def test_settings_of_reasoning_reach_the_template(client: openai.OpenAI, script: Script) -> None:
    script.texts = ["Yes."]
    for options in ({"reasoning_effort": "none"}, {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}):
        ask(client, **options)
        assert script.prompts[-1].endswith("<think>\n\n</think>\n\n")
    ask(client, reasoning_effort="high")
    assert "<think>" not in script.prompts[-1]
    with pytest.raises(openai.BadRequestError, match="reasoning_effort: got 'endless'"):
        ask(client, reasoning_effort="endless")


def test_what_is_no_call_is_content(client: openai.OpenAI, script: Script) -> None:
    text = '<tool_call>\n{"name": weather}\n</tool_call> '
    script.texts = [text]
    choice = ask(client, tools=TOOLS).choices[0]
    assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (text, "stop", None)
    chunks = list(ask(client, tools=TOOLS, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text


def test_a_call_that_was_cut_off_says_so(client: openai.OpenAI, script: Script) -> None:
    script.texts, script.finish_reason = ['<tool_call>{"name": "weather", "arguments": {"city": "Pa'], "length"
    choice = ask(client, tools=TOOLS).choices[0]
    assert choice.finish_reason == "length"
    assert choice.message.tool_calls[0].function.arguments == '{"city": "Pa'


def test_without_tools_calls_are_text(client: openai.OpenAI, script: Script) -> None:
    for options in ({}, {"tools": []}, {"tools": TOOLS, "tool_choice": "none"}, {"tool_choice": "auto"}):
        script.texts = [ANSWERS["hermes"]]
        choice = ask(client, **options).choices[0]
        assert (choice.message.content, choice.finish_reason) == (ANSWERS["hermes"], "stop")
        assert "weather" not in script.prompts[-1]  # the model isn't told of what it may not call


def test_one_call_at_a_time(client: openai.OpenAI, script: Script) -> None:
    script.texts = [ANSWERS["hermes"]]
    calls = ask(client, tools=TOOLS, parallel_tool_calls=False).choices[0].message.tool_calls
    assert [call.function.name for call in calls] == ["weather"]


def test_logprobs_cover_every_token(client: openai.OpenAI, script: Script) -> None:
    script.texts = [ANSWERS["hermes"]]
    whole = ask(client, tools=TOOLS, logprobs=True)
    chunks = list(ask(client, tools=TOOLS, logprobs=True, stream=True))
    streamed = [each for chunk in chunks if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content]
    assert len(streamed) == len(whole.choices[0].logprobs.content) == whole.usage.completion_tokens


def form_of(client: openai.OpenAI, script: Script, template: str | None = None, **options: Any) -> Any:
    script.texts = [ANSWERS["hermes"]]
    ask(client, template, **options)
    params: SamplingParams = script.params[-1]
    return params.structured_outputs


def test_what_must_be_called_is_held_to_by_a_grammar(client: openai.OpenAI, script: Script) -> None:
    required = form_of(client, script, tools=TOOLS, tool_choice="required")
    assert "weather" in required.grammar
    assert "now" in required.grammar
    named = form_of(client, script, tools=TOOLS, tool_choice={"type": "function", "function": {"name": "now"}})
    assert "weather" not in named.grammar
    assert "weather" in script.prompts[-1]
    assert form_of(client, script, tools=TOOLS) is None
    strict = form_of(client, script, tools=[WEATHER])
    assert "TEXT" in strict.grammar
    opened = form_of(client, script, "hermes_open", tools=TOOLS, tool_choice="required")
    assert (required.start_after, opened.start_after) == (None, "</think>")


BAD: list[tuple[dict[str, Any], str]] = [
    ({"tools": "weather"}, "tools: got a value of type str"),
    ({"tools": [{"type": "custom", "custom": {"name": "a"}}]}, r"tools\[0\]"),
    ({"tools": [{**NOW, "type": "web_search"}]}, r"tools\[0\]\.type: got 'web_search'"),
    ({"tools": [{"type": "function", "function": {}}]}, r"tools\[0\]\.function\.name"),
    ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, r"tools\[0\]\.function\.name: got 'a b'"),
    ({"tools": [{"type": "function", "function": {"name": "a" * 65}}]}, r"tools\[0\]\.function\.name"),
    ({"tools": [NOW, NOW]}, r"tools\[1\]\.function\.name: got 'now', expected a name that no other has"),
    ({"tools": [{**NOW, "x": 1}]}, r"tools\[0\]\.x: got a field that this server doesn't implement"),
    ({"tools": [{"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}]}, "parameters.type"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "parameters": {"properties": []}}}]},
        r"parameters\.properties",
    ),
    ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools: got 129"),
    (
        {"tools": [{"type": "function", "function": {"name": "a", "description": "x" * 200_000}}]},
        "tools: got .* characters as JSON",
    ),
    ({"tools": TOOLS, "tool_choice": "any"}, "tool_choice: got 'any'"),
    ({"tools": TOOLS, "tool_choice": 3}, "tool_choice: got a value of type int"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, r"tool_choice\.type"),
    ({"tools": TOOLS, "tool_choice": {"type": "function"}}, r"tool_choice\.function"),
    ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": 3}}}, r"tool_choice\.function\.name"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "b"}}},
        "tool_choice: got the function 'b'",
    ),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now", "x": 1}}},
        r"tool_choice\.function\.x: got an unknown field",
    ),
    ({"tool_choice": "required"}, "tool_choice: got 'required' without tools"),
    ({"tools": TOOLS, "parallel_tool_calls": "no"}, "parallel_tool_calls"),
    ({"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"id": 3}]}]}, r"messages\[1\]\.tool_calls\[0\]\.id"),
    (
        {"messages": [*CHAT, {"role": "assistant", "tool_calls": [{"id": "a"}]}]},
        r"messages\[1\]\.tool_calls\[0\]\.name",
    ),
    ({"messages": [*CHAT, {"role": "tool", "content": "a", "tool_call_id": 3}]}, r"messages\[1\]\.tool_call_id"),
]


@pytest.mark.parametrize(("options", "message"), BAD, ids=[message for _, message in BAD])
def test_what_is_wrong_is_named(client: openai.OpenAI, script: Script, options: dict[str, Any], message: str) -> None:
    script.texts = ["Yes."]
    with pytest.raises(openai.BadRequestError, match=message):
        ask(client, **options)
    assert not script.prompts


def test_the_cost_of_tools(client: openai.OpenAI) -> None:
    costs = [
        client.post("/chat/token_cost", body={"messages": CHAT, **extra}, cast_to=dict[str, Any])["prompt_tokens"]
        for extra in ({}, {"tools": TOOLS, "tool_choice": "none"}, {"tools": TOOLS})
    ]
    assert costs[0] == costs[1] < costs[2]


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"guided_regex": "a+"}, "tools: got functions and guided_regex, expected one of them"),
        ({"structured_outputs": {"choice": ["a"]}}, r"tools: got functions and structured_outputs\.choice, expected"),
        ({"tool_choice": "required"}, r"tools: calls can't be held .*characters.* leave out tool_choice\."),
        ({"strict": True}, r"tools: calls can't be held .*characters.* leave out strict\."),
        (
            {"strict": True, "response_format": {"type": "json_object"}},
            r"tools: .* and response_format \(.*characters.* leave out strict and response_format\.",
        ),
    ],
    ids=str,
)
def test_errors_about_calls_name_what_was_sent(
    client: openai.OpenAI, script: Script, fields: dict[str, Any], expected: str
) -> None:
    """They named a grammar that the server had made. Here it becomes too long: each argument has the definitions."""
    parameters = {
        "type": "object",
        "properties": {f"a{index}": {"$ref": "#/$defs/long"} for index in range(8)},
        "$defs": {"long": {"type": "integer", "description": "x" * 40_000}},
    }
    function = {"name": "f", "parameters": parameters, "strict": fields.get("strict", False)}
    rest = {key: value for key, value in fields.items() if key != "strict"}
    script.texts = ["Yes."]
    with pytest.raises(openai.BadRequestError, match=expected) as error:
        ask(client, "qwen3_coder", tools=[{"type": "function", "function": function}], extra_body=rest)
    assert ("structured_outputs" in str(error.value)) == ("structured_outputs" in fields)

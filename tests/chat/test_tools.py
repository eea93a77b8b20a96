"""Tools in conversations: what templates are shown, and what is found out about them."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest

from sensorium import LLM, SamplingParams
from sensorium.chat.answer_formats import AnswerFormats
from sensorium.chat.renderer import ChatRenderer
from sensorium.errors import ConfigError, UnsupportedFeatureError
from sensorium.multimodal import MULTIMODAL_REGISTRY
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer
from tests.helpers.configs import make_engine_config
from tests.helpers.tool_templates import TEMPLATES

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"id": "abcdefghi", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Paris"}'}}
CHAT: list[Any] = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "abcdefghi", "content": [{"type": "text", "text": "sunny"}]},
]
NO_TOOLS = """\
{% for message in messages %}{{ raise_exception('turns') if loop.index0 % 2 != (message.role == 'assistant') | int }}\
[{{ message.role }}]{{ message.content }}{% endfor %}"""
PARTS_ONLY = """\
{% for message in messages %}[{{ message.role }}]{% for part in message.content %}{{ part.text }}{% endfor %}\
{% endfor %}"""


@functools.cache
def renderer(template: str, **options: str) -> ChatRenderer:
    config = make_engine_config(str(make_checkpoint("llama"))).model_config
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    return ChatRenderer(config, make_tokenizer(), chat_template=template, **options)  # type: ignore[arg-type]


def formats(template: str, **options: str) -> AnswerFormats:
    return renderer(template, **options).answer_formats(has_tools=True)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_form_is_found_by_the_template(name: str) -> None:
    found = formats(TEMPLATES[name])
    assert found.shows_tools
    assert found.calls().name == name.removesuffix("_thinking").removesuffix("_open")
    assert (found.reasoning is not None) == ("_" in name and name != "qwen3_coder")
    without = renderer(TEMPLATES[name]).answer_formats()
    assert (without.tool_format, without.reasoning) == (None, found.reasoning)


@pytest.mark.parametrize("name", TEMPLATES)
def test_tools_calls_and_results_reach_the_template(name: str) -> None:
    prompt = renderer(TEMPLATES[name]).render(CHAT, tools=[TOOL])["prompt"]
    assert prompt.count("Tells the weather.") == 1
    assert "Paris" in prompt
    assert "sunny" in prompt
    assert "None" not in prompt
    assert "'type'" not in prompt
    assert formats(TEMPLATES[name]).is_reasoning_open(prompt) == name.endswith("_open")


def test_an_operator_decides_against_the_template() -> None:
    assert formats(TEMPLATES["hermes"], tool_parser="json").calls().name == "json"
    found = formats(TEMPLATES["hermes_thinking"], tool_parser="none", reasoning_parser="none")
    assert found.reasoning is None
    with pytest.raises(UnsupportedFeatureError, match="switched off"):
        found.calls()
    with pytest.raises(UnsupportedFeatureError, match="tools: got functions"):
        renderer(NO_TOOLS, tool_parser="none").render(CHAT[:1], tools=[TOOL])
    with pytest.raises(ConfigError, match=r"tool_parser: got 'yaml', expected one of .*'hermes'"):
        renderer("", tool_parser="yaml")
    with pytest.raises(ConfigError, match="reasoning_parser"):
        renderer("", reasoning_parser="yaml")


def test_a_form_that_nobody_knows_is_an_error_that_says_what_to_set() -> None:
    template = "{{ tools | tojson if tools }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert "Tells" in renderer(template).render(CHAT[:1], tools=[TOOL])["prompt"]
    with pytest.raises(UnsupportedFeatureError, match="--tool-parser"):
        formats(template).calls()


@pytest.mark.parametrize("template", [NO_TOOLS, PARTS_ONLY], ids=["strings and turns", "parts"])
def test_a_template_without_tools_is_told_of_them_in_messages(template: str) -> None:
    chat = [*CHAT, {**CHAT[2], "content": "also"}, {"role": "user", "content": "So?"}]
    prompt = renderer(template).render(chat, tools=[TOOL])["prompt"]
    assert formats(template).calls().name == "hermes"
    assert json.dumps(TOOL) in prompt
    assert '[assistant]<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>[user]' in prompt
    results = "".join(f"<tool_response>\n{each}\n</tool_response>\n" for each in ("sunny", "also"))
    assert prompt.endswith(results + "So?")
    assert prompt.startswith("[system]" if template is PARTS_ONLY else "[user]")
    again = renderer(template).render(chat)["prompt"]
    assert prompt.endswith(again.removeprefix("[user]Weather?"))
    assert "Tells" not in again
    with pytest.raises(UnsupportedFeatureError, match="--tool-parser hermes"):
        renderer(template, tool_parser="mistral").render(chat, tools=[TOOL])


def test_a_system_message_keeps_its_text_in_front_of_the_tools() -> None:
    chat = [{"role": "system", "content": "Be kind."}, *CHAT]
    prompt = renderer(PARTS_ONLY).render(chat, tools=[TOOL])["prompt"]
    assert prompt.startswith("[system]Be kind.\nYou can call")


def test_arguments_that_are_no_json_stay_as_the_model_wrote_them() -> None:
    """A client sends back what it got: a conversation must not end at a call that went wrong."""
    broken = {**CALL, "function": {"name": "weather", "arguments": '{"city": "Par'}}
    prompt = renderer(TEMPLATES["hermes"]).render([CHAT[0], {**CHAT[1], "tool_calls": [broken]}], tools=[TOOL])
    assert "Par" in prompt["prompt"]


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_past_reasoning_goes_by_two_names(key: str) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "Yes.", key: "Hm."}]
    assert "<think>Hm.</think>\nYes." in renderer(TEMPLATES["hermes_thinking"]).render(chat)["prompt"]


def test_offline_answers_are_taken_apart_by_the_same_forms() -> None:
    llm = LLM(str(make_checkpoint("llama")), device="cpu", num_blocks=64, chat_template=TEMPLATES["hermes_open"])
    output = llm.chat(CHAT[:1], SamplingParams(max_tokens=2, temperature=0.0), tools=[TOOL])[0]
    assert output.prompt is not None
    parser = llm.answer_parser([TOOL], prompt=output.prompt)
    answer = parser.parse(['Hm.</think><tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'])
    assert (answer.reasoning, answer.content, answer.tool_calls[0].name) == ("Hm.", "", "weather")
    llm.shutdown()


def test_marks_that_are_tokens_are_known() -> None:
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<tool_call>", "</think>"]}, replace_extra_special_tokens=False
    )
    config = make_engine_config(str(make_checkpoint("llama"))).model_config
    found = ChatRenderer(config, tokenizer, chat_template=TEMPLATES["hermes_thinking"]).answer_formats(has_tools=True)
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in ("<tool_call>", "</think>")}
    assert found.token_ids == ids
    assert found.reasoning_end_id() == ids["</think>"]

"""A model that is held to a format's grammar writes what its parser reads: tried with llguidance on tokens of bytes."""

from __future__ import annotations

import functools
import json
import random
from typing import Any

import llguidance
import llguidance.hf
import pytest
from tokenizers import AddedToken

from sensorium.parsing import FORMATS, REASONING_FORMATS, AnswerParser, Tool, Tools
from sensorium.parsing.grammars import Held, answer_grammar
from tests.helpers.checkpoints import make_tokenizer

WEATHER = Tool(
    "weather",
    parameters={
        "type": "object",
        "properties": {
            "city": {"type": "string", "maxLength": 8},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["C", "F"]},
        },
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    is_strict=True,
)
NOW = Tool("now", parameters={"type": "object", "properties": {}, "additionalProperties": False})
TOOLS = Tools([WEATHER, NOW])

TEXTS = {
    "hermes": [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n</tool_call>',
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>',
    ],
    "qwen3_coder": [
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
            "</function>\n</tool_call>"
        ),
        "<tool_call>\n<function=now>\n</function>\n</tool_call>",
    ],
    "glm": [
        (
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n"
            "<arg_value>3</arg_value>\n</tool_call>"
        ),
        "<tool_call>now\n</tool_call>",
    ],
    "mistral": ['[TOOL_CALLS]weather[ARGS]{"city": "Paris", "days": 3}', "[TOOL_CALLS]now[ARGS]{}"],
    "llama3": [
        '{"name": "weather", "parameters": {"city": "Paris", "days": 3}}',
        '{"name": "now", "parameters": {}}',
    ],
    "json": [
        '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}',
        '{"name": "now", "arguments": {}}',
    ],
}
"""Of each form, two calls as models write them."""
SEPARATORS = {"hermes": "\n", "qwen3_coder": "\n", "glm": "\n", "mistral": "", "llama3": "; ", "json": ", "}


@functools.cache
def tokenizer(has_marks: bool) -> tuple[Any, Any, dict[str, int]]:
    """One that has the marks as tokens, or not; the same for llguidance; the marks' ids."""
    tokenizer = make_tokenizer()
    marks = [mark for each in FORMATS.values() for mark in each.markers] + ["<think>", "</think>"]
    if has_marks:
        tokenizer.add_tokens([AddedToken(mark, special="[" in mark, normalized=False) for mark in marks])
    ids = {mark: tokenizer.convert_tokens_to_ids(mark) for mark in marks} if has_marks else {}
    return tokenizer, llguidance.hf.from_tokenizer(tokenizer), ids


def accepts(grammar: str, text: str, has_marks: bool) -> bool:
    hf, ll, _ = tokenizer(has_marks)
    matcher = llguidance.LLMatcher(ll, grammar)
    assert not matcher.is_error(), matcher.get_error()
    ids = hf.encode(text, add_special_tokens=False)
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def together(tool_format: str, calls: list[str]) -> str:
    text = SEPARATORS[tool_format].join(calls)
    return f"[{text}]" if tool_format == "json" else text


EVERY = pytest.mark.parametrize(("tool_format", "has_marks"), [(f, m) for f in FORMATS for m in (False, True)])


@EVERY
def test_forced_calls_are_as_models_write_them(tool_format: str, has_marks: bool) -> None:
    ids = tokenizer(has_marks)[2]
    form, calls = FORMATS[tool_format], TEXTS[tool_format]
    if tool_format == "mistral" and not has_marks:
        calls = ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]']
    several = answer_grammar(form, TOOLS, ids, held=Held.CALLS, is_parallel=True)
    one = answer_grammar(form, TOOLS, ids, held=Held.CALLS, is_parallel=False)
    for call in calls:
        assert accepts(several, call, has_marks)
        assert accepts(one, call, has_marks)
        assert not accepts(one, "Well: " + call, has_marks)
    both = together(tool_format, calls)
    assert accepts(several, both, has_marks)
    assert accepts(one, both, has_marks) == (len(calls) == 1)
    assert not accepts(several, "", has_marks)
    for wrong in (
        calls[0].replace("weather", "climate"),
        calls[0].replace("3", "33"),
        calls[0].replace("days", "nights"),
    ):
        assert not accepts(several, wrong, has_marks)


@EVERY
def test_text_may_hold_proper_calls_only(tool_format: str, has_marks: bool) -> None:
    ids = tokenizer(has_marks)[2]
    form, calls = FORMATS[tool_format], TEXTS[tool_format]
    if tool_format == "mistral" and not has_marks:
        calls = ['[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris", "days": 3}}]']
    before = "" if tool_format in ("llama3", "json") else "Well <b> [x]: "
    grammar = answer_grammar(form, TOOLS, ids, held=Held.PROPER, is_parallel=True)
    assert accepts(grammar, "", has_marks)
    assert accepts(grammar, "Nothing to call: {} [1]\n", has_marks)
    assert accepts(grammar, before + calls[0], has_marks)
    assert accepts(grammar, together(tool_format, calls), has_marks)
    assert not accepts(grammar, before + calls[0].replace("days", "nights"), has_marks)
    one = answer_grammar(form, TOOLS, ids, held=Held.PROPER, is_parallel=False)
    assert accepts(one, "No. ", has_marks)
    assert accepts(one, before + calls[0], has_marks)
    assert accepts(one, together(tool_format, calls), has_marks) == (len(calls) == 1)


@EVERY
def test_an_answer_may_be_json_of_a_schema_instead(tool_format: str, has_marks: bool) -> None:
    ids = tokenizer(has_marks)[2]
    schema = {"type": "object", "properties": {"sky": {"type": "string"}}, "required": ["sky"]}
    form = FORMATS[tool_format]
    grammar = answer_grammar(form, TOOLS, ids, held=Held.EITHER, is_parallel=True, schema=schema)
    assert accepts(grammar, '{"sky": "blue"}', has_marks)
    assert not accepts(grammar, '{"sea": "blue"}', has_marks)
    assert not accepts(grammar, "blue", has_marks)
    if tool_format != "mistral" or has_marks:
        assert accepts(grammar, TEXTS[tool_format][0], has_marks)


@pytest.mark.parametrize("has_marks", [False, True])
def test_reasoning_may_come_first(has_marks: bool) -> None:
    ids = tokenizer(has_marks)[2]
    form, call, think = FORMATS["hermes"], TEXTS["hermes"][1], REASONING_FORMATS["think"]
    for held in (Held.CALLS, Held.PROPER):
        grammar = answer_grammar(form, TOOLS, ids, held=held, is_parallel=True, reasoning=think)
        assert accepts(grammar, f"<think>\nHm. {{}}\n</think>\n\n{call}", has_marks)
        assert accepts(grammar, call, has_marks)
        behind = answer_grammar(form, TOOLS, ids, held=held, is_parallel=True, is_behind_reasoning=True)
        assert accepts(behind, f"\n\n{call}", has_marks)


def test_only_strict_functions_need_schemas_that_can_be_held_to() -> None:
    odd = {"type": "object", "properties": {"a": {"type": "string", "format": "odd"}}}
    _, ll, ids = tokenizer(True)
    for is_strict in (False, True):
        tools = Tools([Tool("f", parameters=odd, is_strict=is_strict)])
        matcher = llguidance.LLMatcher(
            ll, answer_grammar(FORMATS["hermes"], tools, ids, held=Held.CALLS, is_parallel=True)
        )
        assert matcher.is_error() == is_strict


@EVERY
def test_random_tokens_under_the_grammar_parse(tool_format: str, has_marks: bool) -> None:
    hf, ll, ids = tokenizer(has_marks)
    grammar = answer_grammar(FORMATS[tool_format], TOOLS, ids, held=Held.CALLS, is_parallel=True)
    ends = {"qwen3_coder": "\n</parameter>\n", "glm": "</arg_value>\n"}
    end = hf.encode(ends.get(tool_format, ""), add_special_tokens=False)
    for seed in range(6):
        text = hf.decode(written(llguidance.LLMatcher(ll, grammar), len(hf), hf.eos_token_id, seed, end))
        text = text.removesuffix(hf.eos_token)
        answer = AnswerParser(tool_format=FORMATS[tool_format], tools=TOOLS).parse([text])
        assert answer.tool_calls
        assert not answer.content
        for call in answer.tool_calls:
            arguments = json.loads(call.arguments)
            if call.name == "weather":
                assert isinstance(arguments["city"], str)
                assert 1 <= arguments["days"] <= 9
            else:
                assert (call.name, arguments) == ("now", {})


def written(matcher: Any, vocab_size: int, eos_token_id: int, seed: int, end: list[int]) -> list[int]:
    """Tokens that a model without an idea writes, held to a grammar. It takes the first end that it may, and now and
    then comes to the end of free text.
    """
    rng = random.Random(seed)
    ids: list[int] = []
    while not matcher.is_stopped():
        mask = matcher.compute_bitmask()
        allowed = [i for i in range(vocab_size) if mask[i // 8] >> (i % 8) & 1]
        if eos_token_id in allowed:
            break
        is_free = len(allowed) > 100
        if end and is_free and rng.random() < 0.2 and matcher.validate_tokens(end) == len(end):
            new = end
        elif is_free:  # printable characters, and the end of a string often enough
            new = [rng.choice([i for i in allowed if 32 <= i < 94] + [1] * 10 * (1 in allowed))]
        else:
            new = [rng.choice(allowed)]
        assert matcher.consume_tokens(new)
        ids += new
        assert len(ids) < 3000
    return ids

"""However an answer is cut and broken: its events say the same, nothing is lost, and the work is linear."""

from __future__ import annotations

import json
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.parsing import FORMATS, REASONING_FORMATS, AnswerParser, ParsedAnswer, Tool, Tools
from sensorium.parsing.json_scanner import JsonScanner

TOOLS = Tools([Tool("f", parameters={"properties": {"s": {"type": "string"}}}), Tool("g")])
SNIPPETS = [
    *(
        "<think>",
        "</think>",
        "<tool_call>",
        "</tool_call>",
        "<function=f>",
        "</function>",
        "<parameter=s>",
        "</parameter>",
    ),
    *(
        "<arg_key>",
        "</arg_key>",
        "<arg_value>",
        "</arg_value>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "[CALL_ID]",
        "<|python_tag|>",
    ),
    *("```json", "```", "f", "g", "h", "s", " ", "\n", "\n\n", "[", "]", "{", "}", ",", ":", '"', "\\", "'", "<", ";"),
    *('{"name": "f", "arguments": {"s": "x"}}', '{"name": "g", "parameters": {}}', '"name"', '"arguments"', '"f"'),
    *('{"name":"f","arguments":', "null", "1", "-1e5", '"\\ud83d\\ude00"', '"\\ud83d"', "😀", "text", "\u2028", "\x00"),
]
FORMS = st.sampled_from(list(FORMATS))
TEXTS = st.lists(st.sampled_from(SNIPPETS), max_size=40).map("".join)


def parser_of(tool_format: str, *, is_open: bool = False) -> AnswerParser:
    return AnswerParser(
        reasoning=REASONING_FORMATS["think"],
        is_reasoning_open=is_open,
        tool_format=FORMATS[tool_format],
        tools=TOOLS,
    )


def cut(text: str, seed: int) -> list[str]:
    """A text in random pieces."""
    rng = random.Random(seed)
    places = sorted(rng.randrange(len(text) + 1) for _ in range(rng.randrange(12)))
    return [text[a:b] for a, b in zip([0, *places], [*places, len(text)], strict=True)]


@settings(max_examples=400, derandomize=True)
@given(FORMS, TEXTS, st.booleans(), st.integers(0, 10_000))
def test_an_answer_is_the_same_however_it_is_cut(tool_format: str, text: str, is_open: bool, seed: int) -> None:
    whole = parser_of(tool_format, is_open=is_open).parse([text])
    assert parser_of(tool_format, is_open=is_open).parse(cut(text, seed)) == whole
    assert parser_of(tool_format, is_open=is_open).parse(text) == whole


@settings(max_examples=400, derandomize=True)
@given(FORMS, TEXTS)
def test_letters_are_never_lost_and_never_made_up(tool_format: str, text: str) -> None:
    answer = parser_of(tool_format).parse([text])
    if answer.tool_calls or answer.reasoning is not None:
        shown = [answer.content, answer.reasoning or "", *(c.name + c.arguments for c in answer.tool_calls)]
        assert "".join(shown).count("text") == text.count("text")
    elif not text.lstrip().startswith("<think>"):  # empty reasoning leaves its marks out
        assert answer == ParsedAnswer(text)
    json.dumps([answer.content, *(c.arguments for c in answer.tool_calls)], ensure_ascii=False).encode()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, derandomize=True)
@given(st.dictionaries(st.text(min_size=1), VALUES, max_size=5), st.booleans(), st.integers(0, 10_000))
def test_any_arguments_come_back(arguments: dict[str, object], ascii_only: bool, seed: int) -> None:
    written = json.dumps(arguments, ensure_ascii=ascii_only)
    for tool_format, text in {
        "hermes": f'<tool_call>{{"name": "f", "arguments": {written}}}</tool_call>',
        "mistral": f"[TOOL_CALLS]f[ARGS]{written}",
        "llama3": f'{{"name": "f", "parameters": {written}}}',
        "json": f'[{{"name": "f", "arguments": {written}}}]',
    }.items():
        (call,) = parser_of(tool_format).parse(cut(text, seed)).tool_calls
        assert call.arguments == written


@settings(max_examples=400, derandomize=True)
@given(VALUES.map(json.dumps), st.data())
def test_the_scanner_agrees_with_the_json_module(text: str, data: st.DataObject) -> None:
    """On values, and on values with a character changed, left out or put in."""
    at = data.draw(st.integers(0, len(text)))
    damaged = text[:at] + data.draw(st.sampled_from(["", "x", '"', "}", "]", ",", "0", "-", "\\"])) + text[at + 1 :]
    for each in (text, damaged):
        scanner = JsonScanner()
        out: list[str] = []
        end = scanner.feed(each + " ", 0, out)
        is_json = scanner.is_done and not each[end:].strip()
        try:
            json.loads(each)
        except ValueError:
            assert not is_json
        else:
            assert is_json or each in ("NaN", "-Infinity", "Infinity")
        assert "".join(out) == (each + " ")[:end]


HOSTILE = {
    "one long string": '<tool_call>{"name": "f", "arguments": {"s": "' + "x" * 400_000,
    "deep nesting": '<tool_call>{"name": "f", "arguments": {"s": ' + "[" * 400_000,
    "a long head": '<tool_call>{"' + "x" * 400_000,
    "a long number": '<tool_call>{"name": "f", "arguments": {"s": ' + "1" * 400_000,
    "arguments before the name": '<tool_call>{"arguments": {"s": "' + "x" * 400_000 + '"}, "name": "f"}',
    "marks": "<tool_call>" * 40_000,
    "begun objects": '<tool_call>{"' * 30_000,
    "begun marks": "<tool_cal" * 40_000,
    "white space": "a" + " " * 400_000,
    "line breaks and text": "\n a" * 100_000,
    "calls": '<tool_call>{"name": "g"}</tool_call>' * 10_000,
    "parameters": "<tool_call><function=f>" + "<parameter=s>\n\n</parameter>" * 15_000,
    "separators": '{"name": "g"}' + ";" * 400_000,
    "reasoning": "<think>" + " </think" * 50_000,
}


@pytest.mark.parametrize("case", HOSTILE)
def test_work_is_linear_in_the_text(case: str) -> None:
    """Several hundred thousand characters take far less than the seconds that anything quadratic takes."""
    text = HOSTILE[case]
    for tool_format in ("qwen3_coder", "llama3"):
        start_s = time.process_time()
        parser = parser_of(tool_format)
        for at in range(0, len(text), 7):
            parser.push(text[at : at + 7])
        parser.finish()
        assert time.process_time() - start_s < 10

"""Answers of every form, well made and broken, taken apart."""

from __future__ import annotations

import json
from typing import Any

import pytest

from sensorium.parsing import FORMATS, REASONING_FORMATS, AnswerParser, ParsedAnswer, ParsedCall, Tool, Tools

TOOLS = Tools(
    [
        Tool(
            "weather",
            parameters={
                "type": "object",
                "properties": {
                    "city": {"type": "string"},
                    "days": {"type": "integer"},
                    "unit": {"enum": ["C", "F"]},
                    "exact": {"type": "boolean"},
                },
            },
        ),
        Tool("now"),
    ]
)
PARIS = ("weather", {"city": "Paris"})
NOW: tuple[str, Any] = ("now", {})


def parse(
    tool_format: str | None, text: str, reasoning: str | None = None, *, is_cut: bool = False, **options: Any
) -> ParsedAnswer:
    """The answer, the same whether its text comes at once or character by character."""

    def parser() -> AnswerParser:
        return AnswerParser(
            reasoning=None if reasoning is None else REASONING_FORMATS[reasoning],
            tool_format=None if tool_format is None else FORMATS[tool_format],
            tools=TOOLS,
            **options,
        )

    whole = parser().parse([text], is_cut=is_cut)
    assert parser().parse(text, is_cut=is_cut) == whole
    return whole


def calls_of(answer: ParsedAnswer) -> list[tuple[str, Any]]:
    return [(call.name, json.loads(call.arguments)) for call in answer.tool_calls]


CALLS: dict[str, tuple[str, str, list[tuple[str, Any]], str]] = {
    "hermes": (
        "hermes",
        (
            '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>\n'
            '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
        ),
        [PARIS, NOW],
        "",
    ),
    "hermes between texts": (
        "hermes",
        'Let me see.\n<tool_call>{"name": "now", "arguments": {}}</tool_call>\nDone. ',
        [NOW],
        "Let me see.\n\nDone.",
    ),
    "hermes, arguments first": (
        "hermes",
        '<tool_call>{"arguments": {"city": "Paris"}, "name": "weather"}</tool_call>',
        [PARIS],
        "",
    ),
    "hermes, arguments as a string": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": "{\\"city\\": \\"Paris\\"}"}</tool_call>',
        [PARIS],
        "",
    ),
    "hermes, no arguments": ("hermes", '<tool_call>{"name": "now"}</tool_call>', [NOW], ""),
    "hermes, null": ("hermes", '<tool_call>{"name": "now", "arguments": null}</tool_call>', [NOW], ""),
    "hermes, a brace too many": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}}\n</tool_call>',
        [PARIS],
        "",
    ),
    "hermes, a brace too few": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}</tool_call>',
        [PARIS],
        "",
    ),
    "hermes, no closing tag": (
        "hermes",
        '<tool_call>{"name": "now", "arguments": {}}\n<tool_call>{"name": "now", "arguments": {}}',
        [NOW, NOW],
        "",
    ),
    "hermes, a line break in a string": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "Pa\nris\t"}}</tool_call>',
        [("weather", {"city": "Pa\nris\t"})],
        "",
    ),
    "hermes, tags in a string": (
        "hermes",
        '<tool_call>{"name": "weather", "arguments": {"city": "</tool_call>"}}</tool_call>',
        [("weather", {"city": "</tool_call>"})],
        "",
    ),
    "hermes, a function of no name known": (
        "hermes",
        '<tool_call>{"name": "other.one", "arguments": {}}</tool_call>',
        [("other.one", {})],
        "",
    ),
    "hermes, in OpenAI's own form": (
        "hermes",
        '<tool_call>{"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}</tool_call>',
        [PARIS],
        "",
    ),
    "coder": (
        "qwen3_coder",
        (
            "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n<parameter=days>\n3\n</parameter>\n"
            "<parameter=exact>\nTrue\n</parameter>\n<parameter=more>\n[1, 2]\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=now>\n</function>\n</tool_call>"
        ),
        [("weather", {"city": "Paris", "days": 3, "exact": True, "more": [1, 2]}), NOW],
        "",
    ),
    "coder, without the outer tag": (
        "qwen3_coder",
        "So:\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        [PARIS],
        "So:",
    ),
    "coder, strings stay strings": (
        "qwen3_coder",
        (
            '<tool_call><function=weather><parameter=city>\n\n{"a": 1}\n "\\\n\n</parameter>'
            "<parameter=unit>C</parameter><parameter=days>a few</parameter></function></tool_call>"
        ),
        [("weather", {"city": '\n{"a": 1}\n "\\\n', "unit": "C", "days": "a few"})],
        "",
    ),
    "coder, a tag left open": (
        "qwen3_coder",
        "<tool_call><function=weather><parameter=city>\nParis\n<parameter=days>3</function></tool_call>",
        [("weather", {"city": "Paris", "days": 3})],
        "",
    ),
    "glm": (
        "glm",
        (
            "I look.\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
            "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call>"
        ),
        [("weather", {"city": "Paris", "days": 3}), NOW],
        "I look.",
    ),
    "mistral, a list": (
        "mistral",
        (
            '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
            '{"name": "now", "arguments": {}}]'
        ),
        [PARIS, NOW],
        "",
    ),
    "mistral, by name": (
        "mistral",
        'Yes.[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Paris"}[TOOL_CALLS]now[ARGS]{}',
        [PARIS, NOW],
        "Yes.",
    ),
    "mistral, by name alone": ("mistral", '[TOOL_CALLS]weather{"city": "Paris"}', [PARIS], ""),
    "llama": ("llama3", '{"name": "weather", "parameters": {"city": "Paris"}}', [PARIS], ""),
    "llama, several": (
        "llama3",
        (
            '<|python_tag|>{"type": "function", "name": "weather", "parameters": {"city": "Paris"}}; '
            '{"name": "now", "parameters": {}}'
        ),
        [PARIS, NOW],
        "",
    ),
    "llama, behind text": (
        "llama3",
        'Wait.<|python_tag|>{"name": "now", "parameters": {}}',
        [NOW],
        "Wait.",
    ),
    "json": ("json", ' {"name": "weather", "arguments": {"city": "Paris"}}\n', [PARIS], ""),
    "json in a fence": (
        "json",
        '```json\n[{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "now", "arguments": {}}]\n```',
        [PARIS, NOW],
        "",
    ),
}


@pytest.mark.parametrize("case", CALLS)
def test_calls_are_found(case: str) -> None:
    tool_format, text, calls, content = CALLS[case]
    answer = parse(tool_format, text)
    assert calls_of(answer) == calls
    assert answer.content == content


NO_CALLS = {
    "hermes": [
        "Plain text with a trailing space. ",
        "\n a < b and <tool_cal",
        "<tool_call>",
        "<tool_call>\n{",
        "<tool_call>{'name': 'now'}</tool_call>",
        '<tool_call>{"name": "now", "arguments": [1]}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "[1]"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "{\\"a\\": \\"\\\\ud800"}</tool_call>',
        '<tool_call>{"name": "now", "arguments": "\\ud800"}</tool_call>',
        '<tool_call>{"name": "no w", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "now", "argum',
        '<tool_call>{"arguments": {"a": 1}}</tool_call>',
        "<tool_call>{}</tool_call>",
        "<tool_call></tool_call>",
        "<tool_call><function=now",
        "<tool_call><function=n w></function></tool_call>",
        "<tool_call>weather is fine</tool_call>",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] []",
        "[TOOL_CALLS]now",
        "[TOOL_CALLS]now[ARGS]x",
        "[TOOL_CALLS][{]",
        "[TO",
    ],
    "llama3": [
        '{"name": "Bob", "age": 3}',
        '{"name": "weather", "age": 3}',
        '{"name": "other", "parameters": {}}',
        '{"answer": 42}',
        '  {"name": "now", "param',
        "<|python_tag|>print(1)",
        'So {"name": "now", "parameters": {}}',
    ],
    "json": ["[1, 2]", "```python\nprint(1)\n```", "```json\n{}\n```", '[{"name": "Bob"}]', "{", "[", "```", " "],
}


@pytest.mark.parametrize(("tool_format", "text"), [(name, text) for name, texts in NO_CALLS.items() for text in texts])
def test_what_is_no_call_is_content_to_the_last_character(tool_format: str, text: str) -> None:
    assert parse(tool_format, text) == ParsedAnswer(text)


@pytest.mark.parametrize(
    ("tool_format", "text", "arguments", "content"),
    [
        ("hermes", '<tool_call>{"name": "weather", "arguments": {"city": "Pa', '{"city": "Pa', ""),
        (
            "hermes",
            '<tool_call>{"name": "weather", "arguments": {"city": Paris}}</tool_call> Bye',
            '{"city": Paris}}',
            "Bye",
        ),
        ("qwen3_coder", "<tool_call><function=weather><parameter=city>\nPa", '{"city": "Pa', ""),
        ("qwen3_coder", "<tool_call><function=weather><parameter=days>\n1", '{"days": ', ""),
        ("glm", "<tool_call>weather<arg_key>city</arg_key><arg_value>Pa", '{"city": "Pa', ""),
        ("mistral", '[TOOL_CALLS]weather{"city": "Pa', '{"city": "Pa', ""),
        ("llama3", '{"name": "weather", "parameters": {"city": Paris}}', '{"city": ', "Paris}}"),
    ],
)
def test_a_call_that_breaks_off_holds_what_the_model_wrote(
    tool_format: str, text: str, arguments: str, content: str
) -> None:
    """Nothing is made up to complete it: whoever gets it sees that it is no JSON."""
    answer = parse(tool_format, text)
    assert [(call.name, call.arguments) for call in answer.tool_calls] == [("weather", arguments)]
    assert answer.content == content


def test_a_call_after_text_that_is_none_is_found() -> None:
    answer = parse("hermes", '<tool_call>{"a" <tool_call>{"name": "now", "arguments": {}}</tool_call>')
    assert (calls_of(answer), answer.content) == ([NOW], '<tool_call>{"a"')


CUT = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>',
    "hermes, two": '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>\n' * 2,
    "qwen3_coder": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n3\n"
    "</parameter>\n</function>\n</tool_call>",
    "qwen3_coder, no outer tag": "<function=weather>\n<parameter=city>\nRome\n</parameter>\n</function>",
    "glm": "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Rome</arg_value>\n<arg_key>days</arg_key>\n"
    "<arg_value>3</arg_value>\n</tool_call>",
    "mistral": '[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"city": "Rome"}[TOOL_CALLS]now[ARGS]{}',
    "mistral, a list": '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now"}]',
    "llama3": '<|python_tag|>{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "now", "parameters": {}}',
}
FORCED = {
    "llama3": '{"name": "weather", "parameters": {"city": "Rome"}}; {"name": "now", "parameters": {}}',
    "json": '[{"name": "weather", "arguments": {"city": "Rome"}}, {"name": "now", "arguments": {}}]',
    "json in a fence": '```json\n[{"name": "weather", "arguments": {"city": "Rome"}}]\n```',
}


@pytest.mark.parametrize("before", ["", "I look: "])
@pytest.mark.parametrize("case", CUT)
def test_what_a_cut_leaves_of_a_call_is_no_content(case: str, before: str) -> None:
    """Half of `</tool_call>` was content beside a call, where `max_tokens` fell into the mark; and half of an opening
    mark, or a mark with half of a name behind it, where it fell there.
    """
    text = before + CUT[case]
    for end in range(len(before), len(text) + 1):
        answer = parse(case.partition(",")[0], text[:end], is_cut=True)
        assert answer.content.rstrip() == before.rstrip(), text[:end]
        for call in answer.tool_calls:
            assert not {"<", "["} & set(call.arguments), text[:end]


@pytest.mark.parametrize("case", FORCED)
def test_what_a_cut_leaves_of_a_forced_call_is_no_content(case: str) -> None:
    """Calls without marks: an answer that must be calls is nothing else, however short it was cut."""
    for end in range(len(FORCED[case]) + 1):
        answer = parse(case.partition(" ")[0], FORCED[case][:end], is_cut=True, is_forced=True)
        assert answer.content == "", FORCED[case][:end]


@pytest.mark.parametrize("case", [case for case, text in {**CUT, **FORCED}.items() if text.endswith((">", "`"))])
def test_a_piece_of_a_closing_mark_is_no_content_even_if_the_model_ended_there(case: str) -> None:
    text = {**CUT, **FORCED}[case]
    answer = parse(case.partition(",")[0].partition(" ")[0], text[:-2])
    assert (answer.content, len(answer.tool_calls) > 0) == ("", True)


@pytest.mark.parametrize(
    ("tool_format", "text", "content"),
    [
        ("hermes", "a < b and c<", "a < b and c"),
        ("hermes", "1 <tool> and </tool_call> 2", "1 <tool> and </tool_call> 2"),
        ("json", '{"name": "Bob', '{"name": "Bob'),
        ("json", '{"answer": 4', '{"answer": 4'),
        ("json", '{"name": "weather", "argu', ""),
        ("llama3", '{"name": "weather"', ""),
        ("llama3", "So<|python", "So"),
    ],
)
def test_text_that_was_cut_stays_but_for_a_mark_that_may_have_begun(tool_format: str, text: str, content: str) -> None:
    assert parse(tool_format, text, is_cut=True) == ParsedAnswer(content)


@pytest.mark.parametrize("text", ["<think>Hm </thi", "<think>Hm"])
def test_what_a_cut_leaves_of_the_mark_behind_reasoning_is_no_reasoning(text: str) -> None:
    assert parse("hermes", text, "think", is_cut=True) == ParsedAnswer("", "Hm")
    assert parse("hermes", "<thi", "think", is_cut=True) == ParsedAnswer("")


@pytest.mark.parametrize(
    ("tool_format", "text"),
    [
        ("hermes", '<tool_call>{"name": "now", "arguments": {"e": "sw"}}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now", "arguments": "{\\"e\\": 1}"}</tool_call>'),
        ("hermes", '<tool_call>{"arguments": {"e": 1}, "name": "now"}</tool_call>'),
        ("hermes", '<tool_call>{"name": "now"}</tool_call>'),
        ("qwen3_coder", "<tool_call><function=now><parameter=e>1</parameter></function></tool_call>"),
        ("glm", "<tool_call>now<arg_key>e</arg_key><arg_value>1</arg_value></tool_call>"),
        ("mistral", '[TOOL_CALLS]now[ARGS]{"e": 1}'),
        ("llama3", '{"name": "now", "parameters": {"e": 1}}'),
        ("json", '[{"name": "now", "arguments": {"e": 1}}]'),
    ],
)
def test_a_function_without_parameters_gets_no_arguments(tool_format: str, text: str) -> None:
    """Models made some up, such as `{"e": "sw"}`, with which no program can call a function that takes none."""
    assert parse(tool_format, text).tool_calls == [ParsedCall("now", "{}")]


def test_calls_beyond_the_limit_are_dropped() -> None:
    text = CALLS["hermes"][1]
    assert calls_of(parse("hermes", text, max_calls=1)) == [PARIS]


@pytest.mark.parametrize(
    ("text", "is_open", "reasoning", "content"),
    [
        ("<think>\nHm.\n</think>\n\nYes. ", False, "Hm.", "Yes."),
        ("\n<think>Hm.</think>Yes.", False, "Hm.", "Yes."),
        ("Hm.\n\nSo.\n</think>\nYes.", True, "Hm.\n\nSo.", "Yes."),
        ("<think>Hm.</think>Yes.", True, "Hm.", "Yes."),
        ("<think>\n\n</think>\n\nYes.", False, None, "Yes."),
        ("Hm, cut of", True, "Hm, cut of", ""),
        ("<think>Hm </thin", False, "Hm </thin", ""),
        (" Yes <think>no</think> ", False, None, " Yes <think>no</think> "),
        ("<thin", False, None, "<thin"),
        ("", True, None, ""),
    ],
)
def test_reasoning_is_set_apart(text: str, is_open: bool, reasoning: str | None, content: str) -> None:
    assert parse(None, text, "think", is_reasoning_open=is_open) == ParsedAnswer(content, reasoning)
    assert parse("hermes", text, "think", is_reasoning_open=is_open) == ParsedAnswer(content, reasoning)


def test_reasoning_and_calls() -> None:
    text = 'Hm <tool_call> perhaps.\n</think>\n\n<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    answer = parse("hermes", text, "think", is_reasoning_open=True)
    assert (answer.reasoning, answer.content, calls_of(answer)) == ("Hm <tool_call> perhaps.", "", [NOW])
    answer = parse("mistral", "[THINK]Hm.[/THINK]Yes.[TOOL_CALLS]now[ARGS]{}", "mistral")
    assert (answer.reasoning, answer.content, calls_of(answer)) == ("Hm.", "Yes.", [NOW])


def test_text_is_handed_on_at_once_but_for_what_may_be_a_mark() -> None:
    parser = AnswerParser(reasoning=REASONING_FORMATS["think"], tool_format=FORMATS["hermes"], tools=TOOLS)
    pieces = ("Well", ", a", " <", "b", " <tool", "_call>", '{"name": "weather", "arg', 'uments": {"a"', ": [1", "]}}")
    shown = [[getattr(event, "text", getattr(event, "name", "")) for event in parser.push(piece)] for piece in pieces]
    assert shown == [["Well"], [", a"], [], [" <b"], [], [], [], [], ["weather", '{"a": [1'], ["]}"]]
    assert parser.finish() == []


def test_a_parser_of_nothing_hands_everything_on() -> None:
    assert parse(None, "  <think> <tool_call> ") == ParsedAnswer("  <think> <tool_call> ")

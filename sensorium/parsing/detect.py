"""Finds the formats that a model uses, by its chat template.

A template that shows past calls shows how the model writes them: it is rendered with a conversation that has a call,
and the result shows the format that the model was trained on. If that fails, the template's source is searched.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from sensorium.errors import ConfigError
from sensorium.parsing.formats import FORMATS, ToolFormat
from sensorium.parsing.reasoning import REASONING_FORMATS, ReasoningFormat

AUTO, NONE = "auto", "none"

_T = TypeVar("_T")

Render = Callable[[list[Mapping[str, Any]], list[Mapping[str, Any]]], str | None]
"""Renders messages and tools by a template; None where it refuses them."""

_TOOLS = re.compile(r"\{[{%][^{}%]*\btools\b")
_PROBE = "qxzprobe"
_TOOL = {
    "type": "function",
    "function": {
        "name": _PROBE,
        "description": _PROBE,
        "parameters": {"type": "object", "properties": {"qxzkey": {"type": "string"}}, "required": ["qxzkey"]},
    },
}
_CALL = {"id": "qxzcall00", "type": "function", "function": {"name": _PROBE, "arguments": {"qxzkey": "qxzvalue"}}}
_QUESTION: Mapping[str, Any] = {"role": "user", "content": "q"}
_ANSWER: Mapping[str, Any] = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: Mapping[str, Any] = {"role": "tool", "tool_call_id": "qxzcall00", "name": _PROBE, "content": "r"}


def shows_tools(template: str, render: Render) -> bool:
    """Whether a template uses tools: renders them, or at least refers to them."""
    return _TOOLS.search(template) is not None or _PROBE in (render([_QUESTION], [_TOOL]) or "")


def find_tool_format(template: str, render: Render | None = None, asked: str = AUTO) -> ToolFormat | None:
    """The format of calls that `asked` names, or that a template has; None if there is none.

    Raises `ConfigError` for an unknown name.
    """
    if asked != AUTO:
        return _named("tool_parser", asked, FORMATS)
    for text in (_rendered_call(render), template):
        for each in FORMATS.values():
            if each.is_shown_by(text):
                return each
    return None


def find_reasoning_format(template: str, asked: str = AUTO) -> ReasoningFormat | None:
    """The marks of reasoning that `asked` names, or that a template has; None if there are none.

    Raises `ConfigError` for an unknown name.
    """
    if asked != AUTO:
        return _named("reasoning_parser", asked, REASONING_FORMATS)
    return next((each for each in REASONING_FORMATS.values() if each.end in template), None)


def check_names(tool_parser: str, reasoning_parser: str) -> None:
    """Raises `ConfigError` for unknown names."""
    find_tool_format("", None, tool_parser)
    find_reasoning_format("", reasoning_parser)


def _rendered_call(render: Render | None) -> str:
    """A call as the template renders it; empty if it doesn't."""
    if render is None:
        return ""
    for messages in ([_QUESTION, _ANSWER, _RESULT], [_QUESTION, _ANSWER]):
        shown = render(messages, [])
        if shown is not None and _PROBE in shown and "qxzvalue" in shown:
            return shown
    return ""


def _named(setting: str, asked: str, formats: Mapping[str, _T]) -> _T | None:
    if asked == NONE:
        return None
    if asked not in formats:
        raise ConfigError(f"{setting}: got {asked!r:.60}, expected one of {[AUTO, NONE, *formats]}. Set {setting}.")
    return formats[asked]

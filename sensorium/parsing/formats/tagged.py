"""Calls between `<tool_call>` and `</tool_call>`.

Hermes, Qwen 2.5, Qwen 3     <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
Qwen3-Coder, Qwen 3.5        <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
GLM 4.5 and later            <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>

White space may stand between the parts. Models trained on one format sometimes write another, so every format reads all
three; they differ in the grammar that a model is constrained to.
"""

from __future__ import annotations

from typing import ClassVar

from sensorium.parsing.formats.base import MarkedFormat, arguments_of
from sensorium.parsing.formats.tagged_reading import (
    BEGIN,
    END,
    FUNCTION,
    FUNCTION_END,
    KEY,
    KEY_END,
    PARAMETER,
    PARAMETER_END,
    VALUE,
    VALUE_END,
    read_tagged,
)
from sensorium.parsing.lark import Lark
from sensorium.parsing.parameter_form import ParameterForm
from sensorium.parsing.reader import Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tool, Tools

_HERMES_TAIL = "}\n" + END


class _Tagged(MarkedFormat):
    """The base class of the three."""

    begin = BEGIN
    separator = "\n"
    begins: ClassVar[tuple[str, ...]] = (BEGIN,)

    def read(self, reader: Reader, sink: Sink, tools: Tools, *, is_forced: bool = False) -> Steps[None]:
        """See `ToolFormat`."""
        yield from read_tagged(self.begins, reader, sink, tools)


class Hermes(_Tagged):
    """JSON between the tags."""

    name = "hermes"
    markers = (BEGIN, END)

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return BEGIN in text

    def call(self, lark: Lark, tool: Tool) -> str:
        """See `MarkedFormat`."""
        head = lark.text(f'\n{{"name": "{tool.name}", "arguments": ')
        return f"{head} {arguments_of(lark, tool)} {lark.text(_HERMES_TAIL)}"


class QwenCoder(_Tagged):
    """Tags within tags. The outer ones are sometimes left out."""

    name = "qwen3_coder"
    markers = (BEGIN, END)
    begins = (BEGIN, FUNCTION)
    parameters = ParameterForm(PARAMETER, ">\n", f"\n{PARAMETER_END}\n")

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return FUNCTION in text and PARAMETER in text

    def call(self, lark: Lark, tool: Tool) -> str:
        """See `MarkedFormat`."""
        head, tail = lark.text(f"\n{FUNCTION}{tool.name}>\n"), lark.text(f"{FUNCTION_END}\n{END}")
        return f"{head} {self.parameters.of(lark, tool)} {tail}"


class Glm(_Tagged):
    """A name, then keys and values."""

    name = "glm"
    markers = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)
    parameters = ParameterForm(KEY, f"{KEY_END}\n{VALUE}", f"{VALUE_END}\n")

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return KEY in text

    def call(self, lark: Lark, tool: Tool) -> str:
        """See `MarkedFormat`."""
        head = lark.text(f"{tool.name}\n")
        return f"{head} {self.parameters.of(lark, tool)} {lark.text(END)}"

"""Calls between `<tool_call>` and `</tool_call>`.

Hermes, Qwen 2.5, Qwen 3     <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>
Qwen3-Coder, Qwen 3.5        <tool_call><function=f><parameter=a>1</parameter></function></tool_call>
GLM 4.5 and later            <tool_call>f<arg_key>a</arg_key><arg_value>1</arg_value></tool_call>

White space may stand between the parts. Models trained on one form sometimes fall into another, so that each is read
wherever the tag stands; the formats differ in what a model is held to.
"""

from __future__ import annotations

import re
from typing import ClassVar

from sensorium.parsing.call_object import CallObject, Outcome
from sensorium.parsing.call_parameters import ParameterWriter
from sensorium.parsing.formats.base import ToolFormat, is_name
from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tools

BEGIN, END = "<tool_call>", "</tool_call>"
_FUNCTION, _FUNCTION_END = "<function=", "</function>"
_PARAMETER, _PARAMETER_END = "<parameter=", "</parameter>"
_KEY, _KEY_END, _VALUE, _VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_NAME_RUN = re.compile(r"[a-zA-Z0-9_.-]*")
_CLOSERS = re.compile(r"[\s}\]]*")


class _Tagged(ToolFormat):
    """Reads all three."""

    begins: ClassVar[tuple[str, ...]] = (BEGIN,)

    def read(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[None]:
        """See `ToolFormat`."""
        while True:
            begin = yield from reader.until(self.begins, sink.content)
            if begin is None:
                return
            reader.mark(begin)
            outcome = yield from _read_call(begin, reader, sink, tools)
            if outcome is Outcome.NONE:
                sink.content(reader.unmark())
            elif outcome is Outcome.BROKEN:
                yield from reader.until((END,), sink.arguments)
            else:
                yield from _read_end(reader, sink)


class Hermes(_Tagged):
    """JSON between the tags."""

    name = "hermes"
    markers = (BEGIN, END)

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return BEGIN in text


class QwenCoder(_Tagged):
    """Tags within tags. The outer ones are sometimes left out."""

    name = "qwen3_coder"
    markers = (BEGIN, END)
    begins = (BEGIN, _FUNCTION)

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return _FUNCTION in text and _PARAMETER in text


class Glm(_Tagged):
    """A name, then keys and values."""

    name = "glm"
    markers = (BEGIN, END, _KEY, _KEY_END, _VALUE, _VALUE_END)

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return _KEY in text


def _read_call(begin: str, reader: Reader, sink: Sink, tools: Tools) -> Steps[Outcome]:
    if begin == _FUNCTION:
        return (yield from _read_function(reader, sink, tools))
    yield from reader.run(WHITESPACE)
    if (yield from reader.peek(1)) == "{":
        return (yield from CallObject(reader, sink, is_name, only_calls=False).read())
    if (yield from reader.take(_FUNCTION)):
        return (yield from _read_function(reader, sink, tools))
    return (yield from _read_keys(reader, sink, tools))


def _read_end(reader: Reader, sink: Sink) -> Steps[None]:
    """The closing tag, if it is there. A brace too many before it is no content."""
    reader.mark()
    yield from reader.run(_CLOSERS)
    has_end = yield from reader.take(END)
    read = reader.unmark()
    if not has_end:
        sink.content(read)


def _read_function(reader: Reader, sink: Sink, tools: Tools) -> Steps[Outcome]:
    """From the function's name on."""
    name = yield from reader.run(_NAME_RUN)
    if not is_name(name) or not (yield from reader.take(">")):
        return Outcome.NONE
    reader.unmark()
    sink.start_call(name)
    writer = ParameterWriter(reader, sink)
    writer.begin()
    tag: str | None = _PARAMETER_END
    while tag in (_PARAMETER, _PARAMETER_END):
        if tag == _PARAMETER:
            tag = yield from _read_parameter(name, reader, sink, tools, writer)
        else:
            yield from reader.run(WHITESPACE)
            tag = yield from reader.until((_PARAMETER, _FUNCTION_END, END), sink.content)
    if tag is not None:  # else it was cut off, and what is missing is not made up
        writer.end()
    return Outcome.CALL


def _read_parameter(
    function: str, reader: Reader, sink: Sink, tools: Tools, writer: ParameterWriter
) -> Steps[str | None]:
    """A parameter from its name on; returns the tag that ended it."""
    pieces: list[str] = []
    if (yield from reader.until((">",), pieces.append)) is None:
        return None
    name = "".join(pieces)
    schema = tools.schema_of(function, name)
    ends = (_PARAMETER_END, _PARAMETER, _FUNCTION_END)
    return (yield from writer.parameter(name, schema, ends, has_frame=True))


def _read_keys(reader: Reader, sink: Sink, tools: Tools) -> Steps[Outcome]:
    """From the function's name on: keys and values up to the closing tag."""
    name = yield from reader.run(_NAME_RUN)
    yield from reader.run(WHITESPACE)
    if not is_name(name) or (yield from reader.peek(len(_KEY))) not in (_KEY, END[: len(_KEY)]):
        return Outcome.NONE
    reader.unmark()
    sink.start_call(name)
    writer = ParameterWriter(reader, sink)
    writer.begin()
    while True:
        yield from reader.run(WHITESPACE)
        tag = yield from reader.until((_KEY, END), sink.content)
        if tag != _KEY:
            break
        key: list[str] = []
        yield from reader.until((_KEY_END,), key.append)
        if (yield from reader.until((_VALUE,), sink.content)) is None:
            return Outcome.CALL
        parameter = "".join(key).strip()
        if (yield from writer.parameter(parameter, tools.schema_of(name, parameter), (_VALUE_END,))) is None:
            return Outcome.CALL
    if tag == END:
        writer.end()
    return Outcome.CALL

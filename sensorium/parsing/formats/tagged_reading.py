"""Reads calls between `<tool_call>` and `</tool_call>`, in any of the formats of `tagged.py`."""

from __future__ import annotations

import re

from sensorium.parsing.call_object import CallObject, Outcome
from sensorium.parsing.call_parameters import ParameterWriter
from sensorium.parsing.formats.base import is_name, no_call
from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tools

BEGIN, END = "<tool_call>", "</tool_call>"
FUNCTION, FUNCTION_END = "<function=", "</function>"
PARAMETER, PARAMETER_END = "<parameter=", "</parameter>"
KEY, KEY_END, VALUE, VALUE_END = "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"
_NAME_RUN = re.compile(r"[a-zA-Z0-9_.-]*")
_CLOSERS = re.compile(r"[\s}\]]*")


def read_tagged(begins: tuple[str, ...], reader: Reader, sink: Sink, tools: Tools) -> Steps[None]:
    """Read an answer to its end. `begins`: what a call begins with."""
    while (begin := (yield from reader.until(begins, sink.content))) is not None:
        reader.mark(begin)
        outcome = yield from _read_call(begin, reader, sink, tools)
        if outcome is Outcome.NONE:
            no_call(reader, sink)
        elif outcome is Outcome.BROKEN:
            yield from reader.until((END,), sink.arguments, is_within=True)
        else:
            yield from _read_end(reader, sink)


def _read_call(begin: str, reader: Reader, sink: Sink, tools: Tools) -> Steps[Outcome]:
    if begin == FUNCTION:
        return (yield from _read_function(reader, sink, tools))
    yield from reader.run(WHITESPACE)
    if (yield from reader.peek(1)) == "{":
        return (yield from CallObject(reader, sink, is_name, only_calls=False).read())
    if (yield from reader.take(FUNCTION)):
        return (yield from _read_function(reader, sink, tools))
    return (yield from _read_keys(reader, sink, tools))


def _read_end(reader: Reader, sink: Sink) -> Steps[None]:
    """Read the closing tag, if it is there. An extra brace before it is not content."""
    reader.mark()
    yield from reader.run(_CLOSERS)
    if (yield from reader.take_end(END)):
        reader.unmark()
    else:
        no_call(reader, sink)


def _read_function(reader: Reader, sink: Sink, tools: Tools) -> Steps[Outcome]:
    """Read a call, starting at the function's name."""
    name = yield from reader.run(_NAME_RUN)
    if not is_name(name) or not (yield from reader.take(">")):
        return Outcome.NONE
    reader.unmark()
    sink.start_call(name)
    writer = ParameterWriter(reader, sink)
    writer.begin()
    tag: str | None = PARAMETER_END
    while tag in (PARAMETER, PARAMETER_END):
        if tag == PARAMETER:
            tag = yield from _read_parameter(name, reader, tools, writer)
        else:
            yield from reader.run(WHITESPACE)
            tag = yield from reader.until((PARAMETER, FUNCTION_END, END), sink.content, is_within=True)
    if tag is not None:  # else it was cut off, and the missing part is not invented
        writer.end()
    return Outcome.CALL


def _read_parameter(function: str, reader: Reader, tools: Tools, writer: ParameterWriter) -> Steps[str | None]:
    """Read a parameter, starting at its name; returns the tag that ended it."""
    pieces: list[str] = []
    if (yield from reader.until((">",), pieces.append)) is None:
        return None
    name = "".join(pieces)
    schema = tools.schema_of(function, name)
    ends = (PARAMETER_END, PARAMETER, FUNCTION_END)
    return (yield from writer.parameter(name, schema, ends, has_frame=True))


def _read_keys(reader: Reader, sink: Sink, tools: Tools) -> Steps[Outcome]:
    """Read a call, starting at the function's name: keys and values up to the closing tag."""
    name = yield from reader.run(_NAME_RUN)
    yield from reader.run(WHITESPACE)
    if not is_name(name) or (yield from reader.peek(len(KEY))) not in (KEY, END[: len(KEY)]):
        for mark in (KEY, END):  # a cut may have left a part of it
            yield from reader.take(mark)
        return Outcome.NONE
    reader.unmark()
    sink.start_call(name)
    writer = ParameterWriter(reader, sink)
    writer.begin()
    while True:
        yield from reader.run(WHITESPACE)
        tag = yield from reader.until((KEY, END), sink.content, is_within=True)
        if tag != KEY:
            break
        key: list[str] = []
        yield from reader.until((KEY_END,), key.append)
        if (yield from reader.until((VALUE,), sink.content, is_within=True)) is None:
            return Outcome.CALL
        parameter = "".join(key).strip()
        if (yield from writer.parameter(parameter, tools.schema_of(name, parameter), (VALUE_END,))) is None:
            return Outcome.CALL
    if tag == END:
        writer.end()
    return Outcome.CALL

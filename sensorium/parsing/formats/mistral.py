"""Calls behind `[TOOL_CALLS]`, a special token.

Until 2024       [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]
from 2025 on     [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}      each call behind its own; the id is left out since
"""

from __future__ import annotations

import re

from sensorium.parsing.call_object import CallObject, Outcome
from sensorium.parsing.formats.base import MarkedFormat, arguments_of, is_name, no_call
from sensorium.parsing.json_scanner import JsonScanner
from sensorium.parsing.lark import Lark
from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tool, Tools

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME_RUN = re.compile(r"[a-zA-Z0-9_.-]*")
_CLOSERS = re.compile(r"[\s}\]]*")


class Mistral(MarkedFormat):
    """Both forms."""

    name = "mistral"
    markers = (BEGIN, CALL_ID, ARGS)
    call_id_chars = 9

    begin = BEGIN

    def call(self, lark: Lark, tool: Tool) -> str:
        """See `MarkedFormat`. Models that know the newer form have a token for it."""
        arguments = arguments_of(lark, tool)
        if lark.is_token(ARGS):
            return f"{lark.text(tool.name + ARGS)} {arguments}"
        return f"{lark.text(_object_head(tool))} {arguments} {lark.text('}')}"

    def calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`."""
        if lark.is_token(ARGS):
            return super().calls(lark, tools, is_parallel=is_parallel)
        return f"{lark.text(BEGIN)} {self._list(lark, tools, is_parallel=is_parallel)}"

    def text_and_calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`."""
        if lark.is_token(ARGS):
            return super().text_and_calls(lark, tools, is_parallel=is_parallel)
        calls = lark.rule(f"{lark.text_to(BEGIN)} {self._list(lark, tools, is_parallel=is_parallel)}")
        return f"({calls} | {lark.rule('TEXT')})"

    def _list(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        call = self._any_call(lark, tools)
        more = f"({lark.text(', ')} {call})*" if is_parallel else ""
        return f"{lark.text(' [')} {call} {more} {lark.text(']')}"

    def read(self, reader: Reader, sink: Sink, tools: Tools, *, is_forced: bool = False) -> Steps[None]:
        """See `ToolFormat`."""
        while (begin := (yield from reader.until((BEGIN,), sink.content))) is not None:
            reader.mark(begin)
            yield from reader.run(WHITESPACE)
            first = yield from reader.peek(1)
            if first in ("[", "{"):
                outcome = yield from _read_list(reader, sink)
            else:
                outcome = yield from _read_named(reader, sink)
            if outcome is Outcome.NONE:
                no_call(reader, sink)

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return BEGIN in text


def _object_head(tool: Tool) -> str:
    return f'{{"name": "{tool.name}", "arguments": '


def _read_list(reader: Reader, sink: Sink) -> Steps[Outcome]:
    """One call or a list of them. What follows the last one that can be read is text."""
    is_list = yield from reader.take("[")
    while True:
        yield from reader.run(WHITESPACE)
        if (yield from reader.peek(1)) != "{":
            return Outcome.NONE
        outcome = yield from CallObject(reader, sink, is_name, only_calls=False).read()
        if outcome is not Outcome.CALL:
            return outcome
        reader.mark()
        yield from reader.run(WHITESPACE)
        if not is_list or not (yield from reader.take(",")):
            break
    yield from reader.run(_CLOSERS)
    reader.unmark()
    return Outcome.CALL


def _read_named(reader: Reader, sink: Sink) -> Steps[Outcome]:
    """A name, and arguments as JSON."""
    name = yield from reader.run(_NAME_RUN)
    yield from reader.run(WHITESPACE)
    if (yield from reader.take(CALL_ID)):
        yield from reader.run(_NAME_RUN)
    yield from reader.take(ARGS)
    yield from reader.run(WHITESPACE)
    if not is_name(name) or (yield from reader.peek(1)) != "{":
        return Outcome.NONE
    reader.unmark()
    sink.start_call(name)
    yield from reader.json(JsonScanner(), sink.arguments)
    return Outcome.CALL

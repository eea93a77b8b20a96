"""Calls behind `[TOOL_CALLS]`, a special token.

Until 2024       [TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "abcdefghi"}]
from 2025 on     [TOOL_CALLS]f[CALL_ID]abcdefghi[ARGS]{"a": 1}      each call behind its own; the id is left out since
"""

from __future__ import annotations

import re

from sensorium.parsing.call_object import CallObject, Outcome
from sensorium.parsing.formats.base import ToolFormat, is_name
from sensorium.parsing.json_scanner import JsonScanner
from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tools

BEGIN, CALL_ID, ARGS = "[TOOL_CALLS]", "[CALL_ID]", "[ARGS]"
_NAME_RUN = re.compile(r"[a-zA-Z0-9_.-]*")
_CLOSERS = re.compile(r"[\s}\]]*")


class Mistral(ToolFormat):
    """Both forms."""

    name = "mistral"
    markers = (BEGIN, CALL_ID, ARGS)
    call_id_chars = 9

    def read(self, reader: Reader, sink: Sink, tools: Tools) -> Steps[None]:
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
                sink.content(reader.unmark())

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return BEGIN in text


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

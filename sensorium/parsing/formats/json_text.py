"""Calls as JSON without marks around them: the whole answer is a call, or several.

Llama 3    {"name": "f", "parameters": {"a": 1}}; {"name": "g", "parameters": {}}     perhaps behind <|python_tag|>
plain      {"name": "f", "arguments": {"a": 1}}    or a list of such, perhaps in a fence of ```json

JSON is a call only if it names a function of the request and has no members but a call's: otherwise it is an answer in
JSON.
"""

from __future__ import annotations

import re
from typing import ClassVar

from sensorium.parsing.call_object import CallObject, Outcome
from sensorium.parsing.formats.base import ToolFormat, arguments_of, no_call
from sensorium.parsing.lark import Lark
from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tools

PYTHON_TAG = "<|python_tag|>"
FENCE, FENCE_NAME = "```", "json"
_NO_JSON = r"/[^\s{\[`](.|\n)*/"
_SEPARATORS = re.compile(r"[\s;,]*")
_CLOSERS = re.compile(r"[\s}\]]*")


class JsonText(ToolFormat):
    """Plain JSON."""

    name = "json"
    begins: ClassVar[tuple[str, ...]] = ()
    """Marks behind which calls may stand anywhere in an answer."""
    arguments_key: ClassVar[str] = "arguments"

    def calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`. Several are a list."""
        call = self._any_call(lark, tools)
        return (
            f"({call} | {lark.text('[')} {call} ({lark.text(', ')} {call})* {lark.text(']')})" if is_parallel else call
        )

    def text_and_calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`. What begins as JSON is a call."""
        text = lark.rule(_NO_JSON)
        return f"({self.calls(lark, tools, is_parallel=is_parallel)} | {text}?)"

    def _any_call(self, lark: Lark, tools: Tools) -> str:
        """Lexeme by lexeme as JSON has it: llguidance's lexer doesn't go back from a longer literal."""
        calls = []
        for tool in tools:
            head = ("{", '"name"', ": ", f'"{tool.name}"', ", ", f'"{self.arguments_key}"', ": ")
            calls.append(f"{' '.join(map(lark.text, head))} {arguments_of(lark, tool)} {lark.text('}')}")
        return lark.rule(" | ".join(calls))

    def read(self, reader: Reader, sink: Sink, tools: Tools, *, is_forced: bool = False) -> Steps[None]:
        """See `ToolFormat`."""
        reader.mark()
        is_certain = is_forced
        yield from reader.run(WHITESPACE)
        while True:
            for begin in self.begins:
                is_certain = (yield from reader.take(begin)) or is_certain
            yield from _read_calls(reader, sink, tools, is_certain=is_certain)
            if not self.begins:
                yield from reader.rest(sink.content)
                return
            found = yield from reader.until(self.begins, sink.content)
            if found is None:
                return
            is_certain = True
            reader.mark(found)

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return re.search(r'"name":\s?"[^"]*",\s?"arguments":\s?\{', text) is not None


class LlamaJson(JsonText):
    """As Llama 3 writes it."""

    name = "llama3"
    markers = (PYTHON_TAG,)
    begins = (PYTHON_TAG,)
    arguments_key = "parameters"

    def calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`."""
        call = self._any_call(lark, tools)
        return f"{call} ({lark.text('; ')} {call})*" if is_parallel else call

    def is_shown_by(self, text: str) -> bool:
        """See `ToolFormat`."""
        return PYTHON_TAG in text or re.search(r'"name":\s?"[^"]*",\s?"parameters":\s?\{', text) is not None


def _read_calls(reader: Reader, sink: Sink, tools: Tools, *, is_certain: bool) -> Steps[None]:
    """Calls one after another. Text that isn't a call is content, with everything marked before it.

    `is_certain`: only calls can stand here, so that an incomplete one is not content.
    """
    has_fence = yield from reader.take(FENCE)
    if has_fence:
        yield from reader.take(FENCE_NAME)
    yield from reader.run(WHITESPACE)
    yield from reader.take("[")
    has_calls = False
    while (yield from _at_brace(reader)):
        call = CallObject(reader, sink, tools.__contains__, only_calls=True)
        if (yield from call.read()) is not Outcome.CALL:
            _end(reader, sink, is_certain=is_certain or has_calls or call.is_named)
            return
        has_calls = True
        reader.mark()
        yield from reader.run(_SEPARATORS)
    if not has_calls:
        _end(reader, sink, is_certain=is_certain)
        return
    reader.unmark()
    yield from reader.run(_CLOSERS)
    if has_fence:
        yield from reader.take_end(FENCE)


def _end(reader: Reader, sink: Sink, *, is_certain: bool) -> None:
    """JSON that was cut off is content, unless it can only be a call."""
    if is_certain:
        no_call(reader, sink)
    else:
        sink.content(reader.unmark())


def _at_brace(reader: Reader) -> Steps[bool]:
    yield from reader.run(WHITESPACE)
    return (yield from reader.peek(1)) == "{"

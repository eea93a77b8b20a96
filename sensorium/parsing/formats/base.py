"""The base classes of formats of calls."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from sensorium.parsing.lark import Lark
from sensorium.parsing.reader import Reader, Steps
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import CALLED_NAME, Tool, Tools


class ToolFormat(ABC):
    """A format of calls: how it is read, and its grammar. Has no state."""

    name: ClassVar[str]
    markers: ClassVar[tuple[str, ...]] = ()
    """Texts that mark calls. If they are special tokens, the detokenizer must keep them."""
    call_id_chars: ClassVar[int | None] = None
    """Length of the ids, of letters and digits, that the model's templates require; None: any."""

    @abstractmethod
    def read(self, reader: Reader, sink: Sink, tools: Tools, *, is_forced: bool = False) -> Steps[None]:
        """Read an answer to its end. `is_forced`: it consists of calls only."""

    @abstractmethod
    def is_shown_by(self, text: str) -> bool:
        """Whether `text`, a call as a template writes it or the template itself, has this format."""

    @abstractmethod
    def calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """An expression for one call or several."""

    @abstractmethod
    def text_and_calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """An expression for text in which calls may stand."""


class MarkedFormat(ToolFormat):
    """A format whose calls begin with a mark, so that they may stand anywhere in an answer."""

    begin: ClassVar[str]
    separator: ClassVar[str] = ""
    """The text between two calls."""

    @abstractmethod
    def call(self, lark: Lark, tool: Tool) -> str:
        """An expression for a call of a tool, without its opening mark."""

    def calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`."""
        call = lark.rule(f"{lark.text(self.begin)} {self._any_call(lark, tools)}")
        return f"{call} ({lark.text(self.separator)} {call})*" if is_parallel else call

    def text_and_calls(self, lark: Lark, tools: Tools, *, is_parallel: bool) -> str:
        """See `ToolFormat`."""
        call = lark.rule(f"{lark.text_to(self.begin)} {self._any_call(lark, tools)}")
        tail = lark.rule("TEXT")
        return f"{call}* {tail}" if is_parallel else f"({call} | {tail})"

    def _any_call(self, lark: Lark, tools: Tools) -> str:
        return lark.rule(" | ".join(self.call(lark, tool) for tool in tools))


def arguments_of(lark: Lark, tool: Tool) -> str:
    """An expression for a tool's arguments as a JSON object."""
    return lark.json(schema_of(tool), is_strict=tool.is_strict)


def schema_of(tool: Tool) -> Mapping[str, Any]:
    """The schema of a tool's arguments, an object."""
    if tool.takes_nothing:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **tool.parameters}


def no_call(reader: Reader, sink: Sink) -> None:
    """What was read since a mark isn't a call: emit it as content, unless the text was cut off within it."""
    read = reader.unmark()
    if not reader.is_cut_off:
        sink.content(read)


def is_name(name: str) -> bool:
    """Whether this is a legal name of a function, known or not."""
    return CALLED_NAME.fullmatch(name) is not None

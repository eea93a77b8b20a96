"""Parses an answer's text as it arrives: reasoning, content, calls."""

from __future__ import annotations

from collections.abc import Iterable

from sensorium.parsing.events import Content, Event, ParsedAnswer, collect
from sensorium.parsing.formats import ToolFormat
from sensorium.parsing.reader import Reader, Steps
from sensorium.parsing.reasoning import ReasoningFormat
from sensorium.parsing.sink import Sink
from sensorium.parsing.tools import Tools


class AnswerParser:
    """Parses one answer. The joined events don't depend on how its text is cut into pieces.

        parser = AnswerParser(reasoning=REASONING_FORMATS["think"], tool_format=FORMATS["hermes"], tools=tools)
        events = parser.push("<think>Hm.</think>") + parser.push("Hello") + parser.finish()

    All that the model wrote is in the events, except for marks, the white space around them, calls beyond `max_calls`,
    arguments of functions that take none, and an incomplete mark or call at the end of an answer that was cut off. Text
    that looks like a call but isn't one is content. Takes time linear in the text.

    Args:
        reasoning: how the model marks its reasoning; None: don't look for it.
        is_reasoning_open: the prompt ended within reasoning.
        tool_format: how the model writes calls; None: don't look for them.
        tools: the functions that it may call.
        max_calls: further calls are dropped; None for any number. is_forced: the answer consists of calls only.
    """

    def __init__(
        self,
        *,
        reasoning: ReasoningFormat | None = None,
        is_reasoning_open: bool = False,
        tool_format: ToolFormat | None = None,
        tools: Tools | None = None,
        max_calls: int | None = None,
        is_forced: bool = False,
    ) -> None:
        self._reader = Reader()
        self._sink = Sink(max_calls, (tool.name for tool in tools or () if tool.takes_nothing))
        self._is_forced = is_forced
        self._is_plain = reasoning is None and tool_format is None
        self._steps = self._read(reasoning, is_reasoning_open, tool_format, tools or Tools(()))

    def push(self, text: str) -> list[Event]:
        """Take more of the answer; returns the events that are certain by now."""
        if self._is_plain:
            return [Content(text)] if text else []
        if text:
            self._reader.push(text)
            next(self._steps, None)
        return self._sink.take()

    def finish(self, *, is_cut: bool = False) -> list[Event]:
        """The answer has ended; returns the remaining events. `is_cut`: it was cut off, by a limit or a stop string."""
        if self._is_plain:
            return []
        self._reader.close(is_cut=is_cut)
        for _ in self._steps:
            raise AssertionError("a parser waits for text behind the end")
        self._sink.finish()
        return self._sink.take()

    def _read(
        self, reasoning: ReasoningFormat | None, is_open: bool, tool_format: ToolFormat | None, tools: Tools
    ) -> Steps[None]:
        if reasoning is not None:
            yield from reasoning.read(self._reader, self._sink, is_open=is_open)
        if tool_format is not None:
            yield from tool_format.read(self._reader, self._sink, tools, is_forced=self._is_forced)
        yield from self._reader.rest(self._sink.content)

    def parse(self, pieces: Iterable[str], *, is_cut: bool = False) -> ParsedAnswer:
        """Parse a whole answer, in one piece or several; see `finish`."""
        events = [event for piece in pieces for event in self.push(piece)]
        return collect([*events, *self.finish(is_cut=is_cut)])

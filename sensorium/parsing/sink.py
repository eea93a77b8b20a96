"""The output of a parser: makes events of what it found, and drops white space that is layout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from sensorium.parsing.events import Content, Event, Reasoning, ToolCallArguments, ToolCallStart


class Sink:
    """Collects the events of one answer.

    White space around calls and reasoning is layout, and dropped; it is held back until the next text shows whether it
    is. An answer that is only text keeps every character.
    """

    def __init__(self, max_calls: int | None = None, take_nothing: Iterable[str] = ()) -> None:
        """`max_calls`: further calls are dropped; None for any number. `take_nothing`: names of functions without
        arguments."""
        self._events: list[Event] = []
        self._max_calls = max_calls
        self._take_nothing = frozenset(take_nothing)
        self._has_arguments = True
        self.num_calls = 0
        """Calls begun, dropped ones included."""
        self._is_layout = False
        """White space at the beginning of content is dropped."""
        self._has_content = False
        self._content_space: list[str] = []
        self._has_reasoning = False
        self._reasoning_space: list[str] = []

    def take(self) -> list[Event]:
        """The events since the last time; neighbours of a kind are joined."""
        events, self._events = self._events, []
        return [_joined(list(group)) for _, group in groupby(events, key=_kind)]

    def content(self, text: str) -> None:
        """Text for the reader."""
        if not self._has_content and self._is_layout:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            self._has_content = True
            self._events.append(Content("".join((*self._content_space, shown))))
            self._content_space.clear()
        if len(shown) < len(text):
            self._content_space.append(text[len(shown) :])

    def reasoning(self, text: str) -> None:
        """Take reasoning."""
        if not self._has_reasoning:
            text = text.lstrip()
        shown = text.rstrip()
        if shown:
            self._has_reasoning = True
            self._events.append(Reasoning("".join((*self._reasoning_space, shown))))
            self._reasoning_space.clear()
        if len(shown) < len(text):
            self._reasoning_space.append(text[len(shown) :])

    def end_reasoning(self) -> None:
        """The reasoning has ended."""
        self._expect_layout()

    def start_call(self, name: str) -> None:
        """A call of a function begins; its arguments follow."""
        self._expect_layout()
        self.num_calls += 1
        self._has_arguments = name not in self._take_nothing
        if self._is_wanted:
            self._events.append(ToolCallStart(self.num_calls - 1, name))
            if not self._has_arguments:
                self._events.append(ToolCallArguments(self.num_calls - 1, "{}"))

    def arguments(self, text: str) -> None:
        """More arguments of the last call. Those of a function that takes none are dropped."""
        if text and self._is_wanted and self._has_arguments:
            self._events.append(ToolCallArguments(self.num_calls - 1, text))

    def finish(self) -> None:
        """The answer has ended."""
        if not self._is_layout:
            self._events.extend(Content(space) for space in self._content_space)
        self._content_space.clear()

    @property
    def _is_wanted(self) -> bool:
        return self._max_calls is None or self.num_calls <= self._max_calls

    def _expect_layout(self) -> None:
        self._is_layout = True
        if not self._has_content:
            self._content_space.clear()


def _kind(event: Event) -> Any:
    if isinstance(event, ToolCallArguments):
        return ToolCallArguments, event.index
    return id(event) if isinstance(event, ToolCallStart) else type(event)


def _joined(events: Sequence[Event]) -> Event:
    """Events of one kind as one."""
    first = events[0]
    if len(events) == 1 or isinstance(first, ToolCallStart):
        return first
    return replace(first, text="".join(event.text for event in events if not isinstance(event, ToolCallStart)))

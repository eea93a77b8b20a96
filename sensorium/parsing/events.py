"""The parts of a model's answer, as events and as a whole.

A parser emits events as text arrives. `collect` joins the events of one answer, so a whole answer always equals its
stream.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Content:
    """More of the answer's text."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """More of the reasoning."""

    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStart:
    """The model calls a function. Calls are numbered from 0, and follow one another."""

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallArguments:
    """More of a call's arguments: a piece of the text of a JSON object."""

    index: int
    text: str


Event: TypeAlias = Content | Reasoning | ToolCallStart | ToolCallArguments


@dataclass(slots=True)
class ParsedCall:
    """A call as a whole."""

    name: str
    arguments: str
    """The text of a JSON object; incomplete or invalid if the model didn't finish it."""


@dataclass(slots=True)
class ParsedAnswer:
    """An answer as a whole."""

    content: str = ""
    reasoning: str | None = None
    """None where the model wrote none."""
    tool_calls: list[ParsedCall] = field(default_factory=list)


def collect(events: Iterable[Event]) -> ParsedAnswer:
    """The answer that a sequence of events makes."""
    content: list[str] = []
    reasoning: list[str] = []
    names: list[str] = []
    arguments: list[list[str]] = []
    for event in events:
        match event:
            case Content(text):
                content.append(text)
            case Reasoning(text):
                reasoning.append(text)
            case ToolCallStart(_, name):
                names.append(name)
                arguments.append([])
            case ToolCallArguments(index, text):
                arguments[index].append(text)
    calls = [ParsedCall(name, "".join(pieces)) for name, pieces in zip(names, arguments, strict=True)]
    return ParsedAnswer("".join(content), "".join(reasoning) if reasoning else None, calls)

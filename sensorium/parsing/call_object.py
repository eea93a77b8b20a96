"""A call as a JSON object, such as `{"name": "f", "arguments": {...}}`, read while the model writes it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from enum import Enum, auto

from sensorium.parsing.json_scanner import JsonScanner
from sensorium.parsing.reader import WHITESPACE, Reader, Steps
from sensorium.parsing.sink import Sink

NAME_KEYS = frozenset({"name", "function", "tool_name"})
ARGUMENTS_KEYS = frozenset({"arguments", "parameters", "args"})
OTHER_KEYS = frozenset({"id", "type"})
"""Further members that a call may have."""
_SURROGATE = re.compile("[\ud800-\udfff]")


class Outcome(Enum):
    """The outcome of reading text that may be a call."""

    CALL = auto()
    """A complete call."""
    BROKEN = auto()
    """A call whose arguments are incomplete."""
    NONE = auto()
    """Not a call: what was read is ordinary text."""


class CallObject:
    """Reads one call, starting at its opening brace.

    The call begins as soon as its name is known and its arguments have begun; from then on they are emitted as they
    arrive. Until then the reader keeps what was read.

    Args:
        accepts: whether a function of this name may be called.
        only_calls: an object with members that a call doesn't have is not a call.
    """

    def __init__(self, reader: Reader, sink: Sink, accepts: Callable[[str], bool], *, only_calls: bool) -> None:
        self._reader = reader
        self._sink = sink
        self._accepts = accepts
        self._only_calls = only_calls
        self._name: str | None = None
        self._early_arguments: str | None = None
        self._has_begun = False
        self._is_complete = False

    @property
    def is_named(self) -> bool:
        """The name was read, and a function of this name may be called."""
        return self._name is not None

    def read(self) -> Steps[Outcome]:
        """Read as much of the call as there is."""
        is_closed = yield from self._object(is_outer=True)
        if is_closed and self._name is not None and not self._has_begun:
            self._begin()
            self._sink.arguments("{}")
            return Outcome.CALL
        if not self._has_begun:
            return Outcome.NONE
        return Outcome.CALL if self._is_complete else Outcome.BROKEN

    def _object(self, *, is_outer: bool) -> Steps[bool]:
        """Read the members of an object; False if it isn't a complete object."""
        reader = self._reader
        yield from reader.take("{")
        while True:
            yield from reader.run(WHITESPACE)
            key = yield from self._string()
            if key is None:
                return False
            yield from reader.run(WHITESPACE)
            if not (yield from reader.take(":")):
                return False
            yield from reader.run(WHITESPACE)
            if not (yield from self._member(key, is_outer=is_outer)):
                return False
            yield from reader.run(WHITESPACE)
            if (yield from reader.take("}")):
                return True
            if not (yield from reader.take(",")):
                return False

    def _member(self, key: str, *, is_outer: bool) -> Steps[bool]:
        first = yield from self._reader.peek(1)
        if key == "function" and first == "{" and is_outer:  # as in OpenAI's own form
            return (yield from self._object(is_outer=False))
        if key in NAME_KEYS and self._name is None:
            return (yield from self._read_name())
        if key in ARGUMENTS_KEYS and not self._has_begun and self._early_arguments is None:
            return (yield from self._read_arguments(first))
        if self._only_calls and key not in OTHER_KEYS:
            return False
        return (yield from self._reader.json(JsonScanner(), _ignore))

    def _read_name(self) -> Steps[bool]:
        name = yield from self._string()
        if name is None or not self._accepts(name):
            return False
        self._name = name
        if self._early_arguments is not None:
            self._begin()
            self._sink.arguments(self._early_arguments)
            self._is_complete = True
        return True

    def _read_arguments(self, first: str) -> Steps[bool]:
        """Read arguments: an object, a string that holds one as JSON, or null for none."""
        if first == "{" and self._name is not None:
            return (yield from self._stream_arguments())
        if first not in ("{", '"', "n"):
            return False
        pieces: list[str] = []
        if not (yield from self._reader.json(JsonScanner(), pieces.append)):
            return False
        arguments = _as_object("".join(pieces))
        if arguments is None:
            return False
        if self._name is None:
            self._early_arguments = arguments
        else:
            self._begin()
            self._sink.arguments(arguments)
            self._is_complete = True
        return True

    def _stream_arguments(self) -> Steps[bool]:
        """Emit the arguments, once their first key shows that they are JSON."""
        scanner = JsonScanner()
        held: list[str] = []

        def emit(text: str) -> None:
            held.append(text)
            if scanner.has_member or scanner.is_done:
                self._begin()
                self._sink.arguments("".join(held))
                held.clear()

        self._is_complete = yield from self._reader.json(scanner, emit)
        return self._is_complete

    def _begin(self) -> None:
        if not self._has_begun:
            assert self._name is not None
            self._has_begun = True
            self._reader.unmark()
            self._sink.start_call(self._name)

    def _string(self) -> Steps[str | None]:
        """Read a string; None if something else comes."""
        if (yield from self._reader.peek(1)) != '"':
            return None
        pieces: list[str] = []
        is_whole = yield from self._reader.json(JsonScanner(), pieces.append)
        return str(json.loads("".join(pieces))) if is_whole else None


def _as_object(text: str) -> str | None:
    """Arguments as the text of a JSON object; None if they are something else."""
    if text == "null":
        return "{}"
    if text.startswith('"'):
        text = json.loads(text).strip() or "{}"
        if _SURROGATE.search(text):  # from an escape that is half of a character
            return None
        scanner = JsonScanner()
        pieces: list[str] = []
        if scanner.feed(text, 0, pieces) < len(text) or not scanner.is_done:
            return None
        text = "".join(pieces)
    return text if text.startswith("{") else None


def _ignore(text: str) -> None:
    pass

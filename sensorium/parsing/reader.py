"""Lets a parser read text that arrives in pieces as if all of it were there.

A parser is a generator:

    found = yield from reader.until(("<tool_call>",), sink.content)

It yields where the text ends and more may come; `push` and `close` resume it. Every read takes as much as it can, so
that the unread rest is shorter than the longest literal: the work is linear in the text, however it is cut.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator
from functools import lru_cache
from typing import TypeAlias, TypeVar

from sensorium.parsing.json_scanner import JsonScanner

_T = TypeVar("_T")
Steps: TypeAlias = Generator[None, None, _T]
Emit: TypeAlias = Callable[[str], None]

WHITESPACE = re.compile(r"\s*")


class Reader:
    """The text of one answer. Reads never go back; `unmark` returns what was read since `mark`.

    If the text was cut off, an incomplete literal at its end is read and dropped.
    """

    def __init__(self) -> None:
        self._text = ""
        self._at = 0
        self._is_closed = False
        self._is_cut = False
        self._marked: list[str] | None = None

    def push(self, text: str) -> None:
        """Add text."""
        self._text = self._text[self._at :] + text
        self._at = 0

    def close(self, *, is_cut: bool = False) -> None:
        """No more text will come. `is_cut`: the text was cut off."""
        self._is_closed = True
        self._is_cut = is_cut

    @property
    def is_cut_off(self) -> bool:
        """Whether the text was cut off and all of it is read."""
        return self._is_cut and self._at == len(self._text)

    def mark(self, before: str = "") -> None:
        """Record what is read from here on, after `before`."""
        self._marked = [before]

    def unmark(self) -> str:
        """Return what was read since `mark`, and stop recording."""
        marked, self._marked = self._marked, None
        return "".join(marked or ())

    def take(self, literal: str) -> Steps[bool]:
        """Read `literal` if it comes next; returns whether it did."""
        while True:
            ahead = self._text[self._at : self._at + len(literal)]
            if ahead == literal:
                self._read_to(self._at + len(literal))
                return True
            if not literal.startswith(ahead):
                return False
            if self._is_closed:
                if self._is_cut:
                    self._at = len(self._text)
                return False
            yield

    def take_end(self, literal: str) -> Steps[bool]:
        """As `take`, for a mark after a complete call: an incomplete mark at the end of the text is read too."""
        while True:
            ahead = self._text[self._at : self._at + len(literal)]
            if ahead == literal or (self._is_closed and literal.startswith(ahead)):
                self._read_to(self._at + len(ahead))
                return True
            if not literal.startswith(ahead):
                return False
            yield

    def peek(self, count: int) -> Steps[str]:
        """The next characters, unread; fewer only where the text ends."""
        while len(self._text) - self._at < count and not self._is_closed:
            yield
        return self._text[self._at : self._at + count]

    def run(self, characters: re.Pattern[str]) -> Steps[str]:
        """Read all that matches a pattern of the form `[...]*`."""
        pieces = []
        while True:
            match = characters.match(self._text, self._at)
            assert match is not None
            pieces.append(self._read_to(match.end()))
            if self._at < len(self._text) or self._is_closed:
                return "".join(pieces)
            yield

    def until(self, literals: tuple[str, ...], emit: Emit, *, is_within: bool = False) -> Steps[str | None]:
        """Read up to and including the first of the literals; returns it, or None where the text ends. The text before
        it goes to `emit`.

        `is_within`: within a call, where an incomplete literal at the end of the text is dropped, whether or not it was
        cut off.
        """
        pattern = _any_of(literals)
        while True:
            match = pattern.search(self._text, self._at)
            if match is not None:
                emit(self._read_to(match.start()))
                self._read_to(match.end())
                return match.group()
            if self._is_closed and not (self._is_cut or is_within):
                emit(self._read_to(len(self._text)))
                return None
            emit(self._read_to(len(self._text) - self._open_length(literals)))
            if self._is_closed:
                self._at = len(self._text)
                return None
            yield

    def json(self, scanner: JsonScanner, emit: Emit) -> Steps[bool]:
        """Read a JSON value to its end; False if it isn't valid, in which case its beginning has been read."""
        while True:
            pieces: list[str] = []
            self._read_to(scanner.feed(self._text, self._at, pieces))
            emit("".join(pieces))
            if scanner.is_done or scanner.is_broken:
                return scanner.is_done
            if self._is_closed:
                return False
            yield

    def rest(self, emit: Emit) -> Steps[None]:
        """Read everything that is left."""
        while True:
            emit(self._read_to(len(self._text)))
            if self._is_closed:
                return
            yield

    def _read_to(self, end: int) -> str:
        piece = self._text[self._at : end]
        self._at = end
        if self._marked is not None:
            self._marked.append(piece)
        return piece

    def _open_length(self, literals: tuple[str, ...]) -> int:
        """Characters at the end that may be the beginning of a literal."""
        longest = min(max(map(len, literals)) - 1, len(self._text) - self._at)
        for length in range(longest, 0, -1):
            tail = self._text[-length:]
            if any(literal.startswith(tail) for literal in literals):
                return length
        return 0


@lru_cache(maxsize=64)
def _any_of(literals: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(literals, key=len, reverse=True)
    return re.compile("|".join(re.escape(literal) for literal in longest_first))

"""Follows one JSON value through text that arrives in pieces. Source: RFC 8259.

Models write unescaped line breaks into strings, which JSON doesn't allow: the scanner emits them escaped, and
everything else unchanged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from enum import Enum, auto
from typing import ClassVar

_SPACE = re.compile(r"[ \t\n\r]*")
_PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
_NUMBER_RUN = re.compile(r"[-+.0-9eE]*")
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_HEX = frozenset("0123456789abcdefABCDEF")
_CONTROLS = {"\n": "\\n", "\r": "\\r", "\t": "\\t", "\b": "\\b", "\f": "\\f"}


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    LITERAL = auto()
    NUMBER = auto()


class JsonScanner:
    """Finds the end of a value that begins at the first character scanned.

    Takes time linear in the text, and memory for its nesting and its longest number.
    """

    def __init__(self) -> None:
        self.is_done = False
        """The value is complete."""
        self.is_broken = False
        """What was read is not the beginning of a JSON value."""
        self.has_member = False
        """A key with its colon was read: the value is an object, as JSON writes it."""
        self._expect = _Expect.VALUE
        self._closers: list[str] = []
        self._is_key = False
        self._rest = ""  # of a literal
        self._hex_left = 0
        self._number: list[str] = []

    def feed(self, text: str, start: int, out: list[str]) -> int:
        """Read from `start`; returns where it stopped: after the value, before a character that can't belong to it, or
        at the end.

        The text that was read goes to `out`.
        """
        at = start
        while at < len(text) and not (self.is_done or self.is_broken):
            at = self._STEPS[self._expect](self, text, at, out)
        return at

    def _run(self, pattern: re.Pattern[str], text: str, at: int, out: list[str]) -> int:
        match = pattern.match(text, at)
        assert match is not None
        if match.end() > at:
            out.append(match.group())
        return match.end()

    def _structure(self, text: str, at: int, out: list[str]) -> int:
        """Between values: white space, punctuation, and the first character of a value."""
        at = self._run(_SPACE, text, at, out)
        if at == len(text):
            return at
        char = text[at]
        if not self._takes(char):
            self.is_broken = True
            return at
        if self._expect is _Expect.NUMBER:
            return at  # read from its first character on
        out.append(char)
        return at + 1

    def _takes(self, char: str) -> bool:
        """Whether a character may come here; updates what is expected next."""
        expect = self._expect
        if expect in (_Expect.VALUE_OR_END, _Expect.KEY_OR_END, _Expect.COMMA_OR_END) and char == self._closers[-1]:
            self._closers.pop()
            self._end_value()
        elif expect in (_Expect.VALUE, _Expect.VALUE_OR_END):
            return self._begins_value(char)
        elif expect in (_Expect.KEY, _Expect.KEY_OR_END) and char == '"':
            self._expect, self._is_key = _Expect.STRING, True
        elif expect is _Expect.COLON and char == ":":
            self._expect, self.has_member = _Expect.VALUE, True
        elif expect is _Expect.COMMA_OR_END and char == ",":
            self._expect = _Expect.KEY if self._closers[-1] == "}" else _Expect.VALUE
        else:
            return False
        return True

    def _begins_value(self, char: str) -> bool:
        if char == "{":
            self._closers.append("}")
            self._expect = _Expect.KEY_OR_END
        elif char == "[":
            self._closers.append("]")
            self._expect = _Expect.VALUE_OR_END
        elif char == '"':
            self._expect, self._is_key = _Expect.STRING, False
        elif char in _LITERALS:
            self._expect, self._rest = _Expect.LITERAL, _LITERALS[char][1:]
        elif char == "-" or char in "0123456789":
            self._expect, self._number = _Expect.NUMBER, []
        else:
            return False
        return True

    def _end_value(self) -> None:
        if self._closers:
            self._expect = _Expect.COMMA_OR_END
        else:
            self.is_done = True

    def _string(self, text: str, at: int, out: list[str]) -> int:
        at = self._run(_PLAIN, text, at, out)
        if at == len(text):
            return at
        char = text[at]
        out.append(char if char in '"\\' else _CONTROLS.get(char, f"\\u{ord(char):04x}"))
        if char == "\\":
            self._expect = _Expect.ESCAPE
        elif char == '"' and self._is_key:
            self._expect = _Expect.COLON
        elif char == '"':
            self._end_value()
        return at + 1

    def _escape(self, text: str, at: int, out: list[str]) -> int:
        char = text[at]
        if char == "u":
            self._expect, self._hex_left = _Expect.HEX, 4
        elif char in '"\\/bfnrt':
            self._expect = _Expect.STRING
        else:
            self.is_broken = True
            return at
        out.append(char)
        return at + 1

    def _hex(self, text: str, at: int, out: list[str]) -> int:
        if text[at] not in _HEX:
            self.is_broken = True
            return at
        out.append(text[at])
        self._hex_left -= 1
        if self._hex_left == 0:
            self._expect = _Expect.STRING
        return at + 1

    def _literal(self, text: str, at: int, out: list[str]) -> int:
        if text[at] != self._rest[0]:
            self.is_broken = True
            return at
        out.append(text[at])
        self._rest = self._rest[1:]
        if not self._rest:
            self._end_value()
        return at + 1

    def _number_part(self, text: str, at: int, out: list[str]) -> int:
        """A number ends where something else begins."""
        end = self._run(_NUMBER_RUN, text, at, out)
        self._number.append(text[at:end])
        if end < len(text):
            if _NUMBER.fullmatch("".join(self._number)):
                self._end_value()
            else:
                self.is_broken = True
        return end

    _STEPS: ClassVar[Mapping[_Expect, Callable[[JsonScanner, str, int, list[str]], int]]] = {
        **dict.fromkeys(_Expect, _structure),
        _Expect.STRING: _string,
        _Expect.ESCAPE: _escape,
        _Expect.HEX: _hex,
        _Expect.LITERAL: _literal,
        _Expect.NUMBER: _number_part,
    }

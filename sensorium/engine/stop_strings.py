"""Finding stop strings in text that arrives in pieces.

The result does not depend on how the text is cut: the stop string that is complete first wins, and of several
that are complete at the same character, the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StopMatch:
    """A stop string within a piece of text."""

    stop: str
    end: int
    """Number of characters of the piece up to the end of the stop string."""


class StopStringMatcher:
    """Searches several strings at once, a few steps per character of text whatever the strings are.

    Source: Knuth, Morris and Pratt, "Fast pattern matching in strings", 1977, section 2.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = sorted(set(stops), key=len, reverse=True)
        self._borders = [_borders(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)
        self._first_chars = frozenset(stop[0] for stop in self._stops)

    @property
    def num_open_chars(self) -> int:
        """Length of the longest end of the text so far that is the beginning of a stop string."""
        return max(self._matched, default=0)

    def feed(self, piece: str) -> StopMatch | None:
        """Take the next piece of text; what follows a match within the piece is not looked at."""
        if not any(self._matched) and self._first_chars.isdisjoint(piece):
            return None
        for position, char in enumerate(piece):
            match = self._advance(char)
            if match is not None:
                return StopMatch(match, position + 1)
        return None

    def _advance(self, char: str) -> str | None:
        found = None
        for i, stop in enumerate(self._stops):
            borders, matched = self._borders[i], self._matched[i]
            while matched and stop[matched] != char:
                matched = borders[matched]
            matched += stop[matched] == char
            if matched == len(stop):
                found = found or stop
                matched = borders[matched]
            self._matched[i] = matched
        return found


def _borders(text: str) -> list[int]:
    """For each length of a beginning of `text`: length of its longest proper beginning that is also its end.

    For example, "abab" gives [0, 0, 0, 1, 2].
    """
    borders = [0, 0]
    for char in text[1:]:
        border = borders[-1]
        while border and text[border] != char:
            border = borders[border]
        borders.append(border + (text[border] == char))
    return borders

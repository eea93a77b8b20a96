"""How long a value is as JSON, without writing it: what a client sent may be far too long for that."""

from __future__ import annotations

from typing import Any


def is_within(value: Any, max_chars: int) -> bool:
    """Whether a value takes at most about `max_chars` characters as JSON. Looks no further than that.

    Escapes and spaces are not counted, and a number counts as one character.
    """
    left, todo = max_chars, [value]
    while todo and left >= 0:
        each = todo.pop()
        left -= len(each) + 2 if isinstance(each, str | dict | list | tuple) else 1
        if left < 0:
            break
        if isinstance(each, dict):
            todo += each.keys()
            todo += each.values()
        elif isinstance(each, list | tuple):
            todo += each
    return left >= 0

"""Numbers that arrive as texts: in queries, headers, forms and names of fields. They are written as JSON writes them.

Python's own `int` and `float` take more: spaces around, underscores, a plus, digits of other scripts, leading zeros.
With those, several texts would mean one number, and a proxy might read another number than the server.
"""

from __future__ import annotations

import re

from sensorium.errors import InvalidRequestError
from sensorium.sampling_params import WHOLE_NUMBER

_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,32})?(?:[eE][+-]?[0-9]{1,3})?")


def is_count(text: str) -> bool:
    """Whether a text is a whole number from 0 on, of at most 18 digits."""
    return WHOLE_NUMBER.fullmatch(text) is not None


def read_count(name: str, text: str) -> int:
    """A whole number from 0 on. Raises `InvalidRequestError`."""
    if not is_count(text):
        raise InvalidRequestError(f"got {text!r:.60}, expected a whole number. Change {name}.", field=name)
    return int(text)


def read_number(name: str, text: str) -> float:
    """A decimal number. Raises `InvalidRequestError`."""
    if _NUMBER.fullmatch(text) is None:
        raise InvalidRequestError(f"got {text!r:.60}, expected a number. Change {name}.", field=name)
    return float(text)

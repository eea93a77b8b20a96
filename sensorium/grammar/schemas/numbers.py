"""Bounds that are no doubles. The library reads every number as one, and the bound would be another.

A bound is moved inwards to the next one that the library reads as it stands, within 64 bits: what fits is then still
valid.
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import NamedTuple

from sensorium.grammar.schemas.walk import Schema, walk

EXACT = 2**53
"""Up to here every integer is a double."""
_MIN_INT64, _MAX_INT64 = -(2**63) + 1024, 2**63 - 1
"""Between these the library writes ranges of integers; both are as it reads them."""
_MAX_DIVISOR = 10**9
_LOW, _HIGH = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_MAX_STEPS = 400


class NoSuchNumber(ValueError):  # noqa: N818 - a finding, not a failure
    """A number that the library can't be told."""


class _Bound(NamedTuple):
    """One of a schema's bounds on a side. Compares by how much it excludes, on the lower side."""

    value: Fraction
    is_strict: bool
    name: str


def is_number(value: object) -> bool:
    """Whether a value is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_big(value: object) -> bool:
    """Whether a value is a number that may lie between two doubles, or be written as another."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) > EXACT


def tighten(root: Schema) -> None:
    """Move bounds in place that the library would read as others.

    Raises:
        NoSuchNumber: A bound or divisor is too large for it, or nothing is left between bounds.
    """
    for schema in walk(root):
        divisor = schema.get("multipleOf")
        if isinstance(divisor, int | float) and divisor > _MAX_DIVISOR:
            raise NoSuchNumber(f"multipleOf: got {divisor}, expected at most {_MAX_DIVISOR}")
        if any(is_big(schema.get(name)) for name in (*_LOW, *_HIGH)):
            _tighten(schema)


def _tighten(schema: Schema) -> None:
    given = schema.get("type")
    if isinstance(given, list) and "number" in given:
        schema["type"] = [each for each in given if each != "integer"]  # which numbers are too
    is_whole = "number" not in given and "integer" in given if isinstance(given, list) else given == "integer"
    low = _move(schema, _LOW, 1, is_whole=is_whole)
    high = _move(schema, _HIGH, -1, is_whole=is_whole)
    if low is not None and high is not None and low > high:
        raise NoSuchNumber(
            "minimum and maximum: got bounds beyond 2^53 between which no number can be held to, expected bounds that "
            "are further apart"
        )


def _move(schema: Schema, names: tuple[str, str], sign: int, *, is_whole: bool) -> Fraction | None:
    """Write the bounds of one side as one; returns it. `sign`: 1 where inwards is up, -1 where it is down."""
    bounds = _bounds(schema, names)
    if not bounds:
        return None
    tightest = max(bounds, key=lambda each: (sign * each.value, each.is_strict))
    kept = schema[tightest.name]
    for name in names:
        schema.pop(name, None)
    if abs(tightest.value) <= EXACT:
        schema[names[1] if tightest.is_strict else names[0]] = kept
        return tightest.value
    moved = _inwards(tightest.value + (sign if tightest.is_strict else 0), sign, is_whole=is_whole)
    schema[names[0]] = moved
    return Fraction(moved)


def _bounds(schema: Schema, names: tuple[str, str]) -> list[_Bound]:
    inclusive, exclusive = names
    value, strict = schema.get(inclusive), schema.get(exclusive)
    found = []
    if isinstance(value, int | float) and is_number(value):
        found.append(_Bound(Fraction(value), strict is True, inclusive))  # draft 4: `exclusive` says which it is
    if isinstance(strict, int | float) and is_number(strict):
        found.append(_Bound(Fraction(strict), True, exclusive))
    return found


def _inwards(bound: Fraction, sign: int, *, is_whole: bool) -> int:
    """The bound, or the nearest that is found inwards and that the library reads as it stands."""
    whole = math.ceil(bound) if sign > 0 else math.floor(bound)
    if not (sign < 0 or whole <= _MAX_INT64) or not (sign > 0 or whole >= _MIN_INT64):
        raise NoSuchNumber(f"{_LOW[0] if sign > 0 else _HIGH[0]}: got {whole}, expected one that fits into 64 bits")
    whole = max(min(whole, _MAX_INT64), _MIN_INT64)
    if is_whole and whole == _MAX_INT64:
        return whole  # of which the library knows
    base = 2 if is_whole else 10
    for power in range(_MAX_STEPS):
        step: int = base**power
        moved = -(-whole // step) * step if sign > 0 else whole // step * step
        if _is_read(moved, is_whole=is_whole):
            return moved
    raise NoSuchNumber(f"{_LOW[0] if sign > 0 else _HIGH[0]}: got {bound}, expected a smaller number")


def _is_read(number: int, *, is_whole: bool) -> bool:
    """Whether the library reads a number as it stands: as a double for integers, by a double's digits for others, which
    may become integers of 64 bits.
    """
    try:
        double = float(number)
    except OverflowError:
        return False
    return int(double) == number and (is_whole or Decimal(repr(double)) == number)

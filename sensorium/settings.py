"""Checks of settings. What a setting may be stands in its field's annotation, and is looked at in one place, here.

    block_size: Annotated[int, Bounds(1, 1024)]        a whole number within bounds
    max_token_gap_s: Annotated[float, Bounds(0)]       a number, never NaN; infinite only where the bounds say so
    policy: Literal["fcfs", "priority"]                one of a closed set
    model: Annotated[str, FileName()]                  a text or a path, not empty

A dataclass of settings calls `check_settings(self)` when it is made. The command line takes its choices from the same
annotations.
"""

from __future__ import annotations

import difflib
import math
import operator
import os
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal, NamedTuple

from sensorium.errors import ConfigError

MAX_INT = 2**31 - 1
MAX_BYTES = 2**62
"""Bounds of settings that have none of their own: what counters hold without wrapping round."""

_MAX_TEXT_CHARS = 1 << 20


@dataclass(frozen=True, slots=True)
class Bounds:
    """Least and most that a number may be. `above`: the least itself is too little."""

    low: float
    high: float = MAX_INT
    above: bool = False

    def holds(self, value: float) -> bool:
        """Whether a value is within the bounds; NaN never is."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low, high = (f"{each:.17g}" for each in (self.low, self.high))
        if self.high >= MAX_INT:
            return f"more than {low}" if self.above else f"at least {low}"
        return f"more than {low}, at most {high}" if self.above else f"{low} to {high}"


@dataclass(frozen=True, slots=True)
class FileName:
    """A text that names a file, a folder or a model: not empty; a path object is taken as its text."""


def check_settings(settings: Any, *, within: str | None = None) -> None:
    """Check all fields of a dataclass by their annotations, and put numbers into their field's own type.

    `within`: the setting whose value, a mapping, has these fields.

    Raises:
        ConfigError: A value has the wrong type, is out of bounds, or is not one of the choices. It names the field.
    """
    hints = _hints(type(settings))  # type: ignore[arg-type]  # classes are hashable
    for field in fields(settings):
        value = getattr(settings, field.name)
        try:
            name = field.name if within is None else f"{within}[{field.name!r}]"
            checked = check_setting(name, value, hints[field.name])
        except ConfigError as error:
            if "flag" in field.metadata:  # a flag of another name than the field's
                raise ConfigError(str(error).replace(flag_of(field.name), flag_of(field.metadata["flag"]))) from None
            raise
        if checked is not value:
            object.__setattr__(settings, field.name, checked)


def check_setting(name: str, value: Any, hint: Any) -> Any:
    """One value, checked by an annotation. Raises `ConfigError`."""
    field_type = field_type_of(hint)
    if value is None and field_type.is_optional:
        return None
    checked = _checked(name, value, field_type)
    for bounds in field_type.bounds:
        if not bounds.holds(checked):
            raise wrong_setting(name, value, str(bounds))
    return checked


def wrong_setting(name: str, value: object, expected: str) -> ConfigError:
    """The error for a setting, in the format that all have."""
    return ConfigError(f"{name}: got {reprlib.repr(value)}, expected {expected}. Set {name} ({flag_of(name)}).")


def unknown_setting(name: str, known: Iterable[str]) -> ConfigError:
    """The error for a setting that there isn't, with the one that may be meant."""
    close = difflib.get_close_matches(name, list(known), n=1)
    meant = f"{close[0]!r}, if that is meant" if close else "a field of EngineArgs"
    return ConfigError(f"{name}: got a setting that there isn't, expected {meant}. Remove or rename it.")


def flag_of(name: str) -> str:
    """The flag of the command line that sets a field."""
    return "--" + name.partition("[")[0].replace("_", "-")


class FieldType(NamedTuple):
    """An annotation, taken apart."""

    kind: Any
    """The type without `None` and `Annotated`."""
    is_optional: bool
    bounds: tuple[Bounds, ...]
    is_file_name: bool

    @property
    def choices(self) -> tuple[str, ...]:
        """The closed set, if it is one."""
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()


def field_type_of(hint: Any) -> FieldType:
    """The type of an annotation, taken apart."""
    is_optional = False
    notes: tuple[Any, ...] = ()
    while (origin := typing.get_origin(hint)) in (Annotated, types.UnionType, typing.Union):
        if origin is Annotated:
            hint, *more = typing.get_args(hint)
            notes += tuple(more)
        else:
            is_optional = True
            (hint,) = [each for each in typing.get_args(hint) if each is not type(None)]
    bounds = tuple(note for note in notes if isinstance(note, Bounds))
    return FieldType(hint, is_optional, bounds, any(isinstance(note, FileName) for note in notes))


@cache
def _hints(kind: Any) -> Mapping[str, Any]:
    hints = typing.get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in fields(kind)}


def _checked(name: str, value: Any, field_type: FieldType) -> Any:
    kind, origin = field_type.kind, typing.get_origin(field_type.kind)
    if field_type.choices:
        choice = choice_of(value, field_type.choices)
        if choice is None:
            raise wrong_setting(name, value, _one_of(field_type))
        return choice
    if kind is bool:
        return _of_type(name, value, bool, "true or false")
    if kind is int:
        return _whole_number(name, value)
    if kind is float:
        return _number(name, value, field_type)
    if kind is str:
        return _text(name, value, field_type)
    if origin is not None and issubclass(origin, Mapping):
        return _mapping(name, value, typing.get_args(kind)[1])
    if origin is not None and issubclass(origin, Sequence):
        return _sequence(name, value, typing.get_args(kind)[0])
    return value if kind is Any else _of_type(name, value, kind, f"a {kind.__name__}")


def choice_of(value: object, choices: Sequence[str]) -> str | None:
    """The choice that a value names, in upper or lower case; None if there is none."""
    if not isinstance(value, str):
        return None
    return next((each for each in choices if each.lower() == value.lower()), None)


def _one_of(field_type: FieldType) -> str:
    names = [repr(each) for each in field_type.choices] + ["None"] * field_type.is_optional
    listing = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
    return f"one of {listing}" if len(names) > 2 else listing


def _of_type(name: str, value: Any, kind: type, expected: str) -> Any:
    if not isinstance(value, kind):
        raise wrong_setting(name, value, expected)
    return value


def _whole_number(name: str, value: Any) -> int:
    try:
        if not isinstance(value, bool):
            return operator.index(value)
    except TypeError:
        pass
    raise wrong_setting(name, value, "a whole number")


def _number(name: str, value: Any, field_type: FieldType) -> float:
    expected = str(field_type.bounds[0]) if field_type.bounds else "a finite number"
    if isinstance(value, bool | str | bytes):
        raise wrong_setting(name, value, f"a number, {expected}")
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise wrong_setting(name, value, f"a number, {expected}") from None
    may_be_infinite = any(math.isinf(bounds.high) for bounds in field_type.bounds)
    if math.isnan(number) or (math.isinf(number) and not may_be_infinite):
        raise wrong_setting(name, value, f"a number, {expected}")
    return value if isinstance(value, int | float) else number


def _text(name: str, value: Any, field_type: FieldType) -> str:
    if field_type.is_file_name and isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        raise wrong_setting(name, value, "a text")
    if "\0" in value or len(value) > _MAX_TEXT_CHARS or (field_type.is_file_name and not value.strip()):
        raise wrong_setting(name, value, "a text that is neither empty nor huge, without null characters")
    return value


def _mapping(name: str, value: Any, kind: Any) -> Mapping[str, Any]:
    _of_type(name, value, Mapping, "a mapping from names to values")
    for key, each in value.items():
        if not isinstance(key, str):
            raise wrong_setting(name, value, f"texts for names, not {reprlib.repr(key)}")
        check_setting(f"{name}[{key!r}]", each, kind)
    return typing.cast("Mapping[str, Any]", value)


def _sequence(name: str, value: Any, kind: Any) -> tuple[Any, ...]:
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise wrong_setting(name, value, "a tuple")
    return tuple(check_setting(name, each, kind) for each in value)

"""What one request's output must look like: JSON, a JSON schema, a regular expression, a grammar, or one of a list.

`StructuredOutputs` is a value: checked for syntax and size at construction, and small enough to travel to the engine
core. Whether a schema, an expression or a grammar means something is found out when it is compiled, off the step loop.
Free of torch and of the library that compiles; importable from every room.
"""

from __future__ import annotations

import json as json_module
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.json_size import is_within

FIELD = "structured_outputs"
"""What errors about them have as `field`."""
MAX_SCHEMA_CHARS = 128 * 1024
MAX_SCHEMA_DEPTH = 64
"""Deepest nesting of objects and lists in a schema."""
MAX_REGEX_CHARS = 16 * 1024
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_NESTING = 100
"""Deepest nesting of brackets in a regular expression or a grammar."""
MAX_CHOICES = 1024
MAX_CHOICE_CHARS = 4096
MAX_CHOICES_CHARS = 128 * 1024
"""Characters of all choices together."""
MAX_START_AFTER_CHARS = 256

_KINDS = ("json", "json_object", "regex", "grammar", "choice")


@dataclass(frozen=True, slots=True)
class StructuredOutputs:
    """What an output is held to; exactly one of the first five fields is set.

    Equal values have the same grammar, so that a compiled one can be shared.

    Raises:
        InvalidRequestError: None or several are set, or one is empty, too long, or nested too deep.
        InvalidTypeError: A value has the wrong type.
    """

    json: str | dict[str, Any] | None = None
    """A JSON schema, as an object or as text; kept as text without spaces, its keys in the order given."""
    json_object: bool = False
    """Any JSON object."""
    regex: str | None = None
    """A regular expression that the whole output matches, in Rust's syntax."""
    grammar: str | None = None
    """A grammar in llguidance's form of Lark; `%json {...}` stands for what a JSON schema describes. Or GBNF, as
    llama.cpp has it: a text with `root ::=`."""
    choice: Sequence[str] = ()
    """The output is one of these strings."""
    start_after: str | None = None
    """What comes before this text, and the text itself, is free; the output is held from there on. An output in which
    the text doesn't appear stays free. For answers behind reasoning: `</think>`."""

    def __post_init__(self) -> None:
        chosen = [name for name in _KINDS if getattr(self, name) not in (None, False, (), [])]
        if len(chosen) != 1:
            raise InvalidRequestError(
                f"got {' and '.join(chosen) or 'none of them'}, expected exactly one of {', '.join(_KINDS)}. Set one.",
                field="structured_outputs",
            )
        _set(self, "json", None if self.json is None else _canonical_schema(self.json))
        if not isinstance(self.json_object, bool):
            raise _wrong_type("json_object", self.json_object, "true or false")
        _set(self, "regex", _bracketed("regex", self.regex, MAX_REGEX_CHARS))
        _set(self, "grammar", _bracketed("grammar", self.grammar, MAX_GRAMMAR_CHARS))
        _set(self, "choice", _choices(self.choice))
        _set(self, "start_after", _text("start_after", self.start_after, MAX_START_AFTER_CHARS))

    @property
    def kind(self) -> str:
        """Name of the field that is set."""
        return next(name for name in _KINDS if getattr(self, name))


def _set(value: StructuredOutputs, name: str, kept: Any) -> None:
    object.__setattr__(value, name, kept)


def _wrong_type(name: str, value: object, expected: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"got a value of type {type(value).__name__}, expected {expected}. Change {name}.",
        field=f"structured_outputs.{name}",
    )


def _text(name: str, value: Any, max_chars: int) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise _wrong_type(name, value, "a string")
    if not 0 < len(value) <= max_chars:
        raise InvalidRequestError(
            f"got {len(value)} characters, expected 1 to {max_chars}. Change {name}.",
            field=f"structured_outputs.{name}",
        )
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidRequestError(
            f"got half of a surrogate pair, expected Unicode text. Change {name}.",
            field=f"structured_outputs.{name}",
        ) from None
    return value


def _bracketed(name: str, value: Any, max_chars: int) -> str | None:
    """A text whose brackets are not nested deeper than a recursive parser can follow.

    Brackets inside literals count too, so the bound is a little stricter than it says.
    """
    text = _text(name, value, max_chars)
    depth = deepest = 0
    for char in text or "":
        if char in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in ")]}":
            depth = max(depth - 1, 0)
    if deepest > MAX_NESTING:
        raise _too_deep(name, MAX_NESTING)
    return text


def _too_deep(name: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"got brackets nested more than {most} deep, expected at most {most}. Simplify {name}.",
        field=f"structured_outputs.{name}",
    )


def _choices(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Sequence):
        raise _wrong_type("choice", value, "a list of strings")
    if len(value) > MAX_CHOICES:
        raise InvalidRequestError(
            f"got {len(value)} choices, expected at most {MAX_CHOICES}. Shorten the list.",
            field="structured_outputs.choice",
        )
    for each in value:
        if _text("choice", each, MAX_CHOICE_CHARS) is None:
            raise _wrong_type("choice", each, "a list of strings")
    num_chars = sum(map(len, value))
    if num_chars > MAX_CHOICES_CHARS:
        raise InvalidRequestError(
            f"got {num_chars} characters in all, expected at most {MAX_CHOICES_CHARS}. Shorten the list.",
            field="structured_outputs.choice",
        )
    return tuple(dict.fromkeys(value))


def _canonical_schema(value: Any) -> str:
    """A schema as text. The order of its keys stays: it is the order of an object's properties in the output."""
    if isinstance(value, str):
        _text("json", value, MAX_SCHEMA_CHARS)
        value = _parsed(value)
    if not isinstance(value, Mapping):
        raise _wrong_type("json", value, "a JSON schema: an object, or its text")
    if _is_deeper(value, MAX_SCHEMA_DEPTH):
        raise _too_deep("json", MAX_SCHEMA_DEPTH)
    if not is_within(value, MAX_SCHEMA_CHARS):
        raise InvalidRequestError(
            f"got more than {MAX_SCHEMA_CHARS} characters, expected at most so many. Change json.",
            field="structured_outputs.json",
        )
    try:
        text = json_module.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    except (TypeError, ValueError):
        raise InvalidRequestError(
            "got an object that is no JSON, expected a JSON schema. Use JSON's types only.",
            field="structured_outputs.json",
        ) from None
    _text("json", text, MAX_SCHEMA_CHARS)
    return text


def _parsed(text: str) -> Any:
    try:
        return json_module.loads(text)
    except (ValueError, RecursionError):
        raise InvalidRequestError(
            "got a text that is no JSON, expected a JSON schema. Correct json.",
            field="structured_outputs.json",
        ) from None


def _is_deeper(value: Any, most: int) -> bool:
    """Whether containers are nested more than `most` deep; looks no deeper than that."""
    layer = [value]
    for _ in range(most):
        layer = [
            member
            for each in layer
            for member in (each.values() if isinstance(each, Mapping) else each)
            if isinstance(member, Mapping | list | tuple)
        ]
        if not layer:
            return False
    return True

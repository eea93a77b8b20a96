"""Random JSON schemas of all the kinds that outputs can be held to, and what validates against them."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema

_KEYS = ("name", "age", "größe", "a b", 'q"uote', "tags", "x", "y/z")


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """A schema with at least one valid value, none of which is endless."""
    kinds = [_integer, _number, _string, _enum, _const, _boolean]
    if depth:
        kinds += [_object, _object, _array, _any_of]
    return rng.choice(kinds)(rng, depth)


def random_object_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """The same, for an object."""
    return _object(rng, depth)


def check(text: str, schema: dict[str, Any]) -> None:
    """Raise unless the text is JSON that validates."""
    validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
    validator.validate(json.loads(text))


def _integer(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(-1000, 1000)
    return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(0, 500)}


def _number(rng: random.Random, depth: int) -> dict[str, Any]:
    low = round(rng.uniform(-50, 50), 2)
    return {"type": "number", "minimum": low, "maximum": round(low + rng.uniform(0.5, 9), 2)}


def _string(rng: random.Random, depth: int) -> dict[str, Any]:
    return rng.choice(
        [
            {"type": "string", "maxLength": rng.randrange(1, 8)},
            {"type": "string", "minLength": 2, "maxLength": 5},
            {"type": "string", "pattern": "^[a-c]{1,3}-[0-9]{2}$"},
            {"type": "string", "format": rng.choice(["date", "ipv4", "uuid"])},
        ]
    )


def _enum(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"enum": rng.sample(["red", "grün", "b\\c", 1, -2.5, None, True, ["x"], {"k": "v"}, "日本"], 3)}


def _const(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"const": rng.choice(["fixed", 12, False, None, ["a", 1]])}


def _boolean(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"type": rng.choice(["boolean", ["boolean", "null"]])}


def _object(rng: random.Random, depth: int) -> dict[str, Any]:
    keys = rng.sample(_KEYS, rng.randrange(1, 4))
    return {
        "type": "object",
        "properties": {key: random_schema(rng, max(depth - 1, 0)) for key in keys},
        "required": [key for key in keys if rng.random() < 0.7],
        "additionalProperties": False,
    }


def _array(rng: random.Random, depth: int) -> dict[str, Any]:
    low = rng.randrange(0, 3)
    return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": low, "maxItems": low + 2}


def _any_of(rng: random.Random, depth: int) -> dict[str, Any]:
    return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}

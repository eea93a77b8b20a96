"""Finds the schemas within a schema. Source: JSON Schema 2020-12, and what drafts 4 to 2019-09 had otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias
from urllib.parse import unquote

Schema: TypeAlias = dict[str, Any]

_BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_SINGLE = (
    *("items", "additionalItems", "additionalProperties", "contains", "propertyNames", "not", "if", "then", "else"),
    *("unevaluatedItems", "unevaluatedProperties"),
)
TYPES = frozenset({"null", "boolean", "number", "integer", "string", "array", "object"})


def places(schema: Schema) -> Iterator[tuple[Any, Any]]:
    """Containers and keys of the schemas directly within one."""
    for name in _BY_NAME:
        if isinstance(schema.get(name), dict):
            yield from ((schema[name], key) for key in schema[name])
    for name in _LISTS:
        if isinstance(schema.get(name), list):
            yield from ((schema[name], index) for index in range(len(schema[name])))
    for name in _SINGLE:
        if isinstance(schema.get(name), dict | bool):
            yield schema, name


def walk(root: Schema) -> list[Schema]:
    """All schemas that are objects, each once, those that references name included."""
    found: dict[int, Schema] = {}
    open_schemas: list[Any] = [root]
    while open_schemas:
        schema = open_schemas.pop()
        if not isinstance(schema, dict) or id(schema) in found:
            continue
        found[id(schema)] = schema
        open_schemas += [container[key] for container, key in places(schema)]
        open_schemas.append(target(root, schema))
    return list(found.values())


def target(root: Schema, schema: Schema) -> Any:
    """What a schema's `$ref` names; None where it has none, or names nothing within `root`."""
    reference = schema.get("$ref")
    if not isinstance(reference, str) or not reference.startswith("#"):
        return None
    found: Any = root
    for piece in unquote(reference[1:]).split("/")[1:]:
        key = piece.replace("~1", "/").replace("~0", "~")
        if isinstance(found, list) and key.isascii() and key.isdigit():
            found = found[int(key)] if int(key) < len(found) else None
        else:
            found = found.get(key) if isinstance(found, dict) else None
    return found if reference in ("#", "") or reference.startswith("#/") else _anchored(root, reference[1:])


def _anchored(root: Schema, name: str) -> Any:
    """The schema of an anchor, which stands somewhere in the text."""
    open_values: list[Any] = [root]
    while open_values:
        value = open_values.pop()
        if isinstance(value, dict):
            if value.get("$anchor") == name or value.get("$id") == f"#{name}":
                return value
            open_values += value.values()
        elif isinstance(value, list):
            open_values += value
    return None


def types_of(schema: Mapping[str, Any]) -> frozenset[str]:
    """The types that `type` allows; an integer is a number too."""
    given = schema.get("type")
    if given is None:
        return TYPES
    named = frozenset(each for each in (given if isinstance(given, list) else [given]) if isinstance(each, str))
    return named | {"integer"} if "number" in named else named


def type_of(value: object) -> str:
    """The type of a JSON value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"

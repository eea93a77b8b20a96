"""Schemas whose grammar would lead where nothing valid can follow.

Two kinds, which the library doesn't see. A pattern of `patternProperties` that matches listed names only: behind a
comma no name is left. And a recursion without an end, whose values would have to be infinite.
"""

from __future__ import annotations

import json
from typing import Any

from llguidance import LLMatcher, LLTokenizer

from sensorium.grammar.schemas.walk import TYPES, Schema, places, target, type_of, types_of, walk

_MAX_PATTERNS = 64
_MAX_NAMES = 1024


class NothingFits(ValueError):  # noqa: N818 - a finding, not a failure
    """No finite value fits a schema."""


class TooMuch(ValueError):  # noqa: N818
    """A schema has more of something than can be looked through."""


def remove(root: Schema, tokenizer: LLTokenizer) -> Schema:
    """The schema with what leads nowhere written as what it means.

    Raises:
        NothingFits: It leads nowhere as a whole.
        TooMuch: It has too many patterns or names beside them.
    """
    _list_what_patterns_name(root, tokenizer)
    return _without_endless(root)


# Patterns


def _list_what_patterns_name(root: Schema, tokenizer: LLTokenizer) -> None:
    """Replace patterns that match a few names only by these. Merged schemas may list each other's names."""
    schemas = [schema for schema in walk(root) if isinstance(schema.get("patternProperties"), dict)]
    if not schemas:
        return
    names = _names(root)
    num_patterns = sum(len(schema["patternProperties"]) for schema in schemas)
    if num_patterns > _MAX_PATTERNS or len(names) > _MAX_NAMES:
        raise TooMuch(
            f"patternProperties: got {num_patterns} patterns beside {len(names)} names of properties, expected at most "
            f"{_MAX_PATTERNS} and {_MAX_NAMES}"
        )
    for schema in schemas:
        for pattern in list(schema["patternProperties"]):
            matched = _only_matches(pattern, names, tokenizer)
            if matched is not None:
                _list(schema, schema["patternProperties"].pop(pattern), matched)
        if not schema["patternProperties"]:
            del schema["patternProperties"]


def _names(root: Schema) -> list[str]:
    """All names that the schemas list."""
    found: dict[str, None] = {}
    for schema in walk(root):
        if isinstance(schema.get("properties"), dict):
            found.update(dict.fromkeys(schema["properties"]))
        if isinstance(schema.get("required"), list):
            found.update(dict.fromkeys(each for each in schema["required"] if isinstance(each, str)))
        for value in (schema.get("const"), schema.get("enum")):
            found.update(dict.fromkeys(_keys(value)))
    return list(found)


def _keys(value: Any) -> list[str]:
    """The keys of all objects in a value."""
    if isinstance(value, dict):
        return [*value, *(key for each in value.values() for key in _keys(each))]
    return [key for each in value for key in _keys(each)] if isinstance(value, list) else []


def _only_matches(pattern: str, names: list[str], tokenizer: LLTokenizer) -> list[str] | None:
    """The names that a pattern matches, if it matches no other; None also where it can't be told.

    The library itself says: an object that has all these names, and may have others that match.
    """
    matched = _matched(pattern, names, tokenizer)
    grammar = {
        "properties": {name: {"const": 0} for name in matched},
        "required": matched,
        "patternProperties": {pattern: {"const": 0}},
    }
    begin = "".join(f"{json.dumps(name, ensure_ascii=False)}:0," for name in matched)
    matcher = _matcher(grammar, tokenizer)
    if matcher.is_error() or not matcher.consume_tokens(tokenizer.tokenize_str("{" + begin)):
        return None
    matcher.compute_bitmask()
    if not matched:
        return [] if not matcher.is_error() and _is_closed(matcher, tokenizer) else None
    return matched if matcher.is_error() or matcher.is_stopped() else None


def _matched(pattern: str, names: list[str], tokenizer: LLTokenizer) -> list[str]:
    """The names that a pattern matches."""
    matcher = _matcher({"patternProperties": {pattern: {"const": 0}}}, tokenizer)
    if matcher.is_error():
        return []
    texts = {name: "{" + json.dumps(name, ensure_ascii=False) + ":0}" for name in names}
    return [name for name, text in texts.items() if matcher.deep_copy().consume_tokens(tokenizer.tokenize_str(text))]


def _is_closed(matcher: LLMatcher, tokenizer: LLTokenizer) -> bool:
    """Whether an object that has begun can only end."""
    return bool(matcher.validate_tokens(tokenizer.tokenize_str('"')) == 0)


def _matcher(schema: Schema, tokenizer: LLTokenizer) -> LLMatcher:
    closed = {"type": "object", "additionalProperties": False, **schema}
    grammar = LLMatcher.grammar_from_json_schema(closed, overrides={"whitespace_flexible": False})
    return LLMatcher(tokenizer, grammar, log_level=0)


def _list(schema: Schema, value: Any, names: list[str]) -> None:
    """Say of properties what their pattern says."""
    properties = schema.setdefault("properties", {})
    for name in names:
        properties[name] = {"allOf": [properties[name], value]} if name in properties else value


# Recursion


def _without_endless(root: Schema) -> Schema:
    """The schema with `false` for schemas that only endless values fit."""
    schemas = walk(root)[::-1]  # what is within or behind a reference comes first, so that few rounds are enough
    possible: dict[int, frozenset[str]] = {id(schema): frozenset() for schema in schemas}
    is_changed = True
    while is_changed:
        is_changed = False
        for schema in schemas:
            found = _possible_types(root, schema, possible)
            is_changed |= found != possible[id(schema)]
            possible[id(schema)] = found
    if not possible[id(root)]:
        raise NothingFits("no finite value fits it")
    for schema in schemas:
        for container, key in places(schema):
            if isinstance(container[key], dict) and not possible[id(container[key])]:
                container[key] = False
    return root


def _possible_types(root: Schema, schema: Schema, possible: dict[int, frozenset[str]]) -> frozenset[str]:
    """The types of which a finite value may fit, as far as is known of the schemas within."""

    def of(other: Any) -> frozenset[str]:
        if other is False:
            return frozenset()
        return possible.get(id(other), TYPES) if isinstance(other, dict) else TYPES

    found = types_of(schema)
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    if isinstance(given, list):
        found &= frozenset(map(type_of, given))
    if "$ref" in schema and (referred := target(root, schema)) is not None:
        found &= of(referred)
    for part in _list_of(schema, "allOf"):
        found &= of(part)
    for name in ("anyOf", "oneOf"):
        if isinstance(schema.get(name), list):
            found &= frozenset().union(*map(of, schema[name]))
    if not all(of(each) for each in _required_schemas(schema)):
        found -= {"object"}
    if not all(of(each) for each in _required_items(schema)):
        found -= {"array"}
    return found


def _list_of(schema: Schema, name: str) -> list[Any]:
    return schema[name] if isinstance(schema.get(name), list) else []


def _required_schemas(schema: Schema) -> list[Any]:
    """The schemas of the properties that an object must have."""
    properties = schema.get("properties")
    listed = properties if isinstance(properties, dict) else {}
    rest = True if "patternProperties" in schema else schema.get("additionalProperties", True)
    return [listed.get(name, rest) for name in _list_of(schema, "required") if isinstance(name, str)]


def _required_items(schema: Schema) -> list[Any]:
    """The schemas of the items that a list must have."""
    count = schema.get("minItems", 0)
    if not isinstance(count, int):
        return []
    first, rest = _list_of(schema, "prefixItems"), schema.get("items", True)
    if isinstance(rest, list):
        first, rest = rest, schema.get("additionalItems", True)
    return [*first[:count], *([rest] if count > len(first) else [])]

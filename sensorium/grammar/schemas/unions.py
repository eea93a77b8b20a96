"""`oneOf` whose options exclude each other, which is `anyOf` then.

The library takes a `oneOf` only if it sees that no value fits two options. What it doesn't see: constants that are
numbers; and a discriminated union as pydantic writes it, whose tag has a default and so isn't required. There it is
here: an answer then says which option it is, and fits no other.
"""

from __future__ import annotations

from itertools import combinations
from typing import Any

from sensorium.grammar.schemas.walk import Schema, target, type_of, types_of, walk

_MAX_OPTIONS = 256
_NO_COPY = ("$id", "id", "$anchor", "$dynamicAnchor", "$recursiveAnchor")


def resolve(root: Schema) -> None:
    """Change each `oneOf` in place whose options exclude each other, or do once their tag is required."""
    for schema in walk(root):
        options = schema.get("oneOf")
        if isinstance(options, list) and len(options) <= _MAX_OPTIONS and "anyOf" not in schema:
            apart = _apart(root, schema, options)
            if apart is not None:
                del schema["oneOf"]
                schema["anyOf"] = apart


def _apart(root: Schema, schema: Schema, options: list[Any]) -> list[Any] | None:
    """The options, if they exclude each other or can be made to."""
    if _exclude(root, options):
        return options
    seen = [_seen(root, option) for option in options]
    discriminator = schema.get("discriminator")
    named = discriminator.get("propertyName") if isinstance(discriminator, dict) else None
    for tag in dict.fromkeys((*([named] if isinstance(named, str) else ()), *_shared_names(seen))):
        tagged = [_with_tag(own, tag) if _is_object(own) else option for option, own in zip(options, seen, strict=True)]
        if _exclude(root, tagged):
            return tagged
    return None


def _seen(root: Schema, option: Any) -> Any:
    """An option, or what it refers to."""
    for _ in range(_MAX_OPTIONS):
        following = (
            target(root, option) if isinstance(option, dict) and option.keys() - {"$ref"} <= _SAYS_NOTHING else None
        )
        if following is None:
            return option
        option = following
    return option


_SAYS_NOTHING = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})


def _is_object(option: Any) -> bool:
    return isinstance(option, dict) and types_of(option) == {"object"} and isinstance(option.get("properties"), dict)


def _shared_names(options: list[Any]) -> list[str]:
    """Names of properties that all options have that are objects."""
    objects = [option["properties"] for option in options if _is_object(option)]
    return [name for name in objects[0] if all(name in other for other in objects)] if objects else []


def _with_tag(option: Schema, tag: str) -> Schema:
    """A copy in which a property is required."""
    required = option.get("required")
    required = required if isinstance(required, list) else []
    copy = {key: value for key, value in option.items() if key not in _NO_COPY}
    return {**copy, "required": [*required, *([] if tag in required else [tag])]}


def _exclude(root: Schema, options: list[Any]) -> bool:
    seen = [_seen(root, option) for option in options]
    return all(_are_apart(root, first, second) for first, second in combinations(seen, 2))


def _are_apart(root: Schema, first: Any, second: Any) -> bool:
    """Whether it is certain that no value fits both."""
    if first is False or second is False:
        return True
    if not isinstance(first, dict) or not isinstance(second, dict):
        return False
    values, others = _values(first), _values(second)
    if values is not None and others is not None and not values & others:
        return True
    if not _types(first) & _types(second):
        return True
    if _types(first) & _types(second) != {"object"}:
        return False
    return any(
        not own & other
        for name in _required(first) & _required(second)
        if (own := _values(_property(root, first, name))) is not None
        and (other := _values(_property(root, second, name))) is not None
    )


def _types(schema: Schema) -> frozenset[str]:
    """The types that values may have."""
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(given, list):
        return types_of(schema)
    found = frozenset(map(type_of, given))
    return found & types_of(schema)


def _values(schema: Any) -> frozenset[tuple[str, Any]] | None:
    """The only values, where they are counted out and none is an object or a list."""
    if not isinstance(schema, dict):
        return None
    given = [schema["const"]] if "const" in schema else schema.get("enum")
    if not isinstance(given, list) or any(isinstance(each, dict | list) for each in given):
        return None
    return frozenset(("number" if type_of(each) in ("number", "integer") else type_of(each), each) for each in given)


def _required(schema: Schema) -> set[str]:
    required = schema.get("required")
    return {each for each in required if isinstance(each, str)} if isinstance(required, list) else set()


def _property(root: Schema, schema: Schema, name: str) -> Any:
    properties = schema.get("properties")
    return _seen(root, properties.get(name)) if isinstance(properties, dict) else None

"""Constants that no double is, such as ids of 64 bits: written digit by digit into the grammar itself.

The library reads numbers as doubles, 1234567890123456789 as 1234567890123456768. So what leads to such a constant, the
objects, lists and choices around it, is written here, in the library's form of Lark, and only what lies beside is left
to the library.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sensorium.grammar.schemas.numbers import NoSuchNumber, is_big
from sensorium.grammar.schemas.walk import Schema, places, target, type_of, types_of, walk

OPTIONS = "x-guidance"
"""The keyword by which the library is told how JSON is written."""
_ANNOTATIONS = frozenset(
    {
        *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly", "discriminator"),
        *("$schema", "$id", "id", "$anchor", "$comment", "$defs", "definitions", "$vocabulary", OPTIONS),
        *("contentEncoding", "contentMediaType", "contentSchema", "format", "example", "nullable"),
    }
)
_SAYS_VALUES = frozenset({"const", "enum", "type", "allOf"})
_MAX_PARTS = 64
_OBJECT = frozenset({"type", "properties", "required", "additionalProperties"})
_LIST = frozenset({"type", "items", "prefixItems", "minItems", "maxItems"})
_ANY_NAME = r'/"([^"\\\x00-\x1f\x7f]|\\["\\\/bfnrt]|\\u[0-9a-fA-F]{4})*"/'


def has_big_constants(root: Schema) -> bool:
    """Whether a schema has constants that the library would read as others."""
    return id(root) in _with_big_constants(root)


def _with_big_constants(root: Schema) -> set[int]:
    """Ids of the schemas that have big constants within, or behind a reference."""
    schemas = walk(root)[::-1]
    found = {id(schema) for schema in schemas if _holds_big((schema.get("const"), schema.get("enum")))}
    num_before = -1
    while num_before < len(found):
        num_before = len(found)
        for schema in schemas:
            within = (*(container[key] for container, key in _used(schema)), target(root, schema))
            if any(id(each) in found for each in within):
                found.add(id(schema))
    return found


def _used(schema: Schema) -> list[tuple[Any, Any]]:
    """The places within a schema but for definitions, which say nothing unless something refers to them."""
    definitions = {id(schema.get("$defs")), id(schema.get("definitions"))}
    return [place for place in places(schema) if id(place[0]) not in definitions]


def _is_same(first: Any, second: Any) -> bool:
    return type_of(first) == type_of(second) and bool(first == second)


def _holds_big(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_big, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_big, value))
    return is_big(value)


_SPACE, _SLASH = r"[ \n\r\t]+", r"\/"


@dataclass(frozen=True, slots=True)
class _Style:
    """What stands between the parts of JSON."""

    space: str
    item_separator: str
    key_separator: str

    @classmethod
    def of(cls, root: Schema) -> _Style:
        options = root.get(OPTIONS, {})
        pattern = options.get("whitespace_pattern")
        is_flexible = pattern is not None or options.get("whitespace_flexible", True)
        space = f"/({(pattern or _SPACE).replace('/', _SLASH)})/?" if is_flexible else ""
        item, key = (json.dumps(options.get(name, default)) for name, default in _SEPARATORS)
        return cls(space, f"{space} {item} {space}", f"{space} {key} {space}")


_SEPARATORS = (("item_separator", ","), ("key_separator", ":"))


class Writer:
    """Writes one schema as rules of a grammar."""

    def __init__(self, root: Schema, prefix: str) -> None:
        """`prefix`: what the names of rules begin with, which no others do."""
        self._root = root
        self._prefix = prefix
        self._style = _Style.of(root)
        self._exact = _with_big_constants(root)
        self._rules: list[str] = []
        self._references: dict[int, str] = {}
        self._shared = {key: root[key] for key in ("$defs", "definitions", OPTIONS) if key in root}

    @property
    def rules(self) -> list[str]:
        """The rules that expressions use."""
        return self._rules

    def expression(self, schema: Any) -> str:
        """An expression for what a schema describes.

        Raises:
            NoSuchNumber: A constant stands where it can't be written.
        """
        if id(schema) not in self._exact:
            return self._rule(self._plain(schema))
        says = schema.keys() - _ANNOTATIONS
        if (values := self._values(schema)) is not None:
            return self._constants(values)
        if says == {"$ref"}:
            return self._reference(target(self._root, schema))
        if says == {"anyOf"}:
            return self._rule(" | ".join(map(self.expression, schema["anyOf"])))
        if says == {"allOf"} and len(schema["allOf"]) == 1:
            return self.expression(schema["allOf"][0])
        if says <= _OBJECT and "object" in types_of(schema):
            return self._object(schema)
        if says <= _LIST and "array" in types_of(schema):
            return self._list(schema)
        raise NoSuchNumber(
            f"const and enum: got numbers beyond 2^53 beside {sorted(says - {'const', 'enum'})}, where they can't be "
            "held to, expected smaller numbers or strings"
        )

    def _rule(self, body: str) -> str:
        name = f"{self._prefix}{len(self._rules)}"
        self._rules.append(f"{name}: {body}")
        return name

    def _plain(self, schema: Any) -> str:
        """What the library reads as it stands."""
        if schema is True:
            schema = {}
        if not isinstance(schema, dict):
            raise NoSuchNumber("false: got a schema that nothing fits beside numbers beyond 2^53, expected none")
        return f"%json {json.dumps({**self._shared, **schema}, ensure_ascii=False)}"

    def _reference(self, schema: Any) -> str:
        """The rule of a schema that is referred to, which may refer to itself."""
        if id(schema) not in self._references:
            name = self._references[id(schema)] = f"{self._prefix}ref{len(self._references)}"
            self._rules.append(f"{name}: {self.expression(schema)}")
        return self._references[id(schema)]

    def _values(self, schema: Any) -> list[Any] | None:
        """The values that a schema counts out, perhaps in several parts that must all hold; None for another one."""
        parts: list[Any] = []
        open_parts = [schema]
        while open_parts:
            part = open_parts.pop()
            says = part.keys() - _ANNOTATIONS if isinstance(part, dict) else {"false"}
            if says == {"$ref"} and len(parts) < _MAX_PARTS:
                open_parts.append(target(self._root, part))
            elif says <= _SAYS_VALUES and len(parts) < _MAX_PARTS:
                open_parts += part.get("allOf", ())
            else:
                return None
            parts.append(part)
        counted = [part["enum"] for part in parts if "enum" in part]
        counted += [[part["const"]] for part in parts if "const" in part]
        if not counted:
            return None
        types = frozenset.intersection(*map(types_of, parts))
        first, *others = counted
        kept = [each for each in first if type_of(each) in types]
        return [each for each in kept if all(any(_is_same(each, one) for one in other) for other in others)]

    def _constants(self, values: Sequence[Any]) -> str:
        if not values:
            raise NoSuchNumber("const and enum: got no value that all of them and type allow, expected one")
        plain = [each for each in values if not _holds_big(each)]
        written = [self._constant(each) for each in values if _holds_big(each)]
        return self._rule(" | ".join([*([self._rule(self._plain({"enum": plain}))] if plain else []), *written]))

    def _constant(self, value: Any) -> str:
        if isinstance(value, dict):
            return self._members([(key, self._constant(each), True) for key, each in value.items()], None)
        if isinstance(value, list):
            return self._items([self._constant(each) for each in value], None, len(value), len(value))
        return json.dumps(str(int(value))) if is_big(value) else self._rule(self._plain({"const": value}))

    # Objects

    def _object(self, schema: Schema) -> str:
        required = schema.get("required", [])
        listed = {**dict.fromkeys(required, True), **schema.get("properties", {})}
        ordered = [
            *schema.get("properties", {}),
            *(name for name in required if name not in schema.get("properties", {})),
        ]
        others = schema.get("additionalProperties", True)
        members = []
        for name in ordered:
            own = listed[name] if name in schema.get("properties", {}) else others
            if own is False and name not in required:
                continue
            members.append((name, self.expression(own), name in required))
        more = None if others is False else self._other_member(ordered, others)
        return self._members(members, more)

    def _other_member(self, names: Sequence[str], schema: Any) -> str:
        terminal = f"{self._prefix.upper()}N{len(self._rules)}"
        taken = " | ".join(json.dumps(json.dumps(name, ensure_ascii=False)) for name in names)
        self._rules.append(f"{terminal}: {_ANY_NAME}{f' & ~({taken})' if taken else ''}")
        return self._rule(f"{terminal} {self._style.key_separator} {self.expression(schema)}")

    def _members(self, members: Sequence[tuple[str, str, bool]], more: str | None) -> str:
        """An object: its members in order, then others. Each comes with whether it must be there."""
        comma = self._style.item_separator
        behind = self._rule(f"({comma} {more})*" if more else '""')  # where something stands before
        alone = self._rule(f"{more} {behind}" if more else '""')
        if more:
            alone = self._rule(f'{alone} | ""')
        for name, value, is_required in reversed(members):
            key = json.dumps(json.dumps(name, ensure_ascii=False))
            member = self._rule(f"{key} {self._style.key_separator} {value}")
            alone = self._rule(f"{member} {behind}" if is_required else f"{member} {behind} | {alone}")
            behind = self._rule(f"{comma} {member} {behind}" if is_required else f"({comma} {member})? {behind}")
        return self._rule(f'"{{" {self._style.space} {alone} {self._style.space} "}}"')

    # Lists

    def _list(self, schema: Schema) -> str:
        first, rest = schema.get("prefixItems", []), schema.get("items", True)
        if isinstance(rest, list):
            first, rest = rest, True
        low, high = schema.get("minItems", 0), schema.get("maxItems")
        items = [self.expression(each) for each in first[:high]]
        return self._items(items, None if rest is False else self.expression(rest), low, high)

    def _items(self, first: Sequence[str], rest: str | None, low: int, high: int | None) -> str:
        """A list: its first items by place, then others, `low` to `high` in all."""
        comma = self._style.item_separator
        if high is None and rest is None:
            high = len(first)
        if high is not None and (low > high or (rest is None and low > len(first))):
            raise NoSuchNumber(f"minItems: got {low}, expected at most the {high} items that there may be")
        num_first = len(first)
        tail = ""
        if rest is not None and (high is None or high > num_first):
            least, most = max(low - num_first, 0), "" if high is None else high - num_first
            if num_first == 0:
                least, most = max(least - 1, 0), "" if most == "" else int(most) - 1
            tail = self._rule(f"({comma} {rest}){{{least},{most}}}")
            if num_first == 0:
                tail = self._rule(f"{rest} {tail}" if low else f'{rest} {tail} | ""')
        for index in reversed(range(num_first)):
            item = f"{f'{comma} ' if index else ''}{first[index]} {tail}"
            tail = self._rule(item if index < low else f'{item} | ""')
        return self._rule(f'"[" {self._style.space} {tail} {self._style.space} "]"')

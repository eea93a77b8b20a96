"""The grammar of arguments that are written one by one, between tags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.parsing.call_parameters import is_string
from sensorium.parsing.lark import Lark
from sensorium.parsing.tools import Tool


@dataclass(frozen=True, slots=True)
class ParameterForm:
    """The texts before a parameter's name, between name and value, and after the value."""

    before: str
    between: str
    behind: str

    def of(self, lark: Lark, tool: Tool) -> str:
        """An expression for a tool's arguments: those that its schema names, in order, or any where it names none."""
        properties = tool.parameters.get("properties")
        if tool.takes_nothing:
            return ""
        if not isinstance(properties, Mapping) or not properties:
            if tool.parameters.get("additionalProperties") is False or tool.is_strict:
                return ""
            any_one = (
                f"{lark.text(self.before)} /[a-zA-Z0-9_.-]+/ {lark.text(self.between)} {lark.text_to(self.behind)}"
            )
            return f"({any_one})*"
        required = tool.parameters.get("required", ())
        return " ".join(
            self._parameter(lark, tool, name, schema) + ("" if name in required else "?")
            for name, schema in properties.items()
        )

    def _parameter(self, lark: Lark, tool: Tool, name: str, schema: Any) -> str:
        head = lark.text(f"{self.before}{name}{self.between}")
        return lark.rule(f"{head} {self._value(lark, tool, schema if isinstance(schema, Mapping) else {})}")

    def _value(self, lark: Lark, tool: Tool, schema: Mapping[str, Any]) -> str:
        behind = lark.text(self.behind)
        options = schema.get("enum")
        if is_string(schema) and isinstance(options, list) and options:
            return f"({' | '.join(lark.text(str(each)) for each in options)}) {behind}"
        if is_string(schema):
            return lark.text_to(self.behind)
        # References within the schema refer to the whole schema's definitions.
        shared = {key: tool.parameters[key] for key in ("$defs", "definitions") if key in tool.parameters}
        return f"{lark.json({**shared, **schema}, is_strict=tool.is_strict)} {behind}"

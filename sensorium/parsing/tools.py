"""The functions that a request offers to the model."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
"""Names that functions may have."""
CALLED_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")
"""Names that a call may have, known or not."""


_NAME_ARGUMENTS = (
    *("properties", "patternProperties", "required", "minProperties", "propertyNames", "unevaluatedProperties"),
    *("dependencies", "dependentRequired", "dependentSchemas", "$ref", "$dynamicRef", "$recursiveRef"),
    *("allOf", "anyOf", "oneOf", "not", "if", "then", "else", "const", "enum"),
)
"""Keywords by which a schema says what members an object has, beside `additionalProperties`."""


@dataclass(frozen=True, slots=True, eq=False)
class Tool:
    """A function."""

    name: str
    description: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """JSON schema of its arguments, which are an object."""
    is_strict: bool = False
    """Arguments must keep to the schema."""

    @property
    def takes_nothing(self) -> bool:
        """Whether it takes no arguments: as with OpenAI, a schema that names none means none."""
        is_open = self.parameters.get("additionalProperties") not in (None, False)
        return not is_open and all(self.parameters.get(key) in (None, {}, []) for key in _NAME_ARGUMENTS)

    @classmethod
    def from_description(cls, description: Mapping[str, Any]) -> Tool:
        """From OpenAI's format, whose outer object may be missing."""
        function = description.get("function", description)
        return cls(
            str(function.get("name", "")),
            function.get("description"),
            function.get("parameters") or {},
            bool(function.get("strict")),
        )

    def described(self) -> dict[str, Any]:
        """As chat templates expect it."""
        function: dict[str, Any] = {"name": self.name}
        if self.description is not None:
            function["description"] = self.description
        function["parameters"] = dict(self.parameters) or {"type": "object", "properties": {}}
        return {"type": "function", "function": function}


class Tools:
    """The functions of one request, by name."""

    def __init__(self, tools: Iterable[Tool]) -> None:
        self._by_name = {tool.name: tool for tool in tools}

    def __iter__(self) -> Iterator[Tool]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def get(self, name: str) -> Tool | None:
        """The function of a name, if there is one."""
        return self._by_name.get(name)

    def schema_of(self, name: str, parameter: str) -> Mapping[str, Any]:
        """The schema of one parameter; empty where none is known."""
        tool = self.get(name)
        properties = tool.parameters.get("properties") if tool is not None else None
        schema = properties.get(parameter) if isinstance(properties, Mapping) else None
        return schema if isinstance(schema, Mapping) else {}

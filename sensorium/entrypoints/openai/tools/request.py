"""Checks a request's functions: which there are, which may be called, and whether one must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sensorium.errors import InvalidRequestError, InvalidTypeError, UnsupportedFeatureError
from sensorium.json_size import is_within
from sensorium.parsing import Tool, Tools
from sensorium.parsing.tools import NAME

MAX_TOOLS = 128
MAX_TOOLS_CHARS = 128 << 10
"""Bound on all functions of a request together, as JSON: they are part of its prompt, and of a grammar."""
_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True, eq=False)
class ToolRequest:
    """The functions that a request offers."""

    tools: Tools
    """All, for the prompt."""
    callable: Tools
    """Those that may be called."""
    is_forced: bool
    """One must be called."""
    is_parallel: bool
    """Several may be called at once."""

    @property
    def is_strict(self) -> bool:
        """Whether a function asks that calls keep to its schema."""
        return any(tool.is_strict for tool in self.callable)


def tool_request(
    tools: Sequence[Tool],
    choice: str | None,
    named: str | None,
    *,
    is_parallel: bool,
    where: str = "tools[{}].function",
) -> ToolRequest | None:
    """A request's functions; None if there are none, or none may be called.

    Args:
        tools: the functions.
        choice: "none", "auto" or "required"; None for "auto".
        named: the function that must be called.
        is_parallel: several may be called at once.
        where: what errors call a function, by its index.

    Raises:
        RequestError: Something about them is wrong.
    """
    if choice is not None and choice not in _MODES:
        raise InvalidRequestError(
            f"got {choice!r:.60}, expected one of {list(_MODES)} or a function. Change tool_choice.",
            field="tool_choice",
        )
    check_number(len(tools))
    for index, tool in enumerate(tools):
        _check(tool, where.format(index))
    _check_together(tools, where)
    if named is not None and named not in {tool.name for tool in tools}:
        raise InvalidRequestError(
            f"got the function {named!r:.80}, expected one of tools. Add it to tools.", field="tool_choice"
        )
    if not tools:
        if choice == "required":
            raise InvalidRequestError("got 'required' without tools, expected some. Add tools.", field="tool_choice")
        return None
    if choice == "none" and named is None:
        return None
    every = Tools(tools)
    may_be_called = every if named is None else Tools(tool for tool in tools if tool.name == named)
    is_forced = named is not None or choice == "required"
    return ToolRequest(every, may_be_called, is_forced, is_parallel and named is None)


def check_number(num_tools: int) -> None:
    """Raises `InvalidRequestError` for too many, before they are looked at."""
    if num_tools > MAX_TOOLS:
        raise InvalidRequestError(f"got {num_tools}, expected at most {MAX_TOOLS}. Send fewer.", field="tools")


def parse_choice(choice: object) -> tuple[str | None, str | None]:
    """`tool_choice` of a chat: its mode, and the name of the function that must be called.

    Raises:
        RequestError: It is something else.
    """
    if choice is None or isinstance(choice, str):
        return choice, None
    if not isinstance(choice, Mapping):
        raise InvalidTypeError(
            f"got a value of type {type(choice).__name__}, expected a string or an object. Change it.",
            field="tool_choice",
        )
    if choice.get("type") != "function":
        raise UnsupportedFeatureError(
            f"got {choice.get('type')!r:.60}, expected 'function'. Change tool_choice.", field="tool_choice.type"
        )
    function = choice.get("function")
    if not isinstance(function, Mapping):
        raise InvalidTypeError("got no object, expected one with a name. Add it.", field="tool_choice.function")
    name = function.get("name")
    if not isinstance(name, str):
        raise InvalidTypeError("got no name, expected a string. Add it.", field="tool_choice.function.name")
    unknown = next((key for key in choice if key not in ("type", "function") and choice[key] is not None), None)
    if unknown is None:
        unknown = next((f"function.{key}" for key in function if key != "name" and function[key] is not None), None)
    if unknown is not None:
        raise InvalidRequestError("got an unknown field, expected none. Remove it.", field=f"tool_choice.{unknown:.60}")
    return None, name


def _check(tool: Tool, where: str) -> None:
    if not NAME.fullmatch(tool.name):
        raise InvalidRequestError(
            f"got {tool.name!r:.80}, expected 1 to 64 letters, digits, underscores and dashes. Change it.",
            field=f"{where}.name",
        )
    kind = tool.parameters.get("type", "object")
    if kind != "object":
        raise InvalidRequestError(
            f"got {kind!r:.60}, expected 'object', since arguments go by name. Change it.",
            field=f"{where}.parameters.type",
        )
    if not isinstance(tool.parameters.get("properties", {}), Mapping):
        raise InvalidTypeError(
            "got no object, expected schemas by name. Change it.", field=f"{where}.parameters.properties"
        )
    if not isinstance(tool.parameters.get("required", []), list):
        raise InvalidTypeError(
            "got no list, expected names of properties. Change it.", field=f"{where}.parameters.required"
        )


def _check_together(tools: Sequence[Tool], where: str) -> None:
    seen: set[str] = set()
    for index, tool in enumerate(tools):
        if tool.name in seen:
            raise InvalidRequestError(
                f"got {tool.name!r}, expected a name that no other has. Change it.", field=f"{where.format(index)}.name"
            )
        seen.add(tool.name)
    described = [tool.described() for tool in tools]
    if not is_within(described, MAX_TOOLS_CHARS) or len(json.dumps(described, ensure_ascii=False)) > MAX_TOOLS_CHARS:
        raise InvalidRequestError(
            f"got more than {MAX_TOOLS_CHARS} characters as JSON, expected at most so many. Send fewer.", field="tools"
        )

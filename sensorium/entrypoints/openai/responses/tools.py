"""Functions in the form of responses: flat, and with a choice of its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sensorium.entrypoints.openai.protocol import FunctionBody, parse_body
from sensorium.entrypoints.openai.tools.request import ToolRequest, check_number, tool_request
from sensorium.errors import InvalidRequestError, InvalidTypeError, RequestError, UnsupportedFeatureError
from sensorium.parsing import Tool, Tools

_WHERE = "tools[{}]"


def read_tools(tools: list[Any] | None, choice: object, *, is_parallel: bool) -> ToolRequest | None:
    """The functions that the model may call; None if there are none, or none may be called.

    Raises:
        UnsupportedFeatureError: A tool is one that the server would have to run.
        RequestError: Something else is wrong with them.
    """
    check_number(len(tools or ()))
    functions = [_function(each, _WHERE.format(index)) for index, each in enumerate(tools or ())]
    mode, names = _choice(choice)
    named = names[0] if mode is None and names else None
    request = tool_request(functions, mode, named, is_parallel=is_parallel, where=_WHERE)
    if request is None or mode is None or not names:
        return request
    unknown = [name for name in names if name not in request.tools]
    if unknown:
        raise InvalidRequestError(
            f"got {unknown[0]!r:.80}, expected some of tools. Remove it.", field="tool_choice.tools"
        )
    return replace(request, callable=Tools(tool for tool in request.tools if tool.name in names))


def _function(given: object, where: str) -> Tool:
    kind = given.get("type") if isinstance(given, Mapping) else None
    if not isinstance(given, Mapping) or kind != "function":
        raise UnsupportedFeatureError(
            f"got {kind!r:.60}, expected 'function': the server runs no tools. Remove it.", field=f"{where}.type"
        )
    try:
        function = parse_body(FunctionBody, {key: value for key, value in given.items() if key != "type"})
    except RequestError as error:
        raise type(error)(f"{where}.{error}", code=error.code) from None
    return Tool(function.name, function.description, function.parameters or {}, bool(function.strict))


def _choice(choice: object) -> tuple[str | None, list[str]]:
    """The mode of `tool_choice`, None where one function must be called; and names, where it has some."""
    if choice is None or isinstance(choice, str):
        return choice or "auto", []
    if not isinstance(choice, Mapping):
        raise InvalidTypeError(
            f"got a value of type {type(choice).__name__}, expected a string or an object. Change it.",
            field="tool_choice",
        )
    kind = choice.get("type")
    if kind == "function":
        _check_keys(choice, ("type", "name"))
        return None, [_name(choice, "tool_choice")]
    if kind != "allowed_tools":
        raise UnsupportedFeatureError(
            f"got {kind!r:.60}, expected 'function' or 'allowed_tools'. Change tool_choice.", field="tool_choice.type"
        )
    _check_keys(choice, ("type", "mode", "tools"))
    mode, allowed = choice.get("mode"), choice.get("tools")
    if mode not in ("auto", "required"):
        raise InvalidRequestError(
            f"got {mode!r:.60}, expected 'auto' or 'required'. Change it.", field="tool_choice.mode"
        )
    if not isinstance(allowed, list) or not allowed:
        raise InvalidTypeError("got none, expected a list of functions. Add them.", field="tool_choice.tools")
    return str(mode), [_name(each, f"tool_choice.tools[{index}]") for index, each in enumerate(allowed)]


def _name(given: object, where: str) -> str:
    name = given.get("name") if isinstance(given, Mapping) and given.get("type") == "function" else None
    if not isinstance(name, str):
        raise InvalidTypeError("got something else, expected a function with its name. Change it.", field=where)
    return name


def _check_keys(choice: Mapping[str, Any], known: tuple[str, ...]) -> None:
    unknown = sorted(str(key) for key in choice.keys() - set(known) if choice[key] is not None)
    if unknown:
        raise InvalidRequestError(
            "got an unknown field, expected none. Remove it.", field=f"tool_choice.{unknown[0]:.60}"
        )

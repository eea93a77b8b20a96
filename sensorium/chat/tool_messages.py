"""Tools for models whose chat templates don't support them: described in the messages themselves.

The functions and how to call them go into the system message, or before the first user message if the template has no
system messages; past calls into the assistant's text; results into messages of the user, since such templates know no
other roles.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from sensorium.chat.content import Message, Part, TextPart
from sensorium.errors import InvalidRequestError

_INSTRUCTIONS = """\
You can call functions. These are they, each as JSON, with the JSON schema of its arguments:
<tools>
{tools}
</tools>
To call one, write a JSON object with its name and arguments between tags, and nothing else:
<tool_call>
{{"name": "<name>", "arguments": {{<arguments>}}}}
</tool_call>
Repeat that for further calls. Results come back between <tool_response> and </tool_response>. Where no function is of \
use, answer without calling any."""


def concern_tools(messages: Iterable[Message]) -> bool:
    """Whether a conversation has calls or results."""
    return any(message.role == "tool" or "tool_calls" in message.fields for message in messages)


def with_tools_told(
    messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None, *, has_system: bool
) -> list[Message]:
    """Messages that describe tools, calls and results, in roles that every template knows.

    Raises `InvalidRequestError` (a `ValueError`) if there is no message that could describe the tools.
    """
    told = _joined(_told(message) for message in messages)
    if not tools:
        return told
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    text = _INSTRUCTIONS.format(tools=listed)
    instructions = Message("system", "tools", text=text)
    role = "system" if has_system else "user"
    for index, message in enumerate(told):
        if message.role == role:
            told[index] = _together(message, instructions) if has_system else _together(instructions, message, message)
            return told
    if has_system:
        return [instructions, *told]
    raise InvalidRequestError(
        "got none of role 'user', expected one, since tools are told of there. Add one.", field="messages"
    )


def _told(message: Message) -> Message:
    if message.role == "tool":
        begin, end = (Message("user", message.where, text=text) for text in ("<tool_response>", "</tool_response>"))
        return _together(_together(begin, message), end)
    calls = message.fields.get("tool_calls")
    if calls:
        rest = {key: value for key, value in message.fields.items() if key != "tool_calls"}
        written = Message(message.role, message.where, text="\n".join(_written(call) for call in calls))
        return _together(replace(message, fields=rest), written)
    return message


def _written(call: Mapping[str, Any]) -> str:
    function = call.get("function", {})
    arguments = function.get("arguments", {})
    arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    name = json.dumps(str(function.get("name", "")), ensure_ascii=False)
    return f'<tool_call>\n{{"name": {name}, "arguments": {arguments}}}\n</tool_call>'


def _joined(messages: Iterable[Message]) -> list[Message]:
    """Join consecutive results, and the user's message after them: many templates require alternating roles."""
    joined: list[Message] = []
    for message in messages:
        if joined and message.role == "user" == joined[-1].role:
            joined[-1] = _together(joined[-1], message)
        else:
            joined.append(message)
    return joined


def _together(first: Message, second: Message, like: Message | None = None) -> Message:
    """Two messages as one, `like` the first unless told otherwise: a string, or parts where there are media."""
    if not first.media() and not second.media():
        text = "\n".join(text for each in (first, second) for text in each.texts() if text)
        return replace(like or first, text=text, parts=None)
    parts = (*_parts_of(first, "\n"), *_parts_of(second, ""))
    return replace(like or first, text=None, parts=parts)


def _parts_of(message: Message, end: str) -> tuple[Part, ...]:
    if message.parts is not None:
        return message.parts
    return (TextPart(message.text + end),) if message.text else ()

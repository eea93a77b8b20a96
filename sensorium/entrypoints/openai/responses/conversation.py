"""Items to chat messages: what one turn of the model brought, in several items, is one message.

reasoning, message, function_call, function_call   -->   one message of the assistant with two calls
function_call_output                               -->   a message of the role "tool"
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sensorium.entrypoints.openai.responses.items import Item
from sensorium.errors import InvalidRequestError

Message = dict[str, Any]

_ROLES = {"developer": "system"}
"""Chat templates know the older name only."""


class Conversation:
    """Chat messages, and the place of each in the request, for errors."""

    def __init__(self, instructions: str | None) -> None:
        self.messages: list[Message] = []
        self.places: list[str] = []
        self._names: dict[str, str] = {}
        if instructions is not None:
            self._add({"role": "system", "content": instructions}, "instructions")

    def add(self, items: Iterable[Item], where: str) -> None:
        """Go on with items. Raises `InvalidRequestError` for an output without its call."""
        for index, item in enumerate(items):
            self._add_item(item, f"{where}[{index}]")

    def _add_item(self, item: Item, where: str) -> None:
        match item["type"]:
            case "reasoning":
                text = "".join(each["text"] for each in item["content"] or item["summary"])
                self._turn("reasoning_content", where)["reasoning_content"] = text
            case "function_call":
                self._names[item["call_id"]] = item["name"]
                function = {"name": item["name"], "arguments": item["arguments"]}
                call = {"id": item["call_id"], "type": "function", "function": function}
                self._turn(None, where).setdefault("tool_calls", []).append(call)
            case "function_call_output":
                self._add(self._result(item, where), where)
            case _ if item["role"] == "assistant":
                self._turn("content", where)["content"] = _content(item["content"])
            case _:
                role = item["role"]
                self._add({"role": _ROLES.get(role, role), "content": _content(item["content"])}, where)

    def _turn(self, key: str | None, where: str) -> Message:
        """The assistant's message that goes on; a new one where it has got what comes before `key`, or `key`."""
        order = ("reasoning_content", "content", "tool_calls")
        later = order[order.index(key) :] if key else ()
        last = self.messages[-1] if self.messages else {"role": None}
        if last["role"] != "assistant" or any(each in last for each in later):
            self._add({"role": "assistant"}, where)
        return self.messages[-1]

    def _result(self, item: Item, where: str) -> Message:
        call_id, output = item["call_id"], item["output"]
        if call_id not in self._names:
            raise InvalidRequestError(
                f"got {call_id!r:.80}, expected that of a function_call before it. Send the call too.",
                field=f"{where}.call_id",
            )
        content = output if isinstance(output, str) else _content(output)
        return {"role": "tool", "tool_call_id": call_id, "name": self._names[call_id], "content": content}

    def _add(self, message: Message, where: str) -> None:
        self.messages.append(message)
        self.places.append(where)


def _content(parts: list[Item]) -> str | list[Item]:
    """Parts in the form of chats; one text alone as a string, which every template takes."""
    if len(parts) == 1 and "text" in parts[0]:
        return str(parts[0]["text"])
    return [_part(part) for part in parts]


def _part(part: Item) -> Item:
    match part["type"]:
        case "input_text" | "output_text":
            return {"type": "text", "text": part["text"]}
        case "refusal" | "input_audio" if "audio_url" not in part:
            return part
        case "input_image":
            detail = part.get("detail")
            url = {"url": part.get("image_url"), "detail": "high" if detail == "original" else detail}
            return {"type": "image_url", "image_url": url, "uuid": part.get("uuid")}
        case kind:
            key = f"{kind.removeprefix('input_')}_url"
            return {"type": key, key: part.get(key), "uuid": part.get("uuid")}

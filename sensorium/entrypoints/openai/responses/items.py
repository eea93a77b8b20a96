"""Input items as they come: checked for form, written out in full, named. Errors say where: `input[2].content[0]`.

Items are plain dicts in OpenAI's form, since they are kept and given back as such. Media are not looked at here.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeAlias

from sensorium.chat.content import CACHE_HINTS
from sensorium.errors import InvalidRequestError, InvalidTypeError, UnsupportedFeatureError

MAX_ITEMS = 4096
"""Most items in one body."""
MAX_PARTS = 4096
"""Most parts of one message."""
ROLES = ("user", "assistant", "system", "developer")
STATES = ("in_progress", "completed", "incomplete")

Item: TypeAlias = dict[str, Any]
_Reader: TypeAlias = Callable[[Mapping[str, Any], str], Item]
FindItem: TypeAlias = Callable[[str, str], Item]
"""Gives an item that is kept, by its id; raises an error with the place that names it."""


def new_id(kind: str) -> str:
    """A name that nobody can guess: `resp_...`, `msg_...`, `fc_...`, `rs_...`, `call_...`."""
    return f"{kind}_{uuid.uuid4().hex}"


def _nothing_kept(_item_id: str, where: str) -> Item:
    raise UnsupportedFeatureError(
        "got 'item_reference', expected an item. Send the item itself.", field=f"{where}.type"
    )


def read_items(given: object, where: str = "input", find: FindItem = _nothing_kept) -> list[Item]:
    """The items of a body's input: a string, or a list of items. Those that are named only are found by `find`.

    Raises:
        InvalidTypeError, InvalidRequestError: One is not of its form.
        UnsupportedFeatureError: One is of a kind that can't be taken here.
    """
    if isinstance(given, str):
        return [_message({"role": "user", "content": given}, where)]
    if not isinstance(given, list):
        raise _wrong_type(where, given, "a string or a list of items")
    if len(given) > MAX_ITEMS:
        raise InvalidRequestError(f"got {len(given)} items, expected at most {MAX_ITEMS}. Send fewer.", field=where)
    return [_item(each, f"{where}[{index}]", find) for index, each in enumerate(given)]


def _item(given: object, where: str, find: FindItem) -> Item:
    if not isinstance(given, Mapping):
        raise _wrong_type(where, given, "an object")
    kind = given.get("type")
    if kind is None:
        kind = "message" if "role" in given else "item_reference" if "id" in given else None
    if kind == "item_reference":
        _check_keys(given, ("type", "id"), where)
        return find(_string(given, "id", where), where)
    if not isinstance(kind, str) or kind not in _ITEMS:
        raise UnsupportedFeatureError(
            f"got {kind!r:.60}, expected one of {[*sorted(_ITEMS), 'item_reference']}. Remove the item.",
            field=f"{where}.type",
        )
    item = _ITEMS[kind](given, where)
    if item.get("status") not in (None, *STATES):
        raise InvalidRequestError(
            f"got {item['status']!r:.60}, expected one of {list(STATES)}.", field=f"{where}.status"
        )
    return item


def _message(given: Mapping[str, Any], where: str) -> Item:
    # The phase of an answer is its client's affair: templates know of none.
    _check_keys(given, ("type", "id", "role", "content", "status", "phase"), where)
    role = given.get("role")
    if role not in ROLES:
        raise InvalidRequestError(f"got {role!r:.60}, expected one of {list(ROLES)}. Change it.", field=f"{where}.role")
    kind = "output_text" if role == "assistant" else "input_text"
    return {
        "type": "message",
        "id": _own_id(given, "msg", where),
        "role": role,
        "status": given.get("status") or "completed",
        "content": _parts(given.get("content"), f"{where}.content", kind),
    }


def _parts(content: object, where: str, text_kind: str) -> list[Item]:
    if isinstance(content, str):
        return [_text_part(text_kind, content)]
    if not isinstance(content, list):
        raise _wrong_type(where, content, "a string or a list of parts")
    if len(content) > MAX_PARTS:
        raise InvalidRequestError(f"got {len(content)} parts, expected at most {MAX_PARTS}. Send fewer.", field=where)
    return [_part(part, f"{where}[{index}]") for index, part in enumerate(content)]


def _text_part(kind: str, text: str) -> Item:
    return {"type": kind, "text": text, **({"annotations": []} if kind == "output_text" else {})}


def _part(given: object, where: str) -> Item:
    if not isinstance(given, Mapping):
        raise _wrong_type(where, given, "an object")
    kind = given.get("type")
    if not isinstance(kind, str) or kind not in _PARTS:
        raise UnsupportedFeatureError(
            f"got {kind!r:.60}, expected one of {sorted(_PARTS)}. Change the part.", field=f"{where}.type"
        )
    return _PARTS[kind](given, where)


def _text(kind: str, *more: str) -> _Reader:
    key = "refusal" if kind == "refusal" else "text"

    def read(given: Mapping[str, Any], where: str) -> Item:
        _check_keys(given, ("type", key, *more), where)
        text = _string(given, key, where)
        return {"type": kind, key: text} if key == "refusal" else _text_part(kind, text)

    return read


def _media(*keys: str) -> _Reader:
    """A part with media: what it holds is checked where it is loaded."""

    def read(given: Mapping[str, Any], where: str) -> Item:
        if given.get("file_id") is not None:
            raise UnsupportedFeatureError(
                "got a file, expected none: there are no files here.", field=f"{where}.file_id"
            )
        _check_keys(given, ("type", "file_id", "uuid", *keys), where)
        return {key: value for key, value in given.items() if value is not None and key not in CACHE_HINTS}

    return read


def _function_call(given: Mapping[str, Any], where: str) -> Item:
    _check_keys(given, ("type", "id", "call_id", "name", "arguments", "status"), where)
    return {
        "type": "function_call",
        "id": _own_id(given, "fc", where),
        "call_id": _string(given, "call_id", where),
        "name": _string(given, "name", where),
        "arguments": _string(given, "arguments", where),
        "status": given.get("status") or "completed",
    }


def _function_call_output(given: Mapping[str, Any], where: str) -> Item:
    _check_keys(given, ("type", "id", "call_id", "output", "status"), where)
    output = given.get("output")
    return {
        "type": "function_call_output",
        "id": _own_id(given, "fco", where),
        "call_id": _string(given, "call_id", where),
        "output": output if isinstance(output, str) else _parts(output, f"{where}.output", "input_text"),
        "status": given.get("status") or "completed",
    }


def _reasoning(given: Mapping[str, Any], where: str) -> Item:
    _check_keys(given, ("type", "id", "summary", "content", "status"), where)
    texts = {}
    for key, kind in (("summary", "summary_text"), ("content", "reasoning_text")):
        parts = given.get(key) or []
        if not isinstance(parts, list) or not all(isinstance(each, Mapping) for each in parts):
            raise _wrong_type(f"{where}.{key}", parts, "a list of parts")
        texts[key] = [
            {"type": kind, "text": _string(each, "text", f"{where}.{key}[{index}]")} for index, each in enumerate(parts)
        ]
    status = given.get("status") or "completed"
    return {"type": "reasoning", "id": _own_id(given, "rs", where), **texts, "status": status}


def _own_id(given: Mapping[str, Any], kind: str, where: str) -> str:
    return new_id(kind) if given.get("id") is None else _string(given, "id", where)


def _string(given: Mapping[str, Any], key: str, where: str) -> str:
    value = given.get(key)
    if not isinstance(value, str):
        raise _wrong_type(f"{where}.{key}", value, "a string")
    return value


def _check_keys(given: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(str(key)[:60] for key in given.keys() - CACHE_HINTS - set(known) if given[key] is not None)
    if unknown:
        raise InvalidRequestError(
            f"got a field that this server doesn't implement, expected one of {sorted(known)}. Remove it.",
            field=f"{where}.{unknown[0]}",
        )


def _wrong_type(where: str, value: object, expected: str) -> InvalidTypeError:
    kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
    return InvalidTypeError(f"got {kind}, expected {expected}. Change {where}.", field=where)


_ITEMS: dict[str, _Reader] = {
    "message": _message,
    "function_call": _function_call,
    "function_call_output": _function_call_output,
    "reasoning": _reasoning,
}
_PARTS: dict[str, _Reader] = {
    "input_text": _text("input_text"),
    "output_text": _text("output_text", "annotations", "logprobs"),
    "refusal": _text("refusal"),
    "input_image": _media("image_url", "detail"),
    "input_video": _media("video_url"),
    "input_audio": _media("input_audio", "audio_url"),
}

"""Chat messages in the OpenAI format, parsed: roles, texts, and media with their sources.

Nothing is fetched or decoded here. Errors name the message and the part, as in `messages[2].content[0]`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from sensorium.errors import InvalidRequestError, InvalidTypeError, UnsupportedFeatureError

MAX_MESSAGES = 4096
"""Most messages in one conversation."""
MAX_PARTS = 4096
"""Most parts of one message."""
MAX_ROLES = 16
"""Most roles in one conversation: it takes a while to find out what a template does with one."""
MAX_ROLE_CHARS = 64
MODALITIES = ("image", "video", "audio")
CACHE_HINTS = frozenset({"cache_control", "prompt_cache_breakpoint"})
"""Fields by which clients mark the part of a prompt to cache. They have no effect: prefixes are cached without them."""
_MAX_FORMAT_CHARS = 128


@dataclass(frozen=True, slots=True)
class TextPart:
    """A piece of text."""

    text: str


@dataclass(frozen=True, slots=True, eq=False)
class MediaPart:
    """One media item.

    `source`: an address, data URL or path to load from (`is_encoded`), or an object that a mapper knows; None where
    only the name was given.
    """

    modality: str
    source: Any
    where: str
    is_encoded: bool = False
    uuid: str | None = None


Part: TypeAlias = TextPart | MediaPart


@dataclass(frozen=True, slots=True, eq=False)
class Message:
    """One message. `parts` is None where the content was a string, `text`, or absent."""

    role: str
    where: str
    text: str | None = None
    parts: tuple[Part, ...] | None = None
    fields: Mapping[str, Any] = field(default_factory=dict)
    """The message's other fields, such as `name` and `tool_calls`, for the template."""

    def media(self) -> list[MediaPart]:
        """Its media in order."""
        return [part for part in self.parts or () if isinstance(part, MediaPart)]

    def texts(self) -> list[str]:
        """Its texts in order."""
        if self.parts is None:
            return [] if self.text is None else [self.text]
        return [part.text for part in self.parts if isinstance(part, TextPart)]


def parse_messages(messages: object, places: Sequence[str] | None = None) -> list[Message]:
    """Parse a conversation. `places`: what errors call each message, instead of `messages[0]` and so on.

    Raises:
        InvalidTypeError: (a `TypeError`) Something has another type than the format says.
        InvalidRequestError: (a `ValueError`) The conversation is empty, or a part is unknown or lacks its
        content.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str | bytes):
        raise _wrong_type("messages", messages, "a list of messages")
    if not messages:
        raise InvalidRequestError("got none, expected at least one. Add a message of role 'user'.", field="messages")
    if len(messages) > MAX_MESSAGES:
        raise InvalidRequestError(
            f"got {len(messages)}, expected at most {MAX_MESSAGES}. Send fewer.", field="messages"
        )
    if places is None:
        places = [f"messages[{index}]" for index in range(len(messages))]
    parsed = [_parse_message(message, where) for message, where in zip(messages, places, strict=True)]
    roles = {message.role for message in parsed}
    if len(roles) > MAX_ROLES:
        raise InvalidRequestError(
            f"got {len(roles)} roles, expected at most {MAX_ROLES}. Change roles.", field="messages"
        )
    return parsed


def _parse_message(message: object, where: str) -> Message:
    if not isinstance(message, Mapping):
        raise _wrong_type(where, message, "a dict with role and content")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise _wrong_type(f"{where}.role", role, "a string such as 'user'")
    if len(role) > MAX_ROLE_CHARS:
        raise InvalidRequestError(
            f"got {len(role)} characters, expected at most {MAX_ROLE_CHARS}. Change {where}.role.",
            field=f"{where}.role",
        )
    fields = {key: value for key, value in message.items() if key not in ("role", "content") and value is not None}
    if not isinstance(fields.get("tool_call_id", ""), str):
        raise _wrong_type(f"{where}.tool_call_id", fields["tool_call_id"], "a string")
    if "tool_calls" in fields:
        fields["tool_calls"] = _parse_tool_calls(fields["tool_calls"], f"{where}.tool_calls")
    _parse_reasoning(fields, where)
    if content is None:
        if not fields:
            raise _wrong_type(f"{where}.content", content, "a string or a list of parts")
        return Message(role, where, fields=fields)
    if isinstance(content, str):
        return Message(role, where, text=content, fields=fields)
    if not isinstance(content, list | tuple):
        raise _wrong_type(f"{where}.content", content, "a string or a list of parts")
    if len(content) > MAX_PARTS:
        raise InvalidRequestError(
            f"got {len(content)} parts, expected at most {MAX_PARTS}. Send fewer.", field=f"{where}.content"
        )
    parts = tuple(_parse_part(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    return Message(role, where, parts=parts, fields=fields)


def _parse_reasoning(fields: dict[str, Any], where: str) -> None:
    """Servers have two names for past reasoning, and templates use either."""
    for name, other in (("reasoning", "reasoning_content"), ("reasoning_content", "reasoning")):
        if name in fields:
            if not isinstance(fields[name], str):
                raise _wrong_type(f"{where}.{name}", fields[name], "a string")
            fields.setdefault(other, fields[name])


def _parse_tool_calls(calls: object, where: str) -> list[Any]:
    """Tool calls with their arguments as objects, which is what templates expect; the wire format has them as
    JSON. Arguments that aren't JSON, which a model may have written, stay text.
    """
    if not isinstance(calls, list | tuple):
        raise _wrong_type(where, calls, "a list of tool calls")
    return [_parse_tool_call(call, f"{where}[{index}]") for index, call in enumerate(calls)]


def _parse_tool_call(call: object, where: str) -> dict[str, Any]:
    if not isinstance(call, Mapping) or not isinstance(call.get("function", {}), Mapping):
        raise _wrong_type(where, call, "a dict with a function")
    if not isinstance(call.get("id", ""), str):
        raise _wrong_type(f"{where}.id", call["id"], "a string")
    has_function = "function" in call  # Hugging Face's templates know calls without it too
    place = f"{where}.function" if has_function else where
    function = dict(call["function"] if has_function else call)
    if not isinstance(function.get("name"), str):
        raise _wrong_type(f"{place}.name", function.get("name"), "a string")
    arguments = function.get("arguments", {})
    if not isinstance(arguments, str | Mapping):
        raise _wrong_type(f"{place}.arguments", arguments, "the text of a JSON object")
    if isinstance(arguments, str):
        function["arguments"] = _parse_arguments(arguments)
    return {**call, "function": function} if has_function else function


def _parse_arguments(arguments: str) -> Any:
    try:
        return json.loads(arguments) if arguments.strip() else {}
    except (ValueError, RecursionError):
        return arguments


def _parse_part(part: object, where: str) -> Part:
    if isinstance(part, str):
        return TextPart(part)
    if not isinstance(part, Mapping):
        raise _wrong_type(where, part, "a dict with a type")
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in _PARSERS:
        raise InvalidRequestError(
            f"got {kind!r:.60}, expected one of {sorted(_PARSERS)}. Change the part.", field=f"{where}.type"
        )
    return _PARSERS[kind](part, where)


_Parser: TypeAlias = Callable[[Mapping[str, Any], str], Part]


def _text(key: str) -> _Parser:
    def parse(part: Mapping[str, Any], where: str) -> Part:
        _check_keys(part, ("type", key), where)
        if not isinstance(part.get(key), str):
            raise _wrong_type(f"{where}.{key}", part.get(key), "a string")
        return TextPart(part[key])

    return parse


def _url(modality: str) -> _Parser:
    """`{"type": "image_url", "image_url": {"url": ...}}`, or the address itself in place of the inner dict."""
    key = f"{modality}_url"

    def parse(part: Mapping[str, Any], where: str) -> Part:
        _check_keys(part, ("type", key, "uuid"), where)
        uuid = _uuid(part, where)
        inner = _content(part, key, where, uuid)
        if isinstance(inner, Mapping):
            _check_keys(inner, ("url", "detail"), f"{where}.{key}")
            _check_detail(inner.get("detail"), f"{where}.{key}.detail")
            inner = _content(inner, "url", f"{where}.{key}", uuid)
        if inner is not None and not isinstance(inner, str):
            raise _wrong_type(f"{where}.{key}", inner, "an address as a string")
        return MediaPart(modality, inner, where, is_encoded=True, uuid=uuid)

    return parse


def _check_detail(detail: object, where: str) -> None:
    """Pictures are always seen in full detail, as far as the model's own limits go."""
    if detail not in (None, "auto", "high", "original"):
        raise UnsupportedFeatureError(
            f"got {detail!r:.60}, expected 'auto' or 'high'. Leave it out, or send a smaller image.", field=where
        )


def _input_audio(part: Mapping[str, Any], where: str) -> Part:
    """`{"type": "input_audio", "input_audio": {"data": <base64>, "format": "wav"}}`."""
    _check_keys(part, ("type", "input_audio", "uuid"), where)
    where_inner, uuid = f"{where}.input_audio", _uuid(part, where)
    inner = _content(part, "input_audio", where, uuid)
    if inner is None:
        return MediaPart("audio", None, where, is_encoded=True, uuid=uuid)
    if not isinstance(inner, Mapping):
        raise _wrong_type(where_inner, inner, "a dict with data and format")
    _check_keys(inner, ("data", "format"), where_inner)
    data, audio_format = _content(inner, "data", where_inner), inner.get("format")
    if not isinstance(data, str):
        raise _wrong_type(f"{where_inner}.data", data, "base64 as a string")
    if audio_format is not None and not (isinstance(audio_format, str) and len(audio_format) <= _MAX_FORMAT_CHARS):
        raise InvalidRequestError(
            f"got {audio_format!r:.60}, expected a short name such as 'wav' or 'mp3'. Change it.",
            field=f"{where_inner}.format",
        )
    # The declared format is ignored: the bytes tell the real one.
    source = data if data[:5].lower() == "data:" else f"data:;base64,{data}"
    return MediaPart("audio", source, where, is_encoded=True, uuid=uuid)


def _object(modality: str) -> _Parser:
    """`{"type": "image", "image": <object>}`; a string, bytes or path is loaded; `url` and `path` are as
    good.
    """

    def parse(part: Mapping[str, Any], where: str) -> Part:
        keys = [key for key in (modality, "url", "path") if part.get(key) is not None]
        _check_keys(part, ("type", modality, "url", "path", "uuid"), where)
        if len(keys) > 1:
            raise InvalidRequestError(
                f"got {' and '.join(keys)}, expected one of them. Leave out the others.", field=where
            )
        uuid = _uuid(part, where)
        source = _content(part, keys[0] if keys else modality, where, uuid)
        is_encoded = isinstance(source, str | bytes | Path)
        return MediaPart(modality, source, where, is_encoded=is_encoded, uuid=uuid)

    return parse


def _embeds(modality: str) -> _Parser:
    """`{"type": "image_embeds", "image_embeds": <tensor, or dict of tensors>}`."""
    key = f"{modality}_embeds"

    def parse(part: Mapping[str, Any], where: str) -> Part:
        _check_keys(part, ("type", key, "uuid"), where)
        uuid = _uuid(part, where)
        content = _content(part, key, where, uuid)
        return MediaPart(modality, None if content is None else Embeddings(content), where, uuid=uuid)

    return parse


@dataclass(frozen=True, slots=True, eq=False)
class Embeddings:
    """Embeddings given instead of media: a tensor, a dict of tensors, or base64 of a safetensors file."""

    value: Any


def _content(part: Mapping[str, Any], key: str, where: str, uuid: str | None = None) -> Any:
    """A part's content; None only if it has a name instead."""
    value = part.get(key)
    if value is None and uuid is None:
        raise InvalidRequestError("got nothing, expected the content. Send it.", field=f"{where}.{key}")
    return value


def _uuid(part: Mapping[str, Any], where: str) -> str | None:
    uuid = part.get("uuid")
    if uuid is not None and not isinstance(uuid, str):
        raise _wrong_type(f"{where}.uuid", uuid, "a string")
    return uuid


def _check_keys(part: Mapping[str, Any], known: Iterable[str], where: str) -> None:
    unknown = sorted(str(key) for key in part.keys() - CACHE_HINTS - set(known) if part[key] is not None)
    if unknown:
        raise InvalidRequestError(
            f"got the unknown fields {unknown[:8]}, expected {sorted(known)}. Remove them.", field=where
        )


def _wrong_type(where: str, value: object, expected: str) -> InvalidTypeError:
    kind = "nothing" if value is None else f"a value of type {type(value).__name__}"
    return InvalidTypeError(f"got {kind}, expected {expected}. Change {where}.", field=where)


_PARSERS: dict[str, _Parser] = {
    "text": _text("text"),
    "refusal": _text("refusal"),
    "input_audio": _input_audio,
    **{f"{modality}_url": _url(modality) for modality in MODALITIES},
    **{modality: _object(modality) for modality in MODALITIES},
    **{f"{modality}_embeds": _embeds(modality) for modality in MODALITIES},
}

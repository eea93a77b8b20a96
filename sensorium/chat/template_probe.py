"""Determines by rendering what a chat template does with the content of messages.

Templates differ: some take a string as a message's content, some a list of typed parts, some both, and one template may
do another thing with each role, with calls beside the content, or where there are tools: it loops over the parts of the
user's messages and adds the system's to a string. No template declares it. So each is rendered with probes, once for
each kind of message, at the places of a conversation where such messages occur, and the result is examined.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, TypeAlias

from sensorium.chat.template import render
from sensorium.errors import InvalidRequestError
from sensorium.logger import get_logger

logger = get_logger(__name__)

_FIRST, _SECOND = "qxzfirst", "qxzsecond"
"""Texts of a probe: no template contains them. They are looked for whatever their case, which templates may change."""
_PRINTED = "qxzprinted"
"""Stands in a part beside its text: a template that shows it has printed the part as Python or JSON writes it."""
_MAX_KINDS = 512
"""How many kinds of messages, over all templates, have their probes cached."""

_Message: TypeAlias = Mapping[str, Any]
_USER: _Message = {"role": "user", "content": "u"}
_SYSTEM: _Message = {"role": "system", "content": "s"}
_ANSWER: _Message = {"role": "assistant", "content": "a"}
_CALL = {"id": "qxzcall00", "type": "function", "function": {"name": "f", "arguments": {}}}
_CALLING: _Message = {"role": "assistant", "content": "", "tool_calls": [_CALL]}
_RESULT: _Message = {"role": "tool", "tool_call_id": "qxzcall00", "name": "f", "content": "r"}
_TOOL = {
    "type": "function",
    "function": {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {}}},
}


@dataclass(frozen=True, slots=True)
class MessageKind:
    """The properties of a message that a template may depend on."""

    role: str
    has_calls: bool = False
    """Functions are called beside the content."""
    has_tools: bool = False
    """The request has functions."""

    def in_places(self, content: object) -> list[list[_Message]]:
        """Conversations with a message of this kind, wherever such messages stand."""
        probe: _Message = {"role": self.role, "content": content}
        if self.has_calls:
            probe = {**probe, "tool_calls": [_CALL]}
            return [[_USER, probe, _RESULT], [_USER, probe, _RESULT, _ANSWER, _USER]]
        match self.role:
            case "user":
                return [[probe], [_SYSTEM, probe], [_USER, _ANSWER, probe]]
            case "assistant":
                return [[_USER, probe], [_USER, probe, _USER]]
            case "tool":
                called = {**probe, "tool_call_id": "qxzcall00", "name": "f"}
                return [[_USER, _CALLING, called], [_USER, _CALLING, called, _ANSWER, _USER]]
            case "system":
                return [[probe, _USER], [_USER, probe], [_USER, probe, _USER]]
            case _:
                return [[probe, _USER], [_SYSTEM, probe, _USER], [_USER, probe], [_USER, probe, _USER]]


@dataclass(frozen=True, slots=True)
class ContentFormat:
    """What a template does with the content of messages of one kind."""

    takes_strings: bool
    takes_parts: bool
    media_parts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Per modality that the template places: the part that it recognizes."""
    placeholders: Mapping[str, str] = field(default_factory=dict)
    """Per modality that the template places: what it writes for an item."""

    @property
    def is_shown(self) -> bool:
        """Whether the template shows such messages at all."""
        return self.takes_strings or self.takes_parts


class TemplateProbe:
    """Probes templates with one tokenizer, and caches the results. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, modalities: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._modalities = tuple(modalities)
        self.format_of = lru_cache(maxsize=_MAX_KINDS)(self._format_of)

    def _format_of(self, template: str, kind: MessageKind) -> ContentFormat:
        """What a template does with the content of such messages.

        It takes one form if it shows that, and nowhere loses it where it shows the other; and parts if it nowhere
        prints them.
        """
        strings = [_shows(each, _FIRST) for each in self._tried(template, kind, _FIRST)]
        rendered = self._tried(template, kind, _parts())
        parts = [_shows(each, _FIRST, _SECOND) and not _shows(each, _PRINTED) for each in rendered]
        is_printed = any(_shows(each, _PRINTED) for each in rendered)
        takes_parts = any(parts) and not is_printed and not _is_lost(parts, strings)
        media = self._media(template, kind, parts.index(True), str(rendered[parts.index(True)])) if takes_parts else {}
        found = ContentFormat(
            any(strings) and not _is_lost(strings, parts),
            takes_parts,
            {modality: part for modality, (part, _) in media.items()},
            {modality: placeholder for modality, (_, placeholder) in media.items()},
        )
        _log(kind, found)
        return found

    def _media(
        self, template: str, kind: MessageKind, place: int, base: str
    ) -> dict[str, tuple[Mapping[str, str], str]]:
        """Per modality that a template places: the part that it recognizes, and what it writes for it."""
        found = {}
        for modality in self._modalities:
            for part in _spellings(modality):
                rendered = self._render(template, kind, kind.in_places(_parts(part))[place])
                if rendered is not None and rendered != base and not _shows(rendered, _PRINTED):
                    found[modality] = (part, _inserted(base, rendered))
                    break
        return found

    def _tried(self, template: str, kind: MessageKind, content: object) -> list[str | None]:
        return [self._render(template, kind, messages) for messages in kind.in_places(content)]

    def _render(self, template: str, kind: MessageKind, messages: Sequence[_Message]) -> str | None:
        """The rendered conversation; None if the template refuses it."""
        try:
            return render(self._tokenizer, template, messages, tools=[_TOOL] if kind.has_tools else None)
        except InvalidRequestError:
            return None


def _parts(media_part: Mapping[str, str] | None = None) -> list[Mapping[str, str]]:
    """Two texts, and perhaps a media part in between."""
    first, second = ({"type": "text", "text": text, _PRINTED: _PRINTED} for text in (_FIRST, _SECOND))
    return [first, second] if media_part is None else [first, media_part, second]


def _is_lost(shown: Sequence[bool], others: Sequence[bool]) -> bool:
    """Whether one form of content is lost at a place where the other is shown."""
    return any(other and not own for own, other in zip(shown, others, strict=True))


def _shows(rendered: str | None, *texts: str) -> bool:
    return rendered is not None and all(text in rendered.lower() for text in texts)


def _spellings(modality: str) -> tuple[Mapping[str, str], ...]:
    """Parts by which templates recognize media, the usual one first."""
    return (
        {"type": modality},
        {"type": modality, modality: ""},
        {"type": f"{modality}_url", f"{modality}_url": ""},
        {"type": f"input_{modality}", f"input_{modality}": ""},
    )


def _inserted(base: str, rendered: str) -> str:
    """The text inserted into `base` to make `rendered`."""
    start = 0
    while start < len(base) and base[start] == rendered[start]:
        start += 1
    return rendered[start : start + len(rendered) - len(base)]


def _log(kind: MessageKind, found: ContentFormat) -> None:
    taken = [what for what, has in (("strings", found.takes_strings), ("typed parts", found.takes_parts)) if has]
    places = [f"{modality} as {text!r}" for modality, text in found.placeholders.items()]
    logger.info(
        "chat template: messages of the role %.40r are shown from %s, media placed: %s",
        kind.role,
        " and ".join(taken) or "nothing that was tried",
        ", ".join(places) or "none",
    )

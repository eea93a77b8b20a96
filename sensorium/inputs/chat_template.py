"""A checkpoint's chat template: found, and asked what it does with content.

Templates differ: some take a string as a message's content, some a list of typed parts, some both; some write
a placeholder for an image and not for a sound. None says so, so each is tried out on a probe, once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.errors import ConfigError, InvalidRequestError, UnsupportedFeatureError
from sensorium.logger import get_logger

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

logger = get_logger(__name__)

_FIRST, _SECOND = "qxzfirst", "qxzsecond"
"""Texts of a probe: no template contains them."""

_EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")

_MAX_TEMPLATES = 64
"""Templates whose probes are remembered."""

RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "load_audio_from_video",
        "max_length",
        "messages",
        "padding",
        "processor_kwargs",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
"""Names that a request's `chat_template_kwargs` must not set: they choose what is rendered, or how."""


@dataclass(frozen=True, slots=True)
class ContentFormat:
    """What a template does with a message's content."""

    takes_strings: bool
    takes_parts: bool
    media_parts: Mapping[str, Mapping[str, str]]
    """Per modality that the template places: the part that it recognizes."""
    placeholders: Mapping[str, str]
    """Per modality that the template places: what it writes for an item."""
    takes_tool_parts: bool = False
    """Results of tools may be typed parts."""


def checkpoint_template(model_config: ModelConfig, tokenizer: Any) -> str | Mapping[str, str] | None:
    """The template that comes with a checkpoint, or several by name; None if there is none.

    A processor's own template comes before the tokenizer's, as in Hugging Face.
    """
    directory = Path(model_config.model)
    legacy, current = directory / "chat_template.json", directory / "chat_template.jinja"
    if model_config.is_multimodal_model and not current.is_file() and (template := _legacy_template(legacy)):
        return template
    found: str | Mapping[str, str] | None = getattr(tokenizer, "chat_template", None)
    if found is None and current.is_file():
        return current.read_text(encoding="utf-8")
    return found


def _legacy_template(path: Path) -> str | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"chat template: got a {path.name} that is no JSON. Correct the checkpoint.") from exc
    template = content.get("chat_template") if isinstance(content, dict) else None
    return template if isinstance(template, str) else None


def read_template(given: str) -> str:
    """A template from an engine setting: the text itself, or the path of a file with it.

    Raises `ConfigError` (a `ValueError`) for a path without a file.
    """
    if any(mark in given for mark in ("{", "\n")):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except OSError as exc:
        raise ConfigError(
            f"chat_template: got {given!r:.200}, expected a template or the path of a file with one. Check the path."
        ) from exc


def select_template(templates: str | Mapping[str, str] | None, *, has_tools: bool, name: str | None = None) -> str:
    """The template for a request: by name, the one for tools if there are any, or the default one.

    Raises `InvalidRequestError` (a `ValueError`) if there is none.
    """
    if isinstance(templates, str) and name is None:
        return templates
    if isinstance(templates, Mapping):
        wanted = [name] if name is not None else ["tool_use", "default"] if has_tools else ["default"]
        for each in wanted:
            if each in templates:
                return templates[each]
    raise InvalidRequestError(
        "chat_template: the model has none for this request, expected one in its checkpoint. Set chat_template, or "
        "send a prompt that is already in the model's format."
    )


def reasoning_variables(template: str, effort: str | None) -> dict[str, Any]:
    """How a template is told how long the model may reason: in words, or whether at all.

    Raises `RequestError` for an effort that there isn't, or a template without such a setting.
    """
    if effort is None:
        return {}
    if effort not in _EFFORTS:
        raise InvalidRequestError(
            f"reasoning_effort: got {effort!r:.60}, expected one of {list(_EFFORTS)}. Change reasoning_effort."
        )
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort not in ("none", "minimal")}
    raise UnsupportedFeatureError(
        f"reasoning_effort: got {effort!r}, expected none, since the model's chat template has no setting for it. "
        "Remove reasoning_effort."
    )


def render(
    tokenizer: Any,
    template: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    add_generation_prompt: bool = False,
    continue_final_message: bool = False,
    tools: Sequence[Any] | None = None,
    variables: Mapping[str, Any] | None = None,
) -> str:
    """The prompt that a template makes of messages, rendered in Hugging Face's sandbox.

    Raises `InvalidRequestError` (a `ValueError`) if the template refuses the messages or fails on them.
    """
    from jinja2.exceptions import TemplateError

    try:
        rendered = tokenizer.apply_chat_template(
            list(messages),
            tools=None if tools is None else list(tools),
            chat_template=template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tokenize=False,
            **(variables or {}),
        )
    except TemplateError as exc:  # the template's own words, or about its variables
        raise InvalidRequestError(
            f"messages: the model's chat template can't render them ({exc!s:.300}), expected messages that it knows. "
            "Change roles or content."
        ) from exc
    except Exception as exc:
        raise InvalidRequestError(
            f"messages: the model's chat template failed on them ({type(exc).__name__}), expected messages that it "
            "knows. Change roles or content."
        ) from exc
    return str(rendered)


class TemplateProbe:
    """Finds out about templates with one tokenizer, and remembers. Safe to call from several threads."""

    def __init__(self, tokenizer: Any, modalities: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._modalities = tuple(modalities)
        self.format_of = lru_cache(maxsize=_MAX_TEMPLATES)(self._format_of)
        self.takes_system = lru_cache(maxsize=_MAX_TEMPLATES)(self._takes_system)

    def _format_of(self, template: str) -> ContentFormat:
        """What a template does with content."""
        base = self._parts(template)
        media_parts: dict[str, Mapping[str, str]] = {}
        placeholders: dict[str, str] = {}
        if base is not None:
            for modality in self._modalities:
                for part in _spellings(modality):
                    rendered = self._parts(template, part)
                    if rendered is not None and rendered != base:
                        media_parts[modality] = part
                        placeholders[modality] = _inserted(base, rendered)
                        break
        found = ContentFormat(
            self._takes_strings(template),
            base is not None,
            media_parts,
            placeholders,
            takes_tool_parts=base is not None and self._takes_tool_parts(template),
        )
        logger.info(
            "chat template: takes %s, places %s",
            " and ".join(
                what for what, has in (("strings", found.takes_strings), ("typed parts", found.takes_parts)) if has
            )
            or "nothing that was tried",
            ", ".join(f"{modality} as {text!r}" for modality, text in placeholders.items()) or "no media",
        )
        return found

    def _takes_strings(self, template: str) -> bool:
        return _FIRST in (self._try(template, _FIRST) or "")

    def _takes_system(self, template: str) -> bool:
        """Whether a template shows the system's message."""
        shown = []
        for as_content in (str, lambda text: [{"type": "text", "text": text}]):
            contents = ("system", as_content(_FIRST)), ("user", as_content(_SECOND))
            shown.append(self._render(template, [{"role": role, "content": content} for role, content in contents]))
        return any(_FIRST in (each or "") for each in shown)

    def _takes_tool_parts(self, template: str) -> bool:
        """Whether a template shows a tool's result that is a list of parts."""
        call = {"id": "qxzcall00", "type": "function", "function": {"name": "f", "arguments": {}}}
        parts = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
        messages: list[Mapping[str, Any]] = [
            {"role": "user", "content": "u"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "qxzcall00", "name": "f", "content": parts},
        ]
        rendered = self._render(template, messages) or ""
        return _FIRST in rendered and _SECOND in rendered and not _prints_parts(rendered)

    def _parts(self, template: str, media_part: Mapping[str, str] | None = None) -> str | None:
        """A message of two texts, with a media part in between, rendered; None if the template shows no such
        parts.
        """
        content: list[Mapping[str, str]] = [{"type": "text", "text": _FIRST}, {"type": "text", "text": _SECOND}]
        if media_part is not None:
            content.insert(1, media_part)
        rendered = self._try(template, content)
        if rendered is None or _FIRST not in rendered or _SECOND not in rendered:
            return None
        # A template that knows strings only may print the list as it is.
        return None if _prints_parts(rendered) else rendered

    def _try(self, template: str, content: object) -> str | None:
        user: Mapping[str, Any] = {"role": "user", "content": content}
        system: Mapping[str, Any] = {"role": "system", "content": "s"}
        for messages in ([user], [system, user]):
            rendered = self._render(template, messages)
            if rendered is not None:
                return rendered
        return None

    def _render(self, template: str, messages: Sequence[Mapping[str, Any]]) -> str | None:
        try:
            return render(self._tokenizer, template, messages)
        except InvalidRequestError:
            return None


def _prints_parts(rendered: str) -> bool:
    return "'type'" in rendered or '"type"' in rendered


def _spellings(modality: str) -> tuple[Mapping[str, str], ...]:
    """Parts by which templates recognize media, the usual one first."""
    return (
        {"type": modality},
        {"type": modality, modality: ""},
        {"type": f"{modality}_url", f"{modality}_url": ""},
        {"type": f"input_{modality}", f"input_{modality}": ""},
    )


def _inserted(base: str, rendered: str) -> str:
    """What `rendered` has more than `base`, which it is but for one insertion."""
    start = 0
    while start < len(base) and base[start] == rendered[start]:
        start += 1
    return rendered[start : start + len(rendered) - len(base)]

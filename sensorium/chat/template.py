"""Finds and renders a checkpoint's chat template. `template_probe.py` determines what it does with content."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.errors import ConfigError, InvalidRequestError, UnsupportedFeatureError

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

EFFORT_FIELD = "reasoning_effort"
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh")
"""Values of `reasoning_effort`."""

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


_PLAIN = """\
{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}\
{% endif %}{% endfor %}"""


def plain_template(model_config: ModelConfig, tokenizer: Any) -> str | None:
    """A template that gives contents as they are, for a model that doesn't generate and has none: by messages, requests
    can name media. None for any other."""
    is_needed = model_config.pools and not checkpoint_template(model_config, tokenizer)
    return _PLAIN if is_needed else None


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

    Raises `ConfigError` (a `ValueError`) for a path without a file of text.
    """
    if any(mark in given for mark in ("{", "\n")):
        return given
    try:
        return Path(given).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as exc:
        raise ConfigError(
            f"chat_template: got {given!r:.200}, expected a template or the path of a file with one. Check the path."
        ) from exc


def check_template(template: str) -> None:
    """Raises `ConfigError` (a `ValueError`), with the line, for an engine setting that is no template."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser

    class Generation(Extension):
        """Hugging Face's own tag, around what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  as the base class has it

        def parse(self, parser: Parser) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    try:
        Environment(extensions=[Generation, loopcontrols]).parse(template)
    except TemplateSyntaxError as exc:
        raise ConfigError(
            f"chat_template: got a mistake in line {exc.lineno} ({exc.message!s:.200}), expected a Jinja template. "
            "Correct it."
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
        "the model has none for this request, expected one in its checkpoint. Set chat_template, or "
        "send a prompt that is already in the model's format.",
        field="chat_template",
    )


def hears_effort(template: str) -> bool:
    """Whether a template has a setting for how long the model may reason."""
    return "reasoning_effort" in template or "enable_thinking" in template


def reasoning_variables(template: str, effort: str | None) -> dict[str, Any]:
    """The template's variables for the effort of reasoning: a word, or whether to reason at all.

    Raises `RequestError` for an effort that there isn't, or a template without such a setting.
    """
    if effort is None:
        return {}
    if effort not in EFFORTS:
        raise InvalidRequestError(
            f"got {effort!r:.60}, expected one of {list(EFFORTS)}. Change reasoning_effort.",
            field="reasoning_effort",
        )
    if "reasoning_effort" in template:
        return {"reasoning_effort": effort}
    if "enable_thinking" in template:
        return {"enable_thinking": effort not in ("none", "minimal")}
    raise UnsupportedFeatureError(
        f"got {effort!r}, expected none, since the model's chat template has no setting for it. "
        "Remove reasoning_effort.",
        field="reasoning_effort",
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
    except TemplateError as exc:  # the message is the template's own, or about its variables
        raise InvalidRequestError(
            f"the model's chat template can't render them ({exc!s:.300}), expected messages that it knows. "
            "Change roles or content.",
            field="messages",
        ) from exc
    except Exception as exc:
        raise InvalidRequestError(
            f"the model's chat template failed on them ({type(exc).__name__}), expected messages that it "
            "knows. Change roles or content.",
            field="messages",
        ) from exc
    return str(rendered)

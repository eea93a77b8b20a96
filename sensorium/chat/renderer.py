"""Chat messages to a prompt: the checkpoint's template, with a placeholder wherever a media item stands.

Media stand where the template puts them; for templates that place none of a kind, in front of the message's
text or between its texts, by the model's placeholder string; and always where the user wrote a placeholder.
Items keep their order within each modality. What comes out is a prompt for `InputPreprocessor.process`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sensorium.chat.answer_formats import AnswerFormats, AnswerFormatsFinder
from sensorium.chat.content import MediaPart, Message, TextPart, parse_messages
from sensorium.chat.media import ChatMedia
from sensorium.chat.named_media import NamedMedia
from sensorium.chat.template import (
    RESERVED,
    checkpoint_template,
    hears_effort,
    read_template,
    reasoning_variables,
    render,
    select_template,
)
from sensorium.chat.template_probe import ContentFormat, MessageKind, TemplateProbe
from sensorium.chat.tool_messages import concern_tools, with_tools_told
from sensorium.errors import InvalidRequestError, InvalidTypeError, UnsupportedFeatureError
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalRegistry
from sensorium.multimodal.mrope import token_id_of
from sensorium.multimodal.video_sampling import CheckpointSampling
from sensorium.stages import stage

if TYPE_CHECKING:
    from sensorium.config import ModelConfig
    from sensorium.media import MediaLoader


_FEW_PARTS = 64


@dataclass(frozen=True, slots=True, eq=False)
class _Request:
    """A conversation, parsed and checked, and everything that rendering it needs."""

    messages: list[Message]
    template: str
    add_generation_prompt: bool
    continue_final_message: bool
    tools: Sequence[Any] | None
    variables: Mapping[str, Any]
    mm_processor_kwargs: Mapping[str, Any]
    scope: bytes

    def media(self) -> list[MediaPart]:
        """All media in order."""
        return [part for message in self.messages for part in message.media()]


class ChatRenderer:
    """Renders conversations for one model. Safe to call from several threads.

    Args:
        model_config: the model.
        tokenizer: its Hugging Face tokenizer.
        media_loader: fetches media that messages name; without it, media are objects.
        chat_template: a template, or the path of a file with one, instead of the checkpoint's.
        trust_request_chat_template: take templates that come with a request.
        accept_objects: take Python objects as media; off where messages come over a network.
        accept_embeddings: take embeddings in place of media.
        tool_parser: how the model writes calls: a name of `sensorium.parsing.FORMATS`, "none", or "auto" to go by the
            template.
        reasoning_parser: the same for reasoning, of `sensorium.parsing.REASONING_FORMATS`.
        media_are_apart: decode media again for each scope.
        named_media: keeps media that have a `uuid`; without it, a `uuid` is the item's identity.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        tokenizer: Any,
        media_loader: MediaLoader | None = None,
        *,
        chat_template: str | None = None,
        trust_request_chat_template: bool = False,
        accept_objects: bool = True,
        accept_embeddings: bool = True,
        tool_parser: str = "auto",
        reasoning_parser: str = "auto",
        named_media: NamedMedia | None = None,
        media_are_apart: bool = False,
        mm_registry: MultiModalRegistry = MULTIMODAL_REGISTRY,
    ) -> None:
        self._model_config = model_config
        self._tokenizer = tokenizer
        self._registry = mm_registry
        self._trusts_requests = trust_request_chat_template
        self._media = ChatMedia(
            model_config,
            mm_registry,
            CheckpointSampling(model_config),
            media_loader,
            named_media,
            accept_objects,
            accept_embeddings,
            media_are_apart,
        )
        self._templates = (
            read_template(chat_template) if chat_template else checkpoint_template(model_config, tokenizer)
        )
        taken = [
            modality
            for modality in mm_registry.modalities
            if mm_registry.get_plugin(modality).has_input_mapper(model_config.model_class)
        ]
        self._probe = TemplateProbe(tokenizer, taken)
        self._finder = AnswerFormatsFinder(tokenizer, tool_parser, reasoning_parser)

    def answer_formats(self, *, chat_template: str | None = None, has_tools: bool = False) -> AnswerFormats:
        """How answers to prompts of a template are parsed; `chat_template` as for `render`.

        Raises:
            RequestError: There is no such template.
        """
        template = self._template(chat_template, has_tools=has_tools)
        return self._finder.formats_of(template) if has_tools else self._finder.reasoning_of(template)

    def hears_effort(self, *, chat_template: str | None = None, has_tools: bool = False) -> bool:
        """Whether `reasoning_effort` can be had with a template; `chat_template` as for `render`.

        Raises:
            RequestError: There is no such template.
        """
        return hears_effort(self._template(chat_template, has_tools=has_tools))

    def render(self, messages: object, **options: Any) -> dict[str, Any]:
        """A prompt from messages in the OpenAI format, its media fetched and not yet decoded.

        Options:
            chat_template: a template for this request, or the name of one of the checkpoint's.
            add_generation_prompt: end with the start of an answer; on by default.
            continue_final_message: go on with the last message instead of starting an answer.
            tools: descriptions of tools, for the template.
            chat_template_kwargs: more variables for the template.
            mm_processor_kwargs: for the model's input processor and mappers.
            scope: whose names of media count; see `NamedMedia`.
            reasoning_effort: how long the model may reason, if its template has a setting for it.
            places: what errors call each message, instead of `messages[0]` and so on.

        Raises:
            RequestError: The messages can't be rendered, or media can't be fetched. The message names the
            part.
        """
        request = self._prepare(messages, **options)
        media = self._media.load(request.media(), request.mm_processor_kwargs, request.scope)
        return self._render(request, media)

    async def arender(self, messages: object, **options: Any) -> dict[str, Any]:
        """As `render`, for an event loop: media are fetched concurrently, without a thread."""
        if _is_long(messages):
            request = await asyncio.to_thread(self._prepare, messages, **options)
        else:
            request = self._prepare(messages, **options)
        media = await self._media.aload(request.media(), request.mm_processor_kwargs, request.scope)
        loop = asyncio.get_running_loop()
        with stage("render"):
            return await loop.run_in_executor(None, self._render, request, media)

    # Before fetching

    def _prepare(
        self,
        messages: object,
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
        reasoning_effort: str | None = None,
        places: Sequence[str] | None = None,
        scope: bytes = b"",
    ) -> _Request:
        variables = dict(chat_template_kwargs or {})
        reserved = sorted(str(name) for name in variables if name in RESERVED or not isinstance(name, str))
        if reserved:
            raise InvalidRequestError(
                f"got {reserved}, expected variables of the template. Use the request's own fields.",
                field="chat_template_kwargs",
            )
        if tools is not None and (isinstance(tools, str) or not isinstance(tools, Sequence)):
            raise InvalidTypeError(
                f"got a value of type {type(tools).__name__}, expected a list. Change tools.", field="tools"
            )
        parsed = parse_messages(messages, places)
        template = self._template(chat_template, has_tools=bool(tools))
        if tools or concern_tools(parsed):
            parsed, tools = self._with_tools(parsed, tools, template)
        request = _Request(
            messages=parsed,
            template=template,
            add_generation_prompt=add_generation_prompt and not continue_final_message,
            continue_final_message=continue_final_message,
            tools=tools or None,
            variables={**reasoning_variables(template, reasoning_effort), **variables},
            mm_processor_kwargs=mm_processor_kwargs or {},
            scope=scope,
        )
        self._media.check(request.media())
        return request

    def _with_tools(
        self, messages: list[Message], tools: Sequence[Any] | None, template: str
    ) -> tuple[list[Message], Sequence[Any] | None]:
        """Messages and tools as the template takes them."""
        formats = self._finder.formats_of(template)
        if formats.shows_tools:
            return messages, tools
        if tools:
            formats.calls()  # or an error that says why there are none
        has_system = self._probe.format_of(template, MessageKind("system")).is_shown
        return with_tools_told(messages, tools, has_system=has_system), None

    def _template(self, asked: str | None, *, has_tools: bool) -> str:
        if asked is None:
            return select_template(self._templates, has_tools=has_tools)
        if isinstance(self._templates, Mapping) and asked in self._templates:
            return select_template(self._templates, has_tools=has_tools, name=asked)
        if not self._trusts_requests:
            raise UnsupportedFeatureError(
                "got a template with the request, expected none. The operator can allow it with "
                "trust_request_chat_template.",
                field="chat_template",
            )
        return asked

    # Rendering

    def _render(self, request: _Request, media: Sequence[Any]) -> dict[str, Any]:
        parts = request.media()
        writer = _MessageWriter(self, self._probe, request.template, has_tools=bool(request.tools))
        text = render(
            self._tokenizer,
            request.template,
            [writer.write(message) for message in request.messages],
            add_generation_prompt=request.add_generation_prompt,
            continue_final_message=request.continue_final_message,
            tools=request.tools,
            variables=request.variables,
        )
        prompt: dict[str, Any] = {"prompt": text, "add_special_tokens": self._adds_special_tokens(text)}
        if request.mm_processor_kwargs:
            prompt["mm_processor_kwargs"] = dict(request.mm_processor_kwargs)
        for part, item in zip(parts, media, strict=True):
            prompt.setdefault("multi_modal_data", {}).setdefault(part.modality, []).append(item)
            if self._media.named is None:
                prompt.setdefault("multi_modal_uuids", {}).setdefault(part.modality, []).append(part.uuid)
        return prompt

    def _adds_special_tokens(self, text: str) -> bool:
        """Whether encoding still has to add special tokens.

        A tokenizer's template is complete. A multimodal processor encodes what it rendered like any text,
        unless that begins with the token that would be added.
        """
        bos = getattr(self._tokenizer, "bos_token", None)
        return self._model_config.is_multimodal_model and not (bos and text.startswith(bos))

    def placeholder(self, modality: str, index: int) -> str | None:
        """The model's text for the `index`-th item (from 1) of a modality: declared, or its config's token."""
        declared = self._registry.get_placeholder_str(self._model_config, modality, index)
        return declared if declared is not None else self.placeholder_token(modality)

    def placeholder_token(self, modality: str) -> str | None:
        """The text of the modality's placeholder token, as far as config or class name it."""
        token_id = token_id_of(self._model_config.hf_config, modality)
        if token_id is None:
            declared = self._registry.get_placeholder_token_ids(self._model_config, modality) or ()
            token_id = next(iter(declared)) if len(declared) == 1 else None
        if token_id is None or token_id < 0:
            return None
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        return token if isinstance(token, str) else None


def _is_long(messages: object) -> bool:
    """Whether a conversation is too long to be looked through on an event loop."""
    if not isinstance(messages, list):
        return False
    contents = (message.get("content") for message in messages[:_FEW_PARTS] if isinstance(message, dict))
    num_parts = sum(len(content) for content in contents if isinstance(content, list))
    return len(messages) > _FEW_PARTS or num_parts > _FEW_PARTS


class _MessageWriter:
    """Writes the messages of one conversation in the form that its template takes. Counts items as it goes."""

    def __init__(self, renderer: ChatRenderer, probe: TemplateProbe, template: str, *, has_tools: bool) -> None:
        self._renderer = renderer
        self._probe = probe
        self._template = template
        self._has_tools = has_tools
        self._counts: dict[str, int] = {}

    def write(self, message: Message) -> dict[str, Any]:
        """A message for the template."""
        role, content_format = self._role_and_format(message)
        written: dict[str, Any] = {"role": role, **message.fields}
        takes_strings = content_format.takes_strings or not content_format.takes_parts
        if message.parts is None and message.text is None:
            if "tool_calls" in written:  # some templates read content without checking that there is any
                written["content"] = "" if takes_strings else []
            return written
        written_by_user = self._written_by_user(message, content_format)
        if message.parts is None:
            written["content"] = message.text if takes_strings else [{"type": "text", "text": message.text}]
        elif content_format.takes_parts:
            written["content"] = self._parts(message, written_by_user, content_format)
        else:
            written["content"] = self._string(message, written_by_user)
        return written

    def _role_and_format(self, message: Message) -> tuple[str, ContentFormat]:
        """The template's role for such messages, and what it does with their content.

        Many templates know the older name of "developer" only.
        """
        own = self._format_of(message.role, message)
        if message.role == "developer" and not own.is_shown:
            system = self._format_of("system", message)
            if system.is_shown:
                return "system", system
        return message.role, own

    def _format_of(self, role: str, message: Message) -> ContentFormat:
        has_calls = bool(message.fields.get("tool_calls"))
        return self._probe.format_of(self._template, MessageKind(role, has_calls, self._has_tools))

    def _written_by_user(self, message: Message, content_format: ContentFormat) -> set[int]:
        """Indices, among the message's media, of the items whose placeholders the user wrote into the text.

        Items fill places in order, so if the user wrote k placeholders, the last k items need none of their
        own. Raises `InvalidRequestError` (a `ValueError`) if there are more placeholders than items.
        """
        media = message.media()
        written: set[int] = set()
        for modality in dict.fromkeys([*content_format.placeholders, *(part.modality for part in media)]):
            own = [index for index, part in enumerate(media) if part.modality == modality]
            count = self._count_placeholders(modality, len(own), "\n".join(message.texts()))
            if count > len(own):
                raise InvalidRequestError(
                    f"got {count} {modality} placeholders in the text for {len(own)} "
                    f"{modality} parts, expected at most as many. Remove them, or add the media.",
                    field=f"{message.where}.content",
                )
            written.update(own[len(own) - count :])
        return written

    def _count_placeholders(self, modality: str, num_items: int, text: str) -> int:
        first = self._counts.get(modality, 0) + 1
        declared = [self._renderer.placeholder(modality, first + index) for index in range(max(num_items, 1))]
        by_name = sum(text.count(placeholder) for placeholder in {each for each in declared if each})
        token = self._renderer.placeholder_token(modality)
        return max(by_name, text.count(token) if token else 0)

    def _parts(
        self, message: Message, written_by_user: set[int], content_format: ContentFormat
    ) -> list[dict[str, Any]]:
        """Typed parts; media that the template doesn't place become text."""
        parts: list[dict[str, Any]] = []
        index = 0
        for part in message.parts or ():
            if isinstance(part, TextPart):
                parts.append({"type": "text", "text": part.text})
                continue
            placeholder = self._next_placeholder(part)
            if index not in written_by_user:
                known = content_format.media_parts.get(part.modality)
                parts.append(dict(known) if known else {"type": "text", "text": _required(placeholder, part)})
            index += 1
        return parts

    def _string(self, message: Message, written_by_user: set[int]) -> str:
        """One string. Media come first where there is one text, as models of this kind are trained, else in
        place.
        """
        lines: list[tuple[bool, str]] = []
        index = 0
        for part in message.parts or ():
            if isinstance(part, TextPart):
                lines.append((True, part.text))
                continue
            placeholder = self._next_placeholder(part)
            if index not in written_by_user:
                lines.append((False, _required(placeholder, part)))
            index += 1
        if sum(is_text for is_text, _ in lines) == 1:
            lines.sort(key=lambda line: line[0])
        return "\n".join(text for _, text in lines)

    def _next_placeholder(self, part: MediaPart) -> str | None:
        self._counts[part.modality] = self._counts.get(part.modality, 0) + 1
        return self._renderer.placeholder(part.modality, self._counts[part.modality])


def _required(placeholder: str | None, part: MediaPart) -> str:
    if placeholder is None:
        raise UnsupportedFeatureError(
            f"the model's chat template has no place for {part.modality} parts. Write the model's "
            f"placeholder into the text, or register one with register_placeholder_str({part.modality!r}, ...).",
            field=part.where,
        )
    return placeholder

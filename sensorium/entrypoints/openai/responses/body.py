"""The body of `POST /v1/responses`, as this server takes it. A field that is not here is refused by name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sensorium.entrypoints.openai.body import Body
from sensorium.entrypoints.openai.forms import FormBody
from sensorium.entrypoints.openai.protocol import StreamOptions
from sensorium.entrypoints.openai.responses.tools import read_tools
from sensorium.entrypoints.openai.tools.request import ToolRequest
from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.sampling_params import SamplingParams
from sensorium.structured_outputs import StructuredOutputs

LOGPROBS = "message.output_text.logprobs"
_INCLUDED = (LOGPROBS, "message.input_image.image_url")
"""What `include` may name. Pictures are always included."""
_MAX_METADATA = 16
_MAX_KEY_CHARS = 64
_MAX_VALUE_CHARS = 512
_MAX_TOP_LOGPROBS = 20
_SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
)


class TextFormat(Body):
    """The form of the answer."""

    type: str
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def form(self) -> StructuredOutputs | None:
        """None for text. Raises `InvalidRequestError` for a form that isn't there."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type != "json_schema":
            raise InvalidRequestError(
                f"text.format.type: got {self.type!r:.60}, expected 'text', 'json_object' or 'json_schema'. Change it."
            )
        if self.schema_ is None:
            raise InvalidRequestError("text.format.schema: got nothing, expected a JSON schema. Add it.")
        return StructuredOutputs(json=self.schema_)


class TextConfig(Body):
    """About the answer's text."""

    format: TextFormat | None = None
    verbosity: str | None = None
    """Only "medium", which is OpenAI's default and changes nothing."""


class ReasoningConfig(Body):
    """About what the model writes for itself."""

    effort: str | None = None
    """How long it may reason, where its template has a setting for it."""
    summary: str | None = None
    """There are none: reasoning is given as it was written."""


class ResponseBody(Body):
    """`POST /v1/responses`."""

    model: str | None = None
    input: Any = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = None
    """Whether the response may be come back to; it may by default, while the server has room."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    include: list[str] | None = None
    text: TextConfig | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningConfig | None = None
    metadata: dict[str, str] | None = None
    truncation: str | None = None
    background: bool | None = None
    service_tier: str | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """These three are for the caller's own books; prefixes are cached without a key."""

    structured_outputs: FormBody | None = None
    """A form of the answer that OpenAI has no word for."""
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def check(self) -> None:
        """Refuse what can't be had here. Raises `RequestError`."""
        for name, value, possible in (
            ("background", self.background, (None, False)),
            ("truncation", self.truncation, (None, "disabled")),
            ("service_tier", self.service_tier, (None, "auto", "default")),
            ("reasoning.summary", self.reasoning and self.reasoning.summary, (None,)),
            ("text.verbosity", self.text and self.text.verbosity, (None, "medium")),
            ("stream_options.include_obfuscation", self._obfuscation(), (None, False)),
        ):
            if value not in possible:
                expected = " or ".join(repr(each) for each in possible if each is not None) or "none"
                raise UnsupportedFeatureError(f"{name}: got {value!r:.60}, expected {expected}. Remove {name}.")
        for each in self.include or ():
            if each not in _INCLUDED:
                raise UnsupportedFeatureError(f"include: got {each!r:.80}, expected some of {list(_INCLUDED)}.")
        self._check_metadata()

    def _obfuscation(self) -> bool | None:
        if self.stream_options is None:
            return None
        if not self.stream:
            raise InvalidRequestError("stream_options: got options without stream, expected none. Set stream to true.")
        if self.stream_options.include_usage:
            raise InvalidRequestError(
                "stream_options.include_usage: got true, expected none: the last event always has the usage. Remove it."
            )
        return self.stream_options.include_obfuscation

    def _check_metadata(self) -> None:
        metadata = self.metadata or {}
        if len(metadata) > _MAX_METADATA:
            raise InvalidRequestError(f"metadata: got {len(metadata)} entries, expected at most {_MAX_METADATA}.")
        for key, value in metadata.items():
            if len(key) > _MAX_KEY_CHARS or len(value) > _MAX_VALUE_CHARS:
                raise InvalidRequestError(
                    f"metadata: got a key of {len(key)} and a value of {len(value)} characters, expected at most "
                    f"{_MAX_KEY_CHARS} and {_MAX_VALUE_CHARS}. Shorten them."
                )

    def tool_request(self) -> ToolRequest | None:
        """The functions that the model may call; None for none. Raises `RequestError`."""
        return read_tools(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None for no report."""
        if self.top_logprobs is None:
            return 0 if LOGPROBS in (self.include or ()) else None
        return self.top_logprobs

    def params(self) -> SamplingParams:
        """Without a bound, an answer may fill the context. Raises `RequestError`."""
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= _MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"top_logprobs: got {self.top_logprobs}, expected 0 to {_MAX_TOP_LOGPROBS}. Change top_logprobs."
            )
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise InvalidRequestError(f"max_output_tokens: got {self.max_output_tokens}, expected at least 1.")
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        return SamplingParams(
            **values,
            max_tokens=self.max_output_tokens,
            logprobs=self.num_logprobs,
            structured_outputs=self._form(),
        )

    def _form(self) -> StructuredOutputs | None:
        form = self.text.format.form() if self.text is not None and self.text.format is not None else None
        if self.structured_outputs is None:
            return form
        if form is not None:
            raise InvalidRequestError("structured_outputs: got text.format too, expected one form. Remove one of them.")
        return self.structured_outputs.form()

"""Bodies of requests, as this server takes them. A field that is not here is refused by name.

Bounds of sampling values are those of `SamplingParams`, messages are checked by the chat renderer: here only shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from pydantic import ValidationError, field_validator

from sensorium.entrypoints.openai.body import Body, field_names
from sensorium.entrypoints.openai.errors import as_named, invalid_body
from sensorium.entrypoints.openai.numbers import read_count, read_number
from sensorium.entrypoints.openai.records import note_body
from sensorium.entrypoints.openai.structured_outputs import StructuredOutputsFields
from sensorium.entrypoints.openai.tools.request import ToolRequest, check_number, parse_choice, tool_request
from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.parsing import Tool
from sensorium.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from sensorium.sampling_params import SamplingParams

MAX_PROMPTS = 256
"""Most prompts in one body."""

_Body = TypeVar("_Body", bound=Body)

_SAMPLING_FIELDS = (
    *("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
    *("seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words", "skip_special_tokens"),
    *("spaces_between_special_tokens", "include_stop_str_in_output"),
)


class StreamOptions(Body):
    """Options of a stream."""

    place = "stream_options."

    include_usage: bool = False
    """Tell the numbers of tokens at the end."""
    continuous_usage_stats: bool = False
    """Tell them with every piece."""
    include_obfuscation: bool = False
    """Pad the pieces, so that an eavesdropper can't tell them by their lengths."""


def stream_options(given: StreamOptions | None, *, is_stream: bool) -> StreamOptions:
    """The options of a stream; none are on where there is no stream. Raises `InvalidRequestError`."""
    options = given or StreamOptions()
    if not is_stream and options != StreamOptions():
        raise InvalidRequestError(
            "got options without stream, expected none. Set stream to true.", field="stream_options"
        )
    return options


class SamplingBody(StructuredOutputsFields):
    """Fields that both kinds of completions share."""

    place = ""

    model: str | None = None
    n: int | None = None
    best_of: int | None = None
    """Must equal `n`: no output is dropped."""
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    """The same by its later name."""
    prompt_logprobs: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    """For the caller's own books."""
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    bad_words: list[str] | None = None
    skip_special_tokens: bool | None = None
    spaces_between_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int = 0
    cache_salt: str | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    def options(self) -> StreamOptions:
        """What a stream is to hold. Raises `InvalidRequestError`."""
        return stream_options(self.stream_options, is_stream=bool(self.stream))

    def sampling_params(
        self, defaults: SamplingDefaults, *, logprobs: int | None, least: int | None = None, **changes: Any
    ) -> SamplingParams:
        """The sampling parameters: from the body, else from the checkpoint. `least` bounds an answer's tokens if
        neither does; None: as many as fit.

        Raises `RequestError` if a value is out of bounds.
        """
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.best_of not in (None, self.n or 1):
            raise UnsupportedFeatureError(
                f"got {self.best_of}, expected n ({self.n or 1}): all outputs are given. Remove best_of.",
                code="unsupported_parameter",
                field="best_of",
            )
        if self.prompt_logprobs is not None and self.stream:
            raise UnsupportedFeatureError(
                "got a number with stream, expected none. Set stream to false, or remove it.",
                code="unsupported_parameter",
                field="prompt_logprobs",
            )
        values |= {
            "logit_bias": self.logit_bias,
            "max_tokens": self._bound(),
            "logprobs": logprobs,
            "prompt_logprobs": self.prompt_logprobs,
            "structured_outputs": self.constraint(),
            **changes,
        }
        with as_named(max_tokens="max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"):
            return defaults.params(values, max_tokens=least)

    def _bound(self) -> int | None:
        """The most tokens of an answer. Raises `InvalidRequestError` for two bounds."""
        older, later = self.max_tokens, self.max_completion_tokens
        if older is not None and later is not None and older != later:
            raise InvalidRequestError(
                f"got {older}, and {later} for max_completion_tokens, expected one of them. Remove max_tokens.",
                field="max_tokens",
            )
        return older if later is None else later


class FunctionBody(Body):
    """A function that the model may call."""

    place = "tools."

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool; only functions are known."""

    place = "tools."

    type: str
    function: FunctionBody

    def tool(self, index: int) -> Tool:
        """Raises `UnsupportedFeatureError` for another kind."""
        if self.type != "function":
            raise UnsupportedFeatureError(
                f"got {self.type!r:.60}, expected 'function'. Change it.", field=f"tools[{index}].type"
            )
        function = self.function
        return Tool(function.name, function.description, function.parameters or {}, bool(function.strict))


class ChatPrompt(Body):
    """The fields that make a chat's prompt."""

    place = ""
    prompt_field = "messages"

    messages: list[Any]
    tools: list[ToolBody] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: str | None = None
    """How long the model may reason, where its template has a setting for it."""
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    mm_processor_kwargs: dict[str, Any] | None = None

    def tool_request(self) -> ToolRequest | None:
        """The functions that the model may call; None for none. Raises `RequestError`."""
        choice, named = parse_choice(self.tool_choice)
        check_number(len(self.tools or ()))
        tools = [each.tool(index) for index, each in enumerate(self.tools or ())]
        return tool_request(tools, choice, named, is_parallel=self.parallel_tool_calls is not False)

    def render_options(self, request: ToolRequest | None) -> dict[str, Any]:
        """Options of `ChatRenderer.render`, with the functions of `tool_request`."""
        return {
            "tools": None if request is None else [tool.described() for tool in request.tools],
            "reasoning_effort": self.reasoning_effort,
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "mm_processor_kwargs": self.mm_processor_kwargs,
        }


class ChatBody(ChatPrompt, SamplingBody):
    """`/v1/chat/completions`."""

    logprobs: bool | None = None
    top_logprobs: int | None = None
    include_reasoning: bool = True
    """Whether the answer holds what the model wrote for itself."""

    def params(self, defaults: SamplingDefaults = NO_DEFAULTS) -> SamplingParams:
        """Without a bound, an answer may fill the context. Raises `RequestError`."""
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError(
                "got a number without logprobs, expected none. Set logprobs.", field="top_logprobs"
            )
        with as_named(logprobs="top_logprobs"):
            return self.sampling_params(defaults, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionBody(SamplingBody):
    """`/v1/completions`."""

    prompt_field = "prompt"

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None
    """Alternatives to report for each token; chats have true and false there, of which false asks for nothing."""
    echo: bool = False
    """Begin each answer with its prompt, and its log probabilities with the prompt's."""
    add_special_tokens: bool = True

    @field_validator("logprobs", mode="before")
    @classmethod
    def _none_for_false(cls, given: Any) -> Any:
        return None if given is False else given

    def params(self, defaults: SamplingDefaults = NO_DEFAULTS) -> SamplingParams:
        """Sixteen tokens unless the body or the checkpoint says otherwise, as OpenAI has it. Raises `RequestError`.

        The engine generates at least one token; if none is wanted, it isn't shown.
        """
        changes: dict[str, Any] = {"max_tokens": 1} if self.is_empty else {}
        if self.echo and self.logprobs is not None:
            changes["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return self.sampling_params(defaults, logprobs=self.logprobs, least=16, **changes)

    @property
    def is_empty(self) -> bool:
        """No token of an answer is wanted: only the prompt, or to have it in the cache."""
        return self._bound() == 0

    def prompts(self) -> list[Any]:
        """Each prompt by itself. Raises `InvalidRequestError`."""
        prompts: list[Any] = list(self.prompt) if isinstance(self.prompt, list) else [self.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(
                f"got {len(prompts)} prompts, expected 1 to {MAX_PROMPTS}. Send fewer.", field="prompt"
            )
        return prompts


class TokenizeBody(Body):
    """`/tokenize`."""

    place = ""
    prompt_field = "prompt"

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """`/detokenize`."""

    place = ""
    prompt_field = "tokens"

    model: str | None = None
    tokens: list[int]


class TokenCostBody(ChatPrompt):
    """`/v1/chat/token_cost`: what a chat would take, without generating."""

    model: str | None = None


class TranscriptionForm(Body):
    """`/v1/audio/transcriptions`: the fields beside the file."""

    place = ""
    prompt_field = "file"

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: str = "json"
    temperature: float | None = None
    stream: bool = False
    max_tokens: int | None = None
    """Without it, a transcript that doesn't end is refused. Of a model that hears windows: of each."""
    timestamp_granularities: str | None = None

    @classmethod
    def values(cls, texts: dict[str, str]) -> dict[str, Any]:
        """The fields of a form, which come as texts. An empty one counts as null, which a form can't express.

        Raises:
            InvalidRequestError: A number isn't written as JSON writes it.
        """
        return {name: _READERS.get(name, _read_other)(name, text) for name, text in texts.items() if text}

    def check_format(self, *, tells_times: bool) -> None:
        """Raises `UnsupportedFeatureError` for an unknown format of answer, and for times of a model without any."""
        formats = ("json", "text", "verbose_json", *(("srt", "vtt") if tells_times else ()))
        if self.response_format not in formats:
            expected = f"one of {list(formats)}" if tells_times else "'json', 'text' or 'verbose_json'"
            raise UnsupportedFeatureError(
                f"got {self.response_format!r:.40}, expected {expected}"
                f"{'' if tells_times else ', since the model tells no times'}. Change response_format.",
                field="response_format",
            )
        granularity = self.timestamp_granularities
        if granularity is not None and not (tells_times and granularity == "segment"):
            expected = "'segment'" if tells_times else "none, since the model tells no times"
            raise UnsupportedFeatureError(
                f"got {granularity!r:.40}, expected {expected}. Change it.", field="timestamp_granularities"
            )
        if granularity is not None and self.response_format != "verbose_json":
            raise UnsupportedFeatureError(
                f"got {granularity!r:.40} with response_format {self.response_format!r:.40}, "
                "expected it with 'verbose_json'. Change one of them.",
                field="timestamp_granularities",
            )
        if self.stream and self.response_format != "json":
            raise UnsupportedFeatureError(
                f"got {self.response_format!r:.40} with stream, expected 'json'. Change one of them.",
                field="response_format",
            )

    def params(self, defaults: SamplingDefaults = NO_DEFAULTS) -> SamplingParams:
        """Greedy unless the form or the checkpoint says otherwise. Raises `RequestError` if a value is out of bounds.

        Without a bound a transcript goes on to its end: the checkpoint's own bound would cut it off.
        """
        given = {"temperature": self.temperature, "max_tokens": self.max_tokens}
        return defaults.without("max_tokens").params(given, temperature=0.0, max_tokens=None)


def parse_body(kind: type[_Body], content: object) -> _Body:
    """A body of one kind. Raises `InvalidRequestError` that names the field at fault."""
    if kind.place == "":
        note_body(field_names(kind), kind.prompt_field)
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise invalid_body(error, content) from None


def _read_text(_name: str, text: str) -> str:
    return text


def _read_flag(name: str, text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise InvalidRequestError(f"got {text!r:.60}, expected true or false. Change {name}.", field=name)
    return text.lower() == "true"


def _read_other(_name: str, text: str) -> Any:
    """A value of the table of known fields, which may be any."""
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return text


_READERS: dict[str, Callable[[str, str], Any]] = {
    **dict.fromkeys(("model", "language", "prompt", "response_format", "timestamp_granularities"), _read_text),
    "temperature": read_number,
    "max_tokens": read_count,
    "stream": _read_flag,
}

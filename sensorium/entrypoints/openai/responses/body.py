"""The body of `POST /v1/responses`, as this server takes it. A field that is not here is refused by name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from sensorium.entrypoints.openai.body import Body
from sensorium.entrypoints.openai.errors import as_named
from sensorium.entrypoints.openai.fields import LOGPROBS, check_include, check_metadata
from sensorium.entrypoints.openai.protocol import StreamOptions, stream_options
from sensorium.entrypoints.openai.responses.tools import read_tools
from sensorium.entrypoints.openai.structured_outputs import StructuredOutputsBody, told_of
from sensorium.entrypoints.openai.tools.request import ToolRequest
from sensorium.errors import InvalidRequestError, RequestError
from sensorium.sampling_defaults import NO_DEFAULTS, SamplingDefaults
from sensorium.sampling_params import SamplingParams
from sensorium.structured_outputs import StructuredOutputs

_MAX_TOP_LOGPROBS = 20
_SAMPLING_FIELDS = (
    *("temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
    *("seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens"),
)


class TextFormat(Body):
    """What the answer is held to."""

    type: str
    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None

    def constraint(self) -> StructuredOutputs | None:
        """None for text. Raises `InvalidRequestError` for one that isn't there."""
        if self.type == "text":
            return None
        if self.type == "json_object":
            return StructuredOutputs(json_object=True)
        if self.type != "json_schema":
            raise InvalidRequestError(
                f"got {self.type!r:.60}, expected 'text', 'json_object' or 'json_schema'. Change it.",
                field="text.format.type",
            )
        if self.schema_ is None:
            raise InvalidRequestError("got nothing, expected a JSON schema. Add it.", field="text.format.schema")
        return StructuredOutputs(json=self.schema_)


class TextConfig(Body):
    """About the answer's text."""

    place = "text."

    format: TextFormat | None = None


class ReasoningConfig(Body):
    """About what the model writes for itself."""

    place = "reasoning."

    effort: str | None = None
    """How long it may reason, where its template has a setting for it."""


class ResponseBody(Body):
    """`POST /v1/responses`."""

    place = ""
    prompt_field = "input"

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
    metadata: dict[str, str | None] | None = None
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    """These three are for the caller's own books; prefixes are cached without a key."""

    structured_outputs: StructuredOutputsBody | None = None
    """A constraint that OpenAI has no word for."""
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
        self.options()
        check_include(self.include or [])
        check_metadata(self.own_metadata())

    def own_metadata(self) -> dict[str, str]:
        """The metadata, without entries of nothing."""
        return {key: value for key, value in (self.metadata or {}).items() if value is not None}

    def options(self) -> StreamOptions:
        """What a stream is to hold; the usage at its end is there anyway. Raises `InvalidRequestError`."""
        return stream_options(self.stream_options, is_stream=bool(self.stream))

    def tool_request(self) -> ToolRequest | None:
        """The functions that the model may call; None for none. Raises `RequestError`."""
        return read_tools(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives to report for each token; None for no report."""
        if self.top_logprobs is None:
            return 0 if LOGPROBS in (self.include or ()) else None
        return self.top_logprobs

    def params(self, defaults: SamplingDefaults = NO_DEFAULTS) -> SamplingParams:
        """Without a bound, an answer may fill the context. Raises `RequestError`."""
        if self.top_logprobs is not None and not 0 <= self.top_logprobs <= _MAX_TOP_LOGPROBS:
            raise InvalidRequestError(
                f"got {self.top_logprobs}, expected 0 to {_MAX_TOP_LOGPROBS}. Change top_logprobs.",
                field="top_logprobs",
            )
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        with as_named(max_tokens="max_output_tokens"):
            values |= {
                "max_tokens": self.max_output_tokens,
                "logprobs": self.num_logprobs,
                "structured_outputs": self._constraint(),
            }
            return defaults.params(values, max_tokens=None)

    def constraint_field(self) -> str | None:
        """The field that asks for it; None where it is `structured_outputs`, whose errors are of its fields."""
        if self.structured_outputs is not None or self.text is None or self.text.format is None:
            return None
        return "text.format.schema" if self.text.format.schema_ is not None else "text.format"

    def in_own_terms(self, error: RequestError) -> RequestError:
        """An error about that, told of the field that was sent."""
        field = self.constraint_field()
        return error if field is None else told_of(error, field)

    def _constraint(self) -> StructuredOutputs | None:
        try:
            return self._asked()
        except RequestError as error:
            raise self.in_own_terms(error) from None

    def _asked(self) -> StructuredOutputs | None:
        constraint = self.text.format.constraint() if self.text is not None and self.text.format is not None else None
        if self.structured_outputs is None:
            return constraint
        if constraint is not None:
            raise InvalidRequestError(
                "got text.format too, expected one of them. Remove one.", field="structured_outputs"
            )
        return self.structured_outputs.constraint()

"""Bodies of requests, as this server takes them. A field that is not here is refused by name.

Bounds of sampling values are those of `SamplingParams`, messages are checked by the chat renderer: here only shapes.
"""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from sensorium.entrypoints.openai.body import Body
from sensorium.entrypoints.openai.errors import invalid_body
from sensorium.entrypoints.openai.forms import FormFields
from sensorium.entrypoints.openai.tools.request import ToolRequest, check_number, parse_choice, tool_request
from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.parsing import Tool
from sensorium.sampling_params import SamplingParams

MAX_PROMPTS = 256
"""Most prompts in one body."""

_Body = TypeVar("_Body", bound=BaseModel)

_SAMPLING_FIELDS = (
    *("n", "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "top_k", "min_p"),
    *("seed", "stop", "stop_token_ids", "ignore_eos", "min_tokens", "bad_words", "skip_special_tokens"),
    *("spaces_between_special_tokens", "include_stop_str_in_output"),
)


class StreamOptions(Body):
    """What a stream holds beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool | None = None
    """Padding against an eavesdropper; only "off" is implemented."""


class SamplingBody(FormFields):
    """What both kinds of completions share."""

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    max_tokens: int | None = None
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

    def include_usage(self) -> bool:
        """Whether a stream ends with the numbers of tokens. Raises `InvalidRequestError`."""
        if self.stream_options is None:
            return False
        if not self.stream:
            raise InvalidRequestError("stream_options: got options without stream, expected none. Set stream to true.")
        if self.stream_options.include_obfuscation:
            raise UnsupportedFeatureError(
                "stream_options.include_obfuscation: got true, expected false. Streams are not padded here."
            )
        return self.stream_options.include_usage

    def sampling_params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """Raises `RequestError` if a value is out of bounds."""
        values = {name: getattr(self, name) for name in _SAMPLING_FIELDS if getattr(self, name) is not None}
        return SamplingParams(
            **values,
            logit_bias=self._biases(),
            max_tokens=max_tokens,
            logprobs=logprobs,
            structured_outputs=self.form(),
        )

    def _biases(self) -> dict[int, float]:
        try:
            return {int(token_id): bias for token_id, bias in (self.logit_bias or {}).items()}
        except ValueError:
            raise InvalidRequestError("logit_bias: got a key that is no token id, expected integers.") from None


class FunctionBody(Body):
    """A function that the model may call."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ToolBody(Body):
    """A tool; only functions are known."""

    type: str
    function: FunctionBody

    def tool(self, index: int) -> Tool:
        """Raises `UnsupportedFeatureError` for another kind."""
        if self.type != "function":
            raise UnsupportedFeatureError(
                f"tools[{index}].type: got {self.type!r:.60}, expected 'function'. Change it."
            )
        function = self.function
        return Tool(function.name, function.description, function.parameters or {}, bool(function.strict))


class ChatPrompt(Body):
    """What a chat's prompt is made of."""

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

    def render_options(self) -> dict[str, Any]:
        """Options of `ChatRenderer.render`. Raises `RequestError`."""
        request = self.tool_request()
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

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    include_reasoning: bool = True
    """Whether the answer holds what the model wrote for itself."""

    def params(self) -> SamplingParams:
        """Without a bound, an answer may fill the context. Raises `RequestError`."""
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise InvalidRequestError(
                "max_tokens: got max_tokens and max_completion_tokens, expected one. Remove max_tokens."
            )
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs: got a number without logprobs, expected none. Set logprobs.")
        bound = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self.sampling_params(max_tokens=bound, logprobs=(self.top_logprobs or 0) if self.logprobs else None)


class CompletionBody(SamplingBody):
    """`/v1/completions`."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = None

    def params(self) -> SamplingParams:
        """Sixteen tokens unless the body says otherwise, as OpenAI has it. Raises `RequestError`."""
        return self.sampling_params(
            max_tokens=16 if self.max_tokens is None else self.max_tokens, logprobs=self.logprobs
        )

    def prompts(self) -> list[Any]:
        """Each prompt by itself. Raises `InvalidRequestError`."""
        prompts: list[Any] = list(self.prompt) if isinstance(self.prompt, list) else [self.prompt]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise InvalidRequestError(f"prompt: got {len(prompts)} prompts, expected 1 to {MAX_PROMPTS}.")
        return prompts


class TokenizeBody(Body):
    """`/tokenize`."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True


class DetokenizeBody(Body):
    """`/detokenize`."""

    model: str | None = None
    tokens: list[int]


class TokenCostBody(ChatPrompt):
    """`/v1/chat/token_cost`: what a chat would take, without generating."""

    model: str | None = None


class EmbeddingBody(Body):
    """`/v1/embeddings`."""

    model: str | None = None
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: str = "float"
    user: str | None = None

    def prompts(self) -> list[Any]:
        """Each input by itself. Raises `InvalidRequestError`."""
        if self.encoding_format not in ("float", "base64"):
            raise InvalidRequestError(
                f"encoding_format: got {self.encoding_format!r:.60}, expected 'float' or 'base64'. Change it."
            )
        inputs: list[Any] = list(self.input) if isinstance(self.input, list) else [self.input]
        if inputs and isinstance(inputs[0], int):
            inputs = [inputs]
        if not 0 < len(inputs) <= MAX_PROMPTS:
            raise InvalidRequestError(f"input: got {len(inputs)} inputs, expected 1 to {MAX_PROMPTS}.")
        return inputs


class TranscriptionForm(BaseModel):
    """`/v1/audio/transcriptions`: the fields beside the file, as texts."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    language: str | None = None
    prompt: str | None = None
    response_format: str = "json"
    temperature: float = 0.0
    stream: bool = False
    max_tokens: int | None = None
    """Without it, a transcript that doesn't end is refused."""

    def check_format(self) -> None:
        """Raises `UnsupportedFeatureError` for a form of answer that there isn't."""
        if self.response_format not in ("json", "text", "verbose_json"):
            raise UnsupportedFeatureError(
                f"response_format: got {self.response_format!r:.40}, expected 'json', 'text' or 'verbose_json'. "
                "The model tells no times: change response_format."
            )
        if self.stream and self.response_format != "json":
            raise UnsupportedFeatureError(
                f"response_format: got {self.response_format!r:.40} with stream, expected 'json'. Change one of them."
            )

    def params(self) -> SamplingParams:
        """Raises `RequestError` if a value is out of bounds."""
        return SamplingParams(temperature=self.temperature, max_tokens=self.max_tokens)


def parse_body(kind: type[_Body], content: object) -> _Body:
    """A body of one kind. Raises `InvalidRequestError` that names the field at fault."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise invalid_body(error) from None

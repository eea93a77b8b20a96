"""Bodies of the routes that pool, and what each asks of the engine.

Sources: OpenAI's API reference for embeddings; Jina's and Cohere's for reranking; vLLM's for the others.
"""

from __future__ import annotations

from typing import Any

from sensorium.entrypoints.openai.body import Body
from sensorium.errors import InvalidRequestError
from sensorium.pooling_params import PoolingParams, PoolingTask

MAX_INPUTS = 2048
"""Most texts in one body: as many as OpenAI takes, since clients cut their work by that."""


class PooledBody(Body):
    """Fields of all routes that pool."""

    place = ""

    model: str | None = None
    user: str | None = None
    """For the caller's own books."""
    truncate_prompt_tokens: int | None = None
    """Use so many leading tokens of a longer text; -1: as many as the model takes. Without it, that is an error."""
    priority: int = 0
    cache_salt: str | None = None


class InputsBody(PooledBody):
    """Texts, token ids, or a chat, which may have media."""

    prompt_field = "input"

    input: str | list[int] | list[str] | list[list[int]] | None = None
    messages: list[Any] | None = None
    """Instead of `input`: one input, made of a chat by the model's chat template."""
    add_special_tokens: bool = True
    add_generation_prompt: bool = False
    continue_final_message: bool = False
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    mm_processor_kwargs: dict[str, Any] | None = None

    def prompts(self) -> list[dict[str, Any]]:
        """Each input by itself. Raises `InvalidRequestError`."""
        if self.input is None:
            raise InvalidRequestError(
                "got nothing, expected a value. Add input.", code="missing_required_parameter", field="input"
            )
        inputs: list[Any] = list(self.input) if isinstance(self.input, list) else [self.input]
        if inputs and isinstance(inputs[0], int):
            inputs = [inputs]
        if not 0 < len(inputs) <= MAX_INPUTS:
            raise InvalidRequestError(
                f"got {len(inputs)} inputs, expected 1 to {MAX_INPUTS}. Send fewer.", field="input"
            )
        kwargs = {"mm_processor_kwargs": self.mm_processor_kwargs} if self.mm_processor_kwargs else {}
        return [
            {"prompt": each, "add_special_tokens": self.add_special_tokens, **kwargs}
            if isinstance(each, str)
            else {"prompt_token_ids": each, **kwargs}
            for each in inputs
        ]

    def render_options(self) -> dict[str, Any]:
        """Options of `ChatRenderer.render`. Raises `InvalidRequestError` for a chat beside other input."""
        if self.input is not None:
            raise InvalidRequestError("got a chat beside input, expected one of them. Remove one.", field="messages")
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": self.chat_template_kwargs,
            "add_generation_prompt": self.add_generation_prompt,
            "continue_final_message": self.continue_final_message,
            "mm_processor_kwargs": self.mm_processor_kwargs,
        }

    def params(self, task: PoolingTask, **wishes: Any) -> PoolingParams:
        """What the engine is asked for. Raises `InvalidRequestError`."""
        return PoolingParams(task, truncate_prompt_tokens=self.truncate_prompt_tokens, **wishes)


class EmbeddingBody(InputsBody):
    """`/v1/embeddings`."""

    encoding_format: str = "float"
    dimensions: int | None = None
    """Keep so many leading numbers, where the model was trained for that."""
    prompt_name: str | None = None
    """Put the checkpoint's text of this name in front of each input, such as "query"."""
    normalize: bool = True
    """Bring vectors to length 1, where the checkpoint says so."""

    def pooling(self) -> PoolingParams:
        """See `params`."""
        check_encoding(self.encoding_format)
        return self.params("embed", dimensions=self.dimensions, use_activation=self.normalize)


class ClassifyBody(InputsBody):
    """`/classify`."""

    use_activation: bool = True
    """Answer with probabilities; off: with the scores that they are made of."""

    def pooling(self) -> PoolingParams:
        """See `params`."""
        return self.params("classify", use_activation=self.use_activation)


class PoolingBody(InputsBody):
    """`/pooling`: whatever the model makes, as numbers."""

    task: str | None = None
    """See `PoolingTask`; by default what the model is served for."""
    encoding_format: str = "float"
    dimensions: int | None = None
    use_activation: bool = True

    def pooling(self, default: PoolingTask) -> PoolingParams:
        """See `params`."""
        check_encoding(self.encoding_format)
        task: Any = default if self.task is None else self.task
        return self.params(task, dimensions=self.dimensions, use_activation=self.use_activation)


def check_encoding(encoding_format: str) -> None:
    """Raise `InvalidRequestError` for a form of numbers that there isn't."""
    if encoding_format not in ("float", "base64"):
        raise InvalidRequestError(
            f"got {encoding_format!r:.60}, expected 'float' or 'base64'. Change it.", field="encoding_format"
        )


class ScoreBody(PooledBody):
    """`/score`."""

    prompt_field = "text_2"

    text_1: str | list[str]
    text_2: str | list[str]

    def texts(self) -> tuple[str | list[str], str | list[str]]:
        """Both sides. Raises `InvalidRequestError` for too many."""
        for name, side in (("text_1", self.text_1), ("text_2", self.text_2)):
            check_number(name, side)
        return self.text_1, self.text_2


class DocumentBody(Body):
    """A document of `/rerank`."""

    place = "documents."

    text: str


class RerankBody(PooledBody):
    """`/rerank`."""

    prompt_field = "documents"

    query: str
    documents: list[str | DocumentBody]
    top_n: int | None = None
    """Answer with so many of the best; without it, with all."""
    return_documents: bool = True

    def texts(self) -> list[str]:
        """The documents. Raises `InvalidRequestError` for too many, or a `top_n` of none."""
        check_number("documents", self.documents)
        if self.top_n is not None and self.top_n < 1:
            raise InvalidRequestError(f"got {self.top_n}, expected at least 1. Change or remove top_n.", field="top_n")
        return [each if isinstance(each, str) else each.text for each in self.documents]


def check_number(name: str, given: str | list[Any]) -> None:
    """Raise `InvalidRequestError` for no texts, or more than a body may have."""
    if not isinstance(given, str) and not 0 < len(given) <= MAX_INPUTS:
        raise InvalidRequestError(f"got {len(given)} texts, expected 1 to {MAX_INPUTS}. Change {name}.", field=name)

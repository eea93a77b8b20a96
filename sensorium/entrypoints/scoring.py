"""How well two texts go together, by whatever a model makes of texts. What `LLM.score` and the routes share.

    a classification head of one label    both texts in one prompt: the label's score (cross-encoder)
    a vector for each text                the cosine of the two vectors, with the checkpoint's texts for queries and
                                          documents in front
    a vector for each token               for each token of the first text its best match in the second, summed
                                          (late interaction, "MaxSim")

Sources: Reimers and Gurevych 2019, section 3; Khattab and Zaharia 2020, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.chat.template import read_template, render
from sensorium.config import ModelConfig
from sensorium.entrypoints.instructions import instructed, of_role
from sensorium.errors import InvalidRequestError, InvalidTypeError, UnsupportedFeatureError
from sensorium.outputs import FloatArray, PoolingOutput
from sensorium.pooling_params import PoolingParams

_ROLES = ("query", "document")


@dataclass(frozen=True, slots=True, eq=False)
class ScoringPlan:
    """What is pooled for some pairs of texts, and how their scores follow from it."""

    prompts: list[Any]
    params: PoolingParams
    pairs: list[tuple[int, ...]]
    """Of each pair: the prompt that has both texts, or the prompts of the first and of the second."""
    score: Callable[..., float]

    def scores(self, outputs: Sequence[PoolingOutput | None]) -> list[float]:
        """The pairs' scores, from the prompts' outputs."""
        data = [None if each is None else each.data for each in outputs]
        return [self.score(*(data[i] for i in pair)) for pair in self.pairs]


class Scoring:
    """One model's way to score.

    Args:
        model_config: The model's.
        template: A chat template, or the path of a file with one, that makes one prompt of messages of the roles
            "query" and "document"; None: two texts are encoded as the tokenizer encodes pairs.
        tokenizer: The model's.

    Raises `ConfigError` (a `ValueError`) for a path without a file.
    """

    def __init__(self, model_config: ModelConfig, template: str | None = None, tokenizer: Any = None) -> None:
        self._pooler = model_config.pooler
        self._name = model_config.architecture
        self._pools = model_config.pools
        self._template = None if template is None or tokenizer is None else read_template(template)
        self._tokenizer = tokenizer

    def plan(
        self,
        first: str | Sequence[str],
        second: str | Sequence[str],
        *,
        truncate_prompt_tokens: int | None = None,
        names: tuple[str, str] = ("data_1", "data_2"),
    ) -> ScoringPlan:
        """How to score one text with each of several, or as many with as many.

        Args:
            first: Queries.
            second: Documents.
            truncate_prompt_tokens: See `PoolingParams`.
            names: What the caller calls the two, for errors.

        Raises:
            InvalidRequestError: There are no texts, or their numbers don't fit.
            UnsupportedFeatureError: The model doesn't score.
        """
        self.check()
        queries, documents = _texts(names[0], first), _texts(names[1], second)
        if len(queries) not in (1, len(documents)):
            raise InvalidRequestError(
                f"got {len(queries)} texts for {len(documents)}, expected 1 or {len(documents)}. Send one text, or as "
                f"many as {names[1]} has.",
                field=names[0],
            )
        places = [(0 if len(queries) == 1 else i, i) for i in range(len(documents))]
        if "classify" in self._pooler.tasks:
            params = PoolingParams("classify", truncate_prompt_tokens=truncate_prompt_tokens)
            prompts = [self._pair(queries[i], documents[j]) for i, j in places]
            return ScoringPlan(prompts, params, [(i,) for i in range(len(prompts))], _only)
        task, score = ("embed", cosine) if "embed" in self._pooler.tasks else ("token_embed", max_sim)
        params = PoolingParams(task, truncate_prompt_tokens=truncate_prompt_tokens)  # type: ignore[arg-type]
        pairs = [(i, len(queries) + j) for i, j in places]
        asked, read = (of_role(self._pooler, role) for role in _ROLES)
        prompts = [*instructed(queries, self._pooler, asked), *instructed(documents, self._pooler, read)]
        return ScoringPlan(prompts, params, pairs, score)  # type: ignore[arg-type]

    def check(self) -> None:
        """Raise `UnsupportedFeatureError` unless the model scores."""
        tasks, num_labels = self._pooler.tasks, len(self._pooler.labels)
        if not self._pools:
            raise UnsupportedFeatureError(
                f"got a request to score, expected one to generate: {self._name} is served for that. Serve "
                "a reranker or an embedder, or set --runner pooling.",
                code="unsupported_task",
                field="task",
            )
        if "token_classify" in tasks or ("classify" in tasks and num_labels != 1):
            raise UnsupportedFeatureError(
                f"got a request to score, expected one of {', '.join(tasks)}: {self._name} has {num_labels} "
                "labels, and scores need exactly 1. Ask /classify or /pooling, or serve a reranker.",
                code="unsupported_task",
                field="task",
            )

    def _pair(self, query: str, document: str) -> dict[str, Any]:
        if self._template is not None:
            messages = [{"role": role, "content": text} for role, text in zip(_ROLES, (query, document), strict=True)]
            return {"prompt": render(self._tokenizer, self._template, messages), "add_special_tokens": False}
        if self._pooler.token_ids:
            return {"prompt": f"{query}{document}"}
        return {"prompt": query, "text_pair": document}


def cosine(first: FloatArray, second: FloatArray) -> float:
    """The cosine of two vectors."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / max(length, 1e-12)


def max_sim(first: FloatArray, second: FloatArray) -> float:
    """The sum, over the first text's tokens, of the largest product with one of the second's."""
    return float((first @ second.T).max(axis=1).sum())


def _only(scores: FloatArray) -> float:
    return float(scores[0])


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    for i, each in enumerate(texts):
        if not isinstance(each, str):
            raise InvalidTypeError(
                f"got a {type(each).__name__}, expected a text. Change {name}.", field=f"{name}[{i}]"
            )
    if not texts:
        raise InvalidRequestError("got no text, expected at least 1. Add one.", field=name)
    return texts

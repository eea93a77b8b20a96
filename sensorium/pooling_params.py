"""What a request that pools asks for: a vector, a vector for each token, or scores of labels. Free of torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from sensorium.errors import InvalidRequestError
from sensorium.settings import MAX_INT

PoolingTask: TypeAlias = Literal["embed", "token_embed", "classify", "token_classify"]
"""What a model makes of a prompt: a vector `(size,)`, one for each token `(num_tokens, size)`, the scores of its labels
`(num_labels,)`, or those of each token `(num_tokens, num_labels)`."""
TASKS: tuple[str, ...] = get_args(PoolingTask)
MODEL_LIMIT = -1
"""As `truncate_prompt_tokens`: as many tokens as the model takes."""


@dataclass(frozen=True, slots=True)
class PoolingParams:
    """One request's wishes. Whether the model can do so is checked at admission.

    Raises `InvalidRequestError` (a `ValueError`) for a value that no model takes.
    """

    task: PoolingTask = "embed"
    dimensions: int | None = None
    """Keep so many leading numbers of each vector, where the model was trained for that; None: all."""
    use_activation: bool = True
    """Vectors are brought to length 1, and scores become probabilities, where the checkpoint says so. Off: neither."""
    truncate_prompt_tokens: int | None = None
    """Use only so many leading tokens of a longer prompt, special tokens included; `MODEL_LIMIT`: as many as the model
    takes; None: a longer prompt is an error."""

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InvalidRequestError(
                f"got {self.task!r:.60}, expected one of {', '.join(TASKS)}. Change task.", field="task"
            )
        if self.dimensions is not None and not _is_count(self.dimensions):
            raise InvalidRequestError(
                f"got {self.dimensions!r:.60}, expected at least 1. Change or remove dimensions.", field="dimensions"
            )
        limit = self.truncate_prompt_tokens
        if limit is not None and not _is_count(limit) and limit != MODEL_LIMIT:
            raise InvalidRequestError(
                f"got {limit!r:.60}, expected at least 1, or {MODEL_LIMIT} for as many as the model takes. Change or "
                "remove truncate_prompt_tokens.",
                field="truncate_prompt_tokens",
            )


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= MAX_INT

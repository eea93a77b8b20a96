"""The outputs of a request: generated text and tokens, or a pooled vector, with log probabilities and times.

Immutable values. Free of torch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from sensorium.errors import RequestError


class OutputKind(enum.StrEnum):
    """What the outputs of a request hold from step to step."""

    CUMULATIVE = "cumulative"
    """Every output, from its beginning, whenever one of them has news."""
    DELTA = "delta"
    """The outputs with news, and of them only what is new."""
    FINAL_ONLY = "final_only"
    """Every output, once, when all are complete."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The natural-log probability of one token at one position."""

    logprob: float
    rank: int
    """1 for the most probable token."""
    decoded_token: str | None = None
    """The token's text; bytes that are no whole character show as U+FFFD. None without a tokenizer."""
    token_bytes: bytes | None = None
    """The token's own bytes, of which those of several tokens may make one character. None without a tokenizer."""


PositionLogprobs = dict[int, Logprob]
"""By token id: the token that stands at a position first, then the most probable ones."""


@dataclass(frozen=True, slots=True)
class CompletionOutput:
    """One of a request's `n` outputs."""

    index: int
    text: str
    token_ids: list[int]
    """All ids generated, with the one that ended the output, if one did."""
    cumulative_logprob: float | None = None
    """Sum of the tokens' log probabilities; None where they were not asked for."""
    logprobs: list[PositionLogprobs] | None = None
    """One entry per token; None where they were not asked for."""
    finish_reason: str | None = None
    """"stop", "length", "abort" or "error"; None while the output goes on."""
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end of sequence and other reasons."""
    text_offsets: list[int] | None = None
    """For each token, where in the output's whole text what it stands for begins; None without `logprobs`."""

    @property
    def finished(self) -> bool:
        """Whether the output is complete."""
        return self.finish_reason is not None

    @property
    def is_cut(self) -> bool:
        """Whether something else than the model ended it: a bound, a stop string, an abort or an error."""
        return self.finished and (self.finish_reason != "stop" or isinstance(self.stop_reason, str))


@dataclass(frozen=True, slots=True)
class RequestMetrics:
    """When things happened to a request, in seconds of the engine's monotonic clock. None: not yet, or never."""

    arrival_time_s: float
    queued_time_s: float | None = None
    """When the prepared request went to the scheduler."""
    scheduled_time_s: float | None = None
    """When it first got a share of a step."""
    first_token_time_s: float | None = None
    last_token_time_s: float | None = None
    finished_time_s: float | None = None

    @property
    def time_to_first_token_s(self) -> float | None:
        """From arrival to the first token of any output."""
        return None if self.first_token_time_s is None else self.first_token_time_s - self.arrival_time_s


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """News of a text request, or its end. What `outputs` holds depends on the `OutputKind` asked for."""

    request_id: str
    prompt: str | None
    """The prompt as text, if it was given as text."""
    prompt_token_ids: Sequence[int]
    """The expanded prompt: media take as many ids as they have rows."""
    outputs: list[CompletionOutput]
    finished: bool
    prompt_logprobs: list[PositionLogprobs | None] | None = None
    """One entry per prompt token; None at the first token and at media rows. None where not asked for."""
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    """Prompt tokens that came from the prefix cache."""
    media_token_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    """Per modality, the prompt tokens that each item takes."""
    error: RequestError | None = None
    """Why the request failed. Its outputs hold what there was until then."""

    @classmethod
    def failed(cls, request_id: str, error: RequestError) -> RequestOutput:
        """The output of a request that was refused before it started."""
        return cls(request_id, prompt=None, prompt_token_ids=[], outputs=[], finished=True, error=error)


FloatArray: TypeAlias = np.ndarray[Any, np.dtype[np.float32]]


@dataclass(frozen=True, slots=True, eq=False)
class PoolingOutput:
    """What was made of a prompt's hidden states."""

    data: FloatArray
    """float32, of the shape that the task says: see `PoolingTask`."""

    @property
    def embedding(self) -> FloatArray:
        """Of the task `embed`, the vector `(size,)`; of `token_embed` a vector for each token `(num_tokens, size)`."""
        return self.data

    @property
    def probs(self) -> FloatArray:
        """Of the task `classify`, the labels' scores `(num_labels,)`: probabilities, unless the raw ones were asked
        for."""
        return self.data

    @property
    def hidden_size(self) -> int:
        """Numbers of a vector."""
        return int(self.data.shape[-1])


@dataclass(frozen=True, slots=True)
class ScoringOutput:
    """How well two texts go together."""

    score: float


@dataclass(frozen=True, slots=True, eq=False)
class ScoringRequestOutput:
    """The score of one pair of texts."""

    request_id: str
    outputs: ScoringOutput
    prompt_token_ids: Sequence[int]
    """Of the pair as one sequence, or of its second text where each text has a vector of its own."""
    finished: bool = True


@dataclass(frozen=True, slots=True, eq=False)
class PoolingRequestOutput:
    """The end of a pooling request."""

    request_id: str
    outputs: PoolingOutput | None
    """None if the request failed or was aborted."""
    prompt_token_ids: Sequence[int]
    finished: bool
    metrics: RequestMetrics | None = None
    num_cached_tokens: int = 0
    media_token_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    error: RequestError | None = None

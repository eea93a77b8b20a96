"""The messages between the rooms around the scheduler: immutable values, complete at construction.

    front  --EngineRequest-->  scheduler  --SchedulerOutput-->  worker
    front  <--EngineOutput---  scheduler  <--ModelRunnerOutput--  worker

Values that are made for each request and step are `Struct`s, which are faster to make than dataclasses.

No torch here: tensors inside `MediaItem.kwargs` and `media_rows` are opaque to whoever runs without torch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import numpy as np

from sensorium.cache_spec import CacheGroup
from sensorium.config import ModelFeatures
from sensorium.errors import SensoriumError
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams
from sensorium.spans import Range, Span
from sensorium.token_masks import StepMasks


@dataclass(frozen=True, slots=True, eq=False)
class MediaItem:
    """One media item of a request, as the engine core sees it."""

    modality: str
    key: str
    """Identity of the item's rows: hex digest of at least 128 bits over content, processing and model."""
    span: Span
    """Where its rows stand in the expanded prompt."""
    kwargs: Mapping[str, Any] | None = None
    """The mapped keyword arguments of this item, leaves without batch axes; only the worker looks inside."""
    index: int = 0
    """The item's position among the request's items of its modality."""
    cross_rows: int = 0
    """Where decoder layers attend to the item by cross-attention: its rows, which stand in a cache of their own. The
    tokens of the span see all of them, and nothing is put there. Else 0."""
    seen_rows: int = 0
    """Of `cross_rows`, the first so many, which the span's last token and those behind it see."""

    @property
    def num_rows(self) -> int:
        """Rows that the encoder makes of the item."""
        return self.cross_rows or self.span.num_rows

    @property
    def rows_end(self) -> int:
        """Tokens of the prompt after which nobody reads the encoder's rows any more."""
        return self.span.offset + 1 if self.cross_rows else self.span.rows_end


@dataclass(frozen=True, slots=True, eq=False)
class EngineRequest:
    """An admitted request: everything about it is known to be within limits."""

    request_id: str
    prompt_token_ids: Sequence[int]
    """The expanded prompt; ids at media rows may be negative or beyond the vocabulary."""
    sampling_params: SamplingParams
    eos_token_ids: frozenset[int] = frozenset()
    """Ids that end the output unless `ignore_eos`."""
    media: tuple[MediaItem, ...] = ()
    """In order of offset; spans don't overlap."""
    two_way_spans: tuple[Range, ...] = ()
    """Ranges of the prompt whose positions see one another both ways, in order; they don't overlap."""
    mrope_positions: np.ndarray[Any, np.dtype[np.int64]] | None = None
    """`(3, prompt length)` for models with M-RoPE."""
    mrope_delta: int = 0
    """An output token's position is its index in the sequence plus this."""
    priority: int = 0
    """Lower is served first under the priority policy."""
    arrival_time_s: float = 0.0
    cache_salt: str | None = None
    """Requests share cached blocks and rows only with the same salt."""
    tenant: str = ""
    """Who sent it: tenants that wait share the slots evenly."""
    pooling: PoolingParams | None = None
    """What is made of the prompt's hidden states, in the place of tokens; None: tokens."""
    token_type_ids: Sequence[int] | None = None
    """For each prompt token which text of a pair it belongs to, for models that are told so; None: all to the first."""
    adapter_id: int = 0
    """The adapter that its rows go through, 0 for the base model alone. While an engine lives, an id means the same
    weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Vocabulary:
    """What holding outputs to a grammar needs to know of a tokenizer."""

    tokenizer_json: str
    """The tokenizer as the `tokenizers` library writes it, added tokens included."""
    eos_token_ids: tuple[int, ...]
    """Ids that may end an output."""
    size: int
    """Number of token ids: of the model's head or the tokenizer, whichever has more."""


class FinishReason(enum.StrEnum):
    """Why a request ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, eq=False)
class NewRequest:
    """A request that gets a slot in this step: for the first time, or again after a preemption."""

    request: EngineRequest
    output_token_ids: tuple[int, ...] = ()
    """What it had generated before it was preempted."""


class ScheduledChunk(msgspec.Struct, frozen=True):
    """A request's share of one step: tokens `[num_computed_tokens, num_computed_tokens + num_scheduled_tokens)`."""

    request_id: str
    num_computed_tokens: int
    num_scheduled_tokens: int
    new_block_ids: tuple[tuple[int, ...], ...]
    """By cache group, blocks appended to its block table; for a new request, the whole table, cached prefix included.
    Of a state: the rows that the chunk reads it from and writes it to. Empty where nothing is new in any group."""
    is_last: bool
    """The chunk reaches the end of the known tokens, so that a token is sampled after it."""
    cross_items: tuple[int, ...] = ()
    """`request.media` whose rows this chunk writes into the caches of cross-attention."""
    draft_token_ids: tuple[int, ...] = ()
    """Guesses of the next tokens, which stand in the chunk's last rows. After the row before them and after each of
    them a token is sampled, and counts as long as those before it are what was guessed."""

    def without_drafts(self) -> ScheduledChunk:
        """The known tokens alone."""
        num_known = self.num_scheduled_tokens - len(self.draft_token_ids)
        return msgspec.structs.replace(self, num_scheduled_tokens=num_known, draft_token_ids=())


@dataclass(frozen=True, slots=True)
class EncoderInput:
    """One media item to encode in this step: `request.media[item]`."""

    request_id: str
    item: int


@dataclass(frozen=True, slots=True, eq=False)
class SchedulerOutput:
    """One step. Decode chunks come first. Nothing in it changes once it is made."""

    step: int
    new_requests: tuple[NewRequest, ...]
    chunks: tuple[ScheduledChunk, ...]
    encoder_inputs: tuple[EncoderInput, ...]
    free_encoder_keys: tuple[str, ...]
    """Encoder outputs to drop before anything is encoded."""
    freed_request_ids: tuple[str, ...]
    """Requests that finished, were aborted or preempted since the last step: their slots are free."""
    num_scheduled_tokens: int
    masks: StepMasks | None = None
    """Where constrained requests have their masks; None: no running request is constrained."""
    has_masks: bool = False
    """Whether the first rank has `masks`, which the others don't get."""
    is_idle: bool = False
    """Nobody asks for anything: the worker may get ready for later steps, for a fraction of a second."""

    @classmethod
    def idle(cls) -> SchedulerOutput:
        """The step that is given to workers while no request is unfinished."""
        return cls(0, (), (), (), (), (), 0, is_idle=True)


class TokenLogprobs(msgspec.Struct, frozen=True):
    """Log probabilities at one position: the chosen token's, its rank (1 is the best), and the best others'."""

    token_id: int
    logprob: float
    rank: int
    top_token_ids: tuple[int, ...] = ()
    top_logprobs: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class RequestFailure:
    """The worker could not go on with one request. `message` is fit for the caller, as `SensoriumError.message` is."""

    message: str
    status: int = 500
    code: str | None = None
    """That of the error, where there was one of our own."""
    field: str | None = None
    """Likewise."""
    reason: str | None = None
    """Likewise."""

    @classmethod
    def of(cls, error: SensoriumError) -> RequestFailure:
        """A failure by an error of our own, whose message is fit for the caller."""
        return cls(error.message, error.status, error.code, error.field, error.reason)


@dataclass(frozen=True, slots=True, eq=False)
class ModelRunnerOutput:
    """What a step brought. Requests without an entry sampled nothing (their chunk was not the last)."""

    sampled_token_ids: Mapping[str, Sequence[int]]
    """One token each, and one more for each draft that was right."""
    logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    prompt_logprobs: Mapping[str, Sequence[TokenLogprobs]] = field(default_factory=dict)
    """For this step's chunk: the log probabilities of the prompt tokens that follow its rows."""
    pooled: Mapping[str, Any] = field(default_factory=dict)
    """What was made of pooling requests, float32 arrays; their shapes are those of `PoolingTask`."""
    failures: Mapping[str, RequestFailure] = field(default_factory=dict)
    """These requests took no part in the step from where they failed on."""
    encode_s: float = 0.0
    forward_s: float = 0.0
    idle_s: float = 0.0
    """Between the step before and this one, while the device had nothing to do."""
    complete_request_ids: frozenset[str] = frozenset()
    """Requests to whose output nothing may be added: its grammar is complete. They sampled nothing."""
    lost_mask_source: int | None = None
    """A source of masks that did not answer, and is not asked any more."""
    is_prepared: bool = True
    """After an idle step: nothing is left to get ready."""


class EngineOutput(msgspec.Struct, frozen=True, eq=False):
    """The outputs of one request for the front: tokens since the last message, and how it ended if it did."""

    request_id: str
    new_token_ids: Sequence[int] = ()
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    """The stop token id or stop string that ended it; None for end-of-sequence and other reasons."""
    failure: RequestFailure | None = None
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    scheduled_time_s: float | None = None
    """When it first got a share of a step, in seconds of the monotonic clock, which processes share."""
    pooled: Any = None


@dataclass(frozen=True, slots=True)
class LoadReport:
    """What loading a model found out, and where memory went."""

    features: ModelFeatures
    cache_groups: tuple[CacheGroup, ...]
    """What is kept of requests between steps, and how much of it there is room for."""
    memory_bytes: dict[str, int]
    """By use, such as "weights" and "KV cache"."""
    seconds: dict[str, float]
    """By stage, such as "load weights"."""
    model: str = ""
    weights: str = ""
    """What the weights are stored as, if not all in the model's dtype."""
    steps: str = ""
    """How steps are given to the device, if there is a choice."""
    adapters: str = ""
    """Which adapters requests may choose, if any."""
    drafts: str = ""
    """Where guesses of next tokens come from, or why there are none, if they were asked for."""
    sampling: str = ""
    """Sampling values of requests that leave them out, if the checkpoint has any."""
    pooling: str = ""
    """What is made of prompts where the model doesn't generate."""
    kernels: str = ""
    """What computes, and what follows from it, if that isn't what this kind of device usually has."""
    rounding: str = ""
    """What keys and values are cached in, if not in the model's dtype."""
    processors: str = ""
    """What media are preprocessed with, where there is a choice."""

    @property
    def num_blocks(self) -> int:
        """KV blocks of the group that has most: what the setting `num_blocks` would have to be for the same caches."""
        return max((group.num_blocks for group in self.cache_groups if group.keeps_positions), default=1)

    @property
    def block_size(self) -> int:
        """Tokens in a block."""
        return self.cache_groups[0].block_size

    def lines(self) -> list[str]:
        """The report for people, a line each."""
        mib = {name: f"{name} {size / 2**20:,.0f} MiB" for name, size in self.memory_bytes.items()}
        stages = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in self.seconds.items())
        features = self.features
        lines = [
            f"{self.model}: tier {features.tier}",
            *([f"weights: {self.weights}"] if self.weights else []),
            *([f"steps: {self.steps}"] if self.steps else []),
            *([f"pooling: {self.pooling}"] if self.pooling else []),
            *([f"adapters: {self.adapters}"] if self.adapters else []),
            *([f"drafts: {self.drafts}"] if self.drafts else []),
            *([f"kernels: {self.kernels}"] if self.kernels else []),
            *([f"sampling defaults of the checkpoint: {self.sampling}"] if self.sampling else []),
            *([f"processors: {self.processors}"] if self.processors else []),
            *([f"KV cache: {self.rounding}"] if self.rounding else []),
            *(f"KV cache: {group.line()}" for group in self.cache_groups),
            f"memory: {', '.join(mib.values())}",
            f"start-up: {stages}",
        ]
        return lines + [f"note: {note}" for note in features.notes]

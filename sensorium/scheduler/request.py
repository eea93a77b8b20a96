"""A request as the scheduler sees it: its tokens, how many are computed, its blocks, and where its media stand.

Owns nothing shared: blocks belong to the KV-cache manager, which writes the fields that are marked as its own, and
encoder entries to the encoder-cache manager.
"""

from __future__ import annotations

import enum
from bisect import bisect_right
from collections.abc import Iterator
from typing import TypeAlias

from sensorium.messages import EngineRequest, MediaItem
from sensorium.scheduler.drafting import Guesses
from sensorium.scheduler.stopping import StopRule
from sensorium.spans import Range

Order: TypeAlias = tuple[int, int, int]
"""A request's place among others: its priority, where it starts in its tenant's share, and its arrival."""


class RequestStatus(enum.Enum):
    """WAITING holds no block, RUNNING may hold blocks, FINISHED holds none and has had its final output."""

    WAITING = enum.auto()
    RUNNING = enum.auto()
    FINISHED = enum.auto()


class RequestState:
    """One request from `add_request` to its final output.

    Steps are planned while others are in flight, so a request may be ahead of what is known of it: tokens count as
    computed as soon as their step is on its way, and the tokens that such steps sample count as pending. So do drafts,
    as if all were right, until the result is in.

    Invariant: `num_settled_tokens <= num_computed_tokens <= num_expected_tokens`; while WAITING, it has no blocks and
    nothing is computed or pending.
    """

    __slots__ = (
        "_media_ends",
        "block_hashes",
        "cross_hashes",
        "guesses",
        "held_media",
        "is_cacheable",
        "is_caught_up",
        "is_new",
        "message",
        "needs_sampled_tokens",
        "num_allocated_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_departures",
        "num_pending_tokens",
        "num_prompt_logprobs",
        "num_prompt_tokens",
        "num_registered_blocks",
        "num_settled_tokens",
        "order",
        "pieces",
        "pooling",
        "request_id",
        "scheduled_time_s",
        "span_digests",
        "status",
        "stop",
        "token_ids",
    )

    def __init__(
        self,
        message: EngineRequest,
        order: Order,
        max_model_len: int,
        guesses: Guesses | None = None,
        *,
        counts_tokens: bool = False,
    ) -> None:
        """`counts_tokens`: the worker counts tokens for penalties by itself."""
        self.message = message
        self.request_id = message.request_id
        self.pooling = message.pooling is not None
        self.order = order
        """The request with the smaller order is served first. Unique."""
        self.is_new = True
        """Has had no slot yet."""
        self.status = RequestStatus.WAITING
        self.token_ids: list[int] = list(message.prompt_token_ids)
        """Prompt and output."""
        self.num_prompt_tokens = len(self.token_ids)
        self.stop = StopRule.of(message.sampling_params, message.eos_token_ids, self.num_prompt_tokens, max_model_len)
        self.num_computed_tokens = 0
        """Tokens whose KV is written, or will be by the steps in flight, from the first on."""
        self.num_settled_tokens = 0
        """Tokens whose KV was written by steps that are known to have succeeded."""
        self.num_pending_tokens = 0
        """Output tokens that steps in flight sample, at most."""
        self.num_departures = 0
        """How often it left the running requests: preempted, or ended. What a step in flight brings counts only if that
        did not happen meanwhile."""
        self.guesses = guesses
        """Where its drafts come from, if it gets any."""
        params = message.sampling_params
        self.needs_sampled_tokens = params.needs_sampled_tokens or (params.has_penalties and not counts_tokens)
        """Its next token can be sampled only after the host has seen the last."""
        self.is_caught_up = False
        """A step that samples a token for it was planned since it got its slot: from then on its share of a step is a
        decode."""
        self.scheduled_time_s: float | None = None
        """When it first got a slot, on the monotonic clock."""
        self.num_cached_tokens: int = 0
        """Prompt tokens taken from the prefix cache when it first ran."""
        self.num_prompt_logprobs = 0
        """Prompt positions whose log probabilities went out."""
        self._media_ends = [item.span.end for item in message.media]
        self.pieces: list[Range] | None = None
        """A field of the chunk planner: ranges of the prompt that no chunk may cut; None: not known yet."""
        self.span_digests: list[bytes] = []
        """Of each two-way span, what it holds; filled when a block hash needs one."""
        # Fields of the KV-cache manager.
        self.num_allocated_tokens = 0
        """Tokens up to which it can go on without anything new; 0 where every step needs something."""
        self.block_hashes: list[bytes] = []
        """Hashes of the leading full blocks, as far as they were needed; they stay valid for the request's life."""
        self.cross_hashes: list[bytes] = []
        """Hashes of the blocks with the rows of its items for cross-attention, once they were needed."""
        self.num_registered_blocks = 0
        """Leading blocks that came from the prefix cache or were offered to it."""
        self.is_cacheable = True
        self.held_media: list[MediaItem] = []
        """Items whose encoder entries this request holds."""

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.token_ids)

    @property
    def num_expected_tokens(self) -> int:
        """Known tokens and those that steps in flight sample, at most."""
        return len(self.token_ids) + self.num_pending_tokens

    @property
    def awaits_result(self) -> bool:
        """Whether a decode has to wait for a step in flight: for its token, to go on from or to guess what follows it,
        or because that ends the request."""
        if self.pooling:
            return True
        if not self.num_pending_tokens:
            return False
        if self.needs_sampled_tokens or self.num_expected_tokens >= self.stop.max_total_tokens:
            return True
        return self.guesses is not None and not self.guesses.is_paused

    @property
    def max_drafts(self) -> int:
        """Most drafts that a decode may carry, given the output's length: the last token isn't guessed but sampled."""
        return self.stop.max_total_tokens - self.num_tokens - 1

    def check(self) -> None:
        """Raise `AssertionError` unless the counts of a running request agree."""
        assert self.num_settled_tokens <= self.num_computed_tokens <= self.num_expected_tokens
        if self.is_caught_up and not self.pooling and not self.num_pending_tokens:
            assert self.num_settled_tokens == self.num_computed_tokens == self.num_tokens - 1, (
                "what was guessed is left"
            )

    def media_from(self, position: int) -> Iterator[MediaItem]:
        """The media items whose spans end behind `position`, in order."""
        for i in range(bisect_right(self._media_ends, position), len(self._media_ends)):
            yield self.message.media[i]

    @property
    def max_cached_tokens(self) -> int:
        """Most tokens that may come from the prefix cache instead of being computed.

        One token at least is computed, since its logits are wanted. A pooled vector may depend on every hidden
        state. Prompt log probabilities need each prompt row once.
        """
        if self.pooling:
            return 0
        limit = self.num_tokens - 1
        wants_prompt_logprobs = self.message.sampling_params.prompt_logprobs is not None
        if wants_prompt_logprobs and self.num_prompt_logprobs < self.num_prompt_tokens - 1:
            return min(limit, self.num_prompt_logprobs)
        return limit

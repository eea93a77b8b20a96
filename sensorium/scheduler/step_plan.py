"""One step while it is put together: what is in it so far, and what may still be added."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import msgspec

from sensorium.messages import EncoderInput, MediaItem, NewRequest, ScheduledChunk, SchedulerOutput
from sensorium.scheduler.pacing import StepPace
from sensorium.scheduler.request import RequestState


class StepPlan:
    """Invariant: `chunks` keeps the order of insertion, decodes first; only decode chunks are ever taken out again, and
    get drafts when all chunks are there."""

    __slots__ = (
        "_token_budget",
        "chunks",
        "computing",
        "encoder_inputs",
        "is_admission_closed",
        "is_alone",
        "is_encoder_closed",
        "new_requests",
        "num_departures",
        "num_draft_tokens",
        "num_prefill_tokens",
        "num_rows",
        "pace",
        "rows_left",
        "tokens_left",
    )

    def __init__(self, token_budget: int, row_budget: int, *, is_alone: bool = False) -> None:
        self._token_budget = self.tokens_left = token_budget
        self.rows_left = row_budget
        self.is_alone = is_alone
        """The step is for one request whose chunk fits no shared step; budgets of rows don't bind it."""
        self.pace = StepPace()
        self.chunks: dict[RequestState, ScheduledChunk] = {}
        self.new_requests: list[NewRequest] = []
        self.encoder_inputs: list[EncoderInput] = []
        self.num_prefill_tokens = 0
        self.num_draft_tokens = 0
        self.num_rows = 0
        """Encoder rows in the step."""
        self.computing: set[bytes] = set()
        """Hashes of blocks that this step fills: no request may use them yet, but they will be valid after it."""
        self.is_admission_closed = False
        """A running request lacks memory, or the first waiting one does: no other request is added."""
        self.is_encoder_closed = False
        """A request waits for room in the encoder cache: no request behind it may take more of it."""
        self.num_departures: list[int] = []
        """Of the request of each chunk, when the step was submitted: a chunk whose request has left since is stale."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all chunks."""
        return self._token_budget - self.tokens_left

    def add_chunk(
        self,
        request: RequestState,
        num_tokens: int,
        new_block_ids: tuple[tuple[int, ...], ...],
        cross_items: Sequence[MediaItem] = (),
    ) -> None:
        """Add a request's next `num_tokens` tokens, which write the rows of these items for cross-attention."""
        begin = request.num_computed_tokens
        is_last = begin + num_tokens == request.num_expected_tokens
        written = tuple(map(request.message.media.index, cross_items)) if cross_items else ()
        self.chunks[request] = ScheduledChunk(request.request_id, begin, num_tokens, new_block_ids, is_last, written)
        self.tokens_left -= num_tokens

    def add_drafts(
        self, request: RequestState, token_ids: Sequence[int], new_block_ids: tuple[tuple[int, ...], ...]
    ) -> None:
        """Add guesses of what follows it to a decode chunk, and the blocks that they take on top."""
        assert not request.num_pending_tokens, "a guess goes on from known tokens"
        chunk = self.chunks[request]
        blocks = chunk.new_block_ids or new_block_ids
        if chunk.new_block_ids and new_block_ids:
            blocks = tuple(map(operator.add, chunk.new_block_ids, new_block_ids))
        self.chunks[request] = msgspec.structs.replace(
            chunk,
            num_scheduled_tokens=chunk.num_scheduled_tokens + len(token_ids),
            new_block_ids=blocks,
            draft_token_ids=tuple(token_ids),
        )
        self.tokens_left -= len(token_ids)
        self.num_draft_tokens += len(token_ids)

    def cancel(self, request: RequestState) -> None:
        """Take out a decode chunk; nothing happens where the request has none."""
        chunk = self.chunks.pop(request, None)
        if chunk is not None:
            assert request.is_caught_up, "only decode chunks are taken out"
            self.tokens_left += chunk.num_scheduled_tokens

    def add_prefill(self, num_tokens: int, hashes: Sequence[bytes]) -> None:
        """Count a prefill chunk, and the blocks that it fills."""
        self.num_prefill_tokens += num_tokens
        self.pace.add(num_tokens, 0)
        self.computing.update(hashes)

    def add_encoder_input(self, request: RequestState, item: MediaItem) -> None:
        """Encode an item in this step."""
        self.encoder_inputs.append(EncoderInput(request.request_id, request.message.media.index(item)))
        num_rows = item.num_rows
        self.num_rows += num_rows
        self.rows_left -= num_rows
        self.pace.add(0, num_rows)

    def submit(self) -> None:
        """Count what the step computes as computed, and what it samples as pending. Nothing is added after that."""
        for request, chunk in self.chunks.items():
            request.num_computed_tokens += chunk.num_scheduled_tokens
            if chunk.is_last:
                request.is_caught_up = True
                request.num_pending_tokens += 0 if request.pooling else 1 + len(chunk.draft_token_ids)
            self.num_departures.append(request.num_departures)

    def to_output(
        self, step: int, free_encoder_keys: tuple[str, ...], freed_request_ids: tuple[str, ...]
    ) -> SchedulerOutput:
        """The finished step as a message."""
        return SchedulerOutput(
            step=step,
            new_requests=tuple(self.new_requests),
            chunks=tuple(self.chunks.values()),
            encoder_inputs=tuple(self.encoder_inputs),
            free_encoder_keys=free_encoder_keys,
            freed_request_ids=freed_request_ids,
            num_scheduled_tokens=self.num_tokens,
        )

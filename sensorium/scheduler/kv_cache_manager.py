"""Gives requests their blocks, group by group, and finds prefixes that are computed already.

Owns one manager per group of layers that keep alike (`PagedManager`, `CrossManager`, `StateManager`) and, in each
request's state, the fields that are marked as its own. Blocks are shared only when full, so no request writes into a
block that another reads, and nothing is copied.

A prefix hit is what all groups have. Worked example, blocks of 4 tokens, a prompt of 23: full attention finds blocks
0 to 3; a window of 5, in which position 16 sees 12 to 16, needs block 3 alone; a state has a snapshot behind 12 tokens
and none behind 16. So the hit is 12 tokens long, if the window's block 2 is there too, which position 12 sees.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from sensorium.cache_spec import CacheGroup, CacheKind
from sensorium.scheduler.block_hash import extend_block_hashes
from sensorium.scheduler.cross_manager import CrossManager
from sensorium.scheduler.paged_manager import PagedManager
from sensorium.scheduler.request import RequestState
from sensorium.scheduler.state_manager import StateManager

_Manager: TypeAlias = PagedManager | CrossManager | StateManager


@dataclass(frozen=True, slots=True, eq=False)
class PrefixHit:
    """A computed prefix: whole blocks, found in all groups."""

    num_blocks: int
    num_tokens: int
    block_ids: tuple[list[int], ...]
    """By group: a table with `NO_BLOCK` for blocks that the next token doesn't see; of a state, the row with it."""


class KVCacheManager:
    """Invariant: a block can be found by others only after the step that computed it has succeeded (`settled`).

    Args:
        groups: What loading made of the layers' declarations; all with one block size.
        enable_prefix_caching: Whether requests share what they have in common.
        max_num_seqs: Requests that run at once.
        max_chunk_tokens: Most tokens that a request computes in one step.
    """

    def __init__(
        self, groups: Sequence[CacheGroup], *, enable_prefix_caching: bool, max_num_seqs: int, max_chunk_tokens: int
    ) -> None:
        self.block_size = groups[0].block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.managers: list[_Manager] = []
        for group in groups:
            if group.kind is CacheKind.STATE:
                self.managers.append(StateManager(group, max_num_seqs, keeps_snapshots=enable_prefix_caching))
            elif group.kind is CacheKind.CROSS:
                self.managers.append(CrossManager(group, shares=enable_prefix_caching))
            else:
                self.managers.append(PagedManager(group, max_chunk_tokens))
        self.paged = [each for each in self.managers if isinstance(each, PagedManager)]
        self._states = [each for each in self.managers if isinstance(each, StateManager)]
        self._cross = [each for each in self.managers if isinstance(each, CrossManager)]
        self.keeps_state = bool(self._states)
        self.makes_snapshots = self.keeps_state and enable_prefix_caching
        self.pools = [each.pool for each in self.managers]
        self._within_reach = [each for each in self.paged if each.gives_back]
        self._no_hit = PrefixHit(0, 0, tuple([] for _ in self.managers))

    @property
    def usage(self) -> float:
        """Share of the blocks that requests use, 0 to 1, in the group of which least is free."""
        counted: list[_Manager] = [*self.paged, *self._cross]
        return max(1.0 - each.pool.num_free / each.pool.num_blocks for each in counted or self.managers)

    # Prefixes

    def find_prefix(self, request: RequestState, max_tokens: int | None = None) -> PrefixHit:
        """The longest computed prefix of the request, of at most `max_tokens` tokens, as far as it may use one."""
        if not (self.enable_prefix_caching and request.is_cacheable):
            return self._no_hit
        limit = request.max_cached_tokens if max_tokens is None else min(max_tokens, request.max_cached_tokens)
        num_blocks, before = limit // self.block_size, -1
        # Shortened until it suits every group. A shorter prefix may lack what a longer one didn't need.
        while num_blocks and num_blocks != before:
            before = num_blocks
            for each in self.managers:
                num_blocks = each.longest_hit(request, num_blocks)
            if len(self.managers) == 1:
                break
        if not num_blocks:
            return self._no_hit
        block_ids = tuple(each.hit(request, num_blocks) for each in self.managers)
        return PrefixHit(num_blocks, num_blocks * self.block_size, block_ids)

    def has_cross_rows(self, request: RequestState) -> bool:
        """Whether what cross-attention needs of the request's items is there, or soon will be for others."""
        return all(each.has_rows(request) for each in self._cross)

    def next_hashes(self, request: RequestState, index: int) -> list[bytes]:
        """What the request, whose first `index` blocks are there, would compute first and could wait for: the hashes
        of its next block and of its items' rows."""
        wanted = []
        if index < min(len(request.block_hashes), request.max_cached_tokens // self.block_size):
            wanted.append(request.block_hashes[index])
        for each in self._cross:
            if not each.has_rows(request):
                wanted += each.hashes(request)[:1]
        return wanted

    def hashes_of_chunk(self, request: RequestState, begin: int, end: int) -> list[bytes]:
        """Hashes of what others find when tokens `[begin, end)` are computed; none if nothing is shared."""
        hashes = list(self._full_block_hashes(request, begin, end))
        if request.message.media and begin <= request.message.media[0].span.offset < end:
            for each in self._cross:
                hashes += each.hashes(request)[:1]
        return hashes

    def _full_block_hashes(self, request: RequestState, begin: int, end: int) -> Sequence[bytes]:
        if not (self.enable_prefix_caching and request.is_cacheable):
            return ()
        if self.keeps_state and end % self.block_size:
            return ()
        last = end // self.block_size
        extend_block_hashes(request, last, self.block_size)
        return request.block_hashes[begin // self.block_size : last]

    def adopt(self, request: RequestState, hit: PrefixHit) -> None:
        """Begin a request's tables with a prefix that `find_prefix` found."""
        request.num_registered_blocks = hit.num_blocks
        request.num_computed_tokens = request.num_settled_tokens = hit.num_tokens
        for each, block_ids in zip(self.managers, hit.block_ids, strict=True):
            each.adopt(request, block_ids)
        request.num_allocated_tokens = 0 if self.keeps_state else hit.num_tokens

    # Room

    def has_room(self, request: RequestState, hit: PrefixHit, running: Sequence[RequestState]) -> bool:
        """Whether all known tokens, and the rows of all items, fit behind a prefix, beside what running requests need
        to go on for a while.

        Without that these would be preempted soon, and prefilled again.
        """
        pairs = zip(self.managers, hit.block_ids, strict=True)
        return all(each.has_room(request, block_ids, running) for each, block_ids in pairs)

    def max_tokens_behind(self, hit: PrefixHit) -> int | None:
        """Most tokens that a first chunk behind a prefix may reach to, where there is room for all known tokens
        (`has_room`) and yet not for all at once, since windows give their blocks back meanwhile; None: any."""
        if not self._within_reach:
            return None
        return min(
            (len(block_ids) + each.num_free_beside(block_ids)) * self.block_size
            for each, block_ids in zip(self.managers, hit.block_ids, strict=True)
            if isinstance(each, PagedManager)
        )

    def max_tokens(self, request: RequestState) -> int:
        """Most tokens that the request's tables could hold with all free blocks added."""
        if len(self.paged) == 1:
            return self.paged[0].max_tokens(request)
        return min((each.max_tokens(request) for each in self.paged), default=request.num_expected_tokens)

    # Steps

    def allocate(self, request: RequestState, num_tokens: int) -> tuple[tuple[int, ...], ...]:
        """Make room for a chunk that ends behind `num_tokens` tokens.

        Returns what the worker has to know, by group: the blocks that are new in its tables, at its first chunk the
        prefix included, and the rows that it reads its state from and writes it to. Empty where nothing is new.
        """
        new = tuple(each.allocate(request, num_tokens) for each in self.managers)
        if not self.keeps_state:
            request.num_allocated_tokens = -(-num_tokens // self.block_size) * self.block_size
        return new if any(new) else ()

    def submitted(self, requests: Iterable[RequestState]) -> None:
        """A step with a chunk of each of these requests is on its way: states are where it leaves them."""
        for each in self._states:
            for request in requests:
                each.submitted(request)

    def settled(self, request: RequestState) -> None:
        """A step with a chunk of the request has succeeded: offer the blocks that are full now to others, and take back
        those that no later token sees."""
        num_full = request.num_settled_tokens // self.block_size
        if num_full > request.num_registered_blocks and self.enable_prefix_caching and request.is_cacheable:
            self._commit(request, request.num_registered_blocks, num_full)
        for cross in self._cross:
            cross.settled(request)
        for each in self._within_reach:
            each.give_back(request)

    def _commit(self, request: RequestState, first: int, num_full: int) -> None:
        extend_block_hashes(request, num_full, self.block_size)
        for each in self.managers:
            each.commit(request, first, num_full)
        request.num_registered_blocks = num_full

    def release(self, request: RequestState) -> None:
        """Take the request's blocks back. What was committed can be found until the blocks are reused."""
        for each in self.managers:
            each.release(request)
        request.num_allocated_tokens = request.num_registered_blocks = 0
        request.num_computed_tokens = request.num_settled_tokens = request.num_pending_tokens = 0
        request.is_cacheable = True  # what it computes from here on is new

    def discard(self, request: RequestState) -> None:
        """Remove the hashes of what a failed request computed. Its blocks are still to be released."""
        for each in self.managers:
            each.discard(request)

    def reset_prefix_cache(self, running: Iterable[RequestState]) -> None:
        """Forget all content; what running requests computed, or will, stays theirs alone."""
        for each in self.managers:
            each.pool.forget_all()
        for request in running:
            request.is_cacheable = False
            for each in self.managers:
                each.stop_sharing(request)

    # Books

    def check(self, running: Sequence[RequestState]) -> None:
        """Raise `AssertionError` unless the books of every group agree with these requests. For tests."""
        for each in self.managers:
            each.check(running)

    def check_idle(self) -> None:
        """Raise `AssertionError` unless nothing is held for anyone."""
        for each in self.managers:
            assert each.pool.num_free == each.pool.num_blocks, f"blocks leaked: {each.group.kind}"

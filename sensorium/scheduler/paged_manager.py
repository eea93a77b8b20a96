"""The blocks of one group that keeps positions: full attention, sliding windows and chunked attention.

Owns the group's pool, and the tables of running requests in this group.

Blocks that no later token can see go back while the request goes on, once the step that filled them has succeeded, so
that they can be offered to others before. Steps in flight may still read them; yet they may be given out at once: the
device works in the order in which it is given work, and whoever writes into them is planned, and so submitted, later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sensorium.cache_spec import NO_BLOCK, CacheGroup
from sensorium.scheduler.block_hash import extend_block_hashes
from sensorium.scheduler.block_pool import BlockPool
from sensorium.scheduler.request import RequestState


@dataclass(slots=True, eq=False)
class _Table:
    """One request's blocks, in the order of its positions."""

    block_ids: list[int]
    num_given_back: int
    """Leading entries that are `NO_BLOCK`."""
    num_told: int = 0
    """Leading entries that the worker knows."""


class PagedManager:
    """Invariant: each running request has a table here; `NO_BLOCK` stands in it where a block was given back, or never
    was, which is at its beginning only.

    Args:
        group: Its rule says which positions a token sees.
        max_chunk_tokens: Most tokens that a request computes in one step.
    """

    def __init__(self, group: CacheGroup, max_chunk_tokens: int) -> None:
        self.group = group
        self.pool = BlockPool(group.num_blocks)
        self._tables: dict[RequestState, _Table] = {}
        self._block_size = group.block_size
        self.gives_back = group.reach is not None
        self._most_blocks = group.num_blocks
        """That one request needs at once, however long it is."""
        if group.reach is not None:
            self._most_blocks = min(group.blocks_within_reach(max_chunk_tokens), group.num_blocks)

    def block_ids(self, request: RequestState) -> Sequence[int]:
        """The request's table; empty for one that doesn't run."""
        table = self._tables.get(request)
        return () if table is None else table.block_ids

    # Prefixes

    def longest_hit(self, request: RequestState, num_blocks: int) -> int:
        """How many of the first `num_blocks` blocks can count as computed: what the next token sees is there."""
        if self.gives_back:
            return self._longest_visible_hit(request, num_blocks)
        hashes = request.block_hashes
        for i in range(num_blocks):
            if i == len(hashes):
                # As far again as there were hits: a prompt that shares little isn't hashed to its end before its turn.
                extend_block_hashes(request, min(2 * i + 1, num_blocks), self._block_size)
            if self.pool.lookup(hashes[i]) is None:
                return i
        return num_blocks

    def _longest_visible_hit(self, request: RequestState, num_blocks: int) -> int:
        extend_block_hashes(request, num_blocks, self._block_size)
        hashes, found = request.block_hashes, num_blocks
        i = num_blocks - 1
        while i >= self._first_visible_block(found * self._block_size):
            if self.pool.lookup(hashes[i]) is None:
                found = i  # every longer prefix needs this block: what is visible begins later, but not behind it
            i -= 1
        return found

    def hit(self, request: RequestState, num_blocks: int) -> list[int]:
        """The table of a prefix that `longest_hit` found, with `NO_BLOCK` for what the next token doesn't see."""
        first = self._first_visible_block(num_blocks * self._block_size)
        block_ids = [NO_BLOCK] * first
        for digest in request.block_hashes[first:num_blocks]:
            block_id = self.pool.lookup(digest)
            assert block_id is not None, "a prefix is adopted as it was found"
            block_ids.append(block_id)
        return block_ids

    def adopt(self, request: RequestState, block_ids: Sequence[int]) -> None:
        """Begin the request's table with a prefix."""
        assert request not in self._tables
        first = block_ids.count(NO_BLOCK)
        self.pool.acquire(block_ids[first:])
        self._tables[request] = _Table(list(block_ids), first)

    def _first_visible_block(self, position: int) -> int:
        return self.group.first_visible(position) // self._block_size

    # Room

    def num_blocks_for(self, num_tokens: int) -> int:
        """Most blocks that a request holds on its way to `num_tokens` tokens."""
        return min(-(-num_tokens // self._block_size), self._most_blocks)

    def num_needed(self, num_tokens: int, block_ids: Sequence[int]) -> int:
        """Blocks beside those of a prefix that a request needs on its way to `num_tokens` tokens."""
        return max(self.num_blocks_for(num_tokens) - (len(block_ids) - block_ids.count(NO_BLOCK)), 0)

    def num_held(self, request: RequestState) -> int:
        """Blocks that the request holds now."""
        table = self._tables[request]
        return len(table.block_ids) - table.num_given_back

    def num_free_beside(self, block_ids: Sequence[int]) -> int:
        """Blocks that are free when those of a prefix are taken."""
        first = block_ids.count(NO_BLOCK) if self.gives_back else 0
        return self.pool.num_free - self.pool.num_unused(block_ids[first:] if first else block_ids)

    def has_room(self, request: RequestState, block_ids: Sequence[int], running: Sequence[RequestState]) -> bool:
        """Whether all known tokens fit behind a prefix, beside what running requests need to go on for a while: the
        rest of their prefills, and a block each to grow."""
        num_free = self.num_free_beside(block_ids)
        num_needed = self.num_needed(request.num_tokens, block_ids) + len(running)
        for other in running:
            if not other.is_caught_up:
                num_needed += max(self.num_blocks_for(other.num_tokens) - self.num_held(other), 0)
        return num_needed <= num_free

    def max_tokens(self, request: RequestState) -> int:
        """Most tokens that the request's table could hold with all free blocks added."""
        return (len(self._tables[request].block_ids) + self.pool.num_free) * self._block_size

    # Steps

    def allocate(self, request: RequestState, num_tokens: int) -> tuple[int, ...]:
        """Extend the table to hold `num_tokens` tokens; returns the new entries, to be sent to the worker."""
        table = self._tables[request]
        missing = -(-num_tokens // self._block_size) - len(table.block_ids)
        if missing > 0:
            table.block_ids += self.pool.allocate(missing)
        new = tuple(table.block_ids[table.num_told :])
        table.num_told = len(table.block_ids)
        return new

    def give_back(self, request: RequestState) -> None:
        """Give back what is settled and no token behind the computed ones sees."""
        table = self._tables[request]
        begin = table.num_given_back
        first = self._first_visible_block(request.num_computed_tokens)
        first = min(first, request.num_settled_tokens // self._block_size)
        if first <= begin:
            return
        # The pool reuses a sequence's end first. What stands further ahead is of use to more prefixes.
        self.pool.release(table.block_ids[begin:first][::-1])
        table.block_ids[begin:first] = [NO_BLOCK] * (first - begin)
        table.num_given_back = first

    def commit(self, request: RequestState, first: int, num_full: int) -> None:
        """Offer blocks `[first, num_full)`, which are full and settled, to others."""
        table = self._tables[request]
        for i in range(max(first, table.num_given_back), num_full):
            self.pool.register(table.block_ids[i], request.block_hashes[i])

    def discard(self, request: RequestState) -> None:
        """Let nobody find what a failed request computed."""
        for digest in request.block_hashes:
            self.pool.forget_content(digest)

    def stop_sharing(self, request: RequestState) -> None:
        """Nothing is kept for that: what was computed is offered at `commit`, or not."""

    def release(self, request: RequestState) -> None:
        """Take all blocks of the request back."""
        table = self._tables.pop(request)
        self.pool.release(table.block_ids[table.num_given_back :])

    def check(self, running: Sequence[RequestState]) -> None:
        """Raise `AssertionError` unless the books agree."""
        assert self._tables.keys() == set(running), "a request has a table and doesn't run, or the other way round"
        expected = [0] * self.pool.num_blocks
        for request, table in self._tables.items():
            first = table.num_given_back
            assert table.block_ids[:first] == [NO_BLOCK] * first
            assert len(table.block_ids) * self._block_size >= request.num_computed_tokens
            for block_id in table.block_ids[first:]:
                expected[block_id] += 1
        self.pool.check(expected)

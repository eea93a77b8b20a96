"""The blocks of one group of cross-attention: the rows of a request's media items, which decoder layers attend to.

How many they are is known when a request is admitted, and doesn't change: its blocks are given out then, and go back at
its end. The items' rows lie one item behind the other, without gaps. A chunk that computes the token at which an item
enters the prompt writes the item's rows; all later ones read them.

Requests with the same items share their blocks: `n` outputs of one sound, or the same sound asked about again, which
then needs no encoder either. It is all of a request's items or none, since the rows of several may share a block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sensorium.cache_spec import CacheGroup
from sensorium.scheduler.block_hash import cross_block_hashes
from sensorium.scheduler.block_pool import BlockPool
from sensorium.scheduler.request import RequestState


@dataclass(slots=True, eq=False)
class _Table:
    """One request's blocks, in the order of its items' rows."""

    block_ids: list[int]
    is_written: bool
    """The rows were there when the request was admitted, or its own are known to be."""
    is_told: bool = False
    """The worker knows the blocks."""


class CrossManager:
    """Invariant: each running request has a table here, as long as its items' rows need it.

    Args:
        group: A group of cross-attention.
        shares: Whether requests with the same items share their blocks.
    """

    def __init__(self, group: CacheGroup, *, shares: bool) -> None:
        self.group = group
        self.pool = BlockPool(group.num_blocks)
        self._tables: dict[RequestState, _Table] = {}
        self._block_size = group.block_size
        self._shares = shares

    def has_rows(self, request: RequestState) -> bool:
        """Whether the rows of the request's items need not be encoded and written, as others' are there."""
        table = self._tables.get(request)
        return table.is_written if table is not None else bool(self._found(request))

    def hashes(self, request: RequestState) -> Sequence[bytes]:
        """By which others find the request's blocks; none if they may not."""
        if not (self._shares and request.is_cacheable):
            return ()
        if not request.cross_hashes:
            request.cross_hashes = cross_block_hashes(request, self._num_blocks_of(request))
        return request.cross_hashes

    def _num_blocks_of(self, request: RequestState) -> int:
        return -(-sum(item.cross_rows for item in request.message.media) // self._block_size)

    def _found(self, request: RequestState) -> list[int]:
        """The blocks of others with the same rows; none unless all are there."""
        found = []
        for digest in self.hashes(request):
            block_id = self.pool.lookup(digest)
            if block_id is None:
                return []
            found.append(block_id)
        return found

    # Prefixes

    def longest_hit(self, request: RequestState, num_blocks: int) -> int:
        """How many of the first `num_blocks` blocks of the prompt can count as computed: nobody has to write rows at a
        token in them."""
        if not self.has_rows(request):
            for item in request.message.media:
                num_blocks = min(num_blocks, item.span.offset // self._block_size)
        return num_blocks

    def hit(self, request: RequestState, num_blocks: int) -> list[int]:
        """A prefix says nothing of the items: `adopt` looks for their rows."""
        del request, num_blocks
        return []

    def adopt(self, request: RequestState, block_ids: Sequence[int]) -> None:
        """Give the request blocks for all its items' rows: those of others with the same rows, or new ones."""
        del block_ids
        assert request not in self._tables
        found = self._found(request)
        self.pool.acquire(found)
        self._tables[request] = _Table(found or self.pool.allocate(self._num_blocks_of(request)), bool(found))

    # Room

    def has_room(self, request: RequestState, block_ids: Sequence[int], running: Sequence[RequestState]) -> bool:
        """Whether the request's rows fit. Those of running requests have their blocks."""
        del block_ids, running
        found = self._found(request)
        num_needed = self.pool.num_unused(found) if found else self._num_blocks_of(request)
        return num_needed <= self.pool.num_free

    # Steps

    def allocate(self, request: RequestState, num_tokens: int) -> tuple[int, ...]:
        """The request's blocks, once."""
        del num_tokens
        table = self._tables[request]
        if table.is_told:
            return ()
        table.is_told = True
        return tuple(table.block_ids)

    def commit(self, request: RequestState, first: int, num_full: int) -> None:
        """Nothing: blocks of the prompt are none of these."""
        del request, first, num_full

    def settled(self, request: RequestState) -> None:
        """Offer the request's rows to others once all are written."""
        table = self._tables[request]
        media = request.message.media
        if table.is_written or (media and media[-1].span.offset >= request.num_settled_tokens):
            return
        table.is_written = True
        for block_id, digest in zip(table.block_ids, self.hashes(request), strict=False):
            self.pool.register(block_id, digest)

    def discard(self, request: RequestState) -> None:
        """Let nobody find the rows that a failed request wrote."""
        for digest in request.cross_hashes:
            self.pool.forget_content(digest)

    def stop_sharing(self, request: RequestState) -> None:
        """Nothing is kept for that: rows are offered when they are written, or not."""
        del request

    def release(self, request: RequestState) -> None:
        """Take the request's blocks back."""
        self.pool.release(self._tables.pop(request).block_ids)

    def check(self, running: Sequence[RequestState]) -> None:
        """Raise `AssertionError` unless the books agree."""
        assert self._tables.keys() == set(running), "a request has a table and doesn't run, or the other way round"
        expected = [0] * self.pool.num_blocks
        for request, table in self._tables.items():
            assert len(table.block_ids) == self._num_blocks_of(request)
            for block_id in table.block_ids:
                expected[block_id] += 1
        self.pool.check(expected)

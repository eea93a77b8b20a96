"""Gives requests their KV blocks and finds prefixes that are computed already.

Owns the block pool and, in each request's state, `block_ids`, `block_hashes` and `num_registered_blocks`. Blocks are
shared only when full, so nobody ever writes into a block that another request reads, and nothing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sensorium.scheduler.block_hash import extend_block_hashes
from sensorium.scheduler.block_pool import BlockPool
from sensorium.scheduler.request import RequestState


class KVCacheManager:
    """Invariant: a block can be found by others only after the step that computed it has succeeded (`commit`)."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool) -> None:
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.pool = BlockPool(num_blocks)

    @property
    def usage(self) -> float:
        """Share of the blocks that requests use, 0 to 1."""
        return 1.0 - self.pool.num_free / self.pool.num_blocks

    def num_blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def find_prefix(self, request: RequestState) -> list[int]:
        """Blocks that hold the longest computed prefix of the request, as far as it may use one."""
        if not (self.enable_prefix_caching and request.is_cacheable):
            return []
        block_ids: list[int] = []
        hashes = request.block_hashes
        for i in range(request.max_cached_tokens // self.block_size):
            if i == len(hashes):
                # One by one: a prompt that shares little isn't hashed to its end before it gets its turn.
                extend_block_hashes(request, i + 1, self.block_size)
            block_id = self.pool.lookup(hashes[i])
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def full_block_hashes(self, request: RequestState, begin: int, end: int) -> Sequence[bytes]:
        """Hashes of the blocks that get full when tokens `[begin, end)` are computed; none where nothing is shared."""
        if not (self.enable_prefix_caching and request.is_cacheable):
            return ()
        last = end // self.block_size
        extend_block_hashes(request, last, self.block_size)
        return request.block_hashes[begin // self.block_size : last]

    def adopt(self, request: RequestState, block_ids: Sequence[int]) -> None:
        """Begin a request's block table with a prefix that `find_prefix` found."""
        assert not request.block_ids
        self.pool.acquire(block_ids)
        request.block_ids = list(block_ids)
        request.num_registered_blocks = len(block_ids)
        request.num_computed_tokens = request.num_settled_tokens = len(block_ids) * self.block_size

    def max_tokens(self, request: RequestState) -> int:
        """Most tokens that the request's table could hold with all free blocks added."""
        return (len(request.block_ids) + self.pool.num_free) * self.block_size

    def allocate(self, request: RequestState, num_tokens: int) -> list[int]:
        """Extend the table to hold `num_tokens` tokens; returns the new blocks."""
        missing = self.num_blocks_for(num_tokens) - len(request.block_ids)
        if missing <= 0:
            return []
        block_ids = self.pool.allocate(missing)
        request.block_ids += block_ids
        return block_ids

    def commit(self, request: RequestState) -> None:
        """Offer the blocks that are full now to others. Call only after the step that filled them succeeded."""
        if not (self.enable_prefix_caching and request.is_cacheable):
            return
        num_full = request.num_settled_tokens // self.block_size
        first = request.num_registered_blocks
        if num_full <= first:
            return
        extend_block_hashes(request, num_full, self.block_size)
        for i in range(first, num_full):
            self.pool.register(request.block_ids[i], request.block_hashes[i])
        request.num_registered_blocks = num_full

    def release(self, request: RequestState) -> None:
        """Take the request's blocks back. What was committed can be found until the blocks are reused."""
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_registered_blocks = 0
        request.num_computed_tokens = request.num_settled_tokens = request.num_pending_tokens = 0
        request.is_cacheable = True  # what it computes from here on is new

    def discard(self, request: RequestState) -> None:
        """Take back the blocks of a request that failed, and let nobody find them."""
        self.pool.forget(request.block_ids)
        self.release(request)

    def reset_prefix_cache(self, running: Iterable[RequestState]) -> None:
        """Forget all content; what running requests computed, or will, stays theirs alone."""
        self.pool.forget_all()
        for request in running:
            request.is_cacheable = False

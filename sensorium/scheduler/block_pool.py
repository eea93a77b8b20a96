"""The KV blocks of the worker, as numbers: who uses them, what their content is known as, which are free.

Owns reference counts and the index from content to block. Knows nothing of requests; called by the KV-cache manager.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence


class BlockPool:
    """Blocks `0 ... num_blocks - 1`.

    Invariant: a block is in exactly one of three states: used (reference count above 0), empty (free, its content has
    no name), or evictable (free, its content is in the index under its hash). Empty blocks are reused first, then
    evictable ones in the order in which they were released.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.num_evictions = 0
        self._ref_counts = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._index: dict[bytes, int] = {}
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return len(self._empty) + len(self._evictable)

    @property
    def num_cached(self) -> int:
        """Blocks, used or free, that can be found by their content."""
        return len(self._index)

    def lookup(self, digest: bytes) -> int | None:
        """The block that holds this content, if any."""
        return self._index.get(digest)

    def num_unused(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks are free, so that acquiring them takes from `num_free`."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks for one user; their former content is forgotten."""
        assert count <= self.num_free, "the caller checks num_free first"
        block_ids = []
        for _ in range(count):
            block_id = self._empty.pop() if self._empty else self._evict()
            self._ref_counts[block_id] = 1
            block_ids.append(block_id)
        return block_ids

    def acquire(self, block_ids: Iterable[int]) -> None:
        """Use blocks that were found by `lookup`."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._evictable[block_id]
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """End one use of each block of a sequence. The sequence's end is reused before its beginning."""
        for block_id in reversed(block_ids):
            self._ref_counts[block_id] -= 1
            count = self._ref_counts[block_id]
            assert count >= 0, f"block {block_id} was released more often than it was taken"
            if count == 0:
                self._to_free(block_id)

    def register(self, block_id: int, digest: bytes) -> None:
        """Let a used block be found by its content. Content that is there already stays where it is."""
        if digest not in self._index:
            assert self._hashes[block_id] is None, f"block {block_id} has a name already"
            self._index[digest] = block_id
            self._hashes[block_id] = digest

    def forget(self, block_ids: Iterable[int]) -> None:
        """Remove these blocks' hashes, so that no request finds them by content."""
        for block_id in block_ids:
            digest = self._hashes[block_id]
            if digest is None:
                continue
            del self._index[digest]
            self._hashes[block_id] = None
            if self._ref_counts[block_id] == 0:
                del self._evictable[block_id]
                self._empty.append(block_id)

    def forget_content(self, digest: bytes) -> None:
        """Remove this hash, if it is there, so that no request finds the content."""
        block_id = self._index.get(digest)
        if block_id is not None:
            self.forget([block_id])

    def forget_all(self) -> None:
        """Forget all content."""
        self.forget(list(self._index.values()))

    def check(self, expected_ref_counts: Sequence[int]) -> None:
        """Raise `AssertionError` unless the invariant holds and the counts are as expected."""
        assert self._ref_counts == list(expected_ref_counts), "reference counts differ from the block tables"
        free = [*self._empty, *self._evictable]
        assert len(free) == len(set(free)), "a block is free twice"
        assert set(free) == {i for i, count in enumerate(self._ref_counts) if count == 0}, "free list is wrong"
        assert {d: i for i, d in enumerate(self._hashes) if d is not None} == self._index, "index is wrong"
        assert all(self._hashes[i] is None for i in self._empty), "an empty block has a name"
        assert all(self._hashes[i] is not None for i in self._evictable), "an evictable block has no name"

    def _evict(self) -> int:
        block_id, _ = self._evictable.popitem(last=False)
        digest = self._hashes[block_id]
        assert digest is not None
        del self._index[digest]
        self._hashes[block_id] = None
        self.num_evictions += 1
        return block_id

    def _to_free(self, block_id: int) -> None:
        if self._hashes[block_id] is None:
            self._empty.append(block_id)
        else:
            self._evictable[block_id] = None

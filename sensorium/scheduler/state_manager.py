"""The rows of one group that keeps a state of fixed size per request: who reads and writes which, and snapshots.

A chunk reads the state that the chunk before left in one row, and writes its own into another: a pass that failed can
be repeated, since what it read is still there. Once the step is submitted the row that it read is free, for later
steps only, which the device does later.

That makes snapshots for the prefix cache cheap: the row that a chunk wrote is not given back but kept under the hash of
the block that ends there, as full blocks are. A prefix hit reads its first state from the snapshot; nothing is copied.
Snapshots stand

- at the last block end before the prompt's last token, where prefills are cut for it (`ChunkPlanner`), and at its end;
- at chunks' ends, where `SNAPSHOT_TOKENS` lie between two of a request;
- at the last block end that a request has reached: the next replaces it. A conversation goes on from there, and so does
  a request that was preempted.

Those that nobody uses go least recently used first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from sensorium.cache_spec import NO_BLOCK, CacheGroup
from sensorium.scheduler.block_hash import extend_block_hashes
from sensorium.scheduler.block_pool import BlockPool
from sensorium.scheduler.request import RequestState

SNAPSHOT_TOKENS = 1024
"""Between two snapshots of one request that both stay."""


@dataclass(slots=True, eq=False)
class _Rows:
    """What one request holds."""

    current: int
    """The row with its state; `NO_BLOCK` before its first chunk."""
    last_snapshot: int
    """Tokens before the last snapshot of those that stay."""
    target: int = NO_BLOCK
    """The row that a chunk writes which is planned and not submitted."""
    unsettled: list[tuple[int, int]] = field(default_factory=list)
    """`(number of tokens, row)` of what becomes a snapshot when its step has succeeded."""
    replaceable: bytes | None = None
    """Hash of its last snapshot, if the next one takes its place."""

    def held(self) -> list[int]:
        """All rows that it uses."""
        rows = [row for row in (self.current, self.target) if row != NO_BLOCK]
        return rows + [row for _, row in self.unsettled]


class StateManager:
    """Invariant: a running request holds the row with its state, one more from planning to submission of a chunk, and
    rows that become snapshots when their step has succeeded. Of the last there are at most
    `num_blocks - 2 * max_num_seqs` in all, so that there is always a row for the next chunk.
    """

    def __init__(self, group: CacheGroup, max_num_seqs: int, *, keeps_snapshots: bool) -> None:
        self.group = group
        self.pool = BlockPool(group.num_blocks)
        self._rows: dict[RequestState, _Rows] = {}
        self._block_size = group.block_size
        self._max_unsettled = group.num_blocks - 2 * max_num_seqs if keeps_snapshots else 0
        self._num_unsettled = 0

    # Prefixes

    def longest_hit(self, request: RequestState, num_blocks: int) -> int:
        """The end of the longest prefix of at most `num_blocks` blocks that there is a snapshot of."""
        if not self.pool.num_cached:
            return 0
        extend_block_hashes(request, num_blocks, self._block_size)
        for i in range(num_blocks, 0, -1):
            if self.pool.lookup(request.block_hashes[i - 1]) is not None:
                return i
        return 0

    def hit(self, request: RequestState, num_blocks: int) -> list[int]:
        """The row of a snapshot that `longest_hit` found."""
        if not num_blocks:
            return []
        row = self.pool.lookup(request.block_hashes[num_blocks - 1])
        assert row is not None, "a prefix is adopted as it was found"
        return [row]

    def adopt(self, request: RequestState, block_ids: Sequence[int]) -> None:
        """Begin from a snapshot, or from zeros."""
        assert request not in self._rows
        self.pool.acquire(block_ids)
        self._rows[request] = _Rows(block_ids[0] if block_ids else NO_BLOCK, request.num_computed_tokens)

    # Room

    def has_room(self, request: RequestState, block_ids: Sequence[int], running: Sequence[RequestState]) -> bool:
        """Always: there are as many rows as slots."""
        del request, block_ids, running
        return True

    # Steps

    def allocate(self, request: RequestState, num_tokens: int) -> tuple[int, ...]:
        """The row that a chunk reads its state from, and the one that it writes."""
        del num_tokens
        rows = self._rows[request]
        assert rows.target == NO_BLOCK, "a chunk was planned and not submitted"
        [rows.target] = self.pool.allocate(1)
        return (rows.current, rows.target)

    def submitted(self, request: RequestState) -> None:
        """Give the row back that the chunk reads, and keep what it writes if that becomes a snapshot."""
        rows = self._rows[request]
        if rows.current != NO_BLOCK:
            self.pool.release([rows.current])
        rows.current, rows.target = rows.target, NO_BLOCK
        end = request.num_computed_tokens
        if end % self._block_size == 0 and request.is_cacheable and self._num_unsettled < self._max_unsettled:
            self.pool.acquire([rows.current])
            rows.unsettled.append((end, rows.current))
            self._num_unsettled += 1

    def commit(self, request: RequestState, first: int, num_full: int) -> None:
        """Make snapshots of the states whose steps have succeeded: those at the ends of the first `num_full` blocks."""
        del first
        rows = self._rows[request]
        while rows.unsettled and rows.unsettled[0][0] <= num_full * self._block_size:
            end, row = rows.unsettled.pop(0)
            self._num_unsettled -= 1
            digest = request.block_hashes[end // self._block_size - 1]
            self.pool.register(row, digest)
            self.pool.release([row])
            if rows.replaceable is not None:
                self.pool.forget_content(rows.replaceable)
            rows.replaceable = digest
            if end >= rows.last_snapshot + SNAPSHOT_TOKENS or self._ends_prompt(request, end):
                rows.last_snapshot, rows.replaceable = end, None

    def _ends_prompt(self, request: RequestState, end: int) -> bool:
        """Whether this is a block end from which an equal prompt, or one that begins with this one, goes on."""
        num_prompt_tokens = request.num_prompt_tokens
        return end == num_prompt_tokens or end == (num_prompt_tokens - 1) // self._block_size * self._block_size

    def discard(self, request: RequestState) -> None:
        """Let nobody find what a failed request computed."""
        for digest in request.block_hashes:
            self.pool.forget_content(digest)

    def stop_sharing(self, request: RequestState) -> None:
        """Make no snapshots of what is computed already."""
        rows = self._rows[request]
        self.pool.release([row for _, row in rows.unsettled])
        self._num_unsettled -= len(rows.unsettled)
        rows.unsettled = []
        rows.replaceable = None

    def release(self, request: RequestState) -> None:
        """Take all rows of the request back; snapshots stay."""
        rows = self._rows.pop(request)
        self.pool.release(rows.held())
        self._num_unsettled -= len(rows.unsettled)

    def check(self, running: Sequence[RequestState]) -> None:
        """Raise `AssertionError` unless the books agree."""
        assert self._rows.keys() == set(running), "a request has rows and doesn't run, or the other way round"
        assert self._num_unsettled == sum(len(rows.unsettled) for rows in self._rows.values())
        assert self._num_unsettled <= self._max_unsettled
        expected = [0] * self.pool.num_blocks
        for rows in self._rows.values():
            for row in rows.held():
                expected[row] += 1
        self.pool.check(expected)

"""Bounds how many requests are prepared at once; waiting tenants take turns."""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairTurns:
    """Belongs to one event loop. Invariant: no request waits while there is room.

    `num_at_once`: how many have a turn at the same time.
    """

    def __init__(self, num_at_once: int) -> None:
        self._num_left = num_at_once
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """By tenant, the one whose turn is next first."""

    @asynccontextmanager
    async def turn(self, tenant: str) -> AsyncIterator[None]:
        """Wait for a turn, and have it until the block ends."""
        if self._num_left:
            self._num_left -= 1
        else:
            await self._wait(tenant)
        try:
            yield
        finally:
            self._give_on()

    async def _wait(self, tenant: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # it had just come
                self._give_on()
            raise

    def _give_on(self) -> None:
        while self._waiting:
            tenant, line = next(iter(self._waiting.items()))
            turn = line.popleft()
            self._waiting.move_to_end(tenant)
            if not line:
                del self._waiting[tenant]
            if not turn.done():
                turn.set_result(None)
                return
        self._num_left += 1

"""Bytes of media that are held for requests, counted over all of them while they arrive, and bounded."""

from __future__ import annotations

import gc
import threading
from collections import deque

from sensorium.errors import OverloadedError


class MediaBudget:
    """A bound on bytes that many requests share. Thread-safe.

    Invariant: more than `max_bytes` are held only if one holder has all of them, so that any item within its own limits
    can be loaded, alone if need be.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._num_bytes = 0
        self._returned: deque[int] = deque()
        """Bytes that were returned and are not yet subtracted: the garbage collector may return bytes while this thread
        holds the lock."""

    @property
    def num_bytes(self) -> int:
        """Bytes held now."""
        with self._lock:
            self._count_off()
            return self._num_bytes

    def lease(self, num_bytes: int = 0) -> MediaLease:
        """A lease on `num_bytes`. Raises `OverloadedError` as `MediaLease.grow` does."""
        lease = MediaLease(self)
        lease.grow(num_bytes)
        return lease

    def take(self, num_bytes: int, already: int) -> None:
        """For `MediaLease`: add bytes to a lease that holds `already` bytes."""
        if self._try_take(num_bytes, already):
            return
        gc.collect()  # errors, and the frames that they passed through, may keep leases alive that are no longer needed
        if not self._try_take(num_bytes, already):
            raise OverloadedError(
                f"waiting media: got more than {self._max_bytes} bytes, expected fewer. Send the request again later.",
                retry_after_s=2.0,
            )

    def _try_take(self, num_bytes: int, already: int) -> bool:
        with self._lock:
            self._count_off()
            if self._num_bytes > already and self._num_bytes + num_bytes > self._max_bytes:
                return False
            self._num_bytes += num_bytes
            return True

    def give_back(self, num_bytes: int) -> None:
        """For `MediaLease`: subtract bytes."""
        self._returned.append(num_bytes)

    def _count_off(self) -> None:
        while self._returned:
            self._num_bytes -= self._returned.popleft()


class MediaLease:
    """Some bytes of a budget. They are returned by `release`, or when the lease is garbage."""

    __slots__ = ("_budget", "_num_bytes")

    def __init__(self, budget: MediaBudget) -> None:
        self._budget = budget
        self._num_bytes = 0

    def grow(self, num_bytes: int) -> None:
        """Hold more bytes.

        Raises:
            OverloadedError: The budget is used up, and other leases hold a part of it.
        """
        self._budget.take(num_bytes, self._num_bytes)
        self._num_bytes += num_bytes

    def release(self) -> None:
        """Return all bytes. May be called again."""
        num_bytes, self._num_bytes = self._num_bytes, 0
        if num_bytes:
            self._budget.give_back(num_bytes)

    def __del__(self) -> None:
        self.release()

"""A byte-bounded cache that computes each value once, however many callers ask for it at the same time."""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class CacheStats:
    """Counts since the cache was made, and what it holds now.

    Attributes:
        hits: answers from a stored value.
        shared: answers from a computation that another caller had started.
        misses: computations started.
        evictions: values dropped to stay within the bound.
        num_items: values held.
        num_bytes: bytes held.
        max_bytes: the bound.
    """

    hits: int
    shared: int
    misses: int
    evictions: int
    num_items: int
    num_bytes: int
    max_bytes: int


class _Work(Generic[T]):
    """A running computation, and the futures of the callers that wait for it."""

    def __init__(self) -> None:
        self.waiting: list[Future[T]] = []
        self.source: Future[T] | None = None


class DecodedMediaCache(Generic[T]):
    """Least recently used values go first. Thread-safe.

    Invariants: the bytes held never exceed `max_bytes`; at most one computation runs for a key; every caller gets its
    own copy, so that none can change another's. A failed computation raises in every waiting caller and is not cached.

    Args:
        max_bytes: the bound; a larger value is returned but not kept.
        size_of: bytes that a value takes.
        copy: a private copy of a value.
    """

    def __init__(self, max_bytes: int, *, size_of: Callable[[T], int], copy: Callable[[T], T]) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._copy = copy
        self._lock = threading.Lock()
        self._values: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self._under_way: dict[bytes, _Work[T]] = {}
        self._num_bytes = 0
        self._hits = self._shared = self._misses = self._evictions = 0

    def get_or_compute(self, key: bytes, compute: Callable[[], T]) -> T:
        """The value of `key`: from the cache, from a computation that already runs, or computed in this thread."""
        return self._copy(self.join(key, lambda: _done(compute)).result())

    async def aget_or_compute(self, key: bytes, compute: Callable[[], T], pool: Executor | None = None) -> T:
        """As `get_or_compute`, with the computation and the copy in `pool`; waiting occupies no thread."""
        return await self.aget(key, lambda: _submit(pool, compute), pool)

    async def aget(self, key: bytes, start: Callable[[], Future[T]], pool: Executor | None = None) -> T:
        """As `aget_or_compute`, with a computation that `start` begins elsewhere."""
        value = await asyncio.wrap_future(self.join(key, start))
        return await asyncio.get_running_loop().run_in_executor(pool, self._copy, value)

    def join(self, key: bytes, start: Callable[[], Future[T]]) -> Future[T]:
        """A future for the value of `key`, for this caller only. The value is shared: copy it.

        `start` begins the computation, if nobody has. Cancelling the last future that waits for a computation cancels
        the computation.
        """
        waiting: Future[T] = Future()
        with self._lock:
            if key in self._values:
                self._hits += 1
                self._values.move_to_end(key)
                waiting.set_result(self._values[key][0])
                return waiting
            work = self._under_way.get(key)
            is_mine = work is None
            if work is None:
                self._misses += 1
                work = self._under_way[key] = _Work()
            else:
                self._shared += 1
            work.waiting.append(waiting)
        waiting.add_done_callback(lambda future: self._left(key, work, future))
        if is_mine:
            self._start(key, work, start)
        return waiting

    def stats(self) -> CacheStats:
        """A snapshot."""
        with self._lock:
            return CacheStats(
                self._hits,
                self._shared,
                self._misses,
                self._evictions,
                len(self._values),
                self._num_bytes,
                self._max_bytes,
            )

    def clear(self) -> None:
        """Forget all values."""
        with self._lock:
            self._values.clear()
            self._num_bytes = 0

    def _start(self, key: bytes, work: _Work[T], start: Callable[[], Future[T]]) -> None:
        try:
            source = start()
        except BaseException as error:  # noqa: BLE001  callers that wait must not wait for ever
            self._fail(key, work, error)
            return
        with self._lock:
            work.source = source
            is_wanted = self._under_way.get(key) is work
        if not is_wanted:
            source.cancel()
        source.add_done_callback(lambda done: self._finish(key, work, done))

    def _left(self, key: bytes, work: _Work[T], waiting: Future[T]) -> None:
        """One caller waits no longer. If none does, the next call for this key starts again."""
        if not waiting.cancelled():
            return
        with self._lock:
            if waiting in work.waiting:
                work.waiting.remove(waiting)
            if work.waiting or self._under_way.get(key) is not work:
                return
            del self._under_way[key]
        if work.source is not None:
            work.source.cancel()

    def _finish(self, key: bytes, work: _Work[T], source: Future[T]) -> None:
        try:
            value = source.result()
            size = self._size_of(value)
        except BaseException as error:  # noqa: BLE001  waiting callers get it too, even a KeyboardInterrupt
            self._fail(key, work, error)
            return
        with self._lock:
            self._store(key, value, size)
            waiting = self._end(key, work)
        for each in waiting:
            if each.set_running_or_notify_cancel():
                each.set_result(value)

    def _fail(self, key: bytes, work: _Work[T], error: BaseException) -> None:
        with self._lock:
            waiting = self._end(key, work)
        for each in waiting:
            if each.set_running_or_notify_cancel():
                each.set_exception(error)

    def _end(self, key: bytes, work: _Work[T]) -> list[Future[T]]:
        """Remove a computation, and return the futures that waited for it. The lock is held."""
        if self._under_way.get(key) is work:
            del self._under_way[key]
        waiting, work.waiting = work.waiting, []
        return waiting

    def _store(self, key: bytes, value: T, size: int) -> None:
        if size > self._max_bytes or key in self._values:
            return
        self._values[key] = (value, size)
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, (_, dropped) = self._values.popitem(last=False)
            self._num_bytes -= dropped
            self._evictions += 1


def _done(compute: Callable[[], T]) -> Future[T]:
    """A future whose value is computed in this thread, before this returns."""
    future: Future[T] = Future()
    _settle(future, compute)
    return future


def _submit(pool: Executor | None, compute: Callable[[], T]) -> Future[T]:
    """`compute` in the pool, or in the event loop's own."""
    if pool is not None:
        return pool.submit(compute)
    future: Future[T] = Future()
    asyncio.get_running_loop().run_in_executor(None, lambda: _settle(future, compute))
    return future


def _settle(future: Future[T], compute: Callable[[], T]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(compute())
    except BaseException as error:  # noqa: BLE001  whoever waits learns of it
        future.set_exception(error)

"""A byte-bounded cache in which each value is computed once, however many ask for it at the same time."""

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
        shared: answers from a computation that another caller had under way.
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


class DecodedMediaCache(Generic[T]):
    """Least recently used values go first. Thread-safe.

    Invariants: the bytes held never exceed `max_bytes`; for one key at most one computation is under way; every caller
    gets a copy of its own, so that nobody can change what others get. A failed computation is told to all who wait
    for it and is not remembered.

    Args:
        max_bytes: the bound; a larger value is handed out but not kept.
        size_of: bytes that a value takes.
        copy: a private copy of a value.
    """

    def __init__(self, max_bytes: int, *, size_of: Callable[[T], int], copy: Callable[[T], T]) -> None:
        self._max_bytes = max_bytes
        self._size_of = size_of
        self._copy = copy
        self._lock = threading.Lock()
        self._values: OrderedDict[bytes, tuple[T, int]] = OrderedDict()
        self._under_way: dict[bytes, Future[T]] = {}
        self._num_bytes = 0
        self._hits = self._shared = self._misses = self._evictions = 0

    def get_or_compute(self, key: bytes, compute: Callable[[], T]) -> T:
        """The value of `key`; computed in this thread if nobody has or does, else waited for."""
        future, is_mine = self._claim(key)
        if is_mine:
            self._fulfil(key, future, compute)
        return self._copy(future.result())

    async def aget_or_compute(self, key: bytes, compute: Callable[[], T], pool: Executor | None = None) -> T:
        """As `get_or_compute`, with the computation (and the copy) in `pool`; the waiting holds no thread."""
        loop = asyncio.get_running_loop()
        future, is_mine = self._claim(key)
        if is_mine:
            try:
                loop.run_in_executor(pool, self._fulfil, key, future, compute)
            except BaseException as error:  # the pool is shut down: whoever waits must not wait for ever
                self._fail(key, future, error)
        # A cancelled waiter leaves the computation alone: others may wait for it too.
        value = await asyncio.shield(asyncio.wrap_future(future))
        return await loop.run_in_executor(pool, self._copy, value)

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

    def _claim(self, key: bytes) -> tuple[Future[T], bool]:
        """A future for `key`'s value, and whether the caller has to compute it."""
        with self._lock:
            if key in self._values:
                self._hits += 1
                self._values.move_to_end(key)
                done: Future[T] = Future()
                done.set_result(self._values[key][0])
                return done, False
            if key in self._under_way:
                self._shared += 1
                return self._under_way[key], False
            self._misses += 1
            future: Future[T] = Future()
            self._under_way[key] = future
            return future, True

    def _fulfil(self, key: bytes, future: Future[T], compute: Callable[[], T]) -> None:
        try:
            value = compute()
            size = self._size_of(value)
        except BaseException as error:  # whoever waits learns of it, even of a KeyboardInterrupt
            self._fail(key, future, error)
            return
        with self._lock:
            self._store(key, value, size)
            del self._under_way[key]
        future.set_result(value)

    def _fail(self, key: bytes, future: Future[T], error: BaseException) -> None:
        with self._lock:
            del self._under_way[key]
        future.set_exception(error)

    def _store(self, key: bytes, value: T, size: int) -> None:
        if size > self._max_bytes:
            return
        self._values[key] = (value, size)
        self._num_bytes += size
        while self._num_bytes > self._max_bytes:
            _, (_, dropped) = self._values.popitem(last=False)
            self._num_bytes -= dropped
            self._evictions += 1

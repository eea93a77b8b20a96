"""The store of mapped media: what the input mapper made of an item, kept by the item's identity.

One store in one process, bounded in bytes, least recently used out first. Whoever asks for a key that another
thread is computing waits for that computation. A failure is kept by nobody: those who waited try themselves.
Called from the preprocessing pool.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

Mapped: TypeAlias = Mapping[str, Any]

_ENTRY_OVERHEAD_BYTES = 512
"""What an entry takes beside its tensors: keys, containers, headers."""


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """Counts since the start, and what is held now."""

    hits: int
    misses: int
    waits: int
    """Requests that neither hit nor computed, but waited for another's computation."""
    evictions: int
    num_entries: int
    num_bytes: int
    capacity_bytes: int


class ProcessorCache:
    """Mapped keyword arguments by key. Values are shared between requests: whoever gets one must not change
    it.

    Invariant: the entries' sizes add up to at most `capacity_bytes`; a larger value is returned but not kept.
    With a capacity of 0 nothing is kept, and requests for one key that overlap in time still share one
    computation.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._lock = threading.Lock()
        self._entries: OrderedDict[str, tuple[Mapped, int]] = OrderedDict()
        self._running: dict[str, Future[Mapped]] = {}
        self._num_bytes = 0
        self._hits = self._misses = self._waits = self._evictions = 0

    def get_or_compute(self, key: str, compute: Callable[[], Mapped]) -> Mapped:
        """The value of `key`, from the store, from a computation that runs already, or from `compute`.

        What `compute` raises passes through to its caller alone.
        """
        while True:
            with self._lock:
                if (entry := self._entries.get(key)) is not None:
                    self._entries.move_to_end(key)
                    self._hits += 1
                    return entry[0]
                running = self._running.get(key)
                if running is None:
                    self._misses += 1
                    mine: Future[Mapped] = Future()
                    self._running[key] = mine
                    break
            if running.exception() is None:
                with self._lock:
                    self._waits += 1
                return running.result()
        return self._compute(key, compute, mine)

    def _compute(self, key: str, compute: Callable[[], Mapped], mine: Future[Mapped]) -> Mapped:
        try:
            value = compute()
            self._keep(key, value)
        except BaseException as exc:
            self._finish(key)
            mine.set_exception(exc)
            raise
        self._finish(key)
        mine.set_result(value)
        return value

    def _finish(self, key: str) -> None:
        with self._lock:
            del self._running[key]

    def _keep(self, key: str, value: Mapped) -> None:
        size = nested_bytes(value) + _ENTRY_OVERHEAD_BYTES
        if size > self._capacity_bytes:
            return
        with self._lock:
            self._entries[key] = (value, size)
            self._num_bytes += size
            while self._num_bytes > self._capacity_bytes:
                _, (_, freed) = self._entries.popitem(last=False)
                self._num_bytes -= freed
                self._evictions += 1

    def statistics(self) -> CacheStatistics:
        """A consistent reading of all counts."""
        with self._lock:
            return CacheStatistics(
                hits=self._hits,
                misses=self._misses,
                waits=self._waits,
                evictions=self._evictions,
                num_entries=len(self._entries),
                num_bytes=self._num_bytes,
                capacity_bytes=self._capacity_bytes,
            )


def nested_bytes(value: Any) -> int:
    """Memory that keeping a nested value of tensors and arrays holds on to.

    A view counts with the whole storage behind it, once however many views there are.
    """
    storages: dict[int, int] = {}
    _collect_storages(value, storages)
    return sum(storages.values())


def _collect_storages(value: Any, storages: dict[int, int]) -> None:
    if isinstance(value, Mapping):
        for item in value.values():
            _collect_storages(item, storages)
    elif isinstance(value, list | tuple):
        for item in value:
            _collect_storages(item, storages)
    elif isinstance(value, np.ndarray):
        base = value
        while isinstance(base.base, np.ndarray):
            base = base.base
        storages[id(base)] = base.nbytes
    elif hasattr(value, "untyped_storage"):
        storage = value.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()

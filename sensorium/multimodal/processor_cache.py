"""The store of mapped media: what the input mapper made of an item, kept by the item's identity.

One store in one process, bounded in bytes, least recently used out first. Whoever asks for a key that another thread is
computing waits for that computation. A failure is not kept: those who waited for it compute for themselves. Called from
the preprocessing pool.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np

from sensorium.media.cache import CacheStats, DecodedMediaCache

Mapped: TypeAlias = Mapping[str, Any]

_ENTRY_OVERHEAD_BYTES = 512
"""What an entry takes beside its tensors: keys, containers, headers."""


class ProcessorCache:
    """Mapped keyword arguments by key. Values are shared between requests: callers must not change them.

    With a capacity of 0 nothing is kept, and requests for one key that overlap in time still share one
    computation.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._cache: DecodedMediaCache[Mapped] = DecodedMediaCache(
            capacity_bytes,
            size_of=lambda value: nested_bytes(value) + _ENTRY_OVERHEAD_BYTES,
            copy=lambda value: value,
        )

    def get_or_compute(self, key: str, compute: Callable[[], Mapped]) -> Mapped:
        """The value of `key`, from the store, from a computation that runs already, or from `compute`.

        What `compute` raises passes through to its caller alone.
        """
        is_mine = False

        def mine() -> Mapped:
            nonlocal is_mine
            is_mine = True
            return compute()

        while True:
            try:
                return self._cache.get_or_compute(key.encode(), mine)
            except Exception:
                if is_mine:
                    raise

    def statistics(self) -> CacheStats:
        """A consistent reading of all counts."""
        return self._cache.stats()


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

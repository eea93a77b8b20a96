"""A store of media by the names that their senders gave them, so that media need not be sent twice.

A name refers to what was last sent with it, within one scope: a tenant can't read or replace another's media. Equal
names don't mean equal contents: only digests do.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from sensorium.media import EncodedMedia
from sensorium.media.sampling import FrameSampler
from sensorium.multimodal.processor_cache import nested_bytes

_OVERHEAD_BYTES = 512
"""Bytes of an entry beside its content."""

Key = tuple[bytes, str, str]
"""Scope, modality and name."""


class NamedMedia:
    """Encoded media, or tensors given instead, by scope, modality and name. Least recently used go first. Thread-safe.

    Invariant: at most `max_bytes` are held.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._items: OrderedDict[Key, tuple[Any, int]] = OrderedDict()
        self.num_bytes = 0

    def put(self, key: Key, item: Any) -> None:
        """Store an item, replacing the one of its name; an item larger than the store is not kept.

        A stored item counts in this store, and no longer in the budget of waiting requests.
        """
        item = replace(item, lease=None) if isinstance(item, EncodedMedia) else item
        size = _OVERHEAD_BYTES + (len(item.data) if isinstance(item, EncodedMedia) else nested_bytes(item))
        with self._lock:
            self._drop(key)
            if size > self._max_bytes:
                return
            self._items[key] = (item, size)
            self.num_bytes += size
            while self.num_bytes > self._max_bytes:
                self._drop(next(iter(self._items)))

    def get(self, key: Key, sampler: FrameSampler | None = None) -> Any | None:
        """What was last sent with a name; None if it isn't there. `sampler`: for a clip, the frames wanted."""
        with self._lock:
            if key not in self._items:
                return None
            self._items.move_to_end(key)
            item = self._items[key][0]
        if sampler is not None and isinstance(item, EncodedMedia) and item.sampler.key != sampler.key:
            return replace(item, sampler=sampler)
        return item

    def _drop(self, key: Key) -> None:
        _, size = self._items.pop(key, (None, 0))
        self.num_bytes -= size

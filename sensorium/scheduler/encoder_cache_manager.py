"""Which media items' encoder rows the worker keeps.

Owns the list of kept keys and who holds them; the rows themselves are the worker's. An entry is held from the step that
first reads its rows until all of them are in the KV cache; after that it stays, least recently used first to go, for
other requests with the same item.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable


class EncoderCacheManager:
    """Invariant: the rows kept are at most `capacity_rows`, or belong to one holder that could not be served otherwise.

    A holder is `(request id, offset of the item's span)`: two items of one request may have the same key.
    """

    def __init__(self, capacity_rows: int) -> None:
        self.capacity_rows = capacity_rows
        self.num_rows = 0
        self.num_held_rows = 0
        self._rows: dict[str, int] = {}
        self._holders: dict[str, set[tuple[str, int]]] = {}
        self._evictable: OrderedDict[str, None] = OrderedDict()
        self._freed: list[str] = []

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def is_held(self, key: str) -> bool:
        """Whether a request needs the entry."""
        return bool(self._holders.get(key))

    def is_held_only_by(self, request_id: str) -> bool:
        """Whether only this request holds entries."""
        return all(holder[0] == request_id for holders in self._holders.values() for holder in holders)

    def hold(self, key: str, num_rows: int, holder: tuple[str, int]) -> None:
        """Hold an entry, adding it if it isn't there. The caller makes sure that there is room."""
        if key not in self._rows:
            self._evict_for(num_rows)
            self._rows[key] = num_rows
            self._holders[key] = set()
            self.num_rows += num_rows
            self.num_held_rows += num_rows
        elif key in self._evictable:
            del self._evictable[key]
            self.num_held_rows += self._rows[key]
        self._holders[key].add(holder)

    def release(self, key: str, holder: tuple[str, int]) -> None:
        """End a hold. Nothing happens where the entry was dropped meanwhile."""
        holders = self._holders.get(key)
        if holders is None or holder not in holders:
            return
        holders.discard(holder)
        if not holders:
            self.num_held_rows -= self._rows[key]
            self._evictable[key] = None
            self._evict_for(0)  # an item larger than the capacity stays no longer than it is needed

    def drop(self, keys: Iterable[str]) -> None:
        """Remove entries, held or not: their rows are missing or not to be trusted."""
        for key in keys:
            if key in self._rows:
                if key in self._evictable:
                    del self._evictable[key]
                else:
                    self.num_held_rows -= self._rows[key]
                self._remove(key)

    def take_freed_keys(self) -> tuple[str, ...]:
        """Keys that the worker has to drop, each told once."""
        freed, self._freed = tuple(self._freed), []
        return freed

    @property
    def has_freed_keys(self) -> bool:
        """Whether there is something to tell the worker."""
        return bool(self._freed)

    def check(self) -> None:
        """Raise `AssertionError` unless the books agree."""
        held = {key for key, holders in self._holders.items() if holders}
        assert self._rows.keys() == self._holders.keys()
        assert held.isdisjoint(self._evictable), "a held entry is evictable"
        assert held | self._evictable.keys() == self._rows.keys(), "an entry is neither held nor evictable"
        assert self.num_rows == sum(self._rows.values()), "number of rows is wrong"
        assert self.num_held_rows == sum(self._rows[key] for key in held), "number of held rows is wrong"

    def _evict_for(self, num_rows: int) -> None:
        while self._evictable and self.num_rows + num_rows > self.capacity_rows:
            key, _ = self._evictable.popitem(last=False)
            self._remove(key)

    def _remove(self, key: str) -> None:
        self.num_rows -= self._rows.pop(key)
        del self._holders[key]
        self._freed.append(key)

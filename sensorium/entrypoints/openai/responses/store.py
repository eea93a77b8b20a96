"""Responses kept in memory, so that a client may come back to one: bounded in number and bytes, oldest out first.

A response is kept with the items of the whole conversation up to it. Responses of one conversation share them: an item
counts once, and stays while one that holds it does. Each tenant sees its own only.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sensorium.entrypoints.openai.responses.items import Item

_OVERHEAD_BYTES = 64
"""What a value takes beside its characters."""


class KeptItem:
    """An item, and the bytes that it takes."""

    __slots__ = ("content", "id", "num_bytes")

    def __init__(self, content: Item) -> None:
        self.content = content
        self.id: str = content.get("id", "")
        self.num_bytes = nested_bytes(content)


@dataclass(frozen=True, slots=True, eq=False)
class KeptResponse:
    """A response with its conversation."""

    body: Mapping[str, Any]
    """As its client got it."""
    earlier: tuple[KeptItem, ...]
    """Items of the responses before it, theirs and the client's."""
    given: tuple[KeptItem, ...]
    """Items that the client sent with it."""
    output: tuple[KeptItem, ...]

    def conversation(self) -> tuple[KeptItem, ...]:
        """All items in order."""
        return self.earlier + self.given + self.output


class ResponseStore:
    """Responses by tenant and id. Belongs to the event loop.

    Invariants: at most `max_responses` are held; their bodies and items, each item counted once, take at most
    `max_bytes`.
    """

    def __init__(self, max_responses: int, max_bytes: int) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[bytes, str], tuple[KeptResponse, int]] = OrderedDict()
        self._num_uses: dict[KeptItem, int] = {}
        self._items: dict[tuple[bytes, str], KeptItem] = {}
        """By tenant and id; of several with one id, the latest."""
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def is_on(self) -> bool:
        """Whether anything is kept at all."""
        return self._max_responses > 0 and self._max_bytes > 0

    def put(self, tenant: bytes, response_id: str, response: KeptResponse) -> bool:
        """Keep a response. False, and nothing kept, where it is larger than the store."""
        body_bytes = nested_bytes(response.body)
        items = response.conversation()
        if not self.is_on or body_bytes + _size(items) > self._max_bytes:
            return False
        self._kept[tenant, response_id] = (response, body_bytes)
        self.num_bytes += body_bytes + _OVERHEAD_BYTES * len(items)
        for item in items:
            self.num_bytes += 0 if self._num_uses.get(item) else item.num_bytes
            self._num_uses[item] = self._num_uses.get(item, 0) + 1
            self._items[tenant, item.id] = item
        while len(self._kept) > self._max_responses or self.num_bytes > self._max_bytes:
            self._drop(*next(iter(self._kept)))
        return True

    def get(self, tenant: bytes, response_id: str) -> KeptResponse | None:
        """A response of the tenant, which is young again by that; None if it isn't there."""
        found = self._kept.get((tenant, response_id))
        if found is None:
            return None
        self._kept.move_to_end((tenant, response_id))
        return found[0]

    def get_item(self, tenant: bytes, item_id: str) -> KeptItem | None:
        """An item of the tenant's responses; None if it isn't there."""
        return self._items.get((tenant, item_id))

    def delete(self, tenant: bytes, response_id: str) -> bool:
        """Forget a response; whether it was there."""
        if (tenant, response_id) not in self._kept:
            return False
        self._drop(tenant, response_id)
        return True

    def _drop(self, tenant: bytes, response_id: str) -> None:
        response, body_bytes = self._kept.pop((tenant, response_id))
        items = response.conversation()
        self.num_bytes -= body_bytes + _OVERHEAD_BYTES * len(items)
        for item in items:
            self._num_uses[item] -= 1
            if not self._num_uses[item]:
                del self._num_uses[item]
                self.num_bytes -= item.num_bytes
                if self._items.get((tenant, item.id)) is item:
                    del self._items[tenant, item.id]


def _size(items: tuple[KeptItem, ...]) -> int:
    return sum(item.num_bytes for item in items) + _OVERHEAD_BYTES * len(items)


def nested_bytes(value: object) -> int:
    """About the memory that a value of JSON takes."""
    if isinstance(value, str):
        return len(value) * (1 if value.isascii() else 4) + _OVERHEAD_BYTES
    if isinstance(value, Mapping):
        return _OVERHEAD_BYTES + sum(nested_bytes(key) + nested_bytes(each) for key, each in value.items())
    if isinstance(value, list | tuple):
        return _OVERHEAD_BYTES + sum(map(nested_bytes, value))
    return _OVERHEAD_BYTES

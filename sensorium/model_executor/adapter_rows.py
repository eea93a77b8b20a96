"""Whose adapter each row belongs to, of the rows that go through the layers right now.

A pass mixes requests with different adapters, and a linear layer gets no more than its rows. So the worker says, around
each call of the model's decoder and head, which adapter each row has, and a `LinearMethod` that adds adapters' products
asks here. Code that gives layers only some of the rows says which ones.

Encoders run outside of all this: their rows are the base model's, whoever's request brought the item. That is why
items are shared across adapters, and blocks are not (`scheduler.block_hash.root_hash`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar

import torch


class AdapterRows:
    """The adapters of a pass's rows.

    Args:
        ids: `(num_rows,)` int64: each row's adapter, 0 for the base model.
        present: The adapters among them, and maybe others: the host must not ask a device for them.
    """

    def __init__(self, ids: torch.Tensor, present: Sequence[int]) -> None:
        self.ids = ids
        self.present = tuple(present)
        self._others: dict[int, torch.Tensor] = {}

    def others(self, adapter_id: int) -> torch.Tensor:
        """`(num_rows, 1)`: which rows are not this adapter's."""
        if adapter_id not in self._others:
            self._others[adapter_id] = (self.ids != adapter_id).unsqueeze(1)
        return self._others[adapter_id]

    def of(self, ids: torch.Tensor) -> AdapterRows:
        """The same for some of the rows, whose ids these are."""
        return AdapterRows(ids, self.present)


_current: ContextVar[AdapterRows | None] = ContextVar("adapter_rows", default=None)


def current_adapters() -> AdapterRows | None:
    """The adapters of the rows; None where all rows are the base model's."""
    return _current.get()


def adapter_ids_of_rows(
    adapter_ids: torch.Tensor | None, present: Sequence[int] | None = None
) -> AbstractContextManager[None]:
    """Within it, the rows that go through layers have these adapters. `present`: see `AdapterRows`; found out if not
    given."""
    if adapter_ids is None:
        return _adapters(None) if _current.get() is not None else nullcontext()
    if present is None:
        present = sorted({*adapter_ids.tolist()} - {0})
    return _adapters(AdapterRows(adapter_ids, present))


@contextmanager
def adapter_of_all(adapter_id: int, rows: torch.Tensor) -> Iterator[None]:
    """Within it, `rows` `(num_rows, ...)` of one request, which has this adapter, go through layers."""
    ids = torch.full((len(rows),), adapter_id, device=rows.device) if adapter_id else None
    with adapter_ids_of_rows(ids, (adapter_id,)):
        yield


@contextmanager
def adapters_of_selected(rows: torch.Tensor) -> Iterator[None]:
    """Within it, only these of the rows, by their indices `(num_selected,)`, go through layers."""
    current = _current.get()
    with _adapters(None if current is None else current.of(current.ids.index_select(0, rows))):
        yield


def split_rows(x: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """`torch.split(x, size)`; while a piece is in use, the rows that go through layers are its own."""
    current = _current.get()
    if current is None:
        yield from torch.split(x, size)
        return
    for piece, ids in zip(torch.split(x, size), torch.split(current.ids, size), strict=True):
        with _adapters(current.of(ids)):
            yield piece


@contextmanager
def _adapters(rows: AdapterRows | None) -> Iterator[None]:
    token = _current.set(rows)
    try:
        yield
    finally:
        _current.reset(token)

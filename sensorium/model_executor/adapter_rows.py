"""Whose adapter each row belongs to, of the rows that go through the layers right now.

A pass mixes requests with different adapters, and a linear layer gets no more than its rows. So the worker says, around
each call of the model's decoder and head, which adapter each row has, and a `LinearMethod` that adds adapters' products
asks here. Whoever gives layers a part of the rows only says which.

Encoders run outside of all this: their rows are the base model's, whoever's request brought the item. That is why
items are shared across adapters, and blocks are not (`scheduler.block_hash.root_hash`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_current: ContextVar[torch.Tensor | None] = ContextVar("adapter_ids_of_rows", default=None)


def current_adapter_ids() -> torch.Tensor | None:
    """`(num_rows,)` int64: each row's adapter, 0 for the base model; None where all rows are the base model's."""
    return _current.get()


@contextmanager
def adapter_ids_of_rows(adapter_ids: torch.Tensor | None) -> Iterator[None]:
    """Within it, the rows that go through layers have these adapters."""
    token = _current.set(adapter_ids)
    try:
        yield
    finally:
        _current.reset(token)


def split_rows(x: torch.Tensor, size: int) -> Iterator[torch.Tensor]:
    """`torch.split(x, size)`; while a piece is in use, the rows that go through layers are its own."""
    adapter_ids = _current.get()
    if adapter_ids is None:
        yield from torch.split(x, size)
        return
    for piece, ids in zip(torch.split(x, size), torch.split(adapter_ids, size), strict=True):
        with adapter_ids_of_rows(ids):
            yield piece

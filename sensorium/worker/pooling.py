"""Turns the hidden states of a request's chunks into one vector."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sensorium.config import PoolerConfig


@dataclass(slots=True, eq=False)
class _Pool:
    """What is kept of the rows seen so far."""

    vector: torch.Tensor
    num_rows: int


class Pooler:
    """Pools by `PoolerConfig.pooling_type`: the last row, the mean of all, or the first ("cls"), in float32."""

    def __init__(self, config: PoolerConfig | None) -> None:
        self._config = config or PoolerConfig()
        self._pools: dict[str, _Pool] = {}

    def add(self, request_id: str, hidden: torch.Tensor) -> None:
        """Take in a chunk's rows `(num_rows, hidden_size)`, in order."""
        pool = self._pools.get(request_id)
        kind = self._config.pooling_type
        if kind == "mean":
            vector = hidden.float().sum(0)
            vector = vector if pool is None else pool.vector + vector
        elif kind == "cls":
            vector = hidden[0].float() if pool is None else pool.vector
        else:
            vector = hidden[-1].float()
        self._pools[request_id] = _Pool(vector, (pool.num_rows if pool else 0) + len(hidden))

    def finish(self, request_id: str) -> torch.Tensor:
        """The request's vector `(hidden_size,)` float32; forgets the request."""
        pool = self._pools.pop(request_id)
        vector = pool.vector / pool.num_rows if self._config.pooling_type == "mean" else pool.vector
        return torch.nn.functional.normalize(vector, dim=0) if self._config.normalize else vector

    def remove(self, request_id: str) -> None:
        """Forget a request that ended before its last chunk."""
        self._pools.pop(request_id, None)

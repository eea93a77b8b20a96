"""V0's pooling layer, as classes make it in their constructors.

The engine pools rows itself, chunk by chunk, by the setting `pooling_type` and the checkpoint's files; a class's
`pooler` method is not called.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Any, Self

import torch
from torch import nn

from sensorium.compat.v0.vllm.model_executor.pooling_metadata import PoolingMetadata
from sensorium.compat.v0.vllm.sequence import PoolerOutput
from sensorium.config import PoolingType as OurPoolingType
from sensorium.errors import ModelError
from sensorium.model_executor.layers.pooler import new_pool

__all__ = ["Pooler", "PoolingType"]


class PoolingType(IntEnum):
    """How the rows of a sequence become one."""

    LAST = 0
    ALL = 1
    CLS = 2
    STEP = 3
    MEAN = 4


_OURS: dict[PoolingType, OurPoolingType] = {
    PoolingType.LAST: "last",
    PoolingType.CLS: "cls",
    PoolingType.MEAN: "mean",
}


class Pooler(nn.Module):
    """Pools the rows of each sequence of a batch.

    Raises:
        ModelError: The type is one that picks steps, which is not served.
    """

    def __init__(self, pooling_type: PoolingType, normalize: bool, softmax: bool, **steps: Any) -> None:
        super().__init__()
        if pooling_type not in (*_OURS, PoolingType.ALL):
            raise ModelError(f"pooling_type: got {pooling_type.name}, expected LAST, CLS, MEAN or ALL. Change it.")
        self.pooling_type = pooling_type
        self.normalize = normalize
        self.softmax = softmax

    @classmethod
    def from_config_with_defaults(
        cls, pooler_config: Any, pooling_type: PoolingType, normalize: bool, softmax: bool, **steps: Any
    ) -> Self:
        """What a class asks for; the engine's settings are the engine's own business."""
        return cls(pooling_type, normalize, softmax)

    def forward(self, hidden_states: torch.Tensor, pooling_metadata: PoolingMetadata) -> PoolerOutput:
        """A vector `(hidden_size,)` for each sequence, or all its rows."""
        parts = torch.split(hidden_states, list(pooling_metadata.prompt_lens))
        return PoolerOutput([self._pool(rows) for rows in parts])

    def _pool(self, rows: torch.Tensor) -> torch.Tensor:
        if self.pooling_type is not PoolingType.ALL:
            pool = new_pool(_OURS[self.pooling_type])
            pool.add(rows)
            rows = pool.finish().to(rows.dtype)
        if self.normalize:
            rows = nn.functional.normalize(rows, dim=-1)
        return rows.softmax(-1) if self.softmax else rows

"""What pooling returned."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["PoolerOutput"]


@dataclass
class PoolerOutput:
    """The outputs of a batch, one for each sequence."""

    outputs: list[Any]
    spec_decode_worker_metrics: Any = field(default=None)

    def __getitem__(self, index: int) -> Any:
        return self.outputs[index]

    def __len__(self) -> int:
        return len(self.outputs)

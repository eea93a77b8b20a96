"""Which rows see which."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Self

import torch

from sensorium.errors import ModelError

__all__ = ["BlockDiagonalMask", "LowerTriangularMask"]


class LowerTriangularMask:
    """A row sees itself and earlier ones."""


@dataclass(frozen=True)
class BlockDiagonalMask:
    """Sequences one behind the other, each of which sees itself only."""

    seqlens: tuple[int, ...]

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        device: torch.device | None = None,
    ) -> Self:
        """Sequences of these lengths. Raises `ModelError` if those of keys are others."""
        lens = tuple(int(each) for each in q_seqlen)
        if kv_seqlen is not None and tuple(int(each) for each in kv_seqlen) != lens:
            raise ModelError("kv_seqlen: got other lengths than q_seqlen, expected the same. Leave kv_seqlen out.")
        return cls(lens)

    def starts_of(self, num_rows: int) -> list[int]:
        """Where each sequence begins, and the end. Raises `ModelError` if they don't come to so many rows."""
        starts = [0, *accumulate(self.seqlens)]
        if starts[-1] != num_rows:
            raise ModelError(f"BlockDiagonalMask: got sequences of {starts[-1]} rows in all, expected {num_rows}.")
        return starts

"""Which rows belong together when hidden states are pooled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["PoolingMetadata"]


@dataclass
class PoolingMetadata:
    """A batch whose rows are pooled sequence by sequence."""

    seq_groups: Sequence[tuple[Sequence[int], Any]] = ()
    """Ids of sequences, and their pooling parameters."""
    seq_data: Mapping[int, Any] = field(default_factory=dict)
    """By id of a sequence."""
    prompt_lens: Sequence[int] = ()
    """Rows of each sequence, which lie one after the other."""

"""The masks of all slots in memory that the engine and the mask server share.

One bit for each token of the vocabulary, the lowest first, in 32-bit words: `(num_slots, num_words)`. In front of them
one number for each slot: its `RowState`.
"""

from __future__ import annotations

import mmap
from typing import Any, TypeAlias

import numpy as np

Int32Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


class MaskMemory:
    """Both sides map the same file without a name; the memory goes back when both are gone."""

    def __init__(self, fd: int, num_slots: int, vocab_size: int) -> None:
        """`fd`: an open file of `size_bytes`; the caller closes it."""
        num_words = -(-vocab_size // 32)
        self._map = mmap.mmap(fd, self.size_bytes(num_slots, vocab_size))
        words: Int32Array = np.frombuffer(self._map, dtype=np.int32)
        self.states: Int32Array = words[:num_slots]
        """`(num_slots,)`"""
        self.masks: Int32Array = words[num_slots:].reshape(num_slots, num_words)
        """`(num_slots, num_words)`"""

    @staticmethod
    def size_bytes(num_slots: int, vocab_size: int) -> int:
        """Bytes of states and masks."""
        return 4 * num_slots * (1 + -(-vocab_size // 32))

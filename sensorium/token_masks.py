"""Masks of the tokens that may come next, passed from the mask server to the sampler.

A mask server (`sensorium.grammar`) writes masks into memory that a worker maps too, and signals when they are written.
A step carries a handle, `StepMasks`, to that memory: the worker has no grammars, and may run in any process that open
files can be passed to.
"""

from __future__ import annotations

import enum
import mmap
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import msgspec
import numpy as np

Int32Array: TypeAlias = "np.ndarray[Any, np.dtype[np.int32]]"


class RowState(enum.IntEnum):
    """What a row's mask means."""

    FREE = 0
    """The grammar has not begun: any token may come, and the mask says nothing."""
    HELD = 1
    """The mask says which tokens may come."""
    COMPLETE = 2
    """No token may come: the output ends."""
    FAILED = 3
    """The output can't go on."""


class RowFailure(msgspec.Struct, frozen=True):
    """Why an output can't go on, fit for its caller."""

    message: str
    status: int = 400


class RowsDone(msgspec.Struct, frozen=True):
    """The masks of a numbered order are in the memory. From the mask server to the worker."""

    number: int
    failures: dict[int, RowFailure]
    """By row: outputs that can't go on."""


class MaskMemory:
    """The states and masks of all rows. Both sides map the same file; the memory is freed when both have ended.

    A mask has one bit for each token of the vocabulary, the lowest first, in 32-bit words.
    """

    def __init__(self, fd: int, num_rows: int, vocab_size: int) -> None:
        """`fd`: an open file of `size_bytes`; the caller closes it."""
        num_words = -(-vocab_size // 32)
        self._map = mmap.mmap(fd, self.size_bytes(num_rows, vocab_size))
        words: Int32Array = np.frombuffer(self._map, dtype=np.int32)
        self.states: Int32Array = words[:num_rows]
        """`(num_rows,)`: a `RowState` each."""
        self.masks: Int32Array = words[num_rows:].reshape(num_rows, num_words)
        """`(num_rows, num_words)`"""

    @staticmethod
    def size_bytes(num_rows: int, vocab_size: int) -> int:
        """Bytes of states and masks."""
        return 4 * num_rows * (1 + -(-vocab_size // 32))


class MaskSource:
    """Where one mask server's masks are found: its memory, and the pipe that its `RowsDone` come out of.

    Holds open files of this process, and closes them when the handle is garbage. A worker maps the memory and
    reads the pipe by duplicates; there is one reader. In another process the same source has other file numbers.
    """

    __slots__ = ("done_fd", "memory_fd", "num_rows", "source_id", "vocab_size")

    def __init__(self, source_id: int, num_rows: int, vocab_size: int, memory_fd: int, done_fd: int) -> None:
        """Takes the files over. `source_id`: no other mask server of this engine has it."""
        self.source_id = source_id
        self.num_rows = num_rows
        self.vocab_size = vocab_size
        self.memory_fd = memory_fd
        self.done_fd = done_fd

    def __del__(self) -> None:
        os.close(self.memory_fd)
        os.close(self.done_fd)


class MaskRow(msgspec.Struct, frozen=True):
    """Which row of the memory an output has."""

    row: int
    """Its mask for the next token. The rows behind it have those for tokens behind drafts, as many as there are."""
    begun: int
    """The first order for this output. Results of earlier orders belong to another output."""


@dataclass(frozen=True, slots=True, eq=False)
class StepMasks:
    """The handle in a step: which of its requests are held to a grammar, and where their masks will be."""

    source: MaskSource | None
    """None: the mask server has ended."""
    number: int
    """Masks are there once the source has said that this order is done."""
    rows: Mapping[str, MaskRow]
    """By request id."""
    lost_request_ids: frozenset[str] = field(default_factory=frozenset)
    """Requests whose masks went with an earlier source: they can't go on."""

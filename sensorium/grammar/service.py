"""The engine's ends of one pair of grammar processes: started, spoken to, ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe

import msgspec

from sensorium.anonymous_file import anonymous_file
from sensorium.grammar.mask_memory import MaskMemory
from sensorium.messages import Vocabulary

_EXIT_GRACE_S = 2.0


class GrammarService:
    """Processes with nothing inherited but five open files. They end when this end closes, however it does."""

    def __init__(self, vocabulary: Vocabulary, num_slots: int, deadline_s: float) -> None:
        """See `process.main`. Takes milliseconds: indexing the vocabulary goes on in the process."""
        memory_fd = anonymous_file(size_bytes=MaskMemory.size_bytes(num_slots, vocabulary.size))
        vocabulary_fd = anonymous_file(msgspec.msgpack.encode(vocabulary))
        self.checks, checks = Pipe()
        self.loads, loads = Pipe()
        self.masks, masks = Pipe()
        others: list[Connection] = [checks, loads, masks]
        try:
            self.memory = MaskMemory(memory_fd, num_slots, vocabulary.size)
            fds = [vocabulary_fd, memory_fd, *(each.fileno() for each in others)]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sensorium.grammar.process"),
                    *(",".join(map(str, fds)), str(num_slots), str(deadline_s)),
                ],
                pass_fds=fds,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
            )
        finally:
            os.close(memory_fd)
            os.close(vocabulary_fd)
            for each in others:
                each.close()

    def close(self) -> None:
        """End the processes. May be called again."""
        for each in (self.checks, self.loads, self.masks):
            each.close()
        try:
            self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_GRACE_S)

"""The engine's ends of one pair of grammar processes: started, spoken to, ended."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from multiprocessing.connection import Connection, Pipe

import msgspec

from sensorium.anonymous_file import anonymous_file
from sensorium.grammar.messages import RowUpdate, RowUpdates
from sensorium.messages import Vocabulary
from sensorium.token_masks import MaskMemory, MaskSource

_EXIT_GRACE_S = 2.0


class GrammarService:
    """Processes with nothing inherited but six open files. They end when this end closes, however it does."""

    def __init__(self, service_id: int, vocabulary: Vocabulary, num_rows: int, deadline_s: float) -> None:
        """See `process.main`. Takes milliseconds: indexing the vocabulary goes on in the process."""
        memory_fd = anonymous_file(size_bytes=MaskMemory.size_bytes(num_rows, vocabulary.size))
        vocabulary_fd = anonymous_file(msgspec.msgpack.encode(vocabulary))
        self.checks, checks = Pipe()
        self.loads, loads = Pipe()
        orders, self.rows = Pipe(duplex=False)
        reading, done = Pipe(duplex=False)
        self.source = MaskSource(service_id, num_rows, vocabulary.size, memory_fd, os.dup(reading.fileno()))
        """What a worker needs to have the masks."""
        self.num_orders = 0
        """Orders that were sent to the mask server; the last one's number."""
        others: list[Connection] = [checks, loads, orders, done]
        try:
            fds = [vocabulary_fd, memory_fd, *(each.fileno() for each in others)]
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "sensorium.grammar.process"),
                    *(",".join(map(str, fds)), str(num_rows), str(deadline_s)),
                ],
                pass_fds=fds,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
                stdin=subprocess.DEVNULL,
            )
        finally:
            os.close(vocabulary_fd)
            for each in (reading, *others):
                each.close()

    def order(self, updates: list[RowUpdate]) -> None:
        """Have the mask server follow rows. Raises `OSError` if it has ended."""
        self.num_orders += 1
        self.rows.send_bytes(msgspec.msgpack.encode(RowUpdates(self.num_orders, updates)))

    def close(self) -> None:
        """End the processes. May be called again."""
        for each in (self.checks, self.loads, self.rows):
            each.close()
        try:
            self._process.wait(_EXIT_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_EXIT_GRACE_S)

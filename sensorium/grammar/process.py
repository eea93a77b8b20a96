"""The grammar processes: one indexes the vocabulary, forks the mask server, and goes on as the checker."""

from __future__ import annotations

import os
import signal
import sys
from multiprocessing.connection import Connection

import msgspec

from sensorium.grammar.checker import Checker
from sensorium.grammar.mask_server import MaskServer, serve_masks, start_loading
from sensorium.grammar.messages import NO_CHECK, Verdict
from sensorium.grammar.store import GrammarStore
from sensorium.grammar.vocabulary import index_vocabulary
from sensorium.messages import Vocabulary
from sensorium.token_masks import MaskMemory


def main(fds: list[int], num_rows: int, deadline_s: float) -> None:
    """Serve until the engine closes its ends.

    Args:
        fds: Numbers of open files: vocabulary, mask memory, and the connections for checks, loading, rows, and what is
            done.
        num_rows: Outputs that may be held to a grammar at once.
        deadline_s: Most seconds that a grammar may take to compile.
    """
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the engine, whose end is the sign to stop
    vocabulary_fd, memory_fd, *connection_fds = fds
    checks, loads, rows, done = (Connection(fd) for fd in connection_fds)
    with open(vocabulary_fd, "rb") as file:
        vocabulary = msgspec.msgpack.decode(file.read(), type=Vocabulary)
    try:
        tokenizer = index_vocabulary(vocabulary)
    except ValueError as error:
        checks.send_bytes(msgspec.msgpack.encode(Verdict(NO_CHECK, str(error))))
        return
    pid = os.fork()
    if pid == 0:
        checks.close()
        memory = MaskMemory(memory_fd, num_rows, vocabulary.size)
        store = GrammarStore(tokenizer)
        start_loading(store, loads)
        serve_masks(MaskServer(store, memory, vocabulary.eos_token_ids), rows, done)
        os._exit(0)
    os.close(memory_fd)
    loads.close()
    rows.close()
    done.close()
    try:
        Checker(checks, tokenizer, deadline_s).run()
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


if __name__ == "__main__":
    main([int(each) for each in sys.argv[1].split(",")], int(sys.argv[2]), float(sys.argv[3]))

"""A rank beside the first as a process of its own; see `sensorium.executor.rank_server`."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from typing import NoReturn

import msgspec

from sensorium.config import EngineConfig
from sensorium.engine.args import EngineArgs
from sensorium.engine.loading import LOADING
from sensorium.executor.rank_server import RankServer
from sensorium.ipc.channel import socket_from

_ORPHAN_GRACE_S = 10.0
"""How long a step may go on after the executor is gone."""


def resolve(settings: msgspec.Raw) -> EngineConfig:
    """The configuration that settings stand for, as the engine core makes it."""
    with LOADING:
        return msgspec.msgpack.decode(settings, type=EngineArgs).create_engine_config()


def _exit_soon() -> None:
    """End this process even if its step never returns."""
    timer = threading.Timer(_ORPHAN_GRACE_S, os._exit, [1])
    timer.daemon = True
    timer.start()


def main() -> NoReturn:
    """The process. Argument: the number of the socket's file."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the executor, which says when to stop
    is_well = False
    try:
        is_well = RankServer(socket_from(sys.argv[1]), resolve, _exit_soon).serve()
    finally:
        logging.shutdown()
        # Taking a loaded torch apart takes a second that the executor would wait for.
        os._exit(0 if is_well else 1)


if __name__ == "__main__":
    main()

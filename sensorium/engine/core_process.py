"""The engine core as a process of its own: takes requests from a channel, steps, sends outputs.

One thread receives and decodes; the main thread owns the core. The process ends when it receives `Stop`, when a step
fails, or when the front has ended.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import cast

from sensorium import logger as package_logger
from sensorium.engine.args import EngineArgs
from sensorium.engine.codec import decode_to_core
from sensorium.engine.core import EngineCore
from sensorium.engine.core_messages import (
    Abort,
    Add,
    CoreOutputs,
    Died,
    Ready,
    Start,
    StartFailed,
    Stop,
    ToFront,
    UseVocabulary,
)
from sensorium.engine.loading import LOADING
from sensorium.errors import EngineDeadError, SensoriumError
from sensorium.ipc.channel import BlockingChannel, socket_from
from sensorium.ipc.codec import EncodedMessage, decode_request, encode
from sensorium.logger import LogFormat, LogLevel, get_logger
from sensorium.messages import EngineOutput, EngineRequest, FinishReason, RequestFailure

logger = get_logger(__name__)

_STATS_INTERVAL_S = 0.25
_ORPHAN_GRACE_S = 10.0
"""How long a step may go on after the front has ended."""

CoreFactory = Callable[[EngineArgs], EngineCore]


class _Added:
    """A decoded `Add`."""

    __slots__ = ("requests",)

    def __init__(self, requests: list[EngineRequest]) -> None:
        self.requests = requests


_Order = _Added | UseVocabulary | Abort | Stop


def make_core(args: EngineArgs) -> EngineCore:
    """Load a model, as the settings say."""
    with LOADING:
        return EngineCore(args.create_engine_config())


class CoreServer:
    """Runs one core over one channel."""

    def __init__(
        self, sock: socket.socket, make: CoreFactory = make_core, on_orphaned: Callable[[], None] | None = None
    ) -> None:
        """`on_orphaned` is called, in another thread, as soon as the front has ended."""
        self._channel = BlockingChannel(sock)
        self._make = make
        self._on_orphaned = on_orphaned
        self._orders: SimpleQueue[_Order] = SimpleQueue()
        self._args: SimpleQueue[EngineArgs | None] = SimpleQueue()
        self._stats_time_s = 0.0

    def serve(self) -> bool:
        """Load, step until told to stop, free everything. Returns whether all went well."""
        receiver = threading.Thread(target=self._receive, name="sensorium-core-receiver", daemon=True)
        receiver.start()
        core: EngineCore | None = None
        try:
            args = self._args.get()
            if args is None:
                return True
            core = self._load(args)
            if core is None:
                return False
            self._send(Ready(core.report))
            return self._run(core)
        except OSError:
            logger.info("the front is gone")
            return True
        finally:
            self._channel.close()
            if core is not None:
                core.shutdown()

    def _load(self, args: EngineArgs) -> EngineCore | None:
        try:
            return self._make(args)
        except SensoriumError as error:
            self._send(StartFailed(type(error).__name__, str(error)))
        except Exception as error:
            logger.exception("loading failed")
            self._send(StartFailed(EngineDeadError.__name__, f"loading failed: {type(error).__name__}: {error}"))
        return None

    def _run(self, core: EngineCore) -> bool:
        while True:
            try:
                while not core.has_unfinished_requests() and self._orders.empty() and core.use_idle_time():
                    pass
                if not self._take_orders(core):
                    return True
                if not core.has_unfinished_requests():
                    continue
                outputs = core.step()
            except OSError:
                raise  # the front is gone
            except EngineDeadError as error:
                self._send(Died(str(error)))
                return False
            except Exception as error:
                logger.exception("a step failed")
                self._send(Died(f"the engine has ended: {type(error).__name__}. Restart it."))
                return False
            self._tell(core, outputs)

    def _take_orders(self, core: EngineCore) -> bool:
        """Handle all received messages; wait for one if there is nothing else to do. False: stop."""
        while not self._orders.empty() or not core.has_unfinished_requests():
            order = self._next_order(core)
            if isinstance(order, Stop):
                return False
            if isinstance(order, UseVocabulary):
                core.use_vocabulary(order.vocabulary)
            elif isinstance(order, Abort):
                core.abort(order.request_ids)  # the front knows already
                self._tell(core, [])
            else:
                self._add(core, order.requests)
        return True

    def _next_order(self, core: EngineCore) -> _Order:
        """Wait for a message, and notice meanwhile if the core can't go on. Raises `EngineDeadError`."""
        while True:
            try:
                return self._orders.get(timeout=core.idle_check_s)
            except Empty:
                core.use_idle_time()

    def _add(self, core: EngineCore, requests: list[EngineRequest]) -> None:
        for request in requests:
            try:
                core.add_request(request)
            except SensoriumError as error:
                failure = RequestFailure.of(error)
                output = EngineOutput(request.request_id, finish_reason=FinishReason.ERROR, failure=failure)
                self._tell(core, [output])

    def _tell(self, core: EngineCore, outputs: list[EngineOutput]) -> None:
        now_s = time.monotonic()
        is_due = now_s - self._stats_time_s >= _STATS_INTERVAL_S or not core.has_unfinished_requests()
        if is_due:
            self._stats_time_s = now_s
        if outputs or is_due:
            self._send(CoreOutputs(outputs, core.stats() if is_due else None))

    def _send(self, message: ToFront) -> None:
        self._channel.send(encode(message))

    def _receive(self) -> None:
        """The receiving thread: decodes, so that the main thread only steps."""
        try:
            for frame in self._channel.receive():
                if self._take(frame):
                    return
        except Exception:
            logger.exception("a message from the front can't be read")
        self._args.put(None)
        self._orders.put(Stop())
        if self._on_orphaned is not None:
            self._on_orphaned()

    def _take(self, frame: EncodedMessage) -> bool:
        """Pass a message on to the main thread; returns whether it was the last."""
        message = decode_to_core(frame.payload)
        if isinstance(message, Start):
            self._args.put(message.args)
        elif isinstance(message, Add):
            fd, frame.fd = frame.fd, None
            base = decode_request(message.request, fd)
            requests = [replace(base, request_id=name, sampling_params=params) for name, params in message.outputs]
            self._orders.put(_Added(requests))
        else:
            self._orders.put(message)
        return isinstance(message, Stop)


def _exit_soon() -> None:
    """End this process even if its step never returns."""
    timer = threading.Timer(_ORPHAN_GRACE_S, os._exit, [1])
    timer.daemon = True
    timer.start()


def main() -> int:
    """The process. Arguments: the number of the socket's file, then the level and the form of the log."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)  # meant for the front, which sends `Stop`
    sock = socket_from(sys.argv[1])
    level, form = cast(LogLevel, sys.argv[2]), cast(LogFormat, sys.argv[3])
    package_logger.configure(package_logger.LogSettings(level, form))
    try:
        return 0 if CoreServer(sock, on_orphaned=_exit_soon).serve() else 1
    finally:
        logging.shutdown()


if __name__ == "__main__":
    sys.exit(main())

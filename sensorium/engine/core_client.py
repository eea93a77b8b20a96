"""The front's handle on an engine core: starts it, exchanges messages with it, and notices its end.

The core is a process of its own, or, for tests and small tools, a thread of this one; both speak the same messages over
the same channel.
"""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable

import msgspec

from sensorium.engine.args import EngineArgs
from sensorium.engine.codec import decode_to_front
from sensorium.engine.core_messages import Abort, CoreOutputs, Died, Ready, Start, StartFailed, Stop
from sensorium.engine.core_process import CoreFactory, CoreServer, make_core
from sensorium.errors import EngineDeadError, SensoriumError, error_named
from sensorium.ipc.channel import AsyncChannel, channel_pair
from sensorium.ipc.codec import EncodedMessage, encode
from sensorium.logger import DEFAULT_LOG, LogSettings, get_logger
from sensorium.messages import LoadReport

logger = get_logger(__name__)

_KILL_GRACE_S = 5.0


class CoreClient:
    """One engine core, from its start to its end.

    Args:
        args: settings, which the core resolves by itself.
        on_outputs: called on the event loop with the outputs of each step.
        on_death: called once if the core ends unasked.
        make: makes the core, in a thread of this process; by default it gets a process of its own.
    """

    def __init__(
        self,
        args: EngineArgs,
        on_outputs: Callable[[CoreOutputs], None],
        on_death: Callable[[EngineDeadError], None],
        *,
        make: CoreFactory | None = None,
        log: LogSettings = DEFAULT_LOG,
    ) -> None:
        self._on_news = on_outputs
        self._on_death = on_death
        self._ready: asyncio.Future[LoadReport] = asyncio.get_running_loop().create_future()
        self._is_stopping = False
        self._failure: SensoriumError | None = None
        own, other = channel_pair()
        self._core: _Process | _Thread = _Process(other, log) if make is None else _Thread(other, make)
        self._channel = AsyncChannel(own, self._receive, self._closed)
        self._channel.send(encode(Start(args)))

    @property
    def failure(self) -> SensoriumError | None:
        """Why the core can't be used; None while it can."""
        return self._failure

    @property
    def pid(self) -> int:
        """Id of the process that the core runs in."""
        return self._core.pid

    async def ready(self) -> LoadReport:
        """Wait until the model is loaded.

        Raises:
            ConfigError, ModelError, WeightsError: It can't be served.
            EngineDeadError: The core ended.
        """
        return await asyncio.shield(self._ready)

    def add(self, request: EncodedMessage) -> None:
        """Send an encoded `Add`."""
        self._channel.send(request)

    def abort(self, request_ids: list[str]) -> None:
        """End requests in the core."""
        if request_ids:
            self._channel.send(encode(Abort(request_ids)))

    async def stop(self, timeout_s: float = 30.0) -> None:
        """Let the core free everything and end; kill it if it takes longer than that, with 0 at once."""
        self._is_stopping = True
        self._channel.send(encode(Stop()))
        try:
            await asyncio.to_thread(self._core.wait, timeout_s)
        finally:
            self._channel.close()

    def _receive(self, payload: bytes) -> None:
        try:
            message = decode_to_front(payload)
        except msgspec.MsgspecError:
            logger.exception("a message from the engine core can't be read")
            self._fail(EngineDeadError("the engine core sent a message that can't be read. Restart the engine."))
            return
        if isinstance(message, CoreOutputs):
            self._on_news(message)
        elif isinstance(message, Ready):
            self._ready.set_result(message.report)
        elif isinstance(message, StartFailed):
            self._fail(error_named(message.error, message.message))
        else:
            assert isinstance(message, Died)
            self._fail(EngineDeadError(message.message))

    def _closed(self) -> None:
        if not self._is_stopping:
            self._fail(EngineDeadError("the engine core has ended without a message. Restart the engine."))

    def _fail(self, error: SensoriumError) -> None:
        if self._failure is not None:
            return
        self._failure = error
        if not self._ready.done():
            self._ready.set_exception(error)
            self._ready.exception()  # a waiting caller gets it; without one, asyncio need not warn
        elif isinstance(error, EngineDeadError):
            logger.error("%s", error)
            self._on_death(error)


class _Process:
    """A core in a separate process, which inherits only its socket."""

    def __init__(self, sock: socket.socket, log: LogSettings) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
        command = [sys.executable, "-m", "sensorium.engine.core_process", str(sock.fileno()), log.level, log.form]
        with sock:
            self._process = subprocess.Popen(
                command, pass_fds=[sock.fileno()], env=environment, stdin=subprocess.DEVNULL
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, timeout_s: float) -> None:
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            if timeout_s:
                logger.warning("the engine core has not ended within %.0f s and is killed", timeout_s)
            self._process.kill()
            self._process.wait(_KILL_GRACE_S)


class _Thread:
    """A core in a thread."""

    def __init__(self, sock: socket.socket, make: CoreFactory) -> None:
        server = CoreServer(sock, make)
        self._thread = threading.Thread(target=server.serve, name="sensorium-core", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        return os.getpid()

    def wait(self, timeout_s: float) -> None:
        self._thread.join(timeout_s)
        if timeout_s and self._thread.is_alive():
            logger.warning("the engine core's thread has not ended within %.0f s", timeout_s)


IN_THIS_PROCESS: CoreFactory = make_core
"""A value for `make`: the ordinary core, in a thread."""

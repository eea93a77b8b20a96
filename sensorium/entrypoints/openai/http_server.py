"""uvicorn's server, with deadlines for connections and a bound on their number."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import uvicorn

from sensorium.entrypoints.openai.connections import NUM_RESERVED, Connections, Deadlines
from sensorium.entrypoints.openai.http_protocol import HttpProtocol, TlsProtocol
from sensorium.entrypoints.openai.listening import BACKLOG
from sensorium.logger import AtMostOften, get_logger

logger = get_logger(__name__)
_asyncio_lines = AtMostOften()
"""Asyncio's logger, which writes a line for each write to a client that has disconnected."""

ACCEPTED_AT_ONCE = 16
"""Connections accepted before any is checked: this many open files beyond the bound may exist for a moment."""
_SWEEP_INTERVAL_S = 0.5


class HttpServer(uvicorn.Server):
    """Stops by `stop`. Uvicorn's own way is to let a signal end the process once its connections are closed, which
    would leave no time for the engine.

    Args:
        config: how uvicorn runs the application.
        max_connections: connections whose requests are served; a few more are let in.
        deadlines: how long clients may take.
        url: where it is, for the log.
    """

    connections: Connections

    def __init__(self, config: uvicorn.Config, max_connections: int, deadlines: Deadlines, *, url: str) -> None:
        super().__init__(config)
        self._url = url
        self._max_open = max_connections + NUM_RESERVED
        self._deadlines = deadlines
        self._sweeper: asyncio.Task[None] | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn: begin to answer on sockets that listen, and say so."""
        loop = asyncio.get_running_loop()
        self.connections = Connections(self._max_open, self._deadlines)
        logging.getLogger("asyncio").addFilter(_asyncio_lines)
        loop.set_exception_handler(self.connections.take_loop_error)
        self._sweeper = loop.create_task(self._sweep())
        self.servers = []
        for each in sockets or ():
            self.servers.append(await loop.create_server(self._protocol, sock=each, backlog=ACCEPTED_AT_ONCE))
            each.listen(BACKLOG)  # more may wait than are accepted at once; asyncio uses one number for both
        self.started = True
        logger.info("Sensorium running on %s (Ctrl-C stops it)", self._url)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        await super().shutdown(sockets)
        if self._sweeper is not None:
            self._sweeper.cancel()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone."""
        yield

    def stop(self) -> None:
        """Finish open requests; on a second call, don't."""
        self.force_exit = self.should_exit
        self.should_exit = True

    def _protocol(self) -> asyncio.BaseProtocol:
        http = HttpProtocol(
            self.connections, config=self.config, server_state=self.server_state, app_state=self.lifespan.state
        )
        if self.config.ssl is None:
            return http
        return TlsProtocol(http, self.config.ssl, self._deadlines.handshake_s)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_INTERVAL_S)
            self.connections.sweep()

"""uvicorn's HTTP/1.1 protocol, made strict, with deadlines, and fair between connections.

h11 rather than httptools: it is the stricter one, and bounds heads. What is added here: requests are read in one way
only (`strict_http`), in turns, so that a body of very many chunks holds up nobody; each connection says what it waits
for (`connections`); and a client that closes its sending side behind a request gets its answer. To a server, such a
client looks like one that has disconnected, until something is sent. So a `100 Continue` is sent, which clients ignore.
"""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
import sys
from asyncio.sslproto import SSLProtocol
from typing import Any

import h11
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from sensorium.entrypoints.openai.connections import Connections, Peer, Phase
from sensorium.entrypoints.openai.errors import HttpError, error_body
from sensorium.entrypoints.openai.strict_http import StrictConnection
from sensorium.logger import AtMostOften, get_logger

logger = get_logger(__name__)
logger.addFilter(AtMostOften())

MAX_HEAD_BYTES = 64 << 10
_EVENTS_A_TURN = 256
"""How many events of one connection are handled before others have their turn."""
_FIRST_PROBE_S, _MAX_PROBE_S, _PROBE_ANSWER_S = 0.5, 5.0, 0.1


class _Flow(FlowControl):
    """Reading stays paused while a connection waits for its next turn, even if another part resumes it."""

    is_held = False

    def resume_reading(self) -> None:
        if not self.is_held:
            super().resume_reading()


class HttpProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 over h11, strict, with deadlines, in turns, and for clients that are half closed."""

    conn: StrictConnection
    flow: _Flow

    def __init__(self, connections: Connections, **options: Any) -> None:
        super().__init__(**options)
        self.conn = StrictConnection(MAX_HEAD_BYTES, _EVENTS_A_TURN)
        self.logger = logger
        self._connections = connections
        self._peer: Peer | None = None
        self._has_eof = False
        self._probe: asyncio.TimerHandle | None = None

    @property
    def is_held_back(self) -> bool:
        """Whether so much waits to be sent that nothing more is written."""
        return self.flow is not None and self.flow.write_paused

    def attach(self, transport: asyncio.Transport, phase: Phase) -> None:
        """Register the connection, before its head arrives."""
        self._peer = self._connections.add(transport, self, phase)

    def detach(self) -> None:
        """Unregister the closed connection."""
        if self._peer is not None:
            self._connections.remove(self._peer)

    # Asyncio's side

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        self.flow = _Flow(transport)
        if self._peer is None:
            self.attach(transport, Phase.HEAD)
        self._note_phase()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        if self._probe is not None:
            self._probe.cancel()
        self.detach()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        if self._peer is not None:
            self._peer.num_body_bytes += len(data)
        super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """Stay open for writing while a whole request has no answer. TLS has no such state."""
        self._has_eof = True
        is_answering = self.cycle is not None and not (self.cycle.response_complete or self.cycle.more_body)
        if self.scheme == "https" or not is_answering:
            return False
        self._probe_in(_FIRST_PROBE_S)
        return True

    # uvicorn's side

    def handle_events(self) -> None:
        """Handle some of the received events: one turn."""
        if self.flow.is_held:
            return
        self.conn.begin_turn()
        super().handle_events()
        self._note_phase()
        if self.conn.is_turn_over and not self.transport.is_closing():
            self.flow.pause_reading()
            self.flow.is_held = True
            self.loop.call_soon(self._go_on)

    def _go_on(self) -> None:
        self.flow.is_held = False
        if self.transport.is_closing():
            return
        self.handle_events()
        has_room = self.cycle is None or len(self.cycle.body) <= HIGH_WATER_LIMIT
        is_pipelined = self.conn.their_state is h11.DONE and self.conn.num_buffered_bytes > 0
        if not self.flow.is_held and has_room and not is_pipelined:
            self.flow.resume_reading()

    def on_response_complete(self) -> None:
        """See uvicorn."""
        super().on_response_complete()
        if self.transport.is_closing():
            return
        self._note_phase()
        if self._has_eof and self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        """See uvicorn: the bytes are not a request that can be read in only one way."""
        error = sys.exception()
        status = error.error_status_hint if isinstance(error, h11.RemoteProtocolError) else 400
        self.refuse(
            status,
            "the request: got something that is no HTTP/1.1, or that could be read in two ways, expected one head of "
            "lines that end by CRLF, and a body whose length is given once.",
        )

    def refuse(self, status: int, message: str) -> None:
        """End the connection, with an error if no answer has begun."""
        if self.transport is None or self.transport.is_closing():
            return
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.abort()
            return
        body = json.dumps(error_body(HttpError(status, message))).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        events = (h11.Response(status_code=status, headers=headers, reason=STATUS_PHRASES[status]), h11.Data(data=body))
        for event in (*events, h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    # Phases

    def _note_phase(self) -> None:
        if self._peer is not None:
            self._connections.enter(self._peer, self._phase())

    def _phase(self) -> Phase:
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            return Phase.BODY
        if state is not h11.IDLE:
            return Phase.ANSWER
        return Phase.IDLE if self.cycle is not None and not self.conn.num_buffered_bytes else Phase.HEAD

    # Half-closed clients

    def _probe_in(self, delay_s: float) -> None:
        if self._probe is not None:
            self._probe.cancel()
        self._probe = self.loop.call_later(delay_s, self._send_probe, delay_s)

    def _send_probe(self, delay_s: float) -> None:
        """Send something: a client that has disconnected answers with a reset."""
        if self.transport.is_closing() or self.cycle.response_complete:
            return
        if self.conn.our_state is h11.SEND_RESPONSE and self.scope["http_version"] == "1.1":
            probe = self.conn.send(h11.InformationalResponse(status_code=100, headers=[], reason=b"Continue"))
            self.transport.write(probe or b"")
            self._probe = self.loop.call_later(_PROBE_ANSWER_S, self._read_probe, delay_s)

    def _read_probe(self, delay_s: float) -> None:
        if self.transport.is_closing():
            return
        if self.transport.get_extra_info("socket").getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self.transport.abort()
        else:
            self._probe_in(min(2 * delay_s, _MAX_PROBE_S))


class TlsProtocol(SSLProtocol):
    """TLS under HTTP: a connection is known from its acceptance on, not only from the end of its handshake."""

    def __init__(self, protocol: HttpProtocol, context: ssl.SSLContext, handshake_s: float) -> None:
        super().__init__(
            asyncio.get_running_loop(),
            protocol,
            context,
            None,  # type: ignore[arg-type]  # nobody waits
            server_side=True,
            ssl_handshake_timeout=handshake_s,  # type: ignore[arg-type]  # a float works
            ssl_shutdown_timeout=handshake_s,
        )
        self._http = protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See asyncio."""
        assert isinstance(transport, asyncio.Transport)
        self._http.attach(transport, Phase.HANDSHAKE)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        """See asyncio."""
        self._http.detach()
        super().connection_lost(exc)

"""The server's connections: what each must send next, by when, and which one is closed to make room for another.

A client must send its handshake, then a head, then a body; in between, the server answers. A client that takes too long
gets a 408 and is closed. If there is no room, the connection that has been silent longest is closed first, so that
silent connections don't block others. A few more connections than requests are accepted, so that health checks get
through.
"""

from __future__ import annotations

import asyncio
import enum
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Protocol

from sensorium.logger import AtMostOften, get_logger

logger = get_logger(__name__)
logger.addFilter(AtMostOften())

NUM_RESERVED = 16
"""Connections beyond those whose requests are served."""
_GRACE_S = 1.0
"""A connection younger than this is not closed: its head may be under way."""


@dataclass(frozen=True, slots=True)
class Deadlines:
    """How long a client may take. The settings of the server say what each is, see `ServerArgs`."""

    handshake_s: float
    head_s: float
    body_s: float
    min_body_bytes: int
    reading_s: float


class Owner(Protocol):
    """The protocol object of a connection."""

    @property
    def is_held_back(self) -> bool:
        """Whether so many bytes wait to be sent that writing is paused."""

    def refuse(self, status: int, message: str) -> None:
        """End the connection, with an error if no answer has begun."""


class Phase(enum.Enum):
    """The phase of a connection."""

    HANDSHAKE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    """The server answers; the client only reads."""
    IDLE = enum.auto()
    """Kept alive; uvicorn ends it."""


_EVICTED_FIRST = (Phase.HANDSHAKE, Phase.HEAD, Phase.IDLE)


@dataclass(slots=True, eq=False)
class Peer:
    """One accepted connection."""

    transport: asyncio.Transport
    """The socket's."""
    owner: Owner
    phase: Phase
    since_s: float
    num_body_bytes: int = 0
    num_unread_bytes: int = 0
    unread_since_s: float = 0.0


class Connections:
    """All that are open. Invariant: at most `max_open`, but for those accepted in this turn of the event loop."""

    def __init__(self, max_open: int, deadlines: Deadlines) -> None:
        self.deadlines = deadlines
        self._max_open = max_open
        self._loop = asyncio.get_running_loop()
        self._others: OrderedDict[Peer, None] = OrderedDict()
        self._silent: OrderedDict[Peer, None] = OrderedDict()
        """Those in a phase of `_EVICTED_FIRST`. Both are in the order of `since_s`."""

    def __len__(self) -> int:
        return len(self._silent) + len(self._others)

    def add(self, transport: asyncio.Transport, owner: Owner, phase: Phase) -> Peer:
        """Add a connection; if there is no room, close another one."""
        peer = Peer(transport, owner, phase, self._loop.time())
        self._silent[peer] = None
        if len(self) > self._max_open:
            self.evict(peer)
        return peer

    def remove(self, peer: Peer) -> None:
        """Forget one that is closed."""
        self._silent.pop(peer, None)
        self._others.pop(peer, None)

    def enter(self, peer: Peer, phase: Phase) -> None:
        """Set a connection's phase."""
        if phase is peer.phase or (peer not in self._silent and peer not in self._others):
            return
        self.remove(peer)
        peer.phase, peer.since_s, peer.num_body_bytes = phase, self._loop.time(), 0
        (self._silent if phase in _EVICTED_FIRST else self._others)[peer] = None

    def evict(self, newcomer: Peer | None = None) -> None:
        """Close the connection that has been silent longest; if none has been silent for a while, the one whose body
        takes longest; else the new one.
        """
        silent = next((peer for peer in self._silent if peer is not newcomer), None)
        if silent is None or self._loop.time() - silent.since_s < _GRACE_S:
            silent = next((peer for peer in self._others if peer.phase is Phase.BODY), silent) or newcomer
        if silent is not None:
            logger.warning("a connection was closed to make room for another. Raise max_connections.")
            self.remove(silent)
            silent.transport.abort()

    def sweep(self) -> None:
        """Close the connections whose time is over."""
        now_s = self._loop.time()
        for peer in [*self._silent, *self._others]:
            if self._reads_nothing(peer, now_s):
                peer.transport.abort()
            elif peer.phase is Phase.HEAD and now_s - peer.since_s > self.deadlines.head_s:
                peer.owner.refuse(408, "the request's head: got a part of it for too long. Send it at once.")
            elif peer.phase is Phase.BODY and now_s - peer.since_s > self.deadlines.body_s:
                if peer.num_body_bytes < self.deadlines.min_body_bytes:
                    peer.owner.refuse(408, "the body: got nearly nothing for a while. Send it faster.")
                peer.since_s, peer.num_body_bytes = now_s, 0

    def _reads_nothing(self, peer: Peer, now_s: float) -> bool:
        """Whether a client has for too long read none of the bytes that wait for it."""
        num_bytes = peer.transport.get_write_buffer_size()
        # While an answer is written and not held back, equal numbers may be different bytes.
        is_comparable = peer.owner.is_held_back or peer.phase is not Phase.ANSWER or peer.transport.is_closing()
        if not num_bytes or num_bytes != peer.num_unread_bytes or not is_comparable:
            peer.num_unread_bytes, peer.unread_since_s = num_bytes, now_s
        return num_bytes > 0 and now_s - peer.unread_since_s > self.deadlines.reading_s

    def take_loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """The event loop's exception handler: when files run out, it closes a silent connection."""
        if "out of system resource" in context.get("message", ""):
            logger.warning("a connection could not be accepted: no more files may be opened. Raise ulimit -n.")
            self.evict()
        else:
            loop.default_exception_handler(context)

"""Frames over a pair of connected local sockets, each with at most one open file.

The pair is made by `socket.socketpair`, so it has no address: no other process can connect to it, write to it, or find
it. When one end closes, for whatever reason, the other end sees it at once.
"""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable, Iterator
from struct import Struct
from typing import Any

from sensorium.ipc.codec import EncodedMessage
from sensorium.logger import get_logger

logger = get_logger(__name__)

_HEADER = Struct("<Q?")
"""Bytes of the payload; whether a file comes with it."""
_READ_BYTES = 1 << 18
_MAX_FILES_PER_READ = 64
_SOCKET_BUFFER_BYTES = 1 << 20


def channel_pair() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets."""
    pair = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    for end in pair:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SOCKET_BUFFER_BYTES)
    return pair


class Frames:
    """Reassembles frames from the bytes that arrive. Owns the files of frames that are not complete."""

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._files: deque[int] = deque()

    def feed(self, data: bytes, files: list[int]) -> Iterator[EncodedMessage]:
        """Take bytes that were read; yields complete frames, whose files the caller owns."""
        self._buffer += data
        self._files += files
        while len(self._buffer) >= _HEADER.size:
            length, has_file = _HEADER.unpack_from(self._buffer)
            end = _HEADER.size + length
            if len(self._buffer) < end:
                return
            payload = bytes(memoryview(self._buffer)[_HEADER.size : end])
            del self._buffer[:end]
            yield EncodedMessage(payload, self._files.popleft() if has_file else None)

    def close(self) -> None:
        """Close the files of incomplete frames."""
        while self._files:
            os.close(self._files.popleft())


class _Outgoing:
    """The unsent rest of a frame."""

    def __init__(self, message: EncodedMessage) -> None:
        self._message = message
        header = _HEADER.pack(len(message.payload), message.fd is not None)
        self._rest = memoryview(header + message.payload)

    def send_some(self, sock: socket.socket) -> bool:
        """Send as much as the socket takes; returns whether all is sent. The file goes with the first byte."""
        fd = self._message.fd
        if fd is None:
            sent = sock.send(self._rest)
        else:
            sent = socket.send_fds(sock, [self._rest], [fd])
            self._message.close()  # the kernel holds the file of a message under way
        self._rest = self._rest[sent:]
        return not self._rest

    def close(self) -> None:
        self._message.close()


class BlockingChannel:
    """The end of a process without an event loop. One thread sends, one receives."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(True)
        self._socket = sock
        self._frames = Frames()

    def send(self, message: EncodedMessage) -> None:
        """Send a frame, and wait until the other end takes it. Raises `OSError` if that end is closed."""
        outgoing = _Outgoing(message)
        while not outgoing.send_some(self._socket):
            pass

    def receive(self) -> Iterator[EncodedMessage]:
        """Frames as they arrive, until the other end closes."""
        try:
            while True:
                data, files, _, _ = socket.recv_fds(self._socket, _READ_BYTES, _MAX_FILES_PER_READ)
                if not data:
                    return
                yield from self._frames.feed(data, files)
        except ConnectionError:
            return
        finally:
            self._frames.close()

    def close(self) -> None:
        """Close, which ends a `receive` at either end."""
        try:
            self._socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            logger.debug("the other end has closed already")
        self._socket.close()


class AsyncChannel:
    """The front's end, on an event loop. Never blocks: bytes that the socket doesn't take wait here.

    Args:
        sock: one end of a pair.
        on_message: called with each frame.
        on_close: called once, when the other end has closed or can't be understood; not after `close`.
    """

    def __init__(self, sock: socket.socket, on_message: Callable[[bytes], None], on_close: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._socket = sock
        self._on_message = on_message
        self._on_close = on_close
        self._loop = asyncio.get_running_loop()
        self._frames = Frames()
        self._outgoing: deque[_Outgoing] = deque()
        self._is_open = True
        self._loop.add_reader(sock, self._readable)

    def send(self, message: EncodedMessage) -> None:
        """Send a frame now or as soon as the socket takes it; dropped if the channel is closed."""
        if not self._is_open:
            message.close()
            return
        self._outgoing.append(_Outgoing(message))
        if len(self._outgoing) == 1:
            self._writable()

    def close(self) -> None:
        """Close this end. May be called again."""
        if not self._is_open:
            return
        self._is_open = False
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        self._frames.close()
        while self._outgoing:
            self._outgoing.popleft().close()

    def _readable(self) -> None:
        try:
            data = self._socket.recv(_READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            data = b""
        if not data:
            self._end()
            return
        for message in self._frames.feed(data, []):
            self._on_message(message.payload)

    def _writable(self) -> None:
        try:
            while self._outgoing:
                if not self._outgoing[0].send_some(self._socket):
                    continue
                self._outgoing.popleft()
        except (BlockingIOError, InterruptedError):
            self._loop.add_writer(self._socket, self._writable)
        except OSError:
            self._end()
        else:
            self._loop.remove_writer(self._socket)

    def _end(self) -> None:
        if self._is_open:
            self.close()
            self._on_close()


def socket_from(argument: Any) -> socket.socket:
    """The socket that a parent process passed on by the number of its file."""
    return socket.socket(fileno=int(argument))

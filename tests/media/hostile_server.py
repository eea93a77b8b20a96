"""A local HTTP server that lies, stalls and never ends, and resolvers that change their mind."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.helpers.waiting import HANG_S

BODY = b"sixteen bytes ok"
CERTIFICATE = Path(__file__).with_name("tls_media_example.pem")


class HostileServer:
    """Answers by path on 127.0.0.1; remembers the request heads that it got."""

    def __init__(self, *, tls: bool = False) -> None:
        self.requests: list[str] = []
        self.server_names: list[str | None] = []
        self._stop = threading.Event()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(0.05)
        self.port: int = self._listener.getsockname()[1]
        self._tls = self._make_tls() if tls else None
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def _make_tls(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(CERTIFICATE)
        context.sni_callback = lambda _, name, __: self.server_names.append(name)
        return context

    def url(self, path: str, host: str = "media.example", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"

    def close(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(HANG_S)
        self._listener.close()

    def _accept(self) -> None:
        while not self._stop.is_set():
            with contextlib.suppress(TimeoutError):
                connection, _ = self._listener.accept()
                thread = threading.Thread(target=self._serve, args=(connection,))
                self._threads.append(thread)
                thread.start()

    def _serve(self, connection: socket.socket) -> None:
        connection.settimeout(HANG_S)
        with connection, contextlib.suppress(OSError):
            if self._tls is not None:
                with self._tls.wrap_socket(connection, server_side=True) as secure:
                    self._answer(secure)
            else:
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            received = connection.recv(65536)
            if not received:
                return
            head += received
        text = head.decode("latin-1")
        self.requests.append(text)
        path = text.split(" ")[1]
        for chunk in self._chunks(path):
            connection.sendall(chunk)
            if self._stop.is_set():
                return

    def _chunks(self, path: str) -> Iterator[bytes]:
        name, _, argument = path.strip("/").partition("/")
        if name == "ok":
            yield _head(200, f"Content-Length: {len(BODY)}") + BODY
        elif name == "cookie":
            yield _head(302, "Set-Cookie: secret=1", "Location: /ok")
        elif name == "status":
            yield _head(int(argument), "Content-Length: 0")
        elif name == "to":  # the rest of the path, with ! for /, is where to go
            yield _head(302, "Location: " + argument.replace("!", "/"), "Content-Length: 0")
        elif name == "loop":
            yield _head(302, f"Location: /loop/{int(argument or 0) + 1}", "Content-Length: 0")
        elif name == "endless":
            yield _head(200)
            while True:
                yield bytes(65536)
        elif name == "endless-chunked":
            yield _head(200, "Transfer-Encoding: chunked")
            while True:
                yield b"10000\r\n" + bytes(65536) + b"\r\n"
        elif name == "claims-much":
            yield _head(200, "Content-Length: 1000000000000") + BODY
        elif name == "claims-more":
            yield _head(200, "Content-Length: 1000") + BODY
        elif name == "claims-less":
            yield _head(200, "Content-Length: 4") + BODY
        elif name == "slow":
            yield _head(200)
            while True:
                time.sleep(0.02)
                yield b"x"
        elif name == "slow-head":
            yield b"HTTP/1.1 200 OK\r\n"
            while True:
                time.sleep(0.02)
                yield b"X-Pad: x\r\n"
        elif name == "endless-head":
            yield b"HTTP/1.1 200 OK\r\n"
            while True:
                yield b"X-Pad: " + b"x" * 60000 + b"\r\n"
        elif name == "tiny-chunks":
            yield _head(200, "Transfer-Encoding: chunked")
            while True:
                yield b"1\r\nA\r\n" * 10_000
        elif name == "chunk-extensions":
            yield _head(200, "Transfer-Encoding: chunked")
            while True:
                yield b"1;" + b"x" * 15_000 + b"\r\nA\r\n"
        elif name == "endless-trailers":
            yield _head(200, "Transfer-Encoding: chunked") + b"0\r\n"
            while True:
                yield b"X-Pad: x\r\n" * 1_000
        elif name == "endless-informational":
            while True:
                yield b"HTTP/1.1 103 Early Hints\r\n\r\n" * 1_000
        elif name == "many-headers":
            yield b"HTTP/1.1 200 OK\r\n"
            while True:
                yield b"a: b\r\n" * 1_000
        elif name == "small-reads":
            yield _head(200)
            while True:
                yield b"x"
        elif name == "encodings":
            yield _head(200, "Content-Encoding: identity", "Content-Encoding: gzip", "Content-Length: 16") + BODY
        elif name == "pieces":  # an honest body in many pieces
            yield _head(200, "Transfer-Encoding: chunked")
            for _ in range(2_000):
                yield b"80\r\n" + b"x" * 128 + b"\r\n"
            yield b"0\r\n\r\n"
        elif name == "gzip":
            yield _head(200, "Content-Encoding: gzip", "Content-Length: 16") + BODY
        elif name == "garbage":
            yield b"\x00\xff not http at all /etc/passwd 10.0.0.7\r\n\r\n"
        elif name == "cut":
            yield b"HTTP/1.1 20"


def _head(status: int, *headers: str) -> bytes:
    return "\r\n".join([f"HTTP/1.1 {status} X", *headers, "Connection: close", "", ""]).encode("latin-1")


class FakeResolver:
    """Answers from a table; a list of lists is used up look-up by look-up, the last one again and again."""

    def __init__(self, table: dict[str, Sequence[Sequence[str]]]) -> None:
        self._table = {name: list(answers) for name, answers in table.items()}
        self.asked: list[str] = []

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        answers = self._table.get(host)
        if not answers:
            raise OSError("no such name on 10.0.0.53")
        return answers.pop(0) if len(answers) > 1 else answers[0]

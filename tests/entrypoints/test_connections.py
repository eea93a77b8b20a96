"""What connections may do: stay silent, dawdle, come in numbers, close half of themselves, or be read in two ways."""

from __future__ import annotations

import asyncio
import json
import logging
import resource
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h11
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.types import Receive, Scope, Send

from sensorium.entrypoints.openai import server as server_module
from sensorium.entrypoints.openai.connections import NUM_RESERVED, Connections, Deadlines, Phase
from sensorium.entrypoints.openai.http_server import HttpServer
from sensorium.entrypoints.openai.middleware import Capacity
from sensorium.entrypoints.openai.server import num_connections_for, uvicorn_config
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.entrypoints.openai.strict_http import StrictConnection
from sensorium.errors import ConfigError

CERTIFICATE = Path(__file__).parents[1] / "media" / "tls_media_example.pem"
"""Signed by itself, with its key."""
PATIENT_S = 60.0
"""Long enough for a busy machine; nothing waits for so long unless it fails."""
LAZY = Deadlines(handshake_s=600, head_s=600, body_s=600, min_body_bytes=1000, reading_s=600)
STRICT = Deadlines(handshake_s=1, head_s=0.3, body_s=0.3, min_body_bytes=1000, reading_s=0.5)
GET = b"GET /x HTTP/1.1\r\nHost: x\r\n\r\n"


@dataclass
class App:
    """An application of few routes: `/wait` answers when told to, `/stream` says a word until it is told to stop,
    `/large` answers with many bytes, and all others tell how long the body was.
    """

    release: threading.Event = field(default_factory=threading.Event)
    waiting: int = 0
    disconnects: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.disconnects += 1
                return
            body += message["body"]
            if not message["more_body"]:
                break
        answer = {"/large": b"x" * (32 << 20)}.get(scope["path"], b"%d bytes" % len(body))
        if scope["path"] == "/wait" and not await self._released(receive):
            return
        await send({"type": "http.response.start", "status": 200, "headers": []})
        if scope["path"] == "/stream":
            while not self.release.is_set():
                await send({"type": "http.response.body", "body": b"word ", "more_body": True})
                await asyncio.sleep(0.01)
        await send({"type": "http.response.body", "body": answer})

    async def _released(self, receive: Receive) -> bool:
        self.waiting += 1
        gone = asyncio.ensure_future(receive())
        try:
            while not self.release.is_set():
                if gone.done():
                    self.disconnects += 1
                    return False
                await asyncio.sleep(0.01)
            return True
        finally:
            self.waiting -= 1
            gone.cancel()


@dataclass
class Running:
    app: App
    server: HttpServer
    port: int

    def connect(self, sent: bytes = b"", timeout_s: float = PATIENT_S) -> socket.socket:
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=timeout_s)
        connection.sendall(sent)
        return connection

    def ask(self, sent: bytes, *, closes: bool = False) -> bytes:
        """Everything that comes back until the server closes; with `closes`, the sending side is closed first."""
        with self.connect(sent) as connection:
            if closes:
                connection.shutdown(socket.SHUT_WR)
            return rest(connection)

    def until(self, is_so: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENT_S
        while not is_so():
            assert time.monotonic() < deadline_s
            time.sleep(0.01)


def rest(connection: socket.socket) -> bytes:
    got = b""
    with suppress(ConnectionResetError):
        while piece := connection.recv(65536):
            got += piece
    return got


def first_line(connection: socket.socket) -> bytes:
    got = b""
    while b"\r\n" not in got:
        piece = connection.recv(65536)
        if not piece:
            break
        got += piece
    return got.split(b"\r\n")[0]


@contextmanager
def running(deadlines: Deadlines = LAZY, max_connections: int = 100, *, tls: bool = False) -> Iterator[Running]:
    app, ready, found = App(), threading.Event(), []
    options: dict[str, Any] = {"ssl_certfile": str(CERTIFICATE), "ssl_keyfile": str(CERTIFICATE)} if tls else {}
    listener = socket.create_server(("127.0.0.1", 0))

    async def serve() -> None:
        config = uvicorn.Config(
            Capacity(app, max_connections),
            lifespan="off",
            ws="none",
            log_config=None,
            timeout_keep_alive=600,
            timeout_graceful_shutdown=1,
            **options,
        )
        server = HttpServer(config, max_connections, deadlines, url="here")
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0.01)
        found.append(Running(app, server, listener.getsockname()[1]))
        ready.set()
        await task

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    assert ready.wait(PATIENT_S)
    try:
        yield found[0]
    finally:
        app.release.set()
        found[0].server.stop()
        thread.join(PATIENT_S)
        assert not thread.is_alive()


@pytest.fixture(scope="module")
def lazy() -> Iterator[Running]:
    with running() as server:
        yield server


# Requests that two readers read in two ways


POST = b"POST /x HTTP/1.1\r\nHost: x\r\n"
CHUNKED = b"Transfer-Encoding: chunked\r\n"
AMBIGUOUS = {
    "length beside chunks": POST + b"Content-Length: 5\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "chunks beside length": POST + CHUNKED + b"Content-Length: 5\r\n\r\n0\r\n\r\n",
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    "one length twice": POST + b"Content-Length: 5\r\ncontent-length: 5\r\n\r\nhello",
    "a list of lengths": POST + b"Content-Length: 5, 5\r\n\r\nhello",
    "a signed length": POST + b"Content-Length: +5\r\n\r\nhello",
    "a length in another base": POST + b"Content-Length: 0x5\r\n\r\nhello",
    "a length with an underscore": POST + b"Content-Length: 1_0\r\n\r\nhellohello",
    "a negative length": POST + b"Content-Length: -5\r\n\r\nhello",
    "an empty length": POST + b"Content-Length: \r\n\r\n",
    "a list of codings": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "two codings": POST + CHUNKED + b"Transfer-Encoding: identity\r\n\r\n0\r\n\r\n",
    "an unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "a coding in quotes": POST + b'Transfer-Encoding: "chunked"\r\n\r\n0\r\n\r\n',
    "a vertical tab before the coding": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "chunks in HTTP/1.0": b"POST /x HTTP/1.0\r\nHost: x\r\n" + CHUNKED + b"\r\n0\r\n\r\n",
    "a space before the colon": POST + b"Content-Length : 5\r\n\r\nhello",
    "a folded line": POST + b"X-A: b\r\n c: d\r\n\r\n",
    "a folded length": POST + b"Content-Length:\r\n 5\r\n\r\nhello",
    "a folded first line": b"POST /x HTTP/1.1\r\n Host: x\r\n\r\n",
    "bare newlines": b"GET /x HTTP/1.1\nHost: x\n\n",
    "one bare newline": POST + b"X-A: b\nContent-Length: 5\r\n\r\nhello",
    "a bare newline at the end": b"GET /x HTTP/1.1\r\nHost: x\r\n\n",
    "a bare carriage return": POST + b"X-A: b\rContent-Length: 5\r\n\r\n",
    "a null": POST + b"X-A: b\x00c\r\n\r\n",
    "an escape code": POST + b"X-A: \x1b[2J\r\n\r\n",
    "no host": b"GET /x HTTP/1.1\r\n\r\n",
    "two hosts": b"GET /x HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "another version": b"GET /x HTTP/2.0\r\nHost: x\r\n\r\n",
    "no version": b"GET /x\r\nHost: x\r\n\r\n",
    "an empty name": POST + b": b\r\n\r\n",
    "a chunk size that is none": POST + CHUNKED + b"\r\nfive\r\nhello\r\n0\r\n\r\n",
    "a chunk size with a prefix": POST + CHUNKED + b"\r\n0x5\r\nhello\r\n0\r\n\r\n",
    "a signed chunk size": POST + CHUNKED + b"\r\n+5\r\nhello\r\n0\r\n\r\n",
    "an empty chunk size": POST + CHUNKED + b"\r\n\r\nhello\r\n0\r\n\r\n",
    "a space before a chunk size": POST + CHUNKED + b"\r\n 5\r\nhello\r\n0\r\n\r\n",
    "a chunk size of many digits": POST + CHUNKED + b"\r\n" + b"0" * 30 + b"5\r\nhello\r\n0\r\n\r\n",
    "a chunk that is longer than it says": POST + CHUNKED + b"\r\n3\r\nhello\r\n0\r\n\r\n",
    "a bare newline behind a chunk size": POST + CHUNKED + b"\r\n5\nhello\r\n0\r\n\r\n",
    "a newline in an extension": POST + CHUNKED + b"\r\n5;a\nb\r\nhello\r\n0\r\n\r\n",
    "a carriage return in an extension": POST + CHUNKED + b"\r\n5;a\rb\r\nhello\r\n0\r\n\r\n",
    "a long extension": POST + CHUNKED + b"\r\n5;" + b"a" * 2000 + b"\r\nhello\r\n0\r\n\r\n",
    "a trailer with a bare newline": POST + CHUNKED + b"\r\n0\r\nX-A: b\n\r\n\r\n",
    "many extensions": POST + CHUNKED + b"\r\n" + (b"1;" + b"a" * 500 + b"\r\nx\r\n") * 50 + b"0\r\n\r\n",
    "very many small chunks": POST + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 11_000 + b"0\r\n\r\n",
}
GOOD = {
    "no body": (GET, 0),
    "a length": (POST + b"Content-Length: 5\r\n\r\nhello", 5),
    "chunks": (POST + CHUNKED + b"\r\n5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n", 6),
    "a chunk with an extension": (POST + CHUNKED + b'\r\n5;a="b"\r\nhello\r\n0\r\n\r\n', 5),
    "chunks and a trailer": (POST + CHUNKED + b"\r\n5\r\nhello\r\n0\r\nX-A: b\r\n\r\n", 5),
    "many small chunks": (POST + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 9_000 + b"0\r\n\r\n", 9_000),
    "HTTP/1.0": (b"POST /x HTTP/1.0\r\nContent-Length: 5\r\n\r\nhello", 5),
    "a tab in a value": (b"GET /x HTTP/1.1\r\nHost: x\r\nX-A: b\tc\r\n\r\n", 0),
    "obs-text": (b"GET /x HTTP/1.1\r\nHost: x\r\nX-A: \xe9\r\n\r\n", 0),
}


@pytest.mark.parametrize("request_bytes", AMBIGUOUS.values(), ids=AMBIGUOUS)
def test_what_can_be_read_in_two_ways_is_refused_and_the_connection_closed(lazy: Running, request_bytes: bytes) -> None:
    answers = lazy.ask(request_bytes + GET)
    assert answers.count(b"HTTP/1.1 ") == 1, answers
    assert answers.startswith((b"HTTP/1.1 4", b"HTTP/1.1 5")), answers
    head, _, body = answers.partition(b"\r\n\r\n")
    assert b"connection: close" in head.lower()
    assert "the request: got something" in json.loads(body)["error"]["message"]


@pytest.mark.parametrize(("request_bytes", "num_bytes"), GOOD.values(), ids=GOOD)
def test_what_can_be_read_in_one_way_is_answered(lazy: Running, request_bytes: bytes, num_bytes: int) -> None:
    assert f"{num_bytes} bytes".encode() in lazy.ask(request_bytes, closes=True)


@pytest.mark.parametrize("name", [name for name, data in AMBIGUOUS.items() if len(data) < 1000])
def test_it_makes_no_difference_how_bytes_arrive(name: str) -> None:
    connection = StrictConnection(1 << 16, 1 << 30)

    def events() -> None:
        for each in AMBIGUOUS[name] + GET:
            connection.receive_data(bytes([each]))
            while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
                pass

    with pytest.raises(h11.RemoteProtocolError):
        events()


def test_pipelined_requests_are_answered_in_turn(lazy: Running) -> None:
    answers = lazy.ask(b"".join(data for data, _ in GOOD.values() if b"HTTP/1.0" not in data), closes=True)
    assert answers.count(b"HTTP/1.1 200") == len(GOOD) - 1


def test_a_connection_takes_turns_with_others() -> None:
    """Reading a chunk of one byte costs 17 microseconds: a packet full of them took 0.75 s of everybody's time."""
    connection = StrictConnection(1 << 16, 100)
    connection.receive_data(POST + CHUNKED + b"\r\n" + b"1\r\nx\r\n" * 1000 + b"0\r\n\r\n")
    num_turns = num_events = 0
    while connection.their_state is not h11.DONE:
        num_turns += 1
        connection.begin_turn()
        while connection.next_event() is not h11.NEED_DATA:
            num_events += 1
    assert (num_turns, num_events) == (11, 1002)


def test_garbage_behind_an_early_answer_ends_the_connection(lazy: Running, caplog: pytest.LogCaptureFixture) -> None:
    """An error found while an answer was under way used to raise another one, with a stack in the log."""
    with lazy.connect(b"POST /x HTTP/1.1\r\nHost: x\r\n" + CHUNKED + b"\r\n5\r\nhello\r\n") as connection:
        connection.sendall(b"nonsense\r\n")
        assert b" 400 " in first_line(connection)
    assert not [each for each in caplog.records if each.exc_info]


# Deadlines


def test_how_long_clients_may_take_is_the_operators_to_say() -> None:
    """The deadlines were constants, too short for who uploads over a slow line."""
    args = ServerArgs(
        handshake_timeout_s=1, head_timeout_s=2, body_timeout_s=3, min_body_bytes=4, read_timeout_s=5, keep_alive_s=6
    )
    assert args.deadlines == Deadlines(handshake_s=1, head_s=2, body_s=3, min_body_bytes=4, reading_s=5)
    assert uvicorn_config(Starlette(), args).timeout_keep_alive == 6


@pytest.mark.parametrize("sent", [b"", b"G", b"GET /x HTTP/1.1\r\n", POST + b"X-A: ", GET + b"GET /x HT"])
def test_a_head_has_a_deadline(sent: bytes) -> None:
    with running(STRICT) as server:
        assert b"HTTP/1.1 408 Request Timeout" in server.ask(sent)


@pytest.mark.parametrize("framing", [b"Content-Length: 100000\r\n\r\n", CHUNKED + b"\r\n5\r\nhello\r\n"])
def test_a_body_has_to_get_on(framing: bytes) -> None:
    with running(STRICT) as server:
        answer = server.ask(POST + framing + b"x")
        assert b"HTTP/1.1 408" in answer or answer.startswith(b"HTTP/1.1 400"), answer
        server.until(lambda: server.app.disconnects == 1)


def test_a_body_that_gets_on_may_take_its_time() -> None:
    with running(STRICT) as server, server.connect(POST + b"Content-Length: 30000\r\n\r\n") as connection:
        for _ in range(30):
            connection.sendall(b"x" * 1000)
            time.sleep(0.05)
        assert b" 200 " in first_line(connection)


def test_an_answer_may_take_its_time() -> None:
    with running(STRICT) as server, server.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n" + GET) as connection:
        time.sleep(4 * STRICT.head_s)
        server.app.release.set()
        assert b" 200 " in first_line(connection)


@pytest.mark.parametrize("path", [b"/large", b"/stream"])
def test_a_client_that_reads_nothing_is_let_go(path: bytes) -> None:
    with running(STRICT) as server, socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", server.port))
        connection.sendall(b"GET " + path + b" HTTP/1.1\r\nHost: x\r\n\r\n")
        server.until(lambda: len(server.server.connections) == 1)
        if path == b"/large":  # a stream's words take minutes to fill the buffers of both sides
            server.until(lambda: len(server.server.connections) == 0)


def test_a_handshake_has_a_deadline() -> None:
    with running(STRICT, tls=True) as server, server.connect() as connection:
        server.until(lambda: len(server.server.connections) == 1)
        assert rest(connection) == b""
        server.until(lambda: len(server.server.connections) == 0)


# Numbers


@pytest.mark.parametrize("sent", [b"", POST + b"X-A: ", GET])
@pytest.mark.parametrize("is_tls", [False, True])
def test_silent_connections_keep_nobody_out(sent: bytes, is_tls: bool) -> None:
    """Half heads, idle connections and handshakes that don't begin: as many as there may be, and many more."""
    with running(max_connections=4, tls=is_tls) as server, ExitStack() as held:
        for _ in range(4 * NUM_RESERVED):
            held.enter_context(server.connect(b"" if is_tls else sent))
        with server.connect() as plain:
            context = ssl.create_default_context()
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
            connection = held.enter_context(context.wrap_socket(plain)) if is_tls else plain
            connection.sendall(GET)
            assert b" 200 " in first_line(connection)
        server.until(lambda: len(server.server.connections) <= 4 + NUM_RESERVED)


def test_health_has_a_way_in_where_all_requests_are_taken() -> None:
    with running(max_connections=3) as server, ExitStack() as held:
        for _ in range(3):
            held.enter_context(server.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n"))
        server.until(lambda: server.app.waiting == 3)
        for _ in range(2 * NUM_RESERVED):
            held.enter_context(server.connect(POST + b"X-A: "))
        assert b" 503 " in first_line(held.enter_context(server.connect(GET)))
        assert b" 503 " in first_line(held.enter_context(server.connect(GET.replace(b"/x", b"/health?generate=1"))))
        assert b" 200 " in first_line(held.enter_context(server.connect(GET.replace(b"/x", b"/health"))))
        assert server.app.waiting == 3, "what is being answered is not given up"


def test_bodies_that_dawdle_make_room_too() -> None:
    with running(max_connections=3) as server, ExitStack() as held:
        for _ in range(4 * NUM_RESERVED):
            held.enter_context(server.connect(POST + b"Content-Length: 5\r\n\r\n"))
        server.until(lambda: server.app.disconnects > 0)
        assert len(server.server.connections) <= 3 + NUM_RESERVED


# Files


def test_connections_are_as_many_as_the_system_has_files_for(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    limits = {"now": (64, 128)}
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda _, pair: limits.update(now=pair))
    monkeypatch.setattr(server_module.os, "listdir", lambda _: list(range(8)))
    with caplog.at_level(logging.WARNING):
        assert num_connections_for(4096) == (128 - 8 - 48) // 2
    assert limits["now"] == (128, 128), "what the system allows is asked for"
    assert "4096" in caplog.text
    assert "128: 36 connections" in caplog.text
    limits["now"] = (1024, resource.RLIM_INFINITY)
    assert num_connections_for(4096) == 4096
    assert limits["now"] == (8 + 48 + 2 * 4096, resource.RLIM_INFINITY)
    limits["now"] = (1 << 20, 1 << 20)
    assert num_connections_for(4096) == 4096
    assert limits["now"] == (1 << 20, 1 << 20)
    limits["now"] = (40, 40)
    with pytest.raises(ConfigError, match="open files: got a limit of 40, expected at least 58"):
        num_connections_for(4096)


def test_where_files_run_out_few_lines_say_so_and_the_silent_make_room(caplog: pytest.LogCaptureFixture) -> None:
    """Asyncio tells of each connection that it can't accept, thousands of times a second: megabytes of log."""
    logger = logging.getLogger("sensorium.entrypoints.openai.connections")
    aborted = []

    class Transport:
        def abort(self) -> None:
            aborted.append(self)

    async def run() -> None:
        loop = asyncio.get_running_loop()
        connections = Connections(100, LAZY)
        for _ in range(3):
            connections.add(Transport(), None, Phase.HEAD)  # type: ignore[arg-type]
        for _ in range(1000):
            connections.take_loop_error(loop, {"message": "socket.accept() out of system resource"})

    for each in logger.filters:
        each._last.clear()  # type: ignore[attr-defined]
    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert len(aborted) == 3
    assert len(caplog.records) == 2
    assert "no more files" in caplog.text


# Clients that close their sending side


@pytest.mark.parametrize("version", [b"1.0", b"1.1"])
@pytest.mark.parametrize("path", [b"/x", b"/wait", b"/stream", b"/large"])
def test_a_half_closed_client_gets_its_answer(path: bytes, version: bytes) -> None:
    head = b"POST " + path + b" HTTP/" + version + b"\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"
    with running() as server:
        threading.Timer(2.0, server.app.release.set).start()
        answer = server.ask(head, closes=True)
    *interim, final = answer.split(b"HTTP/1.1 ")[1:]
    assert all(each == b"100 Continue\r\n\r\n" for each in interim)
    assert final.startswith(b"200 OK")
    assert b"5 bytes" in final or len(final) > 32 << 20
    assert server.app.disconnects == 0


def test_a_client_that_is_gone_is_noticed_though_it_might_have_closed_its_sending_side_only() -> None:
    with running() as server:
        for _ in range(3):
            server.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n").close()
        server.until(lambda: server.app.disconnects == 3)
        assert server.app.waiting == 0
        server.until(lambda: len(server.server.connections) == 0)


def test_a_half_closed_client_that_then_goes_is_noticed() -> None:
    with running() as server:
        connection = server.connect(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1024).startswith(b"HTTP/1.1 100 Continue")
        connection.close()
        server.until(lambda: server.app.disconnects == 1)


def test_half_a_request_behind_a_closed_side_gets_no_answer(lazy: Running) -> None:
    assert lazy.ask(POST + b"Content-Length: 5\r\n\r\nhel", closes=True) == b""
    assert lazy.ask(POST, closes=True) == b""
    assert lazy.ask(GET + POST, closes=True).count(b"HTTP/1.1 ") == 1

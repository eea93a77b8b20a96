"""Reading bodies and writing streams: what all routes share of HTTP."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sensorium.entrypoints.openai.body import Body
from sensorium.entrypoints.openai.errors import HttpError, error_body
from sensorium.entrypoints.openai.protocol import parse_body
from sensorium.entrypoints.openai.records import note_failure
from sensorium.errors import InvalidRequestError, RequestAbortedError, SensoriumError
from sensorium.logger import get_logger

logger = get_logger(__name__)

MAX_NESTING = 32
MAX_CONTAINERS = 1 << 15
"""Most lists and objects in one body."""
_MAX_BRACKETS = 1 << 20
"""Most characters that look like the beginning of one, in texts too."""
MAX_MEMBERS = 1 << 16
"""Most members of one object."""
_MAX_COLONS = 1 << 18
"""Most characters that may follow the name of a member, in texts too."""
MAX_ELEMENTS = 1 << 20
"""Most elements of all lists and objects together; commas in texts count too."""
PADDED_BYTES = 128
"""Events that are padded have a multiple of this length: the pieces of an answer are shorter, and mostly all alike."""
_PARSE_IN_THREAD_BYTES = 1 << 16
_T = TypeVar("_T")
_Body = TypeVar("_Body", bound=Body)


async def read_body(request: Request, kind: type[_Body]) -> _Body:
    """The body, which is JSON, as one of a kind.

    Its Content-Type must be JSON: a web page can't send that without asking the server first (CORS).

    Raises:
        HttpError: 415, it is declared as something else.
        InvalidRequestError: It isn't JSON, is nested too deeply, or not of the kind.
        RequestAbortedError: The client has disconnected.
    """
    _check_type(request.headers.get("Content-Type"))
    try:
        body = await request.body()
    except ClientDisconnect:
        raise RequestAbortedError("the client has gone.") from None
    return await beside_loop(request, lambda: parse_body(kind, _parse(body)))


async def beside_loop(request: Request, call: Callable[[], _T]) -> _T:
    """Call a function on a body that has been read, in a thread if it may take long enough to delay other requests."""
    if len(await request.body()) > _PARSE_IN_THREAD_BYTES:
        return await asyncio.to_thread(call)
    return call()


def _check_type(content_type: str | None) -> None:
    if content_type is None or content_type.partition(";")[0].strip().lower() != "application/json":
        got = "none" if content_type is None else f"{content_type!r:.80}"
        raise HttpError(
            415,
            f"Content-Type: got {got}, expected application/json. Send the header 'Content-Type: application/json' "
            "(with curl: -H 'Content-Type: application/json').",
        )


def _parse(body: bytes) -> Any:
    _check_raw_counts(body)
    try:
        content = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError):
        raise InvalidRequestError("the body: got something that is no JSON, expected a JSON object.") from None
    except RecursionError:
        raise _too_deep() from None
    _check_nesting(content)
    if b'"logit_bias"' in body:
        json.loads(body, object_pairs_hook=_once, parse_int=str, parse_float=str)
    return content


def _once(pairs: list[tuple[str, Any]]) -> None:
    """Refuse an object that has a name twice: parsers differ in which value they take."""
    names: set[str] = set()
    for name, _ in pairs:
        if name in names:
            raise InvalidRequestError(f"a name in the body: got {name!r:.60} twice, expected it once. Remove one.")
        names.add(name)


def _check_nesting(content: object) -> None:
    level, num_containers = [content], 0
    for _ in range(MAX_NESTING):
        level = [member for value in level for member in _members(value)]
        if not level:
            return
        num_containers += len(level)
        if num_containers > MAX_CONTAINERS:
            raise _too_many(num_containers, "lists and objects", MAX_CONTAINERS)
    raise _too_deep()


def _check_raw_counts(body: bytes) -> None:
    """Refuse a body that would take long to decode, before it is decoded."""
    for number, kind, most in (
        (body.count(b"{") + body.count(b"["), "lists and objects, or brackets in texts", _MAX_BRACKETS),
        (body.count(b":"), "members of objects, or colons in texts", _MAX_COLONS),
        (body.count(b","), "elements of lists and objects, or commas in texts", MAX_ELEMENTS),
    ):
        if number > most:
            raise _too_many(number, kind, most)


def _too_many(number: int, kind: str, most: int) -> InvalidRequestError:
    return InvalidRequestError(
        f"the body: got {number} {kind}, expected at most {most}. Send several smaller requests."
    )


def _members(value: object) -> list[Any]:
    if isinstance(value, dict):
        if len(value) > MAX_MEMBERS:
            raise InvalidRequestError(
                f"the body: got an object of {len(value)} members, expected at most {MAX_MEMBERS}. Send fewer."
            )
        return [each for each in value.values() if isinstance(each, dict | list)]
    if isinstance(value, list):
        return [each for each in value if isinstance(each, dict | list)]
    return []


def _too_deep() -> InvalidRequestError:
    return InvalidRequestError(f"the body: got values nested too deeply, expected at most {MAX_NESTING} levels.")


def tenant_of(request: Request) -> bytes:
    """The tenant of a request, by its API key: only the same tenant may find what the request leaves in caches."""
    tenant: bytes = getattr(request.state, "tenant", b"")
    return tenant


async def while_connected(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """The result of `work`, which is cancelled if the client disconnects.

    Raises:
        RequestAbortedError: It has.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((task, watcher), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestAbortedError("the client has gone.")
    finally:
        for each in (task, watcher):
            each.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await task  # its `finally` blocks are done before anyone goes on
        del task  # or its error, which holds this frame, would be held by it, and all the media on the way with it


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class JsonResponse(Response):
    """A JSON body, written quickly."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """See Starlette."""
        return msgspec.json.encode(content)


class EventStream(Response):
    """Server-sent events: one `data:` line per item, `[DONE]` at the end, an error event where it breaks off.

    The iterator is closed when the client disconnects, before anything else happens. With `is_named`, each event has
    its item's `type` for a name, and the last item is the end. With `is_padded`, items have one more field, which makes
    their lengths multiples of `PADDED_BYTES`.
    """

    def __init__(self, items: AsyncIterator[Any], *, is_named: bool = False, is_padded: bool = False) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["Content-Length"]
        self._items = items
        self._is_named = is_named
        self._encode = padded if is_padded else msgspec.json.encode

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        writer = asyncio.ensure_future(self._write(send))
        watcher = asyncio.ensure_future(_disconnected(Request(scope, receive)))
        try:
            await asyncio.wait((writer, watcher), return_when=asyncio.FIRST_COMPLETED)
            if writer.done():
                writer.result()
        finally:
            for each in (writer, watcher):
                each.cancel()
            with suppress(asyncio.CancelledError, Exception):
                await writer

    async def _write(self, send: Send) -> None:
        async with aclosing(self._items) as items:  # type: ignore[type-var]
            try:
                async for item in items:
                    name = b"event: " + item["type"].encode() + b"\n" if self._is_named else b""
                    await self._send_event(send, self._encode(item), name)
            except SensoriumError as error:
                note_failure(error)
                await self._send_event(send, msgspec.json.encode(error_body(error)))
            except Exception as error:
                note_failure(error)
                logger.exception("a stream broke off")
                body = error_body(error, "the answer could not be completed.")
                await self._send_event(send, msgspec.json.encode(body))
            if not self._is_named:
                await self._send_event(send, b"[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    @staticmethod
    async def _send_event(send: Send, data: bytes, name: bytes = b"") -> None:
        await send({"type": "http.response.body", "body": name + b"data: " + data + b"\n\n", "more_body": True})


def padded(item: dict[str, Any]) -> bytes:
    """An item as JSON, with `obfuscation`: characters without a meaning, so that its length says nothing."""
    bare = msgspec.json.encode({**item, "obfuscation": ""})
    filling = secrets.token_urlsafe(PADDED_BYTES)[: -len(bare) % PADDED_BYTES]
    return msgspec.json.encode({**item, "obfuscation": filling})


class _Started(AsyncIterator[_T]):
    """A generator's items, of which the first is there. No generator itself: it stands between every two tokens."""

    def __init__(self, first: _T, items: AsyncIterator[_T]) -> None:
        self._first = [first]
        self._items = items

    def __anext__(self) -> Awaitable[_T]:
        return self._take_first() if self._first else anext(self._items)

    async def _take_first(self) -> _T:
        return self._first.pop()

    async def aclose(self) -> None:
        """Close the generator."""
        await self._items.aclose()  # type: ignore[attr-defined]


async def with_first(items: AsyncIterator[_T]) -> AsyncIterator[_T]:
    """The same items, after waiting for the first: an error before it is an ordinary error response."""
    try:
        first = await anext(items)
    except BaseException:
        await items.aclose()  # type: ignore[attr-defined]
        raise
    return _Started(first, items)


async def only(items: AsyncIterator[_T]) -> _T:
    """The only item of a generator, which is closed."""
    async with aclosing(items):  # type: ignore[type-var]
        return await anext(items)


async def merged(sources: list[AsyncIterator[_T]]) -> AsyncIterator[tuple[int, _T]]:
    """Items of several iterators as they come, each with its iterator's index. An error of one ends all."""
    if len(sources) == 1:
        async with aclosing(sources[0]) as source:  # type: ignore[type-var]
            async for item in source:
                yield 0, item
        return
    pending = {asyncio.ensure_future(anext(source)): index for index, source in enumerate(sources)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                index = pending.pop(task)
                try:
                    item = task.result()
                except StopAsyncIteration:
                    continue
                yield index, item
                pending[asyncio.ensure_future(anext(sources[index]))] = index
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        for source in sources:
            await source.aclose()  # type: ignore[attr-defined]

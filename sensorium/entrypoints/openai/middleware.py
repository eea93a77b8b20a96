"""The middleware of every route: request ids, records, keys, bounds. Plain ASGI, nothing buffered.

From the outside in: request id and record, the bound on requests, `WebPages`, keys, the bounds on bodies.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import re
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sensorium.entrypoints.openai.errors import HttpError, error_response
from sensorium.entrypoints.openai.numbers import is_count
from sensorium.entrypoints.openai.records import RequestRecord, begin_record
from sensorium.logger import get_logger, request_id_of_logs
from sensorium.stages import stages_into

logger = get_logger(__name__)

OPEN_PATHS = frozenset({"/health", "/ping"})
"""All other paths need a key, including paths that don't exist, except for pages without data."""
REQUEST_ID_HEADER = "X-Request-Id"
OnEnd: TypeAlias = Callable[[RequestRecord], None]
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestRecords:
    """Gives each request an id, which its answer has too; keeps its record, and passes it on when the request has
    ended.

    Args:
        on_end: called with each record, in this order.
        routes: the paths by which records name their routes, by endpoint.
    """

    def __init__(self, app: ASGIApp, on_end: Sequence[OnEnd], routes: Mapping[Any, str]) -> None:
        self._app = app
        self._on_end = on_end
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        record = _record_of(scope)
        scope.setdefault("state", {})["request_id"] = record.request_id
        begin_record(record)
        request_id_of_logs.set(record.request_id)

        async def send_named(message: Message) -> None:
            if message["type"] == "http.response.start":
                record.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = record.request_id
                for text in record.warnings:
                    headers.append("Warning", f'299 sensorium "{text}"')
            await send(message)

        try:
            with stages_into(record.stages):
                await self._app(scope, receive, send_named)
        finally:
            record.end_s = time.monotonic()
            record.route = self._routes.get(scope.get("endpoint"), record.route)
            for each in self._on_end:
                each(record)


def _record_of(scope: Scope) -> RequestRecord:
    headers = Headers(scope=scope)
    given = headers.get(REQUEST_ID_HEADER, "")
    return RequestRecord(
        request_id=given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex,
        method=scope["method"],
        path=scope["path"],
        start_s=time.monotonic(),
        client=scope["client"][0] if scope.get("client") else None,
        trace_headers={name: headers[name] for name in ("traceparent", "tracestate") if name in headers},
    )


def log_record(record: RequestRecord) -> None:
    """One line of facts without any contents."""
    if logger.isEnabledFor(logging.INFO):
        logger.info("%s %.128s %d", record.method, record.path, record.status, extra={"facts": record.facts()})


class Capacity:
    """Bounds the number of concurrent requests; beyond it, 503. Health checks always get through.

    A request counts from the end of its body on, so that slow bodies take no places.
    """

    def __init__(self, app: ASGIApp, max_requests: int) -> None:
        self._app = app
        self._max_requests = max_requests
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http" or (scope["path"] in OPEN_PATHS and not scope["query_string"]):
            await self._app(scope, receive, send)
            return
        is_counted = False

        async def receive_counted() -> Message:
            nonlocal is_counted
            message = await receive()
            if message["type"] == "http.request" and not message.get("more_body", False) and not is_counted:
                self._check()
                is_counted = True
                self._num_requests += 1
            return message

        try:
            self._check()
            await self._app(scope, receive_counted, send)
        except HttpError as error:
            await error_response(error)(scope, receive, send)
        finally:
            self._num_requests -= is_counted

    def _check(self) -> None:
        if self._num_requests >= self._max_requests:
            raise HttpError(
                503,
                f"requests: got {self._num_requests} at once, expected fewer. Send the request again later.",
                headers={"Retry-After": "1", "Connection": "close"},
            )


class ApiKeys:
    """Refuses requests without one of the keys. Compares digests in constant time, all of them every time.

    The digest of a request's key becomes its `tenant`: only requests with the same key share caches.

    `page_paths`: exact paths of static files that anyone may read.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str], page_paths: Sequence[str] = ()) -> None:
        self._app = app
        self._page_paths = frozenset(page_paths)
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http" and not self._is_open(scope) and not self._is_allowed(scope):
            error = HttpError(
                401,
                "API key: got none that is valid, expected 'Authorization: Bearer <key>'. Send a key of this server.",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error_response(error)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_open(self, scope: Scope) -> bool:
        is_page = scope["path"] in self._page_paths and scope["method"] in ("GET", "HEAD")
        return is_page or scope["path"] in OPEN_PATHS

    def _is_allowed(self, scope: Scope) -> bool:
        scheme, _, token = Headers(scope=scope).get("Authorization", "").partition(" ")
        digest = hashlib.sha256(token.strip().encode("utf-8", "surrogateescape")).digest()
        matches = [hmac.compare_digest(digest, own) for own in self._digests]
        scope.setdefault("state", {})["tenant"] = digest
        return any(matches) and scheme.lower() == "bearer"


class BodyBounds:
    """Bounds the bytes of one body, and those of all bodies whose answers have not begun, while they arrive.

    Beyond the latter, requests are accepted whose API key has less than its share of it.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int, max_waiting_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes
        self._max_waiting_bytes = max_waiting_bytes
        self._num_waiting_bytes: Counter[bytes] = Counter()
        """By tenant, for those who have some."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        num_bytes, tenant = 0, scope.get("state", {}).get("tenant", b"")

        def release() -> None:
            nonlocal num_bytes
            self._num_waiting_bytes[tenant] -= num_bytes
            if not self._num_waiting_bytes[tenant]:
                del self._num_waiting_bytes[tenant]
            num_bytes = 0

        async def receive_bounded() -> Message:
            nonlocal num_bytes
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes += size
            self._num_waiting_bytes[tenant] += size
            self._check(num_bytes, tenant)
            return message

        async def send_and_release(message: Message) -> None:
            if message["type"] == "http.response.start":
                release()
            await send(message)

        try:
            declared = Headers(scope=scope).get("Content-Length", "0")
            self._check_one(int(declared) if is_count(declared) else self._max_body_bytes + 1)
            await self._app(scope, receive_bounded, send_and_release)
        except HttpError as error:
            await error_response(error)(scope, receive, send)
        finally:
            release()

    def _check(self, num_bytes: int, tenant: bytes) -> None:
        self._check_one(num_bytes)
        waiting, most = self._num_waiting_bytes, self._max_waiting_bytes
        if waiting.total() > most and waiting[tenant] > most // len(waiting):
            raise HttpError(
                503,
                f"waiting request bodies: got more than {self._max_waiting_bytes} bytes, expected fewer. "
                "Send the request again later.",
                headers={"Retry-After": "2"},
            )

    def _check_one(self, num_bytes: int) -> None:
        if num_bytes > self._max_body_bytes:
            raise HttpError(
                413,
                f"the body: got more than {self._max_body_bytes} bytes, expected at most so many. "
                "Send smaller media, or raise max_body_bytes.",
            )

"""The one fetcher of media. Nothing else in the package opens a URL or a path that came with a request.

How a remote fetch is kept safe:
  * the address is parsed once (`url.py`) and the client is given the parts;
  * the name is resolved once, all its addresses are checked (`address.py`), and the connection goes to a checked one,
    with the name kept for the Host header and for TLS: a second look-up that answers differently never happens;
  * redirects are followed here, one by one, each checked like the first address, none from https down to http;
  * bytes are counted as they come (`origin.py`); compressed transfer is refused, so that nothing can expand;
  * one deadline covers look-up, connection, redirects and body; one slow host can hold only a part of the slots;
  * no cookies, no credentials, no proxies or other settings from the environment, and no connection is used twice.
"""

from __future__ import annotations

import asyncio
import ssl
import threading
import weakref
from collections.abc import AsyncIterator, Coroutine, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sensorium.errors import MediaForbiddenError, MediaTypeError, MediaUnavailableError
from sensorium.logger import get_logger
from sensorium.media.address import IPAddress, Resolver, SystemResolver, resolve_and_check
from sensorium.media.budget import MediaBudget, MediaLease
from sensorium.media.limits import MediaLimits, bytes_too_large, check_encoded_bytes
from sensorium.media.local import extend_bounded, path_of_file_url, read_data_url, read_local_file
from sensorium.media.policy import FetchPolicy
from sensorium.media.url import RemoteUrl, parse_remote_url, scheme_of

if TYPE_CHECKING:
    from sensorium.media.origin import Answer

logger = get_logger(__name__)

MediaSource = str | Path | bytes
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_MAX_ADDRESSES_TRIED = 4
_MIN_OF_HOST = 4  # fetches from one host at once, however few may be under way
_INLINE_CHARS = 1 << 16  # data URLs up to this long are decoded on the event loop


@dataclass(frozen=True, slots=True)
class FetchedMedia:
    """The bytes of an item as they came. `media_type` is known for data URLs only; elsewhere the content tells.

    `lease` counts the bytes in the fetcher's budget, if there is one, until it is garbage.
    """

    data: bytes
    media_type: str | None = None
    lease: MediaLease | None = field(default=None, repr=False, compare=False)


class MediaFetcher:
    """Fetches encoded media from URLs, data URLs, paths and bytes under one policy and one set of budgets.

    Safe to share between threads and event loops. The bound on concurrent fetches holds for each event loop, and once
    more for all synchronous callers together.

    Args:
        resolver: how names become addresses; the operating system's resolver by default.
        ssl_context: how TLS peers are verified; public authorities by default.
        budget: bounds the bytes that all fetches together hold; without it, they are not bounded.
    """

    def __init__(
        self,
        limits: MediaLimits | None = None,
        policy: FetchPolicy | None = None,
        *,
        resolver: Resolver | None = None,
        ssl_context: ssl.SSLContext | None = None,
        budget: MediaBudget | None = None,
    ) -> None:
        self.budget = budget
        self.limits = limits or MediaLimits()
        self.policy = policy or FetchPolicy()
        self._networks = self.policy.networks()
        self._resolver = resolver or SystemResolver()
        self._given_ssl_context = ssl_context
        self._slots: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, _Slots] = weakref.WeakKeyDictionary()
        self._sync_slots = threading.BoundedSemaphore(self.limits.max_concurrent_fetches)

    def fetch(self, source: MediaSource, modality: str) -> FetchedMedia:
        """Fetch one item, blocking the calling thread; see `afetch`. Works beside a running event loop too."""
        if not _is_remote(source):
            return self._read_here(source, modality)
        with self._sync_slots:
            return _run_blocking(self.afetch(source, modality))

    async def afetch(self, source: MediaSource, modality: str) -> FetchedMedia:
        """Fetch one item of `modality` ("image", "video" or "audio").

        Raises:
            MediaForbiddenError: scheme, host, address, port or file is not allowed.
            MediaTooLargeError: the item exceeds its bytes.
            MediaUnavailableError: the source is missing, answers with an error, breaks off or is too slow.
            OverloadedError: the budget is spent.
            MediaError: the source text is malformed.
        """
        if isinstance(source, str) and _is_remote(source):
            return await self._fetch_remote(source, modality)
        if isinstance(source, bytes) or (isinstance(source, str) and len(source) <= _INLINE_CHARS and _is_data(source)):
            return self._read_here(source, modality)
        return await asyncio.to_thread(self._read_here, source, modality)

    def _read_here(self, source: MediaSource, modality: str) -> FetchedMedia:
        """Sources that need no network."""
        if isinstance(source, bytes):
            check_encoded_bytes(modality, len(source), self.limits)
            return self._held(source)
        if isinstance(source, Path):
            return self._held(read_local_file(source, modality, self.limits, self.policy))
        scheme = scheme_of(source)
        if scheme == "data":
            return self._held(*read_data_url(source, modality, self.limits))
        if scheme is not None and scheme != "file":
            raise MediaForbiddenError(
                f"{modality} source is not allowed: got an unknown scheme, expected http, https, data or file. "
                "Correct the URL, or give the bytes."
            )
        path = Path(source) if scheme is None else path_of_file_url(source)
        return self._held(read_local_file(path, modality, self.limits, self.policy))

    def _held(self, data: bytes, media_type: str | None = None) -> FetchedMedia:
        return FetchedMedia(data, media_type, None if self.budget is None else self.budget.lease(len(data)))

    async def _fetch_remote(self, source: str, modality: str) -> FetchedMedia:
        timeout_s = self.limits.fetch_timeout_s(modality)
        loop = asyncio.get_running_loop()
        slots = self._slots.setdefault(loop, _Slots(self.limits.max_concurrent_fetches))
        url = parse_remote_url(source)
        async with slots.for_host(url.host):
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._follow(url, modality)
            except TimeoutError:
                raise MediaUnavailableError(
                    f"{modality} did not arrive in time: got no complete answer, expected one within {timeout_s:g} s. "
                    f"Use a faster source or a data URL, or raise {modality}_fetch_timeout_s."
                ) from None

    async def _follow(self, url: RemoteUrl, modality: str) -> FetchedMedia:
        """Fetch `url` and what it redirects to."""
        for _ in range(self.limits.max_redirects + 1):
            addresses = await self._check(url)
            answer = await self._request_any(url, addresses, modality)
            if isinstance(answer, FetchedMedia):
                return answer
            target = url.join(answer)
            if url.scheme == "https" and target.scheme == "http":
                raise MediaForbiddenError(
                    "media redirect is not allowed: got one from https to http, expected https. Use the final address."
                )
            url = target
        raise MediaUnavailableError(
            f"media source redirects too often: got more than {self.limits.max_redirects} redirects. "
            "Use the final address, or raise max_redirects."
        )

    async def _check(self, url: RemoteUrl) -> list[IPAddress]:
        """Check a hop against the policy, and return the addresses that may be connected to."""
        policy = self.policy
        if not policy.allow_remote:
            raise MediaForbiddenError("remote media are switched off: got a URL, expected a data URL. Send it inline.")
        if not policy.allows_host(url.host):
            raise MediaForbiddenError(
                "media host is not allowed: got one that is not on the list, expected one of allowed_hosts. "
                "Send the media inline as a data URL, or have the operator extend allowed_hosts."
            )
        if policy.allowed_ports and url.port not in policy.allowed_ports:
            raise MediaForbiddenError(
                f"media port is not allowed: got {url.port}, expected one of allowed_ports. Use an allowed port."
            )
        return await resolve_and_check(url.host, url.port, resolver=self._resolver, allowed_networks=self._networks)

    async def _request_any(self, url: RemoteUrl, addresses: Sequence[IPAddress], modality: str) -> FetchedMedia | str:
        """Request `url` from the first address that accepts a connection. Returns the body, or the address that it
        redirects to."""
        import httpcore

        tried = addresses[:_MAX_ADDRESSES_TRIED]
        connect_timeout_s = self.limits.fetch_timeout_s(modality) / len(tried)
        for address in tried:
            try:
                return await self._request(url, address, modality, connect_timeout_s)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                logger.debug("media source refused a connection: %r", error)
            except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
                logger.debug("media source broke off: %r", error)
                raise MediaUnavailableError(
                    f"{modality} can't be fetched: got an answer that breaks off or can't be read. "
                    "Check the URL, or send a data URL."
                ) from None
        raise MediaUnavailableError(
            f"{modality} can't be fetched: got no connection to its host, or no valid certificate. "
            "Check the URL, or send a data URL."
        )

    async def _request(
        self, url: RemoteUrl, address: IPAddress, modality: str, connect_timeout_s: float
    ) -> FetchedMedia | str:
        from sensorium.media.origin import TooFinelyChopped, ask

        context = self._ssl_context if url.scheme == "https" else None
        max_bytes = self.limits.max_bytes(modality)
        async with ask(url, address, context, connect_timeout_s=connect_timeout_s, max_bytes=max_bytes) as answer:
            if answer.status in _REDIRECTS and "location" in answer.headers:
                return answer.headers["location"]
            try:
                return await self._read_body(answer, modality)
            except TooFinelyChopped:
                raise MediaUnavailableError(
                    f"{modality} can't be fetched: got a body in far too many small pieces, expected larger ones. "
                    "Use another source, or send a data URL."
                ) from None

    async def _read_body(self, answer: Answer, modality: str) -> FetchedMedia:
        if answer.status != 200:
            raise MediaUnavailableError(
                f"{modality} can't be fetched: got HTTP status {answer.status}, expected 200. Check the URL."
            )
        if answer.headers.get("content-encoding", "identity").lower() != "identity":
            raise MediaTypeError(
                f"{modality} can't be read: got a compressed transfer although none was asked for. Use another source."
            )
        max_bytes = self.limits.max_bytes(modality)
        declared = answer.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and int(declared) > max_bytes:
            raise bytes_too_large(modality, int(declared), max_bytes)
        body = bytearray()
        lease = None if self.budget is None else self.budget.lease()
        async for chunk in answer.body:
            if lease is not None:
                lease.grow(len(chunk))
            extend_bounded(body, chunk, modality, max_bytes)
        return FetchedMedia(bytes(body), lease=lease)

    @cached_property
    def _ssl_context(self) -> ssl.SSLContext:
        if self._given_ssl_context is not None:
            return self._given_ssl_context
        import httpx

        return httpx.create_ssl_context(trust_env=False)


class _Slots:
    """Bounds the concurrent fetches of one event loop, and those from one host to a quarter of that."""

    def __init__(self, most: int) -> None:
        self._all = asyncio.Semaphore(most)
        self._most_of_host = max(most // 4, min(most, _MIN_OF_HOST))
        self._hosts: weakref.WeakValueDictionary[str, asyncio.Semaphore] = weakref.WeakValueDictionary()

    @asynccontextmanager
    async def for_host(self, host: str) -> AsyncIterator[None]:
        """Wait for a slot, and hold it."""
        of_host = self._hosts.setdefault(host, asyncio.Semaphore(self._most_of_host))
        async with of_host, self._all:
            yield


def _is_remote(source: MediaSource) -> bool:
    return isinstance(source, str) and scheme_of(source) in ("http", "https")


def _is_data(source: str) -> bool:
    return scheme_of(source) == "data"


def _run_blocking(work: Coroutine[Any, Any, FetchedMedia]) -> FetchedMedia:
    """Run `work` to its end from synchronous code, also where this thread runs an event loop already (a notebook's)."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    outcome: Future[FetchedMedia] = Future()

    def run() -> None:
        try:
            outcome.set_result(asyncio.run(work))
        except BaseException as error:  # noqa: BLE001  raised in the thread that waits
            outcome.set_exception(error)

    thread = threading.Thread(target=run, name="sensorium-fetch", daemon=True)
    thread.start()
    return outcome.result()

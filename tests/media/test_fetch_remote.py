"""The remote fetcher against a hostile server: each defence of the fetcher has a test that fails without it."""

import asyncio
import gc
import socket
import ssl
import time
from collections.abc import Callable, Iterator

import pytest

from sensorium.errors import (
    MediaError,
    MediaForbiddenError,
    MediaTooLargeError,
    MediaTypeError,
    MediaUnavailableError,
)
from sensorium.media import FetchedMedia, FetchPolicy, MediaFetcher, MediaLimits
from tests.helpers.waiting import HANG_S, auntil
from tests.media.hostile_server import BODY, CERTIFICATE, FakeResolver, HostileServer

Fetch = Callable[[MediaFetcher, str], FetchedMedia]
LOOPBACK = "127.0.0.1/32"
LIMITS = MediaLimits(max_image_bytes=1 << 20, image_fetch_timeout_s=HANG_S)


@pytest.fixture(scope="module")
def server() -> Iterator[HostileServer]:
    server = HostileServer()
    yield server
    server.close()


def make_fetcher(
    table: dict[str, list[list[str]]] | None = None, limits: MediaLimits = LIMITS, **policy: object
) -> tuple[MediaFetcher, FakeResolver]:
    resolver = FakeResolver(table if table is not None else {"media.example": [["127.0.0.1"]]})
    policy.setdefault("allowed_networks", (LOOPBACK,))
    return MediaFetcher(limits, FetchPolicy(**policy), resolver=resolver), resolver  # type: ignore[arg-type]


def assert_says_nothing_inside(error: MediaError) -> None:
    """No address, path, class or library text in what the client reads."""
    text = str(error)
    for leak in ("127.0.0.1", "10.0.0", "::1", "/etc", "media.example", "httpx", "Errno", "Traceback", "0x"):
        assert leak not in text, text
    assert error.__cause__ is None


@pytest.fixture(params=["sync", "async", "sync beside a running loop"])
def fetch(request: pytest.FixtureRequest) -> Fetch:
    def run_async(fetcher: MediaFetcher, url: str) -> FetchedMedia:
        return asyncio.run(fetcher.afetch(url, "image"))

    def run_beside(fetcher: MediaFetcher, url: str) -> FetchedMedia:
        async def main() -> FetchedMedia:
            return fetcher.fetch(url, "image")

        return asyncio.run(main())

    def run_sync(fetcher: MediaFetcher, url: str) -> FetchedMedia:
        return fetcher.fetch(url, "image")

    runs: dict[str, Fetch] = {"sync": run_sync, "async": run_async, "sync beside a running loop": run_beside}
    return runs[str(request.param)]


def get(fetcher: MediaFetcher, url: str) -> bytes:
    return fetcher.fetch(url, "image").data


def test_body_arrives(server: HostileServer, fetch: Fetch) -> None:
    fetcher, _ = make_fetcher()
    assert fetch(fetcher, server.url("/ok")) == FetchedMedia(BODY, None)


def test_errors_arrive(server: HostileServer, fetch: Fetch) -> None:
    fetcher, _ = make_fetcher()
    with pytest.raises(MediaUnavailableError, match="status 404"):
        fetch(fetcher, server.url("/status/404"))


# --- addresses ---


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1", "10.1.2.3", "169.254.169.254", "0.0.0.0", "224.0.0.1", "::1", "fe80::1", "::ffff:127.0.0.1"],
)
def test_names_of_private_addresses_are_refused(server: HostileServer, address: str) -> None:
    fetcher, _ = make_fetcher({"media.example": [[address]]}, allowed_networks=())
    before = len(server.requests)
    with pytest.raises(MediaForbiddenError) as caught:
        get(fetcher, server.url("/ok"))
    assert_says_nothing_inside(caught.value)
    assert len(server.requests) == before


def test_one_private_address_among_public_ones_refuses_the_host(server: HostileServer) -> None:
    fetcher, _ = make_fetcher({"media.example": [["127.0.0.1", "10.0.0.7"]]})
    with pytest.raises(MediaForbiddenError):
        get(fetcher, server.url("/ok"))


def test_address_literals_are_checked_too(server: HostileServer) -> None:
    fetcher, resolver = make_fetcher(allowed_networks=())
    for host in ("127.0.0.1", "[::1]", "[::ffff:7f00:1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]"):
        with pytest.raises(MediaForbiddenError):
            get(fetcher, server.url("/ok", host=host))
    assert resolver.asked == []


def test_rebinding_name_is_resolved_once_and_pinned(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name server that answers with an allowed address to the check and another one to the connection."""
    fetcher, resolver = make_fetcher({"media.example": [["127.0.0.1"], ["10.0.0.7"]]})
    real = socket.getaddrinfo

    def only_literals(host: str, *args: object, **kwargs: object) -> object:
        assert host == "127.0.0.1", "the client resolved a name by itself"
        return real(host, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(socket, "getaddrinfo", only_literals)
    assert get(fetcher, server.url("/ok")) == BODY
    assert resolver.asked == ["media.example"]
    assert f"Host: media.example:{server.port}\r\n" in server.requests[-1]


def test_name_that_rebinds_at_a_redirect_is_refused(server: HostileServer) -> None:
    fetcher, resolver = make_fetcher({"media.example": [["127.0.0.1"], ["10.0.0.7"]]})
    with pytest.raises(MediaForbiddenError):
        get(fetcher, server.url("/to/!ok"))
    assert resolver.asked == ["media.example", "media.example"]


def test_next_address_is_tried_when_one_refuses(server: HostileServer) -> None:
    """127.0.0.2 belongs to this machine, but the server listens on 127.0.0.1 only."""
    table = {"media.example": [["127.0.0.2", "127.0.0.1"]]}
    fetcher, _ = make_fetcher(table, allowed_networks=("127.0.0.0/8",))
    assert get(fetcher, server.url("/ok")) == BODY


def test_unknown_name(server: HostileServer) -> None:
    fetcher, _ = make_fetcher({})
    with pytest.raises(MediaUnavailableError, match="can't be found") as caught:
        get(fetcher, server.url("/ok"))
    assert_says_nothing_inside(caught.value)


# --- policy ---


def test_hosts_off_the_list_are_not_even_looked_up(server: HostileServer) -> None:
    fetcher, resolver = make_fetcher(allowed_hosts=("*.media.example", "other.example"))
    with pytest.raises(MediaForbiddenError, match="allowed_hosts") as caught:
        get(fetcher, server.url("/ok"))
    assert resolver.asked == []
    assert_says_nothing_inside(caught.value)


def test_listed_host_still_needs_a_public_address(server: HostileServer) -> None:
    fetcher, _ = make_fetcher(allowed_hosts=("media.example",), allowed_networks=())
    with pytest.raises(MediaForbiddenError, match="public"):
        get(fetcher, server.url("/ok"))


def test_ports_and_remote_switch(server: HostileServer) -> None:
    fetcher, _ = make_fetcher(allowed_ports=(80, 443))
    with pytest.raises(MediaForbiddenError, match="allowed_ports"):
        get(fetcher, server.url("/ok"))
    fetcher, _ = make_fetcher(allow_remote=False)
    with pytest.raises(MediaForbiddenError, match="switched off"):
        get(fetcher, server.url("/ok"))


# --- redirects ---


def test_redirects_are_followed_and_checked(server: HostileServer) -> None:
    fetcher, resolver = make_fetcher({"media.example": [["127.0.0.1"]], "other.example": [["10.0.0.7"]]})
    assert get(fetcher, server.url("/to/!ok")) == BODY
    assert get(fetcher, server.url("/to/..!ok")) == BODY
    with pytest.raises(MediaForbiddenError):
        get(fetcher, server.url("/to/http:!!other.example!"))
    assert resolver.asked[-1] == "other.example"
    for target in ("file:!!!etc!hostname", "data:,x", "gopher:!!media.example", "!!user@media.example!"):
        with pytest.raises(MediaError) as caught:
            get(fetcher, server.url("/to/" + target))
        assert_says_nothing_inside(caught.value)


def test_redirect_may_not_leave_the_host_list(server: HostileServer) -> None:
    table = {"media.example": [["127.0.0.1"]], "other.example": [["127.0.0.1"]]}
    fetcher, resolver = make_fetcher(table, allowed_hosts=("media.example",))
    with pytest.raises(MediaForbiddenError, match="allowed_hosts"):
        get(fetcher, server.url(f"/to/http:!!other.example:{server.port}!ok"))
    assert resolver.asked == ["media.example"]


def test_redirects_are_few(server: HostileServer) -> None:
    fetcher, _ = make_fetcher(limits=MediaLimits(max_redirects=3))
    before = len(server.requests)
    with pytest.raises(MediaUnavailableError, match="max_redirects"):
        get(fetcher, server.url("/loop"))
    assert len(server.requests) - before == 4
    fetcher, _ = make_fetcher(limits=MediaLimits(max_redirects=0))
    with pytest.raises(MediaUnavailableError, match="max_redirects"):
        get(fetcher, server.url("/to/!ok"))


# --- bodies ---


@pytest.mark.parametrize("path", ["/endless", "/endless-chunked", "/claims-much"])
def test_bodies_are_bounded(server: HostileServer, path: str) -> None:
    fetcher, _ = make_fetcher()
    with pytest.raises(MediaTooLargeError, match="max_image_bytes"):
        get(fetcher, server.url(path))


@pytest.mark.parametrize("path", ["/claims-more", "/garbage", "/cut", "/endless-head", "/nothing"])
def test_broken_answers_are_unavailable(server: HostileServer, path: str) -> None:
    fetcher, _ = make_fetcher()
    with pytest.raises(MediaUnavailableError) as caught:
        get(fetcher, server.url(path))
    assert_says_nothing_inside(caught.value)


BUSY = (
    "/tiny-chunks",
    "/chunk-extensions",
    "/endless-trailers",
    "/endless-informational",
    "/many-headers",
    "/small-reads",
    "/endless-chunked",
    "/endless",
    "/endless-head",
    "/slow",
    "/slow-head",
)


@pytest.mark.parametrize("path", BUSY)
def test_no_origin_keeps_the_event_loop_busy(server: HostileServer, path: str) -> None:
    """An origin that sent chunks of one byte stood between all other requests, and past its own deadline.

    Work on one answer is counted in steps of the loop: whoever else runs there gets a turn after a few reads at most.
    What the tests before have left behind isn't collected meanwhile, as a server's objects aren't.
    """
    limits = MediaLimits(max_image_bytes=1 << 20, image_fetch_timeout_s=2.0)
    fetcher, _ = make_fetcher(limits=limits)
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            before = time.thread_time()
            await asyncio.sleep(0)
            longest_s = max(longest_s, time.thread_time() - before)

    async def main() -> None:
        watcher = asyncio.create_task(watch())
        fetches = [fetcher.afetch(server.url(path), "image") for _ in range(4)]
        found = await asyncio.gather(*fetches, return_exceptions=True)
        assert all(isinstance(each, MediaUnavailableError | MediaTooLargeError) for each in found), found
        watcher.cancel()

    gc.disable()
    try:
        asyncio.run(main())
    finally:
        gc.enable()
    assert longest_s < 0.3  # of this thread's own work, for four answers together


def test_honest_bodies_in_many_pieces_arrive(server: HostileServer) -> None:
    fetcher, _ = make_fetcher()
    assert get(fetcher, server.url("/pieces")) == b"x" * 128 * 2_000


def test_several_encodings_are_refused(server: HostileServer) -> None:
    fetcher, _ = make_fetcher()
    with pytest.raises(MediaTypeError, match="compressed"):
        get(fetcher, server.url("/encodings"))


def test_a_slow_host_leaves_slots_to_others(server: HostileServer) -> None:
    """Fetches from one host waited for each other in the line that all hosts share."""
    table = {"media.example": [["127.0.0.1"]], "slow.example": [["127.0.0.1"]]}
    fetcher, _ = make_fetcher(table, limits=MediaLimits(max_concurrent_fetches=8, image_fetch_timeout_s=30.0))

    async def main() -> bytes:
        slow = [
            asyncio.create_task(fetcher.afetch(server.url("/slow", host="slow.example"), "image")) for _ in range(16)
        ]
        await asyncio.sleep(0)
        fetched = await fetcher.afetch(server.url("/ok"), "image")
        assert not any(each.done() for each in slow)
        for each in slow:
            each.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
        return fetched.data

    assert asyncio.run(main()) == BODY


def test_body_beyond_its_claim_is_cut_off(server: HostileServer) -> None:
    fetcher, _ = make_fetcher()
    assert get(fetcher, server.url("/claims-less")) == BODY[:4]


def test_compressed_transfer_is_refused(server: HostileServer) -> None:
    fetcher, _ = make_fetcher()
    with pytest.raises(MediaTypeError, match="compressed"):
        get(fetcher, server.url("/gzip"))


@pytest.mark.parametrize("path", ["/slow", "/slow-head", "/loop"])
def test_one_deadline_for_everything(server: HostileServer, path: str) -> None:
    """Every read makes progress, so that a time-out per read would never strike."""
    limits = MediaLimits(image_fetch_timeout_s=0.4, max_redirects=10**9)
    fetcher, _ = make_fetcher(limits=limits)
    with pytest.raises(MediaUnavailableError, match="image_fetch_timeout_s"):
        get(fetcher, server.url(path))


def test_deadline_covers_the_look_up(server: HostileServer) -> None:
    class StuckResolver:
        async def resolve(self, host: str, port: int) -> list[str]:
            await asyncio.sleep(HANG_S)
            return []

    fetcher = MediaFetcher(MediaLimits(image_fetch_timeout_s=0.2), resolver=StuckResolver())
    with pytest.raises(MediaUnavailableError, match="image_fetch_timeout_s"):
        get(fetcher, server.url("/ok"))


def test_deadline_differs_by_modality(server: HostileServer) -> None:
    limits = MediaLimits(image_fetch_timeout_s=HANG_S, audio_fetch_timeout_s=0.2)
    fetcher, _ = make_fetcher(limits=limits)
    with pytest.raises(MediaUnavailableError, match="audio_fetch_timeout_s"):
        fetcher.fetch(server.url("/slow"), "audio")


# --- the request ---


def test_nothing_from_the_environment_is_sent(server: HostileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no netrc credentials, no cookie of an earlier answer, and one connection for one request."""
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    fetcher, _ = make_fetcher()
    assert get(fetcher, server.url("/cookie")) == BODY
    request = server.requests[-1].lower()
    for header in ("cookie:", "authorization:", "referer:"):
        assert header not in request
    assert "accept-encoding: identity\r\n" in request
    assert "connection: close\r\n" in request


def test_target_is_sent_as_parsed(server: HostileServer) -> None:
    fetcher, _ = make_fetcher()
    assert get(fetcher, server.url("/ok/ä b".replace(" ", "%20") + "?q=%2F&r=é#part")) == BODY
    assert server.requests[-1].split("\r\n")[0] == "GET /ok/%C3%A4%20b?q=%2F&r=%C3%A9 HTTP/1.1"


@pytest.mark.parametrize(
    ("path", "target"),
    [
        ("/a/../ok", "/ok"),
        ("/../../ok", "/ok"),
        ("/ok/./b/.", "/ok/b/"),
        ("/ok/b/..", "/ok/"),
        ("/ok//b", "/ok//b"),
        ("/ok/?to=/../x", "/ok/?to=/../x"),
    ],
)
def test_dots_are_resolved_before_anything_is_asked(server: HostileServer, path: str, target: str) -> None:
    fetcher, _ = make_fetcher()
    assert get(fetcher, server.url(path)) == BODY
    assert server.requests[-1].split(" ")[1] == target


def test_tls_keeps_the_name() -> None:
    """The connection goes to the checked address; certificate and SNI go by the name."""
    context = ssl.create_default_context(cafile=CERTIFICATE)
    server = HostileServer(tls=True)
    try:
        table = {"media.example": [["127.0.0.1"]], "wrong.example": [["127.0.0.1"]]}
        policy = FetchPolicy(allowed_networks=(LOOPBACK,))
        fetcher = MediaFetcher(LIMITS, policy, resolver=FakeResolver(table), ssl_context=context)
        assert get(fetcher, server.url("/ok", scheme="https")) == BODY
        assert server.server_names == ["media.example"]
        with pytest.raises(MediaUnavailableError, match="certificate"):
            get(fetcher, server.url("/ok", host="wrong.example", scheme="https"))
        with pytest.raises(MediaForbiddenError, match="https to http"):
            get(fetcher, server.url("/to/http:!!media.example!", scheme="https"))
        untrusting = MediaFetcher(LIMITS, policy, resolver=FakeResolver(table))
        with pytest.raises(MediaUnavailableError, match="certificate"):
            get(untrusting, server.url("/ok", scheme="https"))
    finally:
        server.close()


def test_concurrent_fetches_are_bounded(server: HostileServer) -> None:
    running = peak = 0

    class CountingResolver:
        async def resolve(self, host: str, port: int) -> list[str]:
            nonlocal running, peak
            running += 1
            peak = max(peak, running)
            await asyncio.sleep(0.02)
            running -= 1
            return ["127.0.0.1"]

    policy = FetchPolicy(allowed_networks=(LOOPBACK,))
    fetcher = MediaFetcher(MediaLimits(max_concurrent_fetches=3), policy, resolver=CountingResolver())

    async def main() -> list[FetchedMedia]:
        return await asyncio.gather(*(fetcher.afetch(server.url("/ok"), "image") for _ in range(12)))

    assert all(fetched.data == BODY for fetched in asyncio.run(main()))
    assert peak == 3


def test_cancelled_fetch_frees_its_slot(server: HostileServer) -> None:
    fetcher, _ = make_fetcher(limits=MediaLimits(max_concurrent_fetches=1))

    async def main() -> bytes:
        before = len(server.requests)
        task = asyncio.create_task(fetcher.afetch(server.url("/slow"), "image"))
        await auntil(lambda: len(server.requests) > before)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return (await fetcher.afetch(server.url("/ok"), "image")).data

    assert asyncio.run(main()) == BODY

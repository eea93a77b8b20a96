"""URLs are read one way, and only public addresses may be connected to."""

import asyncio
import ipaddress
import socket
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sensorium.errors import ConfigError, MediaError, MediaForbiddenError, MediaUnavailableError
from sensorium.media import FetchPolicy
from sensorium.media.address import SystemResolver, may_connect
from sensorium.media.url import RemoteUrl, parse_remote_url, scheme_of
from tests.helpers.waiting import HANG_S, until

PUBLIC = ["93.184.216.34", "8.8.8.8", "172.15.0.1", "172.32.0.1", "100.63.0.1", "2606:2800:220:1::1", "2a00:1450::1"]
NOT_PUBLIC = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.254"),
    *("169.254.0.1", "169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1"),
    *("192.168.1.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255"),
    *("240.0.0.1", "255.255.255.255", "100.100.100.200", "192.88.99.1"),
    *("::", "::1", "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::808:808", "64:ff9b::7f00:1"),
    *("64:ff9b:1::a00:1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::1", "2002:808:808::1", "3fff::1"),
    *("fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "5f00::1", "2001:10::1"),
]


@pytest.mark.parametrize("text", PUBLIC)
def test_public_addresses(text: str) -> None:
    assert may_connect(ipaddress.ip_address(text))


@pytest.mark.parametrize("text", NOT_PUBLIC)
def test_other_addresses_are_refused(text: str) -> None:
    assert not may_connect(ipaddress.ip_address(text))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=300)
def test_carried_addresses_are_never_public_and_follow_the_inner_one(value: int) -> None:
    inner = ipaddress.IPv4Address(value)
    nat64 = ipaddress.IPv6Address(int(ipaddress.IPv6Address("64:ff9b::")) | value)
    mapped = ipaddress.IPv6Address(0xFFFF << 32 | value)
    six_to_four = ipaddress.IPv6Address(0x2002 << 112 | value << 80)
    for outer in (nat64, mapped, six_to_four):
        assert not may_connect(outer)
        assert may_connect(outer, [ipaddress.ip_network("::/0")]) == may_connect(inner)


def test_allowed_networks_open_what_they_name_and_nothing_more() -> None:
    networks = FetchPolicy(allowed_networks=("10.1.0.0/16", "fd12::/16")).networks()
    assert may_connect(ipaddress.ip_address("10.1.2.3"), networks)
    assert may_connect(ipaddress.ip_address("fd12::1"), networks)
    assert not may_connect(ipaddress.ip_address("10.2.0.1"), networks)
    assert not may_connect(ipaddress.ip_address("127.0.0.1"), networks)


def test_metadata_services_stay_closed_whatever_is_allowed() -> None:
    everything = FetchPolicy(allowed_networks=("0.0.0.0/0", "::/0")).networks()
    assert may_connect(ipaddress.ip_address("127.0.0.1"), everything)
    for text in ("169.254.169.254", "fd00:ec2::254", "::ffff:169.254.169.254", "64:ff9b::a9fe:a9fe", "100.100.100.200"):
        assert not may_connect(ipaddress.ip_address(text), everything)


def test_policy_refuses_what_it_cannot_read() -> None:
    for networks in (("10.0.0.1/8",), ("example.com",)):
        with pytest.raises(ConfigError, match="allowed_networks"):
            FetchPolicy(allowed_networks=networks)
    with pytest.raises(ConfigError, match="allowed_local_media_path"):
        FetchPolicy(allowed_local_media_path="/nowhere/at/all")


def test_host_list() -> None:
    policy = FetchPolicy(allowed_hosts=("Example.com", "*.cdn.example"))
    for host, is_allowed in (
        ("example.com", True),
        ("www.example.com", False),
        ("badexample.com", False),
        ("a.cdn.example", True),
        ("a.b.cdn.example", True),
        ("cdn.example", False),
        ("evilcdn.example", False),
        (".cdn.example", False),
    ):
        assert policy.allows_host(host) == is_allowed, host


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("http://example.com", RemoteUrl("http", "example.com", 80, "/")),
        ("HTTPS://EXAMPLE.com./A?b#c", RemoteUrl("https", "example.com", 443, "/A?b")),
        ("http://example.com?x=1", RemoteUrl("http", "example.com", 80, "/?x=1")),
        ("https://example.com:8443/%2e%2E/x", RemoteUrl("https", "example.com", 8443, "/%2e%2E/x")),
        ("http://[2606:2800:220:1:0:0:0:1]:81/", RemoteUrl("http", "2606:2800:220:1::1", 81, "/")),
        ("http://1.2.3.4/", RemoteUrl("http", "1.2.3.4", 80, "/")),
        ("http://bücher.example/ü", RemoteUrl("http", "xn--bcher-kva.example", 80, "/%C3%BC")),
        ("http://a_b.example/", RemoteUrl("http", "a_b.example", 80, "/")),
        # Full-width digits are digits to a resolver: they become an ordinary address, which is then checked.
        ("http://１２７.0.0.1/", RemoteUrl("http", "127.0.0.1", 80, "/")),
    ],
)
def test_urls_are_read(text: str, expected: RemoteUrl) -> None:
    assert parse_remote_url(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "http://good.example\\@evil.example/",
        "http://good.example\\.evil.example/",
        "http://user@good.example/",
        "http://user:pass@good.example/",
        "http://good.example:80@evil.example/",
        "http://good.example#@evil.example@/",
        "http://good.example /",
        "http://good.example\t/",
        "http://good.example\r\nHost: evil.example/",
        "http://good.example/\x00",
        "http://good%2eexample/",
        "http://[fe80::1%25eth0]/",
        "http://[::1/",
        "http://::1/",
        "http://2130706433/",
        "http://0x7f000001/",
        "http://0x7f.1/",
        "http://127.1/",
        "http://0177.0.0.1/",
        "http://1.2.3.4.5/",
        "http://1.2.3.999/",
        "http://example.0x1/",
        "http://",
        "http:///path",
        "http://.example/",
        "http://a..example/",
        "http://-a.example/",
        "http://" + "a" * 64 + ".example/",
        "http://example.com:0/",
        "http://example.com:65536/",
        "http://example.com:/",
        "http://example.com:8o/",
        "http:example.com",
        "https:/example.com",
        "//example.com",
        "ftp://example.com",
        "http://example.com/" + "a" * 9000,
    ],
)
def test_urls_that_can_be_read_two_ways_are_refused(text: str) -> None:
    if text == "http://good.example#@evil.example@/":  # a fragment is never sent; only the host before it counts
        assert parse_remote_url(text).host == "good.example"
        return
    with pytest.raises(MediaError) as caught:
        parse_remote_url(text)
    assert "evil" not in str(caught.value)


@given(st.text(alphabet="htps:/\\@[]#?%.:aé0１ \t\n", max_size=40))
@settings(max_examples=500)
def test_reading_urls_ends_in_parts_or_in_our_error(text: str) -> None:
    try:
        url = parse_remote_url("http://" + text)
    except MediaError:
        return
    assert url.host == url.host.lower()
    assert not set(url.host) & set("/\\@#?% \t\n")
    assert url.target.startswith("/")
    assert url.target.isascii()
    assert parse_remote_url(f"{url.scheme}://{url.netloc}{url.target}") == url


@pytest.mark.parametrize(
    ("location", "expected"),
    [
        ("/x?y", "http://a.example:81/x?y"),
        ("x", "http://a.example:81/one/x"),
        ("?q", "http://a.example:81/one/two?q"),
        ("#f", "http://a.example:81/one/two"),
        ("", "http://a.example:81/one/two"),
        ("//b.example/x", "http://b.example/x"),
        ("https://b.example/x", "https://b.example/x"),
    ],
)
def test_redirects_are_relative_to_where_they_come_from(location: str, expected: str) -> None:
    base = parse_remote_url("http://a.example:81/one/two?old")
    assert base.join(location) == parse_remote_url(expected)


def test_scheme_of() -> None:
    assert scheme_of("DATA:image/png;base64,") == "data"
    assert scheme_of("folder/name.png") is None
    assert scheme_of("/folder/a:b.png") is None


def test_system_resolver_reports_names_without_address(monkeypatch: pytest.MonkeyPatch) -> None:
    resolver = SystemResolver()

    def fails(*args: object, **kwargs: object) -> object:
        raise socket.gaierror("no such name on 10.0.0.53")

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    with pytest.raises(OSError, match="no such name"):
        asyncio.run(resolver.resolve("media.example", 80))
    monkeypatch.undo()
    assert asyncio.run(resolver.resolve("127.0.0.1", 80)) == ["127.0.0.1"]


def test_stuck_look_ups_delay_nobody_and_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    released = threading.Event()

    def stuck(*args: object, **kwargs: object) -> object:
        assert released.wait(HANG_S)
        raise OSError("gone")

    monkeypatch.setattr(socket, "getaddrinfo", stuck)
    resolver = SystemResolver(max_lookups=2)

    async def main() -> None:
        for _ in range(2):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(resolver.resolve("media.example", 80), 0.05)  # gives up on purpose
        with pytest.raises(MediaUnavailableError, match="under way"):
            await resolver.resolve("media.example", 80)

    asyncio.run(main())  # the loop closes without waiting for the threads
    released.set()
    until(lambda: _look_up_ends(resolver))  # they end by themselves, and their slots are free again


def _look_up_ends(resolver: SystemResolver) -> bool:
    try:
        asyncio.run(resolver.resolve("media.example", 80))
    except MediaUnavailableError:
        return False
    except OSError as error:
        return str(error) == "gone"
    return False


def test_forbidden_is_a_403() -> None:
    assert MediaForbiddenError.status == 403

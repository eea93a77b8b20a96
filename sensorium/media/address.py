"""Which IP addresses may be connected to, and how a host name becomes addresses.

The rule is a list of what is *not* public, taken from the IANA special-purpose address registries (RFC 6890 and its
successors). Python's own `is_global` is not used, because its verdict on several ranges differs between releases.
"""

from __future__ import annotations

import asyncio
import ipaddress
import socket
import threading
from collections.abc import Sequence
from typing import Protocol

from sensorium.errors import MediaForbiddenError, MediaUnavailableError
from sensorium.media.policy import Network

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_NOT_PUBLIC_V4 = tuple(
    ipaddress.IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network, unspecified
        "10.0.0.0/8",  # private
        "100.64.0.0/10",  # carrier-grade NAT
        "127.0.0.0/8",  # loopback
        "169.254.0.0/16",  # link-local, cloud metadata
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments
        "192.0.2.0/24",  # documentation
        "192.31.196.0/24",  # AS112
        "192.52.193.0/24",  # automatic multicast tunnelling
        "192.88.99.0/24",  # 6to4 relays
        "192.168.0.0/16",  # private
        "192.175.48.0/24",  # AS112
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, limited broadcast
    )
)
# Only 2000::/3 is handed out for the public internet; inside it these are not.
_PUBLIC_V6 = ipaddress.IPv6Network("2000::/3")
_NOT_PUBLIC_V6 = tuple(
    ipaddress.IPv6Network(text)
    for text in (
        "2001::/23",  # protocol assignments, Teredo, ORCHID
        "2001:db8::/32",  # documentation
        "2002::/16",  # 6to4: carries any IPv4 address
        "2620:4f:8000::/48",  # AS112
        "3fff::/20",  # documentation
    )
)
_METADATA = frozenset(
    ipaddress.ip_address(text)
    for text in ("169.254.169.254", "169.254.170.2", "100.100.100.200", "192.0.0.192", "fd00:ec2::254", "fd20:ce::254")
)
_NAT64 = (ipaddress.IPv6Network("64:ff9b::/96"), ipaddress.IPv6Network("64:ff9b:1::/48"))


def may_connect(address: IPAddress, allowed_networks: Sequence[Network] = ()) -> bool:
    """Whether the fetcher may connect to `address`.

    Public addresses may be connected to, and addresses within `allowed_networks`. An IPv6 address that carries an
    IPv4 address inside (mapped, compatible, 6to4, NAT64) is never public; within an allowed network it is
    accepted only if the carried address would be. Cloud metadata services are never accepted.
    """
    inner = _carried_ipv4(address)
    if address in _METADATA or inner in _METADATA:
        return False
    if any(address in network for network in allowed_networks if network.version == address.version):
        return inner is None or may_connect(inner, allowed_networks)
    return _is_public(address)


def _is_public(address: IPAddress) -> bool:
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC_V4)
    if address.scope_id is not None or address not in _PUBLIC_V6:
        return False
    return not any(address in network for network in _NOT_PUBLIC_V6)


def _carried_ipv4(address: IPAddress) -> ipaddress.IPv4Address | None:
    if isinstance(address, ipaddress.IPv4Address):
        return None
    low = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if any(address in network for network in _NAT64):
        return low
    is_compatible = int(address) >> 32 == 0 and int(low) > 1
    return low if is_compatible else None


class Resolver(Protocol):
    """Turns a host name into IP addresses."""

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """The addresses of `host` in textual form, best first. Raises OSError when there are none."""
        ...


class SystemResolver:
    """The operating system's resolver, off the event loop.

    A look-up can't be cancelled, so each runs in a daemon thread of its own: a name server that never answers delays
    neither the caller's deadline nor the exit of the process. At most `max_lookups` run at once.
    """

    def __init__(self, max_lookups: int = 128) -> None:
        self._slots = threading.BoundedSemaphore(max_lookups)

    async def resolve(self, host: str, port: int) -> Sequence[str]:
        """See `Resolver`."""
        if not self._slots.acquire(blocking=False):
            raise MediaUnavailableError(
                "media host can't be looked up: got too many look-ups under way. Try again in a few seconds."
            )
        loop = asyncio.get_running_loop()
        result: asyncio.Future[list[str]] = loop.create_future()

        def look_up() -> None:
            found: list[str] | OSError
            try:
                infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
                found = list(dict.fromkeys(str(info[4][0]) for info in infos))
            except (OSError, UnicodeError) as error:
                found = OSError(str(error))
            finally:
                self._slots.release()
            try:
                loop.call_soon_threadsafe(_settle, result, found)
            except RuntimeError:  # the caller's deadline passed and its event loop is closed
                return

        threading.Thread(target=look_up, name="sensorium-resolve", daemon=True).start()
        return await result


def _settle(future: asyncio.Future[list[str]], found: list[str] | OSError) -> None:
    if future.done():
        return
    if isinstance(found, OSError):
        future.set_exception(found)
    else:
        future.set_result(found)


async def resolve_and_check(
    host: str, port: int, *, resolver: Resolver, allowed_networks: Sequence[Network]
) -> list[IPAddress]:
    """The addresses of `host`, every one of them checked. An address literal is not looked up.

    One forbidden address among several refuses the host: a name that mixes public and private addresses is either
    broken or hostile.

    Raises:
        MediaUnavailableError: the name has no address.
        MediaForbiddenError: an address is not public and not in an allowed network.
    """
    try:
        addresses = [ipaddress.ip_address(host)]
    except ValueError:
        addresses = await _look_up(host, port, resolver)
    if not all(may_connect(address, allowed_networks) for address in addresses):
        raise MediaForbiddenError(
            "media host is not allowed: got a host that is not on the public internet, expected a public one. "
            "Send the media inline as a data URL, or have the operator list the network in allowed_networks."
        )
    return addresses


async def _look_up(host: str, port: int, resolver: Resolver) -> list[IPAddress]:
    try:
        addresses = [ipaddress.ip_address(text) for text in await resolver.resolve(host, port)]
    except (OSError, ValueError):
        addresses = []
    if not addresses:
        raise MediaUnavailableError(
            "media host can't be found: got a name without an address. Check the URL, or send a data URL."
        )
    return addresses

"""Which sources may be fetched: schemes, hosts, networks and folders. Set by the operator, never by a request."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from pathlib import Path

from sensorium.errors import ConfigError

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchPolicy:
    """What the fetcher may reach. The default: any public host over http and https, no local file.

    Attributes:
        allow_remote: fetch http and https at all.
        allowed_hosts: host names that may be fetched from; empty means any. `*.example.com` stands for every name
            below example.com, not for example.com itself.
        allowed_networks: networks in CIDR form that may be reached although they are not public, for example
            "10.1.0.0/16". Cloud metadata addresses stay refused.
        allowed_ports: ports that may be connected to; empty means any.
        allowed_local_media_path: folder under which `file://` URLs and bare paths may be read; None refuses them.
        allow_any_local_path: read any path that this process may read. Only for the caller's own process, never for
            requests that come over a network.

    Raises:
        ConfigError: a network can't be parsed, or the folder doesn't exist.
    """

    allow_remote: bool = True
    allowed_hosts: tuple[str, ...] = ()
    allowed_networks: tuple[str, ...] = ()
    allowed_ports: tuple[int, ...] = ()
    allowed_local_media_path: str | Path | None = None
    allow_any_local_path: bool = False

    def __post_init__(self) -> None:
        self.networks()
        if self.allowed_local_media_path is not None and not Path(self.allowed_local_media_path).is_dir():
            raise ConfigError(
                f"allowed_local_media_path: got {str(self.allowed_local_media_path)!r}, expected an existing folder. "
                "Create it or change allowed_local_media_path."
            )

    def networks(self) -> tuple[Network, ...]:
        """`allowed_networks`, parsed."""
        try:
            return tuple(ipaddress.ip_network(text) for text in self.allowed_networks)
        except ValueError as error:
            raise ConfigError(
                f"allowed_networks: got {self.allowed_networks!r}, expected networks such as '10.1.0.0/16' without "
                "host bits. Correct allowed_networks."
            ) from error

    def allows_host(self, host: str) -> bool:
        """Whether `host` (lower case, no trailing dot) is on the allow-list, or there is none."""
        return not self.allowed_hosts or any(_host_matches(host, entry) for entry in self.allowed_hosts)


def _host_matches(host: str, entry: str) -> bool:
    entry = entry.lower().rstrip(".")
    if entry.startswith("*."):
        return host.endswith(entry[1:]) and len(host) > len(entry) - 1
    return host == entry

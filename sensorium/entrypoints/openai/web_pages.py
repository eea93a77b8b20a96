"""Refuses requests of foreign web pages. A server without API keys trusts every client that can reach it, and a web
page can reach whatever its visitor's browser can: the loopback too.

There are two attacks. A page may send requests to a server of another origin, without reading the answers; browsers
then send its `Origin`, and don't send JSON's content type, which `http.read_body` requires. Or its host name may be
made to resolve to this machine (DNS rebinding), so that it can read answers too; browsers then send that name as
`Host`.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from sensorium.entrypoints.openai.errors import HttpError, error_response


class WebPages:
    """Refuses requests of pages of other origins, and those for other hosts.

    Args:
        allowed_origins: origins whose pages may come in; "*" for all.
        allowed_hosts: names of this server, beside addresses and those of the loopback, which can't be
            rebound; None for any.
    """

    def __init__(self, app: ASGIApp, allowed_origins: Sequence[str], allowed_hosts: Sequence[str] | None) -> None:
        self._app = app
        self._origins = frozenset(allowed_origins)
        self._hosts = None if allowed_hosts is None else {"localhost", *map(str.lower, allowed_hosts)}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] == "http":
            try:
                self._check(scope["scheme"], Headers(scope=scope))
            except HttpError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _check(self, scheme: str, headers: Headers) -> None:
        host, origin = headers.get("Host"), headers.get("Origin")
        if host is not None and not self._is_own_host(host):
            raise HttpError(
                403,
                f"Host: got {host!r:.80}, expected a name of this server. Use http://localhost, or start the server "
                "with --allowed-host NAME or an --api-key.",
            )
        if origin is not None and not self._is_own_origin(origin, scheme, host or ""):
            raise HttpError(
                403,
                f"Origin: got {origin!r:.80}, expected none, this server's own, or one that is let in. Start the "
                "server with --allowed-origin ORIGIN or an --api-key.",
            )

    def _is_own_host(self, host: str) -> bool:
        if self._hosts is None:
            return True
        name = host_name(host)
        return name in self._hosts or _is_address(name)

    def _is_own_origin(self, origin: str, scheme: str, host: str) -> bool:
        if "*" in self._origins or origin in self._origins:
            return True
        # TLS may end at a proxy, which forwards https requests as http.
        return origin.lower() in {f"{each}://{host.lower()}" for each in (scheme, "https")}


def host_name(host: str) -> str:
    """The name or address in a `Host` header, without its port and brackets, in small letters."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True

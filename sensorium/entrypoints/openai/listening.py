"""Opens a server's address and checks its certificate, before a model is loaded.

Connections made while the model loads wait, and are answered when the server is ready.
"""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError

BACKLOG = 2048
"""Connections that may wait to be accepted."""
_NO_SUCH_FAMILY = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)
"""What binding says where a name has an IPv6 address and the machine has none, or the other way round."""


@contextmanager
def listening(args: ServerArgs) -> Iterator[list[socket.socket]]:
    """Listen on all addresses of a host until the block ends.

    Raises:
        ConfigError: The host has no address here, or the port can't be had.
    """
    with ExitStack() as opened:
        sockets: list[socket.socket] = []
        refusal: OSError | None = None
        for family, address in _addresses(args):
            port = sockets[0].getsockname()[1] if sockets else args.port
            try:
                sockets.append(opened.enter_context(_listen(family, (address[0], port, *address[2:]))))
            except OSError as error:
                refusal = error
                if error.errno not in _NO_SUCH_FAMILY:
                    break
        if refusal is not None and (not sockets or refusal.errno not in _NO_SUCH_FAMILY):
            raise _refused(args, refusal) from refusal
        yield sockets


def url_of(args: ServerArgs, sockets: list[socket.socket]) -> str:
    """The server's URL."""
    host = f"[{args.host}]" if ":" in args.host else args.host or "0.0.0.0"
    scheme = "http" if args.ssl_certfile is None else "https"
    return f"{scheme}://{host}:{sockets[0].getsockname()[1]}"


def check_certificate(args: ServerArgs) -> None:
    """Return if the certificate and its key, where they are set, can be used.

    Raises:
        ConfigError: A file is missing, is not of its kind, is encrypted, or the two don't belong together.
    """
    if args.ssl_certfile is None or args.ssl_keyfile is None:
        return
    for name in ("ssl_certfile", "ssl_keyfile"):
        path = getattr(args, name)
        try:
            with open(path, "rb"):
                pass
        except OSError as error:
            raise ConfigError(
                f"{name}: got {path!r}, expected a file to read ({error.strerror}). Set {name}."
            ) from error
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        # An encrypted key needs a password, which a server can't ask for.
        context.load_cert_chain(args.ssl_certfile, args.ssl_keyfile, password=_no_password)
    except (ssl.SSLError, ValueError) as error:
        raise ConfigError(
            f"ssl_certfile and ssl_keyfile: got {args.ssl_certfile!r} and {args.ssl_keyfile!r}, expected a certificate "
            f"and its key without a password, as PEM ({_reason(error)}). Set ssl_certfile and ssl_keyfile."
        ) from error


def _no_password() -> str:
    raise ValueError("the key is encrypted")


def _reason(error: Exception) -> str:
    known = getattr(error, "reason", None)
    return known.replace("_", " ").lower() if known else "no PEM" if isinstance(error, ssl.SSLError) else str(error)


def _addresses(args: ServerArgs) -> list[tuple[socket.AddressFamily, tuple[str, int] | tuple[str, int, int, int]]]:
    """Families and addresses of the host, each once."""
    try:
        found = socket.getaddrinfo(args.host or None, args.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            f"host: got {args.host!r}, expected a name or an address of this machine ({error}). Set host."
        ) from error
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))  # type: ignore[misc]


def _listen(family: socket.AddressFamily, address: tuple[str | int, ...]) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of an earlier server may still linger
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)  # only then is the port nobody else's
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def _refused(args: ServerArgs, error: OSError) -> ConfigError:
    if error.errno in _NO_SUCH_FAMILY:
        return ConfigError(f"host: got {args.host!r}, expected an address of this machine. Set host.")
    if error.errno == errno.EADDRINUSE:
        return ConfigError(
            f"port: got {args.port}, which another process listens on, expected a free one. Set port, or 0 for any."
        )
    return ConfigError(
        f"host and port: got {args.host!r} and {args.port}, expected an address that this process may listen on "
        f"({error.strerror}). Set host and port."
    )

"""One parse of a remote address, strict, whose parts are what the client connects with.

Checker and client disagreeing about a URL is a classic way around an allow-list. So a URL is parsed here, once, into
plain parts; the HTTP client is handed the parts and never the text. Whatever two parsers could read differently
(backslashes, control characters, spaces, user names, numeric hosts in other than the usual form) is refused.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

from sensorium.errors import MediaError, MediaForbiddenError

MAX_URL_CHARS = 8192
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.\-]*):")
_REMOTE = re.compile(r"(?P<scheme>https?)://(?P<authority>[^/?#]*)(?P<rest>[^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\[\]:@]+)(?::(?P<port>[0-9]{1,5}))?")
_LABEL = re.compile(r"(?!-)[a-z0-9_-]{1,63}(?<!-)")
_BAD_CHARS = re.compile(r"[\x00-\x20\x7f\\]")
_DEFAULT_PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True, slots=True)
class RemoteUrl:
    """A parsed http or https address.

    Attributes:
        scheme: "http" or "https".
        host: lower-case ASCII name without trailing dot, or an IP address without brackets.
        port: the port, made explicit.
        target: path and query as sent in the request line, percent-encoded, starting with "/".
    """

    scheme: str
    host: str
    port: int
    target: str

    @property
    def netloc(self) -> str:
        """Host, and port where it isn't the scheme's own: the value of the `Host` header."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    def join(self, location: str) -> RemoteUrl:
        """The address that a redirect's `Location` means, seen from here; parsed as strictly as the first."""
        if scheme_of(location) is not None:
            return parse_remote_url(location)
        if location.startswith("//"):
            return parse_remote_url(f"{self.scheme}:{location}")
        path = self.target.partition("?")[0]
        if location.startswith("/"):
            target = location
        elif location.startswith(("?", "#")) or not location:
            target = path + location
        else:
            target = path[: path.rindex("/") + 1] + location
        return parse_remote_url(f"{self.scheme}://{self.netloc}{target}")


def scheme_of(source: str) -> str | None:
    """The lower-case scheme of a source text, or None for a bare path."""
    match = _SCHEME.match(source)
    return match[1].lower() if match else None


def parse_remote_url(text: str) -> RemoteUrl:
    """Parse an http or https URL.

    Raises:
        MediaError: it is no well-formed http or https URL.
        MediaForbiddenError: it carries a user name or password.
    """
    if len(text) > MAX_URL_CHARS:
        raise _malformed(f"{len(text)} characters", f"at most {MAX_URL_CHARS}")
    if _BAD_CHARS.search(text):
        raise _malformed("a backslash, space or control character", "none")
    match = _REMOTE.fullmatch(text)
    if match is None:
        raise _malformed("something else", "http:// or https://, a host and a path")
    if "@" in match["authority"]:
        raise MediaForbiddenError(
            "media URL is not allowed: got a user name or password, expected none. Remove what stands before the @."
        )
    authority = _AUTHORITY.fullmatch(match["authority"])
    if authority is None:
        raise _malformed("a host that can't be read", "a host name or address, and a port if need be")
    scheme = match["scheme"].lower()
    port = int(authority["port"]) if authority["port"] else _DEFAULT_PORTS[scheme]
    if not 0 < port < 65536:
        raise _malformed(f"port {port}", "a port from 1 to 65535")
    return RemoteUrl(scheme, _canonical_host(authority["host"]), port, _canonical_target(match["rest"]))


def _canonical_host(host: str) -> str:
    if host.startswith("["):
        try:
            return str(ipaddress.IPv6Address(host[1:-1]))
        except ValueError:
            raise _malformed("a broken IPv6 address", "a valid one") from None
    host = _to_ascii(host).lower().removesuffix(".")
    labels = host.split(".")
    if len(host) > 253 or not all(_LABEL.fullmatch(label) for label in labels):
        raise _malformed("a host that can't be read", "a host name or address")
    if _is_numeric(labels[-1]):
        # Resolvers read 2130706433, 0x7f.1 and 127.1 as addresses: only the plain four-part form is accepted.
        try:
            return str(ipaddress.IPv4Address(host))
        except ValueError:
            raise _malformed("a number as host", "a host name or an address of four decimal parts") from None
    return host


def _is_numeric(label: str) -> bool:
    return label.isdigit() or re.fullmatch(r"0x[0-9a-f]*", label) is not None


def _to_ascii(host: str) -> str:
    if host.isascii():
        return host
    import idna

    try:
        return idna.encode(host, uts46=True).decode("ascii")
    except (idna.IDNAError, UnicodeError):
        raise _malformed("an international host name that can't be encoded", "a valid one") from None


def _canonical_target(rest: str) -> str:
    """Percent-encode what isn't ASCII, resolve "." and "..", and start with a slash; leave the rest alone."""
    encoded = "".join(char if char.isascii() else "".join(f"%{byte:02X}" for byte in char.encode()) for char in rest)
    path, mark, query = encoded.partition("?")
    return _without_dots(path) + mark + query


def _without_dots(path: str) -> str:
    """Source: RFC 3986, section 5.2.4."""
    kept: list[str] = []
    segments = path.removeprefix("/").split("/")
    for segment in segments:
        if segment == "..":
            del kept[-1:]
        elif segment != ".":
            kept.append(segment)
    if segments[-1] in (".", ".."):
        kept.append("")
    return "/" + "/".join(kept)


def _malformed(got: str, expected: str) -> MediaError:
    return MediaError(f"media URL is malformed: got {got}, expected {expected}. Correct the URL.")

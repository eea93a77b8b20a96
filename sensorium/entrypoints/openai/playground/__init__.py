"""The playground at `/`: a page that talks to the server's own API from a browser.

Owns a few static files that are the same for everyone and hold no data of the server: no model name, no key. So they
are served without an API key, each by its exact path and for reading only. The page then uses the API, with a key where
one is needed. It loads nothing from other origins, and may not.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from importlib import resources

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

_PREFIX = "/playground/"
_PAGE = "index.html"
_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob:",
        "media-src blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        # Text from a model can't become HTML even where the page's code had a mistake.
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(self), geolocation=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    # Browsers ask for it each time, and get a 304 unless the server was updated.
    "Cache-Control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class _File:
    """A static file, read once."""

    content: bytes
    media_type: str
    etag: str

    async def answer(self, request: Request) -> Response:
        """The file, or that the browser has it."""
        headers = {**_HEADERS, "ETag": self.etag}
        known = request.headers.get("If-None-Match", "")
        if self.etag in (each.strip().removeprefix("W/") for each in known.split(",")):
            return Response(status_code=304, headers=headers)
        return Response(self.content, headers=headers, media_type=self.media_type)


def playground_routes() -> list[Route]:
    """A route for each file of the page; their paths are all that is open without a key."""
    routes = []
    for entry in sorted(resources.files(__name__).iterdir(), key=lambda entry: entry.name):
        suffix = "." + entry.name.rpartition(".")[2]
        if suffix in _TYPES:
            content = entry.read_bytes()
            file = _File(content, _TYPES[suffix], f'"{hashlib.sha256(content).hexdigest()[:32]}"')
            routes.append(Route("/" if entry.name == _PAGE else _PREFIX + entry.name, file.answer))
    return routes

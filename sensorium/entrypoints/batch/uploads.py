"""Lines for routes that take a file: JSON that names a source becomes the multipart body that the route reads.

{"file": "data:audio/wav;base64,...", "language": "en"}    -->    multipart/form-data with the bytes and language=en

`file` may be a data URL, an address or a path, under the same rules as media in chats; `file_url` means the same.
"""

from __future__ import annotations

from typing import Any

import msgspec

from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.media import MediaLoader

UPLOAD_PATHS = ("/v1/audio/transcriptions",)


async def form_of(body: msgspec.Raw, loader: MediaLoader) -> dict[str, Any]:
    """Arguments of `httpx.AsyncClient.post` for a body. Raises `RequestError`."""
    fields: dict[str, Any] = msgspec.json.decode(body)
    source = fields.pop("file_url", None) if "file" not in fields else fields.pop("file")
    if not isinstance(source, str):
        raise InvalidTypeError(
            f"got {'nothing' if source is None else type(source).__name__}, expected a data URL, an address "
            "or a path as a string. Set it.",
            field="body.file",
        )
    encoded = await loader.aencoded("audio", source)
    data = {name: _field(name, value) for name, value in fields.items() if value is not None}
    return {"data": data, "files": {"file": ("audio", bytes(encoded.data), "application/octet-stream")}}


def _field(name: str, value: Any) -> str | list[str]:
    """A value as a multipart field has it."""
    if isinstance(value, list):
        return [str(_field(name, each)) for each in value]
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str | int | float):
        return str(value)
    raise InvalidRequestError("got an object, expected a plain value or a list. Change it.", field=f"body.{name:.40}")

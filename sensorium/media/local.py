"""Sources that need no network: data URLs, base64 text, and files under a folder that the operator chose."""

from __future__ import annotations

import binascii
import os
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from sensorium.errors import MediaError, MediaForbiddenError, MediaUnavailableError
from sensorium.media.limits import MediaLimits, bytes_too_large
from sensorium.media.policy import FetchPolicy

_CHUNK_BYTES = 1 << 20
_MAX_HEADER_CHARS = 256
JPEG_FRAMES_TYPE = "video/jpeg"
_STANDARD_ALPHABET = str.maketrans("-_", "+/")
_WRAPPING_FACTOR = 2
"""Line breaks make base64 text longer, by less than this factor."""
_ESCAPING_FACTOR = 3


def decode_base64(text: str, *, modality: str, max_bytes: int) -> bytes:
    """Decode base64; the size is bounded before anything is decoded. See `bytes_of_base64`.

    Raises:
        MediaTooLargeError: the text stands for more than `max_bytes`.
        MediaError: it isn't base64.
    """
    if len(text) > _max_chars(max_bytes):
        text = "" if len(text) > _WRAPPING_FACTOR * _max_chars(max_bytes) else "".join(text.split())
        if not 0 < len(text) <= _max_chars(max_bytes):
            raise bytes_too_large(modality, max_bytes, max_bytes, at_least=True)
    try:
        data = bytes_of_base64(text)
    except ValueError:
        raise MediaError(
            f"{modality} data can't be read: got something else, expected base64. Encode the bytes with "
            "base64.b64encode."
        ) from None
    if len(data) > max_bytes:
        raise bytes_too_large(modality, len(data), max_bytes)
    return data


def bytes_of_base64(text: str) -> bytes:
    """The bytes of base64 in the standard or the URL-safe alphabet, with padding or without, wrapped into lines or not.

    Raises:
        ValueError: it is neither.
    """
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except ValueError:  # binascii.Error, and text that isn't ASCII
        plain = "".join(text.split()).translate(_STANDARD_ALPHABET)
        if "=" not in plain:
            plain += "=" * (-len(plain) % 4)
        return binascii.a2b_base64(plain, strict_mode=True)


def _max_chars(num_bytes: int) -> int:
    return (num_bytes + 2) // 3 * 4


def read_data_url(url: str, modality: str, limits: MediaLimits) -> tuple[bytes, str | None]:
    """The bytes and the lower-case media type, with its parameters, of a `data:` URL.

    For `video/jpeg` (JPEG frames, each in base64, with commas between) the payload is returned as it is: the video
    decoder splits it under the frame budget.

    Raises:
        MediaError: it isn't a base64 data URL.
        MediaTooLargeError: its payload is beyond the budget.
    """
    comma = url.find(",", 0, _MAX_HEADER_CHARS)
    head = url[len("data:") : comma].lower() if comma >= 0 else ""
    if not head.endswith(";base64"):
        raise MediaError(
            "data URL is malformed: got no ';base64,' near its start, expected data:<media type>;base64,<data>. "
            "Correct the URL."
        )
    media_type = head.removesuffix(";base64") or None
    max_bytes = limits.max_bytes(modality)
    if is_jpeg_frames(media_type):
        if len(url) - comma - 1 > _max_chars(max_bytes):
            raise bytes_too_large(modality, (len(url) - comma - 1) // 4 * 3, max_bytes)
        return url[comma + 1 :].encode("ascii", "replace"), media_type
    payload = url[comma + 1 :]
    if "%" in payload and len(payload) <= _ESCAPING_FACTOR * _max_chars(max_bytes):
        payload = unquote(payload)
    return decode_base64(payload, modality=modality, max_bytes=max_bytes), media_type


def is_jpeg_frames(media_type: str | None) -> bool:
    """Whether a media type means base64 JPEG frames with commas between."""
    return media_type is not None and media_type.partition(";")[0].strip() == JPEG_FRAMES_TYPE


def path_of_file_url(url: str) -> Path:
    """The path of a `file://` URL of this machine.

    Raises:
        MediaForbiddenError: the URL names another machine.
    """
    rest = url[len("file:") :]
    if not rest.startswith("//"):
        raise MediaForbiddenError(
            "file URL is not allowed: got no '//', expected file:///folder/name. Correct the URL."
        )
    host, slash, path = rest[2:].partition("/")
    if host.lower() not in ("", "localhost"):
        raise MediaForbiddenError("file URL is not allowed: got a host, expected none. Write file:///folder/name.")
    return Path(slash + unquote(path.partition("?")[0].partition("#")[0]))


def read_local_file(path: Path, modality: str, limits: MediaLimits, policy: FetchPolicy) -> bytes:
    """Read a file that the policy allows. Symbolic links count as what they point to.

    Raises:
        MediaForbiddenError: local files are switched off, or this one lies outside the allowed folder. The error
            doesn't tell whether it exists.
        MediaUnavailableError: it can't be read, or is no regular file.
        MediaTooLargeError: it exceeds the budget.
    """
    try:
        with os.fdopen(_open_allowed(path, policy), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _unreadable(modality)
            return read_bounded(file, modality, limits.max_bytes(modality))
    except (OSError, ValueError, RuntimeError) as error:  # a NUL in the path; a loop of links
        if isinstance(error, MediaError):
            raise
        raise _unreadable(modality) from None


def _unreadable(modality: str) -> MediaUnavailableError:
    return MediaUnavailableError(
        f"local {modality} can't be read: got a missing or unreadable file, expected a regular file. Check the path."
    )


def _open_allowed(path: Path, policy: FetchPolicy) -> int:
    """A descriptor of `path`. Opening never blocks, so that a pipe can't hold a worker."""
    flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    if policy.allow_any_local_path:
        return os.open(path, flags)
    if policy.allowed_local_media_path is None:
        raise MediaForbiddenError(
            "local files are not allowed: got a path or file URL, expected a data URL or a remote one. "
            "Send the media inline, or have the operator set allowed_local_media_path."
        )
    root = Path(policy.allowed_local_media_path).resolve()
    resolved = (root / path).resolve()
    if not resolved.is_relative_to(root):
        raise MediaForbiddenError(
            "local file is not allowed: got a path outside the allowed folder, expected one inside. "
            "Move the file, or have the operator change allowed_local_media_path."
        )
    return _open_beneath(root, resolved.relative_to(root).parts, flags)


def _open_beneath(root: Path, parts: tuple[str, ...], flags: int) -> int:
    """Open `root/parts` one component at a time, following no link.

    The path was resolved before, so it holds no link, unless one was put there since.
    """
    if os.open not in os.supports_dir_fd or not parts:
        return os.open(root.joinpath(*parts), flags)
    folder = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        for part in parts[:-1]:
            below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW, dir_fd=folder)
            os.close(folder)
            folder = below
        return os.open(parts[-1], flags | os.O_NOFOLLOW, dir_fd=folder)
    finally:
        os.close(folder)


def read_bounded(file: BinaryIO, modality: str, max_bytes: int) -> bytes:
    """Read to the end, stopping at the first byte beyond `max_bytes`: for files and for uploads.

    Raises:
        MediaTooLargeError: there is more.
    """
    return join_bounded(iter(lambda: file.read(_CHUNK_BYTES), b""), modality, max_bytes)


def join_bounded(chunks: Iterable[bytes], modality: str, max_bytes: int) -> bytes:
    """Join chunks as they come, stopping at the first byte beyond `max_bytes`.

    Raises:
        MediaTooLargeError: there is more.
    """
    body = bytearray()
    for chunk in chunks:
        extend_bounded(body, chunk, modality, max_bytes)
    return bytes(body)


def extend_bounded(body: bytearray, chunk: bytes, modality: str, max_bytes: int) -> None:
    """Append `chunk` to `body` unless that would exceed `max_bytes`.

    Raises:
        MediaTooLargeError: it would.
    """
    if len(body) + len(chunk) > max_bytes:
        raise bytes_too_large(modality, max_bytes, max_bytes, at_least=True)
    body += chunk

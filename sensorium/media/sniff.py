"""What encoded bytes are, told from their first bytes alone.

The demuxer is then chosen by us and never probed for: probing would accept play lists and concatenation scripts, which
make a demuxer open further files and addresses.
"""

from __future__ import annotations

import re

_VIDEO_CAPABLE = frozenset({"mov", "matroska", "avi", "gif"})
_MOV_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp"})


_ID3_HEADER_BYTES = 10
_APE_HEADER_BYTES = 32
_MAX_TAGS = 16
_BOX_SIZE_BYTES = 4
_NO_PADDING = re.compile(rb"[^\0 \t\r\n]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def find_stream(data: bytes) -> tuple[str, bytes] | None:
    """FFmpeg's name of the demuxer for audio or video bytes, and the bytes from where the stream begins.

    Some tools put tags, padding or a byte order mark in front of a stream, which players skip. The bytes after them
    decide. None when they are of no accepted kind.
    """
    start = _skip_tags(data)
    end = _skip_padding(data, start)
    # A box of MP4 begins with its size, which looks like padding.
    for at in (start, *range(end, max(end - _BOX_SIZE_BYTES, start) - 1, -1)):
        name = sniff_container(data[at : at + 16])
        if name is not None:
            return name, data[at:] if at else data
    # Behind a tag, decoders of MPEG audio look for the next frame themselves.
    return ("mp3", data[start:]) if data[:3] == b"ID3" else None


def find_video_stream(data: bytes) -> tuple[str, bytes] | None:
    """As `find_stream`, for containers that hold pictures."""
    found = find_stream(data)
    return found if found is not None and found[0] in _VIDEO_CAPABLE else None


def _skip_tags(data: bytes) -> int:
    """Where the tags in front of a stream end. Padding may stand between them."""
    start = 0
    for _ in range(_MAX_TAGS):
        at = _skip_padding(data, start)
        length = _tag_bytes(data[at : at + _APE_HEADER_BYTES])
        if not length:
            break
        start = at + length
    return start


def _skip_padding(data: bytes, start: int) -> int:
    if data.startswith(_BYTE_ORDER_MARK, start):
        start += len(_BYTE_ORDER_MARK)
    found = _NO_PADDING.search(data, start)
    return len(data) if found is None else found.start()


def _tag_bytes(head: bytes) -> int:
    """Length of the tag that begins here; 0 if none does.

    Sources: ID3 tag version 2.4.0, section 3.1 (a size of four times seven bits, without header and footer); APE tag
    version 2 (a size with the footer and without the header).
    """
    if head[:3] == b"ID3" and len(head) >= _ID3_HEADER_BYTES and max(head[6:10]) < 0x80:
        size = 0
        for byte in head[6:10]:
            size = size << 7 | byte
        has_footer = head[5] & 0x10
        return _ID3_HEADER_BYTES * (2 if has_footer else 1) + size
    if head[:8] == b"APETAGEX" and len(head) == _APE_HEADER_BYTES:
        return _APE_HEADER_BYTES + int.from_bytes(head[12:16], "little")
    return 0


def sniff_container(data: bytes) -> str | None:
    """The demuxer for bytes that begin with a stream, or None when they are of no accepted kind."""
    head = data[:16]
    if head[4:8] in _MOV_FIRST_BOXES:
        return "mov"
    if head[:4] in (b"RIFF", b"RF64", b"BW64"):
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "matroska"),
        (b"OggS", "ogg"),
        (b"fLaC", "flac"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
    ):
        if head.startswith(magic):
            return name
    return _sniff_mpeg_audio(head)


def _sniff_mpeg_audio(head: bytes) -> str | None:
    """Raw MPEG audio starts with eleven set bits; the two layer bits are zero for ADTS (AAC) only."""
    if len(head) < 2 or head[0] != 0xFF or head[1] & 0xE0 != 0xE0:
        return None
    return "aac" if head[1] & 0xF6 == 0xF0 else "mp3"


def webp_canvas(data: bytes) -> tuple[int, int] | None:
    """Width and height that a WebP header declares, or None for other bytes.

    The library allocates the whole canvas when it opens a file, so the budget has to be checked before.
    Source: the WebP container specification, sections "Simple File Format" and "Extended File Format"; RFC 6386,
    section 9.1; the WebP lossless bitstream specification, section 3.
    """
    if data[:4] != b"RIFF" or data[8:12] != b"WEBP" or len(data) < 30:
        return None
    kind, body = data[12:16], data[20:30]
    if kind == b"VP8X":
        return int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1
    if kind == b"VP8 ":
        return int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF
    if kind == b"VP8L":
        bits = int.from_bytes(body[1:5], "little")
        return (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    return None

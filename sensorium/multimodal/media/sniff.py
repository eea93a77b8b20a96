"""What encoded bytes are, told from their first bytes alone.

The demuxer is then chosen by us and never probed for: probing would accept play lists and concatenation scripts, which
make a demuxer open further files and addresses.
"""

from __future__ import annotations

_VIDEO_CAPABLE = frozenset({"mov", "matroska", "avi", "gif"})
_MOV_FIRST_BOXES = frozenset({b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip", b"pnot", b"styp"})


def sniff_container(data: bytes) -> str | None:
    """FFmpeg's name of the demuxer for audio or video bytes, or None when they are of no accepted kind."""
    head = data[:16]
    if head[4:8] in _MOV_FIRST_BOXES:
        return "mov"
    if head[:4] in (b"RIFF", b"RF64"):
        return {b"WAVE": "wav", b"AVI ": "avi"}.get(head[8:12])
    if head[:4] == b"FORM" and head[8:12] in (b"AIFF", b"AIFC"):
        return "aiff"
    for magic, name in (
        (b"\x1a\x45\xdf\xa3", "matroska"),
        (b"OggS", "ogg"),
        (b"fLaC", "flac"),
        (b"GIF87a", "gif"),
        (b"GIF89a", "gif"),
        (b"ID3", "mp3"),
    ):
        if head.startswith(magic):
            return name
    return _sniff_mpeg_audio(head)


def sniff_video_container(data: bytes) -> str | None:
    """As `sniff_container`, for containers that hold pictures."""
    name = sniff_container(data)
    return name if name in _VIDEO_CAPABLE else None


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

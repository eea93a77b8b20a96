"""Refuses MP4 and MOV files whose tables claim absurdly many samples, before the demuxer allocates for them.

The demuxer turns run-length tables into one entry of about 36 bytes per sample: a file of 900 bytes whose `trun` box
claims 50 million samples of default size makes it allocate 1.8 GB and work for eight seconds. An edit list repeats
a track's samples, from the key frame before it on, for each of its edits. So the claims are added up here first, over
all tracks. Sources of the layouts: ISO/IEC 14496-12 sections 8.6.1, 8.6.6, 8.7.3, 8.7.4, 8.7.5 and 8.8.8.

Boxes are looked for by their four letters in everything but the media data, instead of by their nesting, so that tables
in unusual places, which a tolerant demuxer might still read, are counted too.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from sensorium.errors import MediaError, MediaTooLargeError

MAX_CLAIMED_SAMPLES = 4_000_000
_SAMPLES_OF_ANY_FILE = 100_000
"""Beyond these, a sample has at least a byte."""
BYTES_PER_SAMPLE = 80
"""The most that the demuxer takes for a sample, over its tables and the copies that it makes of them."""
# Uncompressed sound keeps a table entry per group of samples; the demuxer's smallest group.
_PCM_GROUP = 160
_MAX_STSC_RUNS = 1_000_000
_EDIT_BYTES = 12
"""Of the shorter form of an edit."""


def check_mp4_tables(data: bytes, modality: str) -> int:
    """Add up the samples that all tables and edits claim; the demuxer takes `BYTES_PER_SAMPLE` for each.

    Raises:
        MediaTooLargeError: more than any file within the other budgets has, or than a file of so many bytes.
        MediaError: the tables are compressed or broken.
    """
    claimed = 0
    for chunk in _tracks_and_rest(data):
        if b"cmov" in chunk:
            raise MediaError(f"{modality} can't be decoded: got compressed tables, expected plain ones. Convert it.")
        claimed += _claimed_fragment_samples(chunk) + _claimed_table_entries(chunk) * _num_edits(chunk)
    most = min(MAX_CLAIMED_SAMPLES, _SAMPLES_OF_ANY_FILE + len(data))
    if claimed > most:
        raise MediaTooLargeError(
            f"{modality} has too many samples: got tables and edits that claim {claimed}, expected at most "
            f"{most} for {len(data)} bytes. Send a shorter {modality}, or one without edits."
        )
    return claimed


def _tracks_and_rest(data: bytes) -> Iterator[bytes]:
    """Each track, and each other box outside the media data, with its header."""
    for kind, start, body, stop in _boxes(data, 0, len(data)):
        if kind == b"moov":
            yield from (data[inner:end] for _, inner, _, end in _boxes(data, body, stop))
        elif kind != b"mdat":
            yield data[start:stop]


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int, int]]:
    """(type, start, start of the body, end) of the boxes side by side in `data[start:end]`."""
    while start + 8 <= end:
        size, kind = struct.unpack_from(">I4s", data, start)
        body = start + 8
        if size == 1 and start + 16 <= end:
            (size,) = struct.unpack_from(">Q", data, body)
            body += 8
        stop = end if size == 0 else min(start + size, end)
        if stop < body:  # a broken size: what is left counts as one box
            kind, body, stop = b"", start, end
        yield kind, start, body, stop
        start = stop


def _claimed_fragment_samples(chunk: bytes) -> int:
    return sum(_uint32(chunk, at + 8) for at in _find(chunk, b"trun"))


def _claimed_table_entries(chunk: bytes) -> int:
    """Entries that the sample tables in `chunk` make the demuxer allocate."""
    if _is_uncompressed_sound(chunk):
        return _pcm_entries(chunk)
    return sum(_uint32(chunk, at + 12) for tag in (b"stsz", b"stz2") for at in _find(chunk, tag))


def _num_edits(chunk: bytes) -> int:
    """How often the samples of `chunk` may be repeated; 1 without an edit list."""
    edits = sum(min(_uint32(chunk, at + 8), (len(chunk) - at) // _EDIT_BYTES) for at in _find(chunk, b"elst"))
    return max(edits, 1)


def _is_uncompressed_sound(chunk: bytes) -> bool:
    """Exactly one handler, of sound, and exactly one time table, of one run with a duration of one tick."""
    handlers, times = list(_find(chunk, b"hdlr")), list(_find(chunk, b"stts"))
    if len(handlers) != 1 or len(times) != 1 or chunk.count(b"stsz") != 1:
        return False
    is_sound = chunk[handlers[0] + 12 : handlers[0] + 16] == b"soun"
    return is_sound and _uint32(chunk, times[0] + 8) == 1 and _uint32(chunk, times[0] + 16) == 1


def _pcm_entries(chunk: bytes) -> int:
    """An upper bound: every chunk as long as the longest, cut into the smallest groups."""
    chunks = sum(_uint32(chunk, at + 8) for tag in (b"stco", b"co64") for at in _find(chunk, tag))
    longest = 0
    for at in _find(chunk, b"stsc"):
        runs = min(_uint32(chunk, at + 8), (len(chunk) - at) // 12)
        if runs > _MAX_STSC_RUNS:
            return MAX_CLAIMED_SAMPLES + 1
        longest = max([longest, *(_uint32(chunk, at + 12 + 12 * run + 4) for run in range(runs))])
    return chunks * (longest // _PCM_GROUP + 1)


def _find(chunk: bytes, tag: bytes) -> Iterator[int]:
    """Where the box type `tag` stands; 4 bytes of version and flags follow it, then the fields."""
    at = chunk.find(tag)
    while at >= 0:
        yield at
        at = chunk.find(tag, at + 4)


def _uint32(chunk: bytes, at: int) -> int:
    """The big-endian number at `at`; 0 beyond the end, where a demuxer finds nothing either."""
    return int.from_bytes(chunk[at : at + 4], "big") if at + 4 <= len(chunk) else 0

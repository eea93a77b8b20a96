"""MP4 tables that claim absurdly many samples are refused before a demuxer believes them."""

import contextlib
import resource
import struct
import time

import numpy as np
import pytest

from sensorium.errors import MediaError, MediaTooLargeError
from sensorium.media import decode_audio, decode_video
from sensorium.media.mp4_guard import MAX_CLAIMED_SAMPLES, check_mp4_tables
from tests.media.samples import (
    box,
    clip,
    encode_frames,
    fragment,
    full_box,
    mp4_with_tables,
    numbered_frames,
    sample_tables,
    sound,
)

HUGE = MAX_CLAIMED_SAMPLES + 1
MVEX = box(b"mvex", full_box(b"trex", 0, struct.pack(">IIIII", 1, 1, 1, 1, 0)))


def hidden(inner: bytes, kind: bytes) -> bytes:
    return box(b"ftyp", b"isom\0\0\2\0isom") + box(kind, inner)


def edited(samples: int, edits: int, *, version: int = 0, num_tracks: int = 1) -> bytes:
    """Tracks whose edit lists repeat their samples, from the first on."""
    edit = struct.pack(">QqHH" if version else ">IiHH", samples, 0, 1, 0)
    body = struct.pack(">I", edits) + edit * min(edits, 100)
    table = box(b"elst", bytes([version, 0, 0, 0]), body)
    track = box(b"trak", box(b"edts", table), box(b"mdia", box(b"minf", box(b"stbl", *sample_tables(samples)))))
    return box(b"ftyp", b"isom\0\0\2\0isom") + box(b"moov", track * num_tracks)


BOMBS = {
    "one table": mp4_with_tables(*sample_tables(20_000_000)),
    "fragments": mp4_with_tables(*sample_tables(0), extra=MVEX) + fragment(50_000_000),
    "many small fragments": mp4_with_tables(*sample_tables(0), extra=MVEX) + fragment(HUGE // 8 + 1, 8),
    "tables before a broken box": mp4_with_tables(box(b"junk"), *sample_tables(HUGE)).replace(
        struct.pack(">I", 8) + b"junk", struct.pack(">I", 4) + b"junk"
    ),
    "moov inside free": hidden(mp4_with_tables(*sample_tables(HUGE)), b"free"),
    "moov in a 64-bit box": hidden(b"", b"free") + struct.pack(">I4sQ", 1, b"moov", 16 + 20) + sample_tables(HUGE)[2],
    "moov to the end": struct.pack(">I4s", 0, b"moov") + box(b"trak", *sample_tables(HUGE)),
    "pcm in long chunks": mp4_with_tables(*sample_tables(0xFFFFFFFF), handler=b"soun"),
    "pcm in many chunks": mp4_with_tables(
        *sample_tables(10, per_chunk=2**31)[:3],
        full_box(b"stco", 0, struct.pack(">I", 200), bytes(800)),
        handler=b"soun",
    ),
    "a few samples in each of many edits": edited(2_000, 1_000_000),
    "many samples, some edits": edited(90_000, 20),
    "longer edits": edited(90_000, 20, version=1),
    "tracks that add up": edited(60_000, 1, num_tracks=3),
    "compressed tables": box(b"ftyp", b"qt  ") + box(b"moov", box(b"cmov", box(b"dcom", b"zlib"))),
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.parametrize("decode", [decode_video, decode_audio])
def test_bombs_are_refused_at_no_cost(name: str, decode: object) -> None:
    assert len(BOMBS[name]) < 5_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.process_time()
    with pytest.raises(MediaError) as caught:
        decode(BOMBS[name])  # type: ignore[operator]
    if name != "compressed tables":
        assert isinstance(caught.value, MediaTooLargeError)
        assert "too many samples" in str(caught.value)
    assert time.process_time() - start < 2.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # kilobytes


def test_ordinary_files_pass() -> None:
    for format in ("mp4", "mov"):
        check_mp4_tables(clip(format), "video")
    check_mp4_tables(sound("m4a"), "audio")
    fragmented = encode_frames(numbered_frames(20), "mp4", "libx264", "yuv420p", {})
    check_mp4_tables(fragmented, "video")


def test_an_hour_of_uncompressed_sound_passes() -> None:
    """QuickTime counts each sample of PCM; its demuxer groups them, so the claim is harmless there."""
    num_samples = 3_600 * 48_000
    tables = [
        full_box(b"stts", 0, struct.pack(">III", 1, num_samples, 1)),
        full_box(b"stsc", 0, struct.pack(">IIII", 1, 1, 24_000, 1)),
        full_box(b"stsz", 0, struct.pack(">II", 1, num_samples)),
        full_box(b"stco", 0, struct.pack(">I", 7_200), bytes(4 * 7_200)),
    ]
    samples = box(b"mdat", bytes(1 << 20))  # a part of them is enough here
    check_mp4_tables(mp4_with_tables(*tables, handler=b"soun") + samples, "audio")
    with pytest.raises(MediaTooLargeError):  # the same numbers for pictures are not harmless
        check_mp4_tables(mp4_with_tables(*tables) + samples, "video")


def test_media_data_is_not_searched() -> None:
    """Compressed pictures may contain any four letters."""
    poisoned = np.random.default_rng(0).bytes(1_000) + b"stsz" + b"\xff" * 20 + b"trun" + b"\xff" * 20
    check_mp4_tables(box(b"ftyp", b"isom") + box(b"mdat", poisoned), "video")
    check_mp4_tables(box(b"ftyp", b"isom") + struct.pack(">I4sQ", 1, b"mdat", 16 + len(poisoned)) + poisoned, "video")


@pytest.mark.parametrize("seed", range(20))
def test_random_bytes_end(seed: int) -> None:
    rng = np.random.default_rng(seed)
    data = bytearray(mp4_with_tables(*sample_tables(10)) + fragment(3))
    for _ in range(20):
        data[rng.integers(len(data))] = rng.integers(256)
    with contextlib.suppress(MediaError):
        check_mp4_tables(bytes(data), "video")

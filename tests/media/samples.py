"""Sounds and clips made on the spot, and tools to damage them."""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import av
import numpy as np
import PIL.Image
from numpy.typing import NDArray

from sensorium.media.encode import encode_audio, encode_video


def tone(seconds: float, sampling_rate: int, hertz: float = 440.0) -> NDArray[np.float32]:
    return (0.5 * np.sin(2 * np.pi * hertz * np.arange(int(seconds * sampling_rate)) / sampling_rate)).astype(
        np.float32
    )


@cache
def numbered_frames(num_frames: int = 60, height: int = 48, width: int = 64) -> NDArray[np.uint8]:
    """Frame i can be told from its neighbours: grey level, and a bar that moves."""
    frames = np.zeros((num_frames, height, width, 3), np.uint8)
    for number in range(num_frames):
        frames[number] = number * 4 % 256
        frames[number, :, : number % width + 1, 0] = 255 - number * 4 % 256
    frames.flags.writeable = False
    return frames


@cache
def clip(
    format: str = "mp4", num_frames: int = 60, fps: float = 10.0, options: tuple[tuple[str, str], ...] = ()
) -> bytes:
    return encode_video(numbered_frames(num_frames), fps, format, dict(options))


@cache
def sound(format: str = "wav", seconds: float = 1.0, sampling_rate: int = 48_000) -> bytes:
    return encode_audio(tone(seconds, sampling_rate), sampling_rate, format)


def encode_frames(
    frames: NDArray[np.uint8],
    format: str,
    codec: str,
    pix_fmt: str,
    options: dict[str, str],
    times: list[int] | None = None,
) -> bytes:
    """As `encode_video`, with a free choice of codec and, in milliseconds, of frame times."""
    from fractions import Fraction

    buffer = io.BytesIO()
    with _same_scheduling(), av.open(buffer, "w", format=format) as container:
        stream: Any = container.add_stream(codec, rate=10, options=options)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = times[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return buffer.getvalue()


@contextmanager
def _same_scheduling() -> Iterator[None]:
    """Keep this thread's scheduling policy: run by root, the encoder of AV1 makes its caller a real-time thread, which
    others on the machine, and then our own threads, would wait for.
    """
    policy, parameters = os.sched_getscheduler(0), os.sched_getparam(0)
    try:
        yield
    finally:
        os.sched_setscheduler(0, policy, parameters)


def wav(samples: NDArray[Any], sampling_rate: int, *, claimed_bytes: int | None = None) -> bytes:
    """A WAV file by hand, float or int16, shape `(num_samples,)` or `(num_samples, channels)`, that may lie."""
    channels = 1 if samples.ndim == 1 else samples.shape[1]
    body = samples.tobytes()
    width = samples.dtype.itemsize
    kind = 3 if samples.dtype.kind == "f" else 1
    rate = sampling_rate * channels * width
    header = struct.pack("<HHIIHH", kind, channels, sampling_rate, rate & 0xFFFFFFFF, channels * width, 8 * width)
    claimed = len(body) if claimed_bytes is None else claimed_bytes
    chunks = b"fmt " + struct.pack("<I", 16) + header + b"data" + struct.pack("<I", claimed) + body
    return b"RIFF" + struct.pack("<I", min(4 + len(chunks), 0xFFFFFFFF)) + b"WAVE" + chunks


def box(kind: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return struct.pack(">I4s", 8 + len(body), kind) + body


def full_box(kind: bytes, flags: int, *parts: bytes) -> bytes:
    return box(kind, struct.pack(">I", flags), *parts)


def mp4_with_tables(*tables: bytes, handler: bytes = b"vide", extra: bytes = b"") -> bytes:
    """A small MP4 with one track and the given sample tables."""
    matrix = struct.pack(">9i", 0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)
    times = struct.pack(">IIII", 0, 0, 1000, 1000)
    mvhd = full_box(b"mvhd", 0, times, struct.pack(">IH10x", 0x10000, 0x100), matrix, bytes(24), struct.pack(">I", 2))
    sizes = struct.pack(">II", 64 << 16, 48 << 16)
    tkhd = full_box(b"tkhd", 3, struct.pack(">IIIII", 0, 0, 1, 0, 1000), bytes(16), matrix, sizes)
    mdhd = full_box(b"mdhd", 0, times, struct.pack(">HH", 0x55C4, 0))
    hdlr = full_box(b"hdlr", 0, struct.pack(">I4s12x", 0, handler), b"v\0")
    dinf = box(b"dinf", full_box(b"dref", 0, struct.pack(">I", 1), full_box(b"url ", 1)))
    picture = bytes(6) + struct.pack(">H", 1) + bytes(16) + struct.pack(">HH", 64, 48)
    picture += struct.pack(">IIIH", 0x480000, 0x480000, 0, 1) + bytes(32) + struct.pack(">Hh", 24, -1)
    stsd = full_box(b"stsd", 0, struct.pack(">I", 1), box(b"jpeg", picture))
    minf = box(b"minf", full_box(b"vmhd", 1, bytes(8)), dinf, box(b"stbl", stsd, *tables))
    track = box(b"trak", tkhd, box(b"mdia", mdhd, hdlr, minf))
    head = box(b"ftyp", b"isom\0\0\2\0isom") + box(b"mdat", bytes(100))
    return head + box(b"moov", mvhd, track, extra)


def sample_tables(
    num_samples: int, *, sample_size: int = 1, per_chunk: int | None = None, delta: int = 1
) -> list[bytes]:
    return [
        full_box(b"stts", 0, struct.pack(">III", 1, num_samples, delta)),
        full_box(b"stsc", 0, struct.pack(">IIII", 1, 1, num_samples if per_chunk is None else per_chunk, 1)),
        full_box(b"stsz", 0, struct.pack(">II", sample_size, num_samples)),
        full_box(b"stco", 0, struct.pack(">II", 1, 40)),
    ]


def fragment(samples_per_run: int, runs: int = 1) -> bytes:
    run = full_box(b"trun", 1, struct.pack(">Ii", samples_per_run, 40))
    traf = box(b"traf", full_box(b"tfhd", 0x20000, struct.pack(">I", 1)), *[run] * runs)
    return box(b"moof", full_box(b"mfhd", 0, struct.pack(">I", 1)), traf) + box(b"mdat", bytes(100))


@cache
def _progressive(side: int) -> bytes:
    buffer = io.BytesIO()
    PIL.Image.new("L", (side, side), 128).save(buffer, "JPEG", progressive=True, quality=5)
    return buffer.getvalue()


def many_scans(num_scans: int, side: int = 7_000) -> bytes:
    """A progressive JPEG whose last scan is repeated: few bytes, much work."""
    data = _progressive(side)
    begin, end = data.rfind(b"\xff\xda"), data.rfind(b"\xff\xd9")
    return data[:begin] + data[begin:end] * num_scans + data[end:]

"""Pictures of every depth and meaning of samples, written byte by byte, beside what they show."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.uint32]
"""`(height, width, channels)`."""


def samples(bits: int, channels: int, *, height: int = 6, width: int = 11, seed: int = 0) -> Samples:
    """Random samples in which the least and the greatest value occur."""
    made = np.random.default_rng(seed).integers(0, 2**bits, (height, width, channels), dtype=np.uint32)
    made[0, 0], made[0, 1] = 0, 2**bits - 1
    return made


def to_eight_bits(values: Samples, bits: int) -> NDArray[np.float64]:
    """What samples mean, on a scale of 0 to 255."""
    return values * (255.0 / (2**bits - 1))


def packed(rows: Samples, bits: int, order: str = "<") -> bytes:
    """Rows of samples, each row filled up to whole bytes, the highest bit first."""
    flat = rows.reshape(len(rows), -1)
    if bits in (8, 16, 32):
        return flat.astype(f"{order}u{bits // 8}").tobytes()
    return b"".join(np.packbits((row[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for row in flat)


def _bits(data: bytes) -> NDArray[np.uint8]:
    return np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, 1), axis=1)


def tiff(
    values: Samples,
    bits: int,
    photometric: int,
    *,
    order: str = "<",
    fill_order: int = 1,
    extra: Sequence[int] = (),
    planar: int = 1,
    sample_format: int = 1,
    colours: Samples | None = None,
    compressed: bool = False,
    more: Sequence[tuple[int, int, Sequence[int]]] = (),
) -> bytes:
    """A TIFF of one strip (or one for each channel). `colours`: a palette `(2^bits, 3)` of 16 bits."""
    height, width, channels = values.shape
    planes = [values] if planar == 1 else [values[:, :, i : i + 1] for i in range(channels)]
    strips = [packed(plane, bits, order) for plane in planes]
    if compressed:
        strips = [zlib.compress(strip) for strip in strips]
    if fill_order == 2:  # the bits of each byte the other way round
        strips = [np.packbits(_bits(strip)[:, ::-1]).tobytes() for strip in strips]
    offsets = [8 + sum(map(len, strips[:i])) for i in range(len(strips))]
    start = 8 + sum(map(len, strips))
    start += start % 2
    entries: list[tuple[int, int, Sequence[int]]] = [
        (256, 3, [width]),
        (257, 3, [height]),
        (258, 3, [bits] * channels),
        (259, 3, [8 if compressed else 1]),
        (262, 3, [photometric]),
        (266, 3, [fill_order]),
        (273, 4, offsets),
        (277, 3, [channels]),
        (278, 3, [height]),
        (279, 4, [len(strip) for strip in strips]),
        (284, 3, [planar]),
        (339, 3, [sample_format] * channels),
        *more,
    ]
    if extra:
        entries.append((338, 3, extra))
    if colours is not None:
        entries.append((320, 3, [int(value) for value in colours.T.reshape(-1)]))
    entries.sort()
    table, behind = b"", b""
    at = start + 2 + 12 * len(entries) + 4
    for tag, kind, numbers in entries:
        data = struct.pack(f"{order}{len(numbers)}{'H' if kind == 3 else 'I'}", *numbers)
        if len(data) > 4:
            table += struct.pack(f"{order}HHII", tag, kind, len(numbers), at + len(behind))
            behind += data + b"\0" * (len(data) % 2)
        else:
            table += struct.pack(f"{order}HHI", tag, kind, len(numbers)) + data.ljust(4, b"\0")
    body = b"".join(strips).ljust(start - 8, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}I", start)
    return head + body + struct.pack(f"{order}H", len(entries)) + table + b"\0" * 4 + behind


def png(
    values: Samples,
    bits: int,
    colour: int,
    *,
    transparent: Sequence[int] | bytes | None = None,
    palette: bytes = b"",
) -> bytes:
    """A PNG. `colour`: 0 grey, 2 RGB, 3 palette, 4 grey and alpha, 6 RGBA. `transparent`: what `tRNS` holds."""
    height, width, _ = values.shape
    lines = b"".join(b"\0" + packed(values[row : row + 1], bits, ">") for row in range(height))
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0))]
    if palette:
        chunks.append((b"PLTE", palette))
    if transparent is not None:
        data = transparent if isinstance(transparent, bytes) else struct.pack(f">{len(transparent)}H", *transparent)
        chunks.append((b"tRNS", data))
    chunks += [(b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + body

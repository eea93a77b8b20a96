"""Every depth and meaning of samples that a container can hold is read rightly, or refused."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterator
from typing import Any

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray

from sensorium.errors import MediaTypeError
from sensorium.media import canonical_image, decode_image
from tests.media.pictures import Samples, png, samples, tiff, to_eight_bits

Expected = NDArray[np.float64]
TOLERANCE = 3
"""Of 255: high bytes instead of rounding, and alpha that was multiplied in before."""


def over(colour: Expected, alpha: Expected) -> Expected:
    """Over white; `alpha` on a scale of 0 to 1."""
    return colour * alpha + 255 * (1 - alpha)


def grey_tiffs() -> Iterator[tuple[str, bytes, Expected]]:
    for bits in (1, 2, 4, 8, 12, 16):
        values = samples(bits, 1)
        light = to_eight_bits(values, bits)
        for photometric, expected in ((0, 255 - light), (1, light)):
            for options in ways():
                yield f"grey {bits} {photometric} {options}", tiff(values, bits, photometric, **options), expected


def ways() -> Iterator[dict[str, Any]]:
    for order in "<>":
        for compressed in (False, True):
            for fill_order in (1, 2):
                yield {"order": order, "compressed": compressed, "fill_order": fill_order}


def colour_tiffs() -> Iterator[tuple[str, bytes, Expected]]:
    for bits in (8, 16):
        for options in ways():
            for planar in (1, 2):
                how: dict[str, Any] = {**options, "planar": planar}
                values = samples(bits, 4)
                light = to_eight_bits(values, bits)
                rgb, alpha = light[..., :3], light[..., 3:] / 255
                multiplied = values.copy()
                multiplied[..., :3] = np.round(values[..., :3] * alpha)
                inks = light / 255
                cmyk = 255 * (1 - inks[..., :3]) * (1 - inks[..., 3:])
                name = f"{bits} {how}"
                yield f"RGB {name}", tiff(values[..., :3], bits, 2, **how), rgb
                yield f"RGB and alpha {name}", tiff(values, bits, 2, extra=[2], **how), over(rgb, alpha)
                yield f"RGB and something {name}", tiff(values, bits, 2, extra=[0], **how), rgb
                yield f"RGB times alpha {name}", tiff(multiplied, bits, 2, extra=[1], **how), over(rgb, alpha)
                yield f"RGB and more {name}", tiff(values, bits, 2, **how), over(rgb, alpha)
                yield f"CMYK {name}", tiff(values, bits, 5, **how), cmyk
                for photometric, grey in ((0, 255 - light[..., :1]), (1, light[..., :1])):
                    two = values[..., [0, 3]]
                    yield f"grey, alpha {name}", tiff(two, bits, photometric, extra=[2], **how), over(grey, alpha)
                    yield f"grey, something {name}", tiff(two, bits, photometric, extra=[0], **how), grey
                whole = [(530, 3, [1, 1])]
                yield f"YCbCr {name}", tiff(values[..., :3], bits, 6, more=whole, **how), of_ycbcr(rgb)
    for bits in (1, 2, 4, 8):
        for options in ways():
            palette = samples(16, 3, height=1, width=2**bits)[0]
            values = samples(bits, 1)
            expected = to_eight_bits(palette[values[..., 0]], 16)
            yield f"palette {bits} {options}", tiff(values, bits, 3, colours=palette, **options), expected


def of_ycbcr(light: Expected) -> Expected:
    y, b, r = light[..., 0], light[..., 1] - 128, light[..., 2] - 128
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)
    return rgb.clip(0, 255)


def pngs() -> Iterator[tuple[str, bytes, Expected]]:
    for bits in (1, 2, 4, 8, 16):
        values = samples(bits, 1)
        light = to_eight_bits(values, bits)
        yield f"grey {bits}", png(values, bits, 0), light
        for transparent in {0, 1, 2**bits - 1, int(values[2, 3, 0])}:
            seen = np.where(values == transparent, 255.0, light)
            yield f"grey {bits}, {transparent} transparent", png(values, bits, 0, transparent=[transparent]), seen
        if bits <= 8:
            colours = samples(8, 4, height=1, width=2**bits)[0]
            palette = colours[:, :3].astype(np.uint8).tobytes()
            picked = colours[values[..., 0]].astype(float)
            yield f"palette {bits}", png(values, bits, 3, palette=palette), picked[..., :3]
            alpha = colours[:, 3].astype(np.uint8).tobytes()
            seen = over(picked[..., :3], picked[..., 3:] / 255)
            yield f"palette {bits} and alpha", png(values, bits, 3, palette=palette, transparent=alpha), seen
    for bits in (8, 16):
        values = samples(bits, 4)
        light = to_eight_bits(values, bits)
        rgb, alpha = light[..., :3], light[..., 3:] / 255
        yield f"RGB {bits}", png(values[..., :3], bits, 2), rgb
        yield f"grey and alpha {bits}", png(values[..., [0, 3]], bits, 4), over(rgb[..., :1], alpha)
        yield f"RGBA {bits}", png(values, bits, 6), over(rgb, alpha)
        chosen = values[2, 3, :3]
        seen = np.where((values[..., :3] == chosen).all(-1, keepdims=True), 255.0, rgb)
        data = png(values[..., :3], bits, 2, transparent=[int(value) for value in chosen])
        yield f"RGB {bits}, one transparent", data, seen


def bmps() -> Iterator[tuple[str, bytes, Expected]]:
    for bits in (1, 4, 8):
        values = samples(bits, 1, width=16)
        colours = samples(8, 3, height=1, width=2**bits)[0]
        yield f"palette {bits}", bmp(values, bits, colours=colours), colours[values[..., 0]].astype(float)
    for name, bits, masks in (
        ("555", 16, None),
        ("565", 16, (0xF800, 0x07E0, 0x001F)),
        ("24", 24, None),
        ("32", 32, None),
        ("32 in another order", 32, (0xFF, 0xFF00, 0xFF0000)),
    ):
        depths = (5, 6, 5) if name == "565" else (5, 5, 5) if bits == 16 else (8, 8, 8)
        channels = [samples(depth, 1, width=16, seed=seed)[..., 0] for seed, depth in enumerate(depths)]
        expected = np.stack([to_eight_bits(each, depth) for each, depth in zip(channels, depths, strict=True)], -1)
        shifts = (0, 8, 16) if name.endswith("order") else (depths[1] + depths[2], depths[2], 0)
        words = sum(each.astype(np.uint32) << shift for each, shift in zip(channels, shifts, strict=True))
        yield name, bmp(np.asarray(words)[..., None], bits, masks=masks), expected


def bmp(
    values: Samples, bits: int, *, colours: Samples | None = None, masks: tuple[int, int, int] | None = None
) -> bytes:
    height, width, _ = values.shape
    rows = values[::-1, :, 0]
    if bits < 8:
        lines = [np.packbits((row[:, None] >> np.arange(bits)[::-1]) & 1).tobytes() for row in rows.astype(np.uint8)]
    else:
        lines = [b"".join(int(value).to_bytes(4, "little")[: bits // 8] for value in row) for row in rows]
    body = b"".join(line + b"\0" * (-len(line) % 4) for line in lines)
    table = b"" if masks is None else struct.pack("<3I", *masks)
    if colours is not None:
        table = b"".join(bytes(map(int, colour[::-1])) + b"\0" for colour in colours)
    start = 54 + len(table)
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, 3 if masks else 0, len(body), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", start + len(body), 0, 0, start) + head + table + body


@pytest.mark.parametrize(
    ("pictures", "must_be_read"),
    [
        (grey_tiffs, ("grey 1 0", "grey 2 1", "grey 4 0", "grey 8 0", "grey 12 1", "grey 16 0", "grey 16 1")),
        (colour_tiffs, ("RGB 8", "RGB 16", "RGB and alpha 16", "CMYK 8", "grey, alpha 8", "YCbCr 8", "palette 4")),
        (pngs, ("grey 1", "grey 2, 1 transparent", "grey 16", "RGBA 16", "palette 4 and alpha", "RGB 8, one")),
        (bmps, ("palette 1", "palette 4", "555", "565", "24", "32")),
    ],
    ids=["grey TIFF", "TIFF in colour", "PNG", "BMP"],
)
def test_samples_are_read_rightly_or_refused(pictures: Any, must_be_read: tuple[str, ...]) -> None:
    """A grey TIFF of 16 bits in which white is zero came out inverted; planes, transparent greys and signed samples
    came out wrong in ways of their own.
    """
    read, wrong = [], []
    for name, data, expected in pictures():
        try:
            seen = np.asarray(decode_image(data)).astype(float)
        except MediaTypeError:
            continue
        except ValueError:  # the library knows no such combination
            continue
        read.append(name)
        off = float(np.abs(seen - np.broadcast_to(expected, seen.shape)).max())
        if off > TOLERANCE:
            wrong.append((name, off))
    assert not wrong
    assert not [kind for kind in must_be_read if not any(name.startswith(kind) for name in read)]


def test_white_is_zero_at_sixteen_bits() -> None:
    values = samples(16, 1)
    expected = np.broadcast_to(255 - (values >> 8), (*values.shape[:2], 3))
    assert np.array_equal(np.asarray(decode_image(tiff(values, 16, 0))), expected)


def odd_tiffs() -> Iterator[tuple[str, bytes]]:
    for bits in (8, 16, 32):
        for sample_format in (2, 3):
            values = samples(min(bits, 31), 1)
            yield f"format {sample_format} {bits}", tiff(values, bits, 1, sample_format=sample_format)
            yield f"format {sample_format} {bits} black", tiff(values, bits, 0, sample_format=sample_format)
    yield "32 bits", tiff(samples(31, 1), 32, 1)
    yield "signed RGB", tiff(samples(8, 3), 8, 2, sample_format=2)
    yield "Lab", tiff(samples(8, 3), 8, 8)
    yield "mask", tiff(samples(1, 1), 1, 4)
    yield "inks", tiff(samples(8, 4), 8, 5, more=[(332, 3, [2])])
    yield "subsampled", tiff(samples(8, 3), 8, 6)
    yield "planes of 16 bits", tiff(samples(16, 3), 16, 2, planar=2)


@pytest.mark.parametrize(("name", "data"), list(odd_tiffs()), ids=lambda value: value if isinstance(value, str) else "")
def test_samples_of_no_defined_reading_are_refused(name: str, data: bytes) -> None:
    with pytest.raises(MediaTypeError):
        decode_image(data)


@pytest.mark.parametrize("values", [(-1, 5), (0, 70_000)])
def test_integers_beyond_sixteen_bits_are_refused_and_not_clipped(values: tuple[int, int]) -> None:
    with pytest.raises(MediaTypeError, match=str(values[1])):
        canonical_image(PIL.Image.fromarray(np.array([values], np.int32)))


def test_a_picture_opened_by_its_caller_is_read_the_same_way() -> None:
    """Offline, a user opens the file with the library and hands the object over."""
    values = samples(16, 1)
    data = tiff(values, 16, 0)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert canonical_image(opened).tobytes() == decode_image(data).tobytes()

"""What the samples of an encoded image mean: which sample layouts the image library reads correctly.

The library opens more layouts than it reads correctly: it takes signed samples for unsigned ones, ignores "white is
zero" at 16 bits, and so on. This module lists the layouts that it reads correctly and those whose samples can be
corrected; the rest is refused. Sources: TIFF 6.0, sections 3 to 6, 16 to 18 and 21; PNG 1.2, section 4.2.1.1.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from sensorium.errors import MediaTypeError

if TYPE_CHECKING:
    from PIL.Image import Image

_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _PLANAR, _EXTRA, _FORMAT = 258, 259, 262, 266, 284, 338, 339
_INK_SET, _COEFFICIENTS, _SUBSAMPLING, _REFERENCE = 332, 529, 530, 532
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _PALETTE, _CMYK, _YCBCR = 0, 1, 2, 3, 5, 6
_COLOUR_CHANNELS = {_WHITE_IS_ZERO: 1, _BLACK_IS_ZERO: 1, _RGB: 3, _PALETTE: 1, _CMYK: 4, _YCBCR: 3}
_RAW = 1
_JPEG = (6, 7)


@dataclass(frozen=True, slots=True)
class SampleLayout:
    """How the library's samples are to be read.

    Attributes:
        bits: of a sample, in modes of 16 bits.
        is_inverted: whether 0 is white there.
        transparent_scale: what the transparent grey of the file is to be multiplied with.
    """

    bits: int = 16
    is_inverted: bool = False
    transparent_scale: int = 1


PLAIN = SampleLayout()


def layout_of(image: Image) -> SampleLayout:
    """The layout of an image that was opened and not loaded yet.

    Raises:
        MediaTypeError: The library would misread its samples.
    """
    if image.format == "TIFF" and hasattr(image, "tag_v2"):
        return _tiff_layout(image.tag_v2)
    if image.format == "PNG":
        return _png_layout(image)
    return PLAIN


def _tiff_layout(tags: Mapping[int, Any]) -> SampleLayout:
    bits = _numbers(tags, _BITS, 1)
    photometric = tags.get(_PHOTOMETRIC, _WHITE_IS_ZERO)
    compression = tags.get(_COMPRESSION, _RAW)
    if compression in _JPEG:
        return PLAIN  # the format itself defines its samples
    if set(_numbers(tags, _FORMAT, 1)) != {1}:
        raise _unreadable("signed or floating-point samples", "unsigned integers")
    if len(set(bits)) > 1 or bits[0] not in (1, 2, 4, 8, 12, 16):
        raise _unreadable(f"samples of {bits[0]} bits", "1, 2, 4, 8, 12 or 16")
    if photometric not in _COLOUR_CHANNELS:
        raise _unreadable(f"photometric interpretation {photometric}", "grey, RGB, a palette, CMYK or YCbCr")
    if tags.get(_PLANAR, 1) == 2:
        _check_planes(tags, len(bits), bits[0], photometric, compression)
    if photometric == _CMYK and tags.get(_INK_SET, 1) != 1:
        raise _unreadable("inks of its own", "CMYK")
    if photometric == _YCBCR:
        _check_ycbcr(tags)
    is_deep_grey = photometric == _WHITE_IS_ZERO and bits[0] > 8
    return SampleLayout(bits=12 if bits[0] == 12 else 16, is_inverted=is_deep_grey and not _library_inverts())


def _check_planes(tags: Mapping[int, Any], num_bits: int, bits: int, photometric: int, compression: int) -> None:
    """Channels that lie one after the other."""
    extra = _numbers(tags, _EXTRA, None)
    colours = _COLOUR_CHANNELS[photometric]
    if compression == _RAW and colours > 1 and (bits > 8 or tags.get(_FILL_ORDER, 1) != 1):
        raise _unreadable(f"separate planes of {bits} bits, uncompressed", "one plane")
    if num_bits > colours + len(extra):
        raise _unreadable("a separate plane of no declared meaning", "one plane, or ExtraSamples")
    if colours == 1 and any(extra):
        raise _unreadable("alpha in a plane of its own", "one plane")


def _check_ycbcr(tags: Mapping[int, Any]) -> None:
    """Without compression by JPEG, the library knows neither subsampling nor other conversions than JPEG's."""
    if _numbers(tags, _SUBSAMPLING, 2) not in ((1, 1), (1,)) or {_COEFFICIENTS, _REFERENCE} & tags.keys():
        raise _unreadable("YCbCr with subsampling or a conversion of its own", "RGB, or compression by JPEG")


def _numbers(tags: Mapping[int, Any], tag: int, default: int | None) -> tuple[int, ...]:
    value = tags.get(tag, () if default is None else default)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _png_layout(image: Image) -> SampleLayout:
    if "transparency" not in image.info or not getattr(image, "tile", None):
        return PLAIN
    arguments = image.tile[0][3]  # type: ignore[attr-defined]
    raw_mode = arguments if isinstance(arguments, str) else arguments[0]
    if raw_mode == "RGB;16B":
        raise _unreadable("a transparent colour of 16 bits", "8 bits, or an alpha channel")
    return SampleLayout(transparent_scale={"1": 255, "L;2": 85, "L;4": 17}.get(raw_mode, 1))


def _unreadable(got: str, expected: str) -> MediaTypeError:
    return MediaTypeError(f"image has pixels without a defined reading: got {got}, expected {expected}. Convert it.")


@cache
def _library_inverts() -> bool:
    """Whether the library itself turns "white is zero" round at 16 bits, as it does below."""
    import PIL.Image

    tags = ((256, 1), (257, 1), (258, 16), (259, 1), (262, 0), (273, 8), (277, 1), (278, 1), (279, 2))
    table = b"".join(struct.pack("<HHIHH", tag, 3, 1, value, 0) for tag, value in tags)
    data = b"II*\0" + struct.pack("<I", 10) + b"\0\0" + struct.pack("<H", len(tags)) + table + b"\0" * 4
    with PIL.Image.open(io.BytesIO(data), formats=["TIFF"]) as image:
        return image.getpixel((0, 0)) != 0

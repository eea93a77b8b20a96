"""Images: from encoded bytes or a PIL image to one canonical form.

Canonical: a PIL image of mode "RGB", its only frame, upright (the EXIF orientation is applied), alpha composited over
white, 16-bit grey reduced to its high byte, no colour profile applied, no metadata kept. An RGB image in memory without
orientation is returned untouched, so that Hugging Face's processors see the same pixels as without Sensorium. An image
that can't be converted exactly is refused.
"""

from __future__ import annotations

import io
from functools import cache
from typing import TYPE_CHECKING, Any

from sensorium.errors import MediaError, MediaTypeError
from sensorium.logger import get_logger
from sensorium.media import memory_fence
from sensorium.media.limits import MediaLimits, check_encoded_bytes, takes_too_much_memory, too_large
from sensorium.media.sample_layout import SampleLayout, layout_of
from sensorium.media.sniff import webp_canvas

if TYPE_CHECKING:
    from PIL.Image import Image

logger = get_logger(__name__)

# Formats with a signature and a decoder that only decodes. Left out on purpose: EPS and similar formats, which run
# other programs; ICO, whose header may lie about the picture inside; plain PPM and TGA, which accept almost any bytes.
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "AVIF", "BMP", "TIFF", "JPEG2000")
BACKGROUND = (255, 255, 255)
BYTES_PER_PIXEL = 4
"""Memory that the library takes for a pixel of three channels."""
_WORKING_BYTES_PER_PIXEL = 32
"""The most that decoding takes for a pixel: coefficients of a progressive JPEG, copies while modes are converted."""
_ORIENTATION_TAG = 0x0112
_SUBFILE_TYPE = 254
_PREVIEW_OR_MASK = 1 | 4
_MAX_PREVIEWS = 8
_SIXTEEN_BIT_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N", "I"})
_ALPHA_MODES = frozenset({"RGBA", "LA", "PA", "La", "RGBa"})
_OPAQUE_MODES = frozenset({"RGB", "RGBX", "1", "L", "P", "CMYK", "YCbCr", "HSV"})


def decode_image(data: bytes, limits: MediaLimits | None = None) -> Image:
    """Decode encoded bytes into a canonical RGB image.

    Raises:
        MediaTooLargeError: too many bytes, or too many pixels by the header, before any pixel is allocated.
        MediaTypeError: the bytes are of no accepted format or pixel type.
        MediaError: the image is truncated or corrupt.
    """
    limits = limits or MediaLimits()
    check_encoded_bytes("image", len(data), limits)
    if not data:
        raise MediaError("image is empty: got 0 bytes, expected an encoded image. Send the image's bytes.")
    canvas = webp_canvas(data)
    if canvas is not None:
        _check_size(canvas, limits)
        _allow(canvas, len(data))
    image = _open(data, limits)
    _check_size(image.size, limits)
    _allow(image.size, len(data))
    try:
        _check_single(image)
    except MediaError:
        raise
    except Exception as error:  # noqa: BLE001  decoders raise any exception; callers get one
        raise _corrupt(error) from None
    return canonical_image(image, limits)


def _check_single(image: Image) -> None:
    """Refuse frames and pages of which a model would see the first only. Previews beside a picture are no pages."""
    if not getattr(image, "is_animated", False):
        return
    if image.format == "TIFF":
        for page in range(1, _MAX_PREVIEWS + 1):
            try:
                image.seek(page)
            except EOFError:
                image.seek(0)
                return
            if not image.tag_v2.get(_SUBFILE_TYPE, 0) & _PREVIEW_OR_MASK:  # type: ignore[attr-defined]
                break
    elif image.format == "MPO":  # a photograph with previews, or with a second one for stereo
        return
    raise MediaTypeError(
        f"image has several {'pages' if image.format == 'TIFF' else 'frames'}: got more than one, expected one. Send "
        "each as an image of its own, or an animated GIF as a video."
    )


def _allow(size: tuple[int, int], num_bytes: int) -> None:
    """Memory in proportion to the pixels that the header promises."""
    memory_fence.allow(memory_fence.HEADER_BYTES + num_bytes + _WORKING_BYTES_PER_PIXEL * size[0] * size[1])


def image_of(pixels: Any, size: tuple[int, int]) -> Image:
    """An RGB image of a buffer of pixels in the library's own layout, `BYTES_PER_PIXEL` for each."""
    import PIL.Image

    return PIL.Image.frombytes("RGB", size, pixels, "raw", "RGBX")


def warm_up() -> None:
    """Load what decoding needs."""
    _available_formats()


def canonical_image(image: Image, limits: MediaLimits | None = None) -> Image:
    """Convert a PIL image to the canonical form (see the module). A plain RGB image is returned as it is.

    Raises:
        MediaTooLargeError: it has too many pixels.
        MediaTypeError: its pixels are floating point or otherwise without a defined reading as RGB.
        MediaError: it has no pixels, or loading them fails.
    """
    from PIL import ImageFile

    _check_size(image.size, limits or MediaLimits())
    try:
        layout = layout_of(image)
        image.load()
        upright = _turn(_to_rgb(image, layout), _orientation(image))
        if upright is image and not isinstance(image, ImageFile.ImageFile):
            return image
        bare = upright.copy() if upright is image else upright
    except MediaError:
        raise
    except MemoryError:
        raise takes_too_much_memory("image") from None
    except Exception as error:  # noqa: BLE001  decoders raise any exception; callers get one
        raise _corrupt(error) from None
    bare.info = {}
    return bare


@cache
def _available_formats() -> tuple[str, ...]:
    """Those of `FORMATS` that this build of Pillow supports."""
    import PIL.Image

    PIL.Image.init()
    return tuple(name for name in FORMATS if name in PIL.Image.OPEN)


def _open(data: bytes, limits: MediaLimits) -> Image:
    """Parse the header; pixels are decoded later, by `load`."""
    import PIL.Image

    try:
        return PIL.Image.open(io.BytesIO(data), formats=_available_formats())
    except (PIL.Image.DecompressionBombError, PIL.Image.DecompressionBombWarning):
        raise _too_many_pixels("more than the decoder takes", limits) from None
    except PIL.UnidentifiedImageError:
        raise MediaTypeError(
            f"image can't be read: got no whole header of a known format, expected one of "
            f"{', '.join(_available_formats())}. Convert the image, or send all of its bytes."
        ) from None
    except MemoryError:
        raise takes_too_much_memory("image") from None
    except Exception as error:  # noqa: BLE001  decoders raise any exception; callers get one
        raise _corrupt(error) from None


def _corrupt(error: Exception) -> MediaError:
    logger.debug("image decoder failed: %r", error)
    return MediaError("image can't be decoded: got truncated or corrupt data, expected a whole image. Send it again.")


def _check_size(size: tuple[int, int], limits: MediaLimits) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise MediaError(f"image is empty: got {width} x {height} pixels, expected at least 1 x 1. Send an image.")
    if width * height > limits.max_image_pixels:
        raise _too_many_pixels(f"{width} x {height} = {width * height}", limits)


def _too_many_pixels(got: str, limits: MediaLimits) -> MediaError:
    bound = str(limits.max_image_pixels)
    return too_large("image has too many pixels", got, bound, "Send a smaller image", "max_image_pixels")


def _orientation(image: Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where it is absent or unreadable."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # noqa: BLE001  an image with damaged metadata is still readable
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _turn(image: Image, orientation: int) -> Image:
    """Undo the camera's orientation. Source: EXIF 2.32, tag 0x0112."""
    from PIL.Image import Transpose

    steps = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    return image if orientation == 1 else image.transpose(steps[orientation])


def _to_rgb(image: Image, layout: SampleLayout) -> Image:
    """RGB pixels of a loaded image; the image itself where it is RGB already."""
    if image.mode in _SIXTEEN_BIT_MODES:
        return _sixteen_bit_to_rgb(image, layout)
    if layout.transparent_scale > 1:
        image.info["transparency"] *= layout.transparent_scale
    if image.mode in _ALPHA_MODES or _has_transparent_colour(image):
        return _flatten(image)
    if image.mode in _OPAQUE_MODES:
        return image if image.mode == "RGB" else image.convert("RGB")
    raise MediaTypeError(
        f"image has pixels without a defined reading: got mode {image.mode}, expected 8 or 16 bits per channel. "
        "Convert the image to RGB."
    )


def _has_transparent_colour(image: Image) -> bool:
    """Whether the image names a colour or palette entries as transparent. RGB in memory is taken at its pixels."""
    from PIL import ImageFile

    if image.mode == "RGB" and not isinstance(image, ImageFile.ImageFile):
        return False
    return "transparency" in image.info and image.mode in ("RGB", "L", "P", "1")


def _flatten(image: Image) -> Image:
    """Composite over the background."""
    import PIL.Image

    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    flat = PIL.Image.new("RGB", rgba.size, BACKGROUND)
    flat.paste(rgba.convert("RGB"), mask=rgba.getchannel("A"))
    return flat


def _sixteen_bit_to_rgb(image: Image, layout: SampleLayout) -> Image:
    """Grey of 16 bits to its high byte, as decoders do for colour of 16 bits. Pillow's own conversion would clip.

    Mode "I" is read as 16 bits too, if its values are.
    """
    import numpy as np
    import PIL.Image

    values = np.asarray(image)
    least, most = int(values.min()), int(values.max())
    if least < 0 or most >> layout.bits:
        raise MediaTypeError(
            f"image has pixels without a defined reading: got values from {least} to {most}, expected "
            f"{layout.bits} bits. Scale the image to 8 or 16 bits."
        )
    grey = (values >> (layout.bits - 8)).astype(np.uint8)
    if layout.is_inverted:
        grey = ~grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = BACKGROUND[0]
    return PIL.Image.fromarray(grey).convert("RGB")

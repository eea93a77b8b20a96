"""Images: every legal kind decodes to one canonical form, everything else is refused with our own words."""

import io
import struct
import zlib
from collections.abc import Callable

import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from PIL import ImageOps
from PIL.Image import Image

from sensorium.errors import MediaError, MediaTooLargeError, MediaTypeError
from sensorium.media import MediaLimits, canonical_image, decode_image

WIDTH, HEIGHT = 24, 16


def picture(seed: int = 0) -> Image:
    """A smooth picture without symmetry, so that wrong turns show."""
    rng = np.random.default_rng(seed)
    corners = PIL.Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8))
    return corners.resize((WIDTH, HEIGHT), PIL.Image.Resampling.BICUBIC)


def encode(image: Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)  # type: ignore[arg-type]
    return buffer.getvalue()


def pixels(image: Image) -> NDArray[np.uint8]:
    return np.asarray(image)


def assert_canonical(image: Image, size: tuple[int, int] = (WIDTH, HEIGHT)) -> None:
    assert type(image) is PIL.Image.Image
    assert image.mode == "RGB"
    assert image.size == size
    assert image.info == {}
    assert not image.getexif()


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "WEBP", "JPEG2000"])
def test_lossless_formats_keep_every_pixel(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    decoded = decode_image(encode(picture(), format, **options))
    assert_canonical(decoded)
    assert np.array_equal(pixels(decoded), pixels(picture()))


@pytest.mark.parametrize("format", ["JPEG", "WEBP", "GIF"])
def test_lossy_formats_equal_pillow(format: str) -> None:
    data = encode(picture(), format)
    decoded = decode_image(data)
    assert_canonical(decoded)
    assert np.array_equal(pixels(decoded), pixels(PIL.Image.open(io.BytesIO(data)).convert("RGB")))


# --- orientation ---


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_orientation_is_applied_as_hugging_face_does(format: str, orientation: int) -> None:
    exif = PIL.Image.Exif()
    exif[0x0112] = orientation
    data = encode(picture(), format, exif=exif)
    with PIL.Image.open(io.BytesIO(data)) as opened:
        expected = ImageOps.exif_transpose(opened).convert("RGB")  # what transformers' load_image does
    decoded = decode_image(data)
    assert_canonical(decoded, (HEIGHT, WIDTH) if orientation > 4 else (WIDTH, HEIGHT))
    assert np.array_equal(pixels(decoded), pixels(expected))
    with PIL.Image.open(io.BytesIO(data)) as opened:
        assert np.array_equal(pixels(canonical_image(opened)), pixels(expected))
    assert np.array_equal(pixels(canonical_image(decoded)), pixels(expected))  # a second time changes nothing


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow warns, as it does in production
def test_damaged_orientation_leaves_the_picture_upright() -> None:
    data = encode(picture(), "JPEG", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff")
    assert np.array_equal(pixels(decode_image(data)), pixels(decode_image(encode(picture(), "JPEG"))))


# --- transparency ---


def test_alpha_is_composited_over_white() -> None:
    alpha = np.linspace(0, 255, WIDTH * HEIGHT).astype(np.uint8).reshape(HEIGHT, WIDTH)
    rgba = picture().copy()
    rgba.putalpha(PIL.Image.fromarray(alpha))
    weight = alpha[..., None] / 255
    expected = pixels(picture()) * weight + 255 * (1 - weight)
    for decoded in (decode_image(encode(rgba, "PNG")), canonical_image(rgba)):
        assert_canonical(decoded)
        assert np.abs(pixels(decoded) - expected).max() <= 1
    grey_alpha = rgba.convert("LA")
    grey = pixels(grey_alpha)[..., 0][..., None]
    assert np.abs(pixels(decode_image(encode(grey_alpha, "PNG"))) - (grey * weight + 255 * (1 - weight))).max() <= 1


def test_transparent_colours_become_white() -> None:
    grey = PIL.Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    expected = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None], 3, axis=2)
    expected[expected == 7] = 255
    assert np.array_equal(pixels(decode_image(encode(grey, "PNG", transparency=7))), expected)

    colour = PIL.Image.new("RGB", (2, 1), (1, 2, 3))
    colour.putpixel((1, 0), (9, 9, 9))
    decoded = decode_image(encode(colour, "PNG", transparency=(9, 9, 9)))
    assert pixels(decoded).tolist() == [[[1, 2, 3], [255, 255, 255]]]

    palette = PIL.Image.new("P", (3, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    palette.putdata([0, 1, 2])
    assert pixels(decode_image(encode(palette, "PNG"))).tolist() == [[[10, 20, 30], [40, 50, 60], [70, 80, 90]]]
    one_entry = decode_image(encode(palette, "PNG", transparency=1))
    assert pixels(one_entry).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    every_entry = decode_image(encode(palette, "PNG", transparency=bytes([255, 0, 255])))
    assert pixels(every_entry).tolist() == [[[10, 20, 30], [255, 255, 255], [70, 80, 90]]]
    assert pixels(decode_image(encode(palette, "GIF", transparency=2)))[0, 2].tolist() == [255, 255, 255]


# --- other pixel types ---


def test_sixteen_bit_grey_keeps_its_high_byte() -> None:
    values = (np.arange(WIDTH * HEIGHT, dtype=np.uint16) * 170).reshape(HEIGHT, WIDTH)
    expected = np.repeat((values >> 8).astype(np.uint8)[..., None], 3, axis=2)
    grey = PIL.Image.fromarray(values)
    assert grey.mode == "I;16"
    for format in ("PNG", "TIFF"):
        assert np.array_equal(pixels(decode_image(encode(grey, format))), expected)
    assert np.array_equal(pixels(canonical_image(PIL.Image.fromarray(values.astype(np.int32)))), expected)


def test_other_modes() -> None:
    for mode in ("1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "RGBa", "La", "PA"):
        source = {"RGBa": "RGBA", "La": "LA", "PA": "RGBA"}.get(mode, "RGB")
        image = picture().convert(source)
        if mode == "PA":
            image = picture().convert("P").convert("PA")
        elif mode != source:
            image = image.convert(mode)
        assert_canonical(canonical_image(image))
    cmyk = picture().convert("CMYK")
    assert np.abs(pixels(canonical_image(cmyk)).astype(int) - pixels(picture())).max() <= 1
    for mode in ("F", "LAB"):
        with pytest.raises(MediaTypeError, match=mode):
            canonical_image(PIL.Image.new(mode, (3, 3)))


def test_inverted_cmyk_jpeg_of_adobe_comes_out_right_way_round() -> None:
    data = encode(PIL.Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG", quality=100)  # red
    assert np.abs(pixels(decode_image(data)).astype(int) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_pictures_of_several_frames_or_pages_are_refused(format: str) -> None:
    """All but the first were dropped without a word."""
    frames = [picture(seed) for seed in range(3)]
    data = encode(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(MediaTypeError, match="several"):
        decode_image(data)
    assert_canonical(decode_image(encode(frames[0], format, save_all=True)))


def test_previews_beside_a_picture_are_no_pages() -> None:
    """Cameras store a small copy beside a picture: JPEG with several pictures in it, TIFF with reduced copies."""
    small = picture().resize((4, 4))
    assert_canonical(decode_image(encode(picture(), "MPO", save_all=True, append_images=[small])))
    data = bytearray(encode(picture(), "TIFF", save_all=True, append_images=[picture(1)]))
    with pytest.raises(MediaTypeError, match="pages"):
        decode_image(bytes(data))
    first = int.from_bytes(data[4:8], "little")
    behind_first = first + 2 + 12 * int.from_bytes(data[first : first + 2], "little")
    second = int.from_bytes(data[behind_first : behind_first + 4], "little")
    entries = range(second + 2, second + 2 + 12 * int.from_bytes(data[second : second + 2], "little"), 12)
    (planes,) = [at for at in entries if data[at : at + 2] == (284).to_bytes(2, "little")]
    data[planes : planes + 12] = struct.pack("<HHII", 254, 4, 1, 1)  # in its place: this is a reduced copy
    decoded = decode_image(bytes(data))
    assert np.array_equal(pixels(decoded), pixels(picture()))


def test_plain_rgb_in_memory_is_what_hugging_face_sees() -> None:
    """The same object: no copy, no conversion, no change."""
    image = picture()
    image.info["transparency"] = (0, 0, 0)  # RGB in memory is taken at its pixels
    assert canonical_image(image) is image


# --- sizes ---


@pytest.mark.parametrize("size", [(1, 1), (1, 10_000), (10_000, 1), (65_535, 1)])
def test_extreme_shapes(size: tuple[int, int]) -> None:
    for format in ("PNG", "JPEG"):
        if max(size) > 65_500 and format == "JPEG":
            continue
        assert_canonical(decode_image(encode(PIL.Image.new("RGB", size, (1, 2, 3)), format)), size)


def test_pixels_in_memory_are_bounded_too() -> None:
    with pytest.raises(MediaTooLargeError, match="24 x 16 = 384"):
        canonical_image(picture(), MediaLimits(max_image_pixels=383))
    assert canonical_image(picture(), MediaLimits(max_image_pixels=384)) is not None
    with pytest.raises(MediaError, match="0 x 5"):
        canonical_image(PIL.Image.new("RGB", (0, 5)))


def png_claiming(width: int, height: int) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def patched(format: str, at: int, layout: str, *sizes: int) -> Callable[[int, int], bytes]:
    """Makes a maker of files whose header claims another size."""

    def make(width: int, height: int) -> bytes:
        data = bytearray(encode(picture(), format))
        values = [width, height] if not sizes else [size - 1 for size in (width, height)]
        data[at : at + struct.calcsize(layout)] = struct.pack(layout, *values)
        return bytes(data)

    return make


def webp_claiming(width: int, height: int) -> bytes:
    body = b"VP8X" + struct.pack("<I", 10) + bytes(4)
    body += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    body += encode(picture(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def jpeg_claiming(width: int, height: int) -> bytes:
    data = bytearray(encode(picture(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


BOMBS: dict[str, Callable[[int, int], bytes]] = {
    "PNG": png_claiming,
    "GIF": patched("GIF", 6, "<HH"),
    "BMP": patched("BMP", 18, "<ii"),
    "WEBP": webp_claiming,
    "JPEG": jpeg_claiming,
}


@pytest.mark.parametrize("format", BOMBS)
@pytest.mark.parametrize("size", [(8_001, 8_000), (16_383, 16_383), (65_500, 65_500)])
def test_bombs_are_refused_by_their_header(format: str, size: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused before any pixel is allocated: allocation is made impossible here."""
    data = BOMBS[format](*size)

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("pixels were allocated before the size was checked")

    import PIL.ImageFile

    monkeypatch.setattr(PIL.ImageFile.ImageFile, "load", never)
    if format == "WEBP":  # the library allocates the canvas when it opens the file
        monkeypatch.setattr(PIL.Image, "open", never)
    with pytest.raises(MediaTooLargeError, match="max_image_pixels"):
        decode_image(data)


# --- damaged and foreign bytes ---


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000"])
def test_truncated_images_are_refused(format: str) -> None:
    noise = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    data = encode(noise, format)
    for keep in (0, 1, 10, len(data) // 3, len(data) // 2, len(data) * 3 // 4):
        with pytest.raises(MediaError):
            decode_image(data[:keep])


@pytest.mark.parametrize(
    "data",
    [
        b"not an image",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"%PDF-1.4\n",
        b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>",
        b"P6 2 2 255 " + bytes(12),
        b"\x00\x00\x01\x00\x01\x00" + bytes(64),
    ],
)
def test_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(MediaTypeError, match="JPEG, PNG") as caught:
        decode_image(data)
    assert caught.value.status == 415


def test_library_texts_stay_inside() -> None:
    for data in (encode(picture(), "PNG")[:-30], b"\x89PNG\r\n\x1a\n" + bytes(40)):
        with pytest.raises(MediaError) as caught:
            decode_image(data)
        for leak in ("0x", "BytesIO", "truncated (", "PngImage", "object at", "/"):
            assert leak not in str(caught.value)
        assert caught.value.__cause__ is None


def test_encoded_bytes_are_bounded() -> None:
    data = encode(picture(), "PNG")
    with pytest.raises(MediaTooLargeError, match="max_image_bytes"):
        decode_image(data, MediaLimits(max_image_bytes=len(data) - 1))
    assert decode_image(data, MediaLimits(max_image_bytes=len(data))).size == (WIDTH, HEIGHT)


def test_decoding_is_independent_of_what_is_left_in_memory() -> None:
    """Two decodings of one file give one result, in separate memory."""
    data = encode(picture(), "JPEG")
    first, second = decode_image(data), decode_image(data)
    assert np.array_equal(pixels(first), pixels(second))
    first.putpixel((0, 0), (1, 2, 3))
    assert not np.array_equal(pixels(first), pixels(second))

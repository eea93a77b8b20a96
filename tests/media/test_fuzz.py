"""Damaged media of every kind: each either decodes to a legal canonical object or is a MediaError, in bounded time."""

import re
import time
from collections.abc import Callable, Iterator

import numpy as np
import PIL.Image
import pytest

from sensorium.errors import MediaError
from sensorium.media import (
    AudioClip,
    MediaLimits,
    VideoFrames,
    VideoSampling,
    decode_audio,
    decode_image,
    decode_video,
)
from sensorium.media.audio import MAX_AMPLITUDE
from sensorium.media.encode import encode_image
from tests.media.samples import clip, fragment, mp4_with_tables, numbered_frames, sample_tables, sound

# Pillow and numpy warn about some of these; in production that is a log line, here it would be an error.
pytestmark = pytest.mark.filterwarnings("ignore")

NUM_DAMAGED = 60
SLOWEST_S = 5.0
LIMITS = MediaLimits(
    max_image_pixels=1_000_000,
    max_video_frames=100,
    max_video_decoded_frames=1_000,
    max_video_frame_pixels=1_000_000,
    max_video_pixels=10_000_000,
    max_audio_decoded_bytes=10_000_000,
    max_decode_s=3.0,
)


def damaged(data: bytes, seed: int) -> Iterator[bytes]:
    """Truncations, flipped bits, overwritten headers, runs cut out, doubled or replaced."""
    rng = np.random.default_rng(seed)
    extremes = [0, 1, 0x7F, 0x80, 0xFF]
    for _ in range(NUM_DAMAGED):
        copy = bytearray(data)
        start, length = int(rng.integers(len(copy))), int(rng.integers(1, 64))
        kind = rng.integers(7)
        if kind == 0:
            copy = copy[:start]
        elif kind == 1:
            for at in rng.integers(0, len(copy), rng.integers(1, 20)):
                copy[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:  # headers and tables stand at the ends
            for at in rng.integers(0, min(200, len(copy)), 4):
                copy[at] = extremes[rng.integers(5)]
        elif kind == 3:
            for at in rng.integers(max(0, len(copy) - 800), len(copy), 6):
                copy[at] = extremes[rng.integers(5)]
        elif kind == 4:
            del copy[start : start + length]
        elif kind == 5:
            copy[start:start] = copy[start : start + length]
        else:
            copy[start : start + length] = rng.bytes(min(length, len(copy) - start))
        yield bytes(copy)


def image_files() -> dict[str, bytes]:
    picture = PIL.Image.fromarray(numbered_frames(40)[39])
    alpha = picture.convert("RGBA")
    alpha.putalpha(100)
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    PIL.Image.init()
    avif = {"avif": encode_image(picture, "AVIF")} if "AVIF" in PIL.Image.SAVE else {}  # newer Pillow only
    return {
        "png": encode_image(picture),
        "png palette": encode_image(picture.convert("P"), "PNG", transparency=3),
        "png 16 bit": encode_image(PIL.Image.fromarray(np.arange(3072, dtype=np.uint16).reshape(48, 64) * 20)),
        "png alpha": encode_image(alpha),
        "jpeg": encode_image(picture, "JPEG", exif=exif),
        "jpeg progressive": encode_image(picture, "JPEG", progressive=True),
        "jpeg cmyk": encode_image(picture.convert("CMYK"), "JPEG"),
        "webp": encode_image(picture, "WEBP"),
        "webp animated": encode_image(picture, "WEBP", save_all=True, append_images=[alpha, picture]),
        "gif": encode_image(picture, "GIF"),
        "gif animated": encode_image(picture, "GIF", save_all=True, append_images=[picture.rotate(90)]),
        "bmp": encode_image(picture, "BMP"),
        "tiff": encode_image(picture, "TIFF", compression="tiff_lzw"),
        "tiff deflate": encode_image(picture, "TIFF", compression="tiff_deflate", exif=exif),
        "jpeg2000": encode_image(picture, "JPEG2000"),
        **avif,
    }


IMAGES = image_files()
SOUNDS = ["wav", "flac", "mp3", "ogg", "m4a", "webm"]
CLIPS = ["mp4", "mov", "mkv", "webm", "avi", "gif"]


def assert_bounded(decode: Callable[[], None]) -> bool:
    """Run one decoding; whether it succeeded."""
    start = time.process_time()
    refusal = None
    try:
        decode()
    except MediaError as error:
        refusal = str(error)
    assert time.process_time() - start < SLOWEST_S
    assert refusal is None or not re.search(r"Errno|0x|[/\\<>]", refusal)
    return refusal is None


def check_image(data: bytes) -> None:
    image = decode_image(data, LIMITS)
    assert image.mode == "RGB"
    assert 1 <= image.width * image.height <= LIMITS.max_image_pixels
    assert np.asarray(image).shape == (image.height, image.width, 3)


def check_audio(data: bytes) -> None:
    sound = decode_audio(data, LIMITS)
    assert isinstance(sound, AudioClip)
    assert sound.samples.ndim == 1
    assert 0 < sound.samples.nbytes <= LIMITS.max_audio_decoded_bytes
    assert sound.samples.dtype == np.float32
    assert np.abs(sound.samples).max() <= MAX_AMPLITUDE


def check_video(data: bytes) -> None:
    for sampler in (VideoSampling(num_frames=5), VideoSampling(fps=2)):
        clip = decode_video(data, LIMITS, sampler)
        assert isinstance(clip, VideoFrames)
        num_frames, height, width, channels = clip.frames.shape
        assert (channels, clip.frames.dtype) == (3, np.uint8)
        assert 1 <= num_frames <= LIMITS.max_video_frames
        assert clip.frames.size <= 3 * LIMITS.max_video_pixels
        metadata = clip.metadata
        assert (metadata.height, metadata.width, len(metadata.frames_indices)) == (height, width, num_frames)
        assert max(metadata.frames_indices) < metadata.total_num_frames
        assert metadata.fps is None or metadata.fps > 0


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    assert assert_bounded(lambda: check_image(IMAGES[name])) is ("animated" not in name)
    outcomes = [assert_bounded(lambda data=data: check_image(data)) for data in damaged(IMAGES[name], 1)]  # type: ignore[misc]
    assert not all(outcomes)


@pytest.mark.parametrize("format", SOUNDS)
def test_sounds(format: str) -> None:
    whole = sound(format, 0.3)
    assert assert_bounded(lambda: check_audio(whole))
    outcomes = [assert_bounded(lambda data=data: check_audio(data)) for data in damaged(whole, 2)]  # type: ignore[misc]
    assert not all(outcomes)


@pytest.mark.parametrize("format", CLIPS)
def test_clips(format: str) -> None:
    whole = clip(format, 20)
    assert assert_bounded(lambda: check_video(whole))
    outcomes = [assert_bounded(lambda data=data: check_video(data)) for data in damaged(whole, 3)]  # type: ignore[misc]
    assert not all(outcomes)


def test_hand_made_tables() -> None:
    whole = mp4_with_tables(*sample_tables(10)) + fragment(10)
    for data in damaged(whole, 4):
        assert_bounded(lambda data=data: check_video(data))  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(3))
def test_one_kind_taken_for_another(seed: int) -> None:
    """Every file through every decoder, and random bytes behind every signature."""
    rng = np.random.default_rng(seed)
    files = [*IMAGES.values(), *(sound(format, 0.3) for format in SOUNDS), *(clip(format, 20) for format in CLIPS)]
    for data in files:
        for check in (check_image, check_audio, check_video):
            noise = data[: int(rng.integers(4, 40))] + rng.bytes(300)
            assert_bounded(lambda check=check, noise=noise: check(noise))  # type: ignore[misc]
            if seed == 0:
                assert_bounded(lambda check=check, data=data: check(data))  # type: ignore[misc]

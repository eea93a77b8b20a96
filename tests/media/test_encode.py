"""Encoding for clients comes back through the decoders."""

import numpy as np
import PIL.Image
import pytest

from sensorium.errors import InvalidRequestError
from sensorium.media import MediaLimits, MediaLoader, decode_audio, decode_video
from sensorium.media.encode import (
    audio_to_data_url,
    encode_audio,
    encode_video,
    frames_to_jpeg_data_url,
    image_to_data_url,
    video_to_data_url,
)
from tests.media.samples import numbered_frames, tone


def test_images() -> None:
    image = PIL.Image.fromarray(numbered_frames(1)[0])
    assert image_to_data_url(image).startswith("data:image/png;base64,")
    assert MediaLoader().load_image(image_to_data_url(image)).tobytes() == image.tobytes()
    assert image_to_data_url(image, "JPEG", quality=50).startswith("data:image/jpeg;base64,")


@pytest.mark.parametrize("format", ["wav", "flac"])
def test_lossless_sounds(format: str) -> None:
    samples = tone(0.3, 22_050)
    assert np.abs(decode_audio(encode_audio(samples, 22_050, format)).samples - samples).max() < 1e-4
    stereo = np.stack([samples, -samples])
    assert np.abs(decode_audio(encode_audio(stereo, 22_050, format)).samples).max() == 0.0
    loud = decode_audio(encode_audio(samples * 10, 22_050, format)).samples
    assert np.abs(loud).max() <= 1.0


@pytest.mark.parametrize("format", ["mp4", "mov", "mkv", "webm", "avi", "gif"])
@pytest.mark.parametrize("size", [(48, 64), (47, 63), (16, 16)])
def test_clips_of_any_size(format: str, size: tuple[int, int]) -> None:
    frames = numbered_frames(5, *size)
    decoded = decode_video(encode_video(frames, 12.5, format))
    assert decoded.frames.shape == frames.shape
    assert decoded.metadata.fps == pytest.approx(12.5, rel=0.01)


def test_data_urls_name_their_type() -> None:
    assert audio_to_data_url(tone(0.1, 8_000), 8_000, "flac").startswith("data:audio/flac;base64,")
    assert video_to_data_url(numbered_frames(2), 5, "webm").startswith("data:video/webm;base64,")
    url = frames_to_jpeg_data_url(numbered_frames(3), fps=2)
    assert url.startswith("data:video/jpeg;fps=2;base64,")
    clip = MediaLoader(MediaLimits()).load_video(url)
    assert clip.metadata.fps == 2.0
    assert clip.frames.shape == (3, 48, 64, 3)


def test_wrong_arguments() -> None:
    with pytest.raises(InvalidRequestError, match="image format"):
        image_to_data_url(PIL.Image.new("RGB", (1, 1)), "xyz")
    with pytest.raises(InvalidRequestError, match="audio format"):
        encode_audio(tone(0.1, 8_000), 8_000, "xyz")
    with pytest.raises(InvalidRequestError, match="video format"):
        encode_video(numbered_frames(2), 5, "xyz")
    for samples in (np.zeros(0), np.zeros((3, 10)), np.zeros((1, 2, 3))):
        with pytest.raises(InvalidRequestError, match="shape"):
            encode_audio(samples, 8_000)
    for frames in (np.zeros((0, 4, 4, 3), np.uint8), np.zeros((2, 4, 4), np.uint8), np.zeros((2, 4, 4, 3))):
        with pytest.raises(InvalidRequestError, match="shape"):
            encode_video(frames)  # type: ignore[arg-type]

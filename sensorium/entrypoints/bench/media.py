"""Random pictures, clips and sounds: seeded, one item for each number, and as large as photographs when encoded.

Plain noise would be several times as large as a photograph in JPEG or PNG, and as much slower to decode. So pixels are
enlarged noise of low resolution.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_GRAIN = 8
"""Pixels between two independent values."""


@dataclass(frozen=True, slots=True)
class Media:
    """An encoded item."""

    modality: str
    data: bytes
    media_type: str


def image(seed: int, number: int, width: int, height: int, format: str) -> Media:
    """A picture; `format` is "jpeg" or "png"."""
    from sensorium.media.encode import encode_image

    picture = _picture(_rng("image", seed, number), width, height)
    return Media("image", encode_image(picture, format.upper()), f"image/{format}")


def clip(seed: int, number: int, width: int, height: int, num_frames: int) -> Media:
    """A clip in MP4: a window that moves over a larger picture."""
    from sensorium.media.encode import encode_video

    large = np.asarray(_picture(_rng("video", seed, number), width + num_frames, height))
    frames = np.stack([large[:, shift : shift + width] for shift in range(num_frames)])
    return Media("video", encode_video(frames), "video/mp4")


def sound(seed: int, number: int, seconds: float, sampling_rate: int = 16_000) -> Media:
    """A sound in WAV: a few tones that come and go."""
    from sensorium.media.encode import encode_audio

    rng = _rng("audio", seed, number)
    time_s = np.arange(max(1, round(seconds * sampling_rate)), dtype=np.float32) / sampling_rate
    tones = [np.sin(2 * np.pi * rng.uniform(100, 3000) * time_s + rng.uniform(0, 6)) for _ in range(4)]
    loudness = np.sin(2 * np.pi * rng.uniform(0.5, 3) * time_s) ** 2
    return Media("audio", encode_audio(0.2 * loudness * np.sum(tones, axis=0), sampling_rate), "audio/wav")


def _rng(kind: str, seed: int, number: int) -> np.random.Generator:
    return np.random.default_rng([seed % 2**63, number, *kind.encode()])


def _picture(rng: np.random.Generator, width: int, height: int) -> Any:
    import PIL.Image

    shape = (height // _GRAIN + 2, width // _GRAIN + 2, 3)
    coarse: NDArray[np.uint8] = rng.integers(0, 256, shape, dtype=np.uint8)
    return PIL.Image.fromarray(coarse).resize((width, height), PIL.Image.Resampling.BICUBIC)

"""Greedy requests with text, pictures, clips and sounds, whose answers can be compared between runs."""

from __future__ import annotations

import json
from functools import cache, lru_cache
from typing import Any

import numpy as np
from PIL import Image

from sensorium.media.encode import audio_to_data_url, image_to_data_url, video_to_data_url

SAMPLING_RATE = 16_000


def chat(*parts: dict[str, Any], max_tokens: int = 8) -> bytes:
    """A body for `/v1/chat/completions`."""
    messages = [{"role": "user", "content": list(parts)}]
    return json.dumps({"messages": messages, "temperature": 0, "max_tokens": max_tokens}).encode()


def text(content: str) -> dict[str, Any]:
    """A part of text."""
    return {"type": "text", "text": content}


def picture(seed: int) -> Image.Image:
    """A small picture, a different one for each seed."""
    rng = np.random.default_rng(seed)
    tiles = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles.repeat(12, axis=0).repeat(12, axis=1))


def clip(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Eight frames `(8, 64, 64, 3)`."""
    tiles = np.random.default_rng(seed).integers(0, 256, (8, 4, 4, 3), dtype=np.uint8)
    return tiles.repeat(16, axis=1).repeat(16, axis=2)


def sound(seed: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Half a second of a tone."""
    time_s = np.arange(SAMPLING_RATE // 2) / SAMPLING_RATE
    return (0.3 * np.sin(2 * np.pi * (200 + 40 * seed) * time_s)).astype(np.float32)


def image_request(seed: int, max_tokens: int = 4) -> bytes:
    """A question about a picture."""
    url = image_to_data_url(picture(seed), "PNG", compress_level=1)
    return chat({"type": "image_url", "image_url": {"url": url}}, text("What is in the image?"), max_tokens=max_tokens)


@lru_cache(maxsize=64)
def _clip_url(seed: int) -> str:
    return video_to_data_url(clip(seed), 4.0)


@cache
def good_requests() -> tuple[bytes, ...]:
    """Sixteen requests, two thirds of them with media."""
    bodies = []
    for seed in range(4):
        bodies += [
            chat(text(f"How many shapes are there? {seed}")),
            image_request(seed, 8),
            chat({"type": "video_url", "video_url": {"url": _clip_url(seed)}}, text("What moves?")),
            chat(
                {"type": "audio_url", "audio_url": {"url": audio_to_data_url(sound(seed), SAMPLING_RATE)}},
                text("What kind of sound is this?"),
            ),
        ]
    return tuple(bodies)

"""Painting with Pillow: shapes, backgrounds and noise. All functions are pure in their random source."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from training.catalog import COLOR_JITTER, COLORS
from training.dialogue import Pixels

RGB = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape on the canvas: centre and radius in pixels, angle in radians, the exact colour that is painted."""

    kind: str
    color: str
    x: float
    y: float
    radius: float
    angle: float = 0.0
    rgb: RGB = (0, 0, 0)
    outline: bool = False

    @property
    def name(self) -> str:
        """``red circle``."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True, slots=True)
class Backdrop:
    """A background colour with the colours that can be told from it."""

    rgb: RGB
    colors: tuple[str, ...]


def sample_backdrop(rng: random.Random) -> Backdrop:
    """A light, tinted, mid-gray or dark background."""
    style = rng.random()
    if style < 0.55:
        level = rng.randint(225, 255) if rng.random() < 0.7 else 255
        rgb, hidden = (level, level, level), {"white"}
    elif style < 0.7:
        base = rng.randint(218, 240)
        tint = rng.choice(((-16, 0, 14), (-14, 10, -8), (8, 6, -14)))
        rgb, hidden = (base + tint[0], base + tint[1], base + tint[2]), {"white"}
    elif style < 0.85:
        level = rng.randint(0, 40)
        rgb, hidden = (level, level, min(level + rng.randint(0, 18), 255)), {"black", "brown"}
    else:
        level = rng.randint(115, 165)
        rgb, hidden = (level, level, level), {"purple", "brown"}
    return Backdrop(rgb, tuple(color for color in COLORS if color not in hidden))


def sample_rgb(rng: random.Random, color: str) -> RGB:
    """One of the colour's anchors with jitter."""
    anchor = rng.choice(COLORS[color])
    jitter = COLOR_JITTER if rng.random() < 0.7 else 0
    red, green, blue = (max(0, min(255, value + rng.randint(-jitter, jitter))) for value in anchor)
    return red, green, blue


def sample_angle(rng: random.Random, kind: str) -> float:
    """A rotation that leaves the kind recognisable (a square turned by 45 degrees would be a diamond)."""
    limit = {"square": 0.16, "diamond": 0.12, "cross": 0.25, "triangle": 0.3, "star": 0.6}.get(kind, 0.0)
    return rng.uniform(-limit, limit) if rng.random() < 0.6 else 0.0


def draw_shape(draw: ImageDraw.ImageDraw, shape: Shape, background: RGB, scale: float = 1.0) -> None:
    """Paint one shape, its coordinates multiplied by ``scale``."""
    x, y, radius = shape.x * scale, shape.y * scale, shape.radius * scale
    edge = _darker(shape.rgb) if shape.outline else None
    if shape.kind in ("circle", "ring"):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=shape.rgb, outline=edge)
        if shape.kind == "ring":
            hole = radius * 0.56
            draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background, outline=edge)
        return
    cos, sin = math.cos(shape.angle) * radius, math.sin(shape.angle) * radius
    corners = [(x + u * cos - v * sin, y + u * sin + v * cos) for u, v in _corners(shape.kind)]
    draw.polygon(corners, fill=shape.rgb, outline=edge)


def paint(size: tuple[int, int], background: RGB, shapes: tuple[Shape, ...], supersample: int = 2) -> Image.Image:
    """Shapes on a background; ``size`` is (width, height) and ``supersample`` smooths the edges."""
    width, height = size
    canvas = Image.new("RGB", (width * supersample, height * supersample), background)
    draw = ImageDraw.Draw(canvas)
    for shape in shapes:
        draw_shape(draw, shape, background, supersample)
    return canvas if supersample == 1 else canvas.reduce(supersample)


def finish(rng: random.Random, image: Image.Image) -> Pixels:
    """Blur and noise, each with some chance, as an array ``(height, width, 3)``."""
    if rng.random() < 0.12:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 0.8)))
    pixels = np.asarray(image)
    return add_noise(rng, pixels) if rng.random() < 0.4 else pixels


def add_noise(rng: random.Random, pixels: Pixels) -> Pixels:
    """Gaussian noise with a standard deviation of up to 10 levels, taken from a table at a random offset."""
    table = _noise_table()
    start = rng.randrange(len(table) - pixels.size)
    noise = table[start : start + pixels.size].reshape(pixels.shape)
    amplitude = rng.randint(1, 10)
    noisy = pixels.astype(np.int16) + ((noise * amplitude) >> 5)
    return np.clip(noisy, 0, 255).astype(np.uint8)


@cache
def _noise_table() -> np.ndarray[tuple[int], np.dtype[np.int16]]:
    """Normal deviates in units of 1/32: drawing them anew for each image would cost more than the image."""
    return np.round(np.random.default_rng(0).standard_normal(1 << 21) * 32).astype(np.int16)


@cache
def _corners(kind: str) -> tuple[tuple[float, float], ...]:
    """Corners of a shape of radius 1 around the origin, y pointing down."""
    match kind:
        case "square":
            return ((-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8))
        case "diamond":
            return ((0.0, -1.0), (0.72, 0.0), (0.0, 1.0), (-0.72, 0.0))
        case "triangle":
            return ((0.0, -1.0), (0.94, 0.75), (-0.94, 0.75))
        case "cross":
            a, b = 0.32, 0.95
            return (
                *((-a, -b), (a, -b), (a, -a), (b, -a), (b, a), (a, a)),
                *((a, b), (-a, b), (-a, a), (-b, a), (-b, -a), (-a, -a)),
            )
        case "star":
            spokes = [(1.0 if index % 2 == 0 else 0.42, math.pi * index / 5) for index in range(10)]
            return tuple((length * math.sin(turn), -length * math.cos(turn)) for length, turn in spokes)
    raise ValueError(f"kind of polygon: got {kind!r}, expected one of the catalog's KINDS with straight edges.")


def _darker(rgb: RGB) -> RGB:
    return rgb[0] // 2, rgb[1] // 2, rgb[2] // 2

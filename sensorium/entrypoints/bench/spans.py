"""Small values of a workload, as people write them on the command line."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from sensorium.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Span:
    """Whole numbers from `low` to `high`, all equally likely. Written "64" or "32-128"."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str) -> Span:
        """Raises `ConfigError`."""
        found = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", text.strip())
        low, high = (int(found[1]), int(found[2] or found[1])) if found else (1, 0)
        if low > high:
            raise ConfigError(f"span: got {text!r}, expected a number or two such as '32-128'. Correct it.")
        return cls(low, high)

    def draw(self, rng: np.random.Generator) -> int:
        """One of the numbers."""
        return int(rng.integers(self.low, self.high + 1))

    def __str__(self) -> str:
        return str(self.low) if self.low == self.high else f"{self.low}-{self.high}"


@dataclass(frozen=True, slots=True)
class Size:
    """A picture's width and height in pixels, and its share beside others. Written "640x480" or "640x480:3"."""

    width: int
    height: int
    weight: float = 1.0

    @classmethod
    def parse(cls, text: str) -> Size:
        """Raises `ConfigError`."""
        found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})(?::(\d+(?:\.\d+)?))?", text.strip())
        weight = float(found[3] or 1) if found else 0.0
        if not found or weight <= 0:
            raise ConfigError(
                f"size: got {text!r}, expected such as '640x480', or '640x480:3' with a weight. Correct it."
            )
        return cls(int(found[1]), int(found[2]), weight)

    def __str__(self) -> str:
        return f"{self.width}x{self.height}" + ("" if self.weight == 1 else f":{self.weight:g}")


@dataclass(frozen=True, slots=True)
class Target:
    """A bound on one of a request's times. Written "ttft:500", in milliseconds."""

    name: str
    most_ms: float

    @classmethod
    def parse(cls, text: str) -> Target:
        """Raises `ConfigError`."""
        found = re.fullmatch(r"(ttft|tpot|itl|e2e):(\d+(?:\.\d+)?)", text.strip())
        if not found:
            raise ConfigError(
                f"goodput: got {text!r}, expected ttft, tpot, itl or e2e and milliseconds, as 'ttft:500'."
            )
        return cls(found[1], float(found[2]))

    def __str__(self) -> str:
        return f"{self.name}:{self.most_ms:g}"

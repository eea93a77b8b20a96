"""The closed world that the demo model knows: colours, kinds of shapes, places, directions and spoken words."""

from __future__ import annotations

# Each colour is a set of sRGB anchors; a drawn colour is an anchor plus a small jitter. The anchors hold the pure
# colours of the web palette and matplotlib's default cycle, which are what people draw with.
COLORS: dict[str, tuple[tuple[int, int, int], ...]] = {
    "red": ((255, 0, 0), (220, 20, 30), (214, 39, 40), (190, 20, 20)),
    "orange": ((255, 140, 0), (255, 165, 0), (255, 127, 14), (240, 120, 20)),
    "yellow": ((255, 255, 0), (250, 215, 10), (255, 230, 60), (240, 220, 30)),
    "green": ((0, 128, 0), (0, 200, 0), (44, 160, 44), (0, 255, 0), (40, 180, 90)),
    "blue": ((0, 0, 255), (30, 80, 220), (31, 119, 180), (30, 144, 255), (20, 40, 170)),
    "purple": ((128, 0, 128), (130, 40, 200), (148, 103, 189), (150, 50, 170)),
    "pink": ((255, 105, 180), (255, 150, 200), (255, 182, 203), (227, 119, 194), (255, 60, 160)),
    "brown": ((139, 69, 19), (120, 70, 30), (110, 60, 40), (150, 85, 40)),
    "black": ((0, 0, 0), (22, 22, 22), (30, 30, 34)),
    "white": ((255, 255, 255), (245, 245, 245), (250, 250, 240)),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
COLOR_JITTER = 10

KINDS: tuple[str, ...] = ("circle", "square", "triangle", "star", "diamond", "cross", "ring")

# Places on a 3 x 3 grid, row by row; each completes the sentence "It is ...".
PLACES: tuple[str, ...] = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the center",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)

# Directions of motion: words after "moves", and the unit step (x right, y down).
DIRECTIONS: dict[str, tuple[int, int]] = {
    "to the left": (-1, 0),
    "to the right": (1, 0),
    "up": (0, -1),
    "down": (0, 1),
    "up and to the left": (-1, -1),
    "up and to the right": (1, -1),
    "down and to the left": (-1, 1),
    "down and to the right": (1, 1),
}

DIGITS: tuple[str, ...] = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

SPOKEN_WORDS: tuple[str, ...] = (
    *("yes", "no", "stop", "go", "left", "right", "up", "down", "on", "off", "open", "close", "start", "end"),
    *("hello", "goodbye", "red", "green", "blue", "yellow", "black", "white", "apple", "banana", "cat", "dog"),
    *("house", "car", "water", "music", "light", "door"),
)

# What is asked for and never there.
STRANGERS: tuple[str, ...] = (
    *("dog", "cat", "person", "car", "tree", "bird", "house", "boat", "phone", "flower", "horse", "child"),
)


def plural(kind: str) -> str:
    """The plural of a noun of this world: ``cross`` becomes ``crosses``."""
    return kind + ("es" if kind.endswith("s") else "s")


def counted(count: int, noun: str) -> str:
    """``1 red circle``, ``3 red circles``; ``no red circles`` for zero."""
    if count == 0:
        return f"no {plural(noun)}"
    return f"{count} {noun if count == 1 else plural(noun)}"


def with_article(noun: str) -> str:
    """``a red circle``, ``an orange star``."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listed(parts: list[str]) -> str:
    """``a``; ``a and b``; ``a, b and c``."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]

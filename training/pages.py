"""Printed text: one line in some font, size, slant and colour, and questions that need it read."""

from __future__ import annotations

import json
import math
import random
import string
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from PIL import Image, ImageDraw

from training.catalog import COLOR_NAMES, COLORS, KINDS, SPOKEN_WORDS, STRANGERS
from training.dialogue import Pixels, Turn
from training.drawing import RGB, finish, sample_backdrop, sample_rgb
from training.fonts import font_paths, load_font

# Letters whose lower case is not just the upper case made smaller: a text in one case holds at least one of them.
_CLEAR_CASE = set("abdefghijklmnqrtyABDEFGHIJLMNQRTY")
# Codes mix letters and digits, so they leave out what many fonts draw alike.
_CODE_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZ"
_MAX_LENGTH = 8
_MIN_FONT_SIZE = 15


@dataclass(frozen=True, slots=True)
class Page:
    """One printed line. ``slant`` is the shear of an oblique cut, ``tilt`` the turn of the line in degrees."""

    width: int
    height: int
    text: str
    color: str
    rgb: RGB
    background: RGB
    font_index: int
    split: str
    slant: float
    tilt: float
    fill: float

    @property
    def is_number(self) -> bool:
        """Whether the text is made of digits alone."""
        return self.text.isdigit()

    def render(self, rng: random.Random) -> Pixels:
        """The page as pixels ``(height, width, 3)``: the largest size that fits, times ``fill``, at a random spot."""
        path = font_paths(self.split)[self.font_index % len(font_paths(self.split))]
        limit = self.height * 0.8
        probe = load_font(path, 32).getbbox(self.text)
        reach = (probe[2] - probe[0]) + abs(self.slant) * 32 + abs(math.sin(math.radians(self.tilt))) * 32
        size = int(min(limit, 32 * self.width * 0.92 / max(reach, 1.0)) * self.fill)
        ink = self._ink(load_font(path, max(size, _MIN_FONT_SIZE)))
        canvas = Image.new("RGB", (self.width, self.height), self.background)
        left = rng.randint(min(0, self.width - ink.width), max(0, self.width - ink.width))
        top = rng.randint(min(0, self.height - ink.height), max(0, self.height - ink.height))
        canvas.paste(self.rgb, (left, top), ink)
        return finish(rng, canvas)

    def _ink(self, font: object) -> Image.Image:
        """The line's coverage as a tight gray image, sheared and turned."""
        left, top, right, bottom = (int(edge) for edge in font.getbbox(self.text))  # type: ignore[attr-defined]
        width, height = right - left + 4, bottom - top + 4
        ink = Image.new("L", (width, height), 0)
        ImageDraw.Draw(ink).text((2 - left, 2 - top), self.text, fill=255, font=font)  # type: ignore[arg-type]
        if self.slant:
            extra = math.ceil(abs(self.slant) * height)
            shift = -extra if self.slant > 0 else 0
            matrix = (1, self.slant, shift, 0, 1, 0)
            ink = ink.transform((width + extra, height), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)
        if self.tilt:
            ink = ink.rotate(self.tilt, Image.Resampling.BILINEAR, expand=True)
        return ink


def sample_page(rng: random.Random, width: int, height: int, split: str, max_length: int = _MAX_LENGTH) -> Page:
    """A page whose text fits at a readable size."""
    backdrop = sample_backdrop(rng)
    readable = [color for color in backdrop.colors if _contrast(color, backdrop.rgb)]
    color = rng.choice(readable)
    slanted, tilted = rng.random() < 0.3, rng.random() < 0.3
    return Page(
        width=width,
        height=height,
        text=sample_text(rng, min(max_length, width // 16)),
        color=color,
        rgb=sample_rgb(rng, color),
        background=backdrop.rgb,
        font_index=rng.randrange(len(font_paths(split))),
        split=split,
        slant=rng.uniform(-0.25, 0.35) if slanted else 0.0,
        tilt=rng.uniform(-10, 10) if tilted else 0.0,
        fill=rng.uniform(0.55, 1.0),
    )


def sample_text(rng: random.Random, max_length: int) -> str:
    """A number, a word or a code of at most ``max_length`` characters."""
    form = rng.random()
    length = rng.randint(1, max_length)
    if form < 0.35:
        return "".join(rng.choices(string.digits, k=min(length, 6)))
    if form < 0.42:
        return rng.choice(
            (f"{rng.randint(0, 99)}%", f"${rng.randint(0, 999)}", f"{rng.randint(0, 99)}.{rng.randint(0, 9)}")
        )
    if form < 0.52:
        return "".join(rng.choices(_CODE_LETTERS + "23456789", k=max(length, 2)))
    words = [word for word in _printed_words() if len(word) <= max_length]
    word = rng.choice(words) if form < 0.7 and words else _random_word(rng, max(length, 2))
    return rng.choice((word.upper(), word.lower(), word.capitalize()))


def _random_word(rng: random.Random, length: int) -> str:
    """Letters that may or may not be pronounceable, with a case that can be seen."""
    while True:
        if rng.random() < 0.5:
            word = "".join(rng.choices(string.ascii_lowercase, k=length))
        else:
            word = "".join(rng.choice("aeiou" if index % 2 else "bcdfghjklmnprstvwz") for index in range(length))
        if len(set(word[1:]) & _CLEAR_CASE) > 0 and not set(word) <= set("il"):
            return word


@cache
def _printed_words() -> tuple[str, ...]:
    return tuple(sorted({*COLOR_NAMES, *KINDS, *SPOKEN_WORDS, *STRANGERS, "exit", "sale", "open", "menu", "push"}))


def _contrast(color: str, background: RGB) -> bool:
    """Whether text of this colour stands out: every anchor differs from the background in luma by a fifth."""
    return all(abs(_luma(anchor) - _luma(background)) > 50 for anchor in COLORS[color])


def _luma(rgb: RGB) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def ask_text(page: Page, rng: random.Random) -> Turn | None:
    """What the page says."""
    question = rng.choice(("What does the text say?", "Read the text.", "What is written here?", "What does it say?"))
    return Turn("reading", question, f'It says "{page.text}".')


def ask_number(page: Page, rng: random.Random) -> Turn | None:
    """The number on the page, or that there is none."""
    question = rng.choice(("What number is this?", "Read the number.", "Which number do you see?"))
    if not page.is_number:
        if any(character.isdigit() for character in page.text):
            return None
        return Turn("absent", question, "I can't tell: there is no number.")
    return Turn("reading", question, f"The number is {page.text}.")


def ask_text_color(page: Page, rng: random.Random) -> Turn | None:
    """The colour of the ink."""
    return Turn("scene", "What color is the text?", f"The text is {page.color}.")


def ask_shapes_on_page(page: Page, rng: random.Random) -> Turn | None:
    """Something that a page of text does not hold."""
    kind = rng.choice((*KINDS, *STRANGERS))
    return Turn("absent", f"What color is the {kind}?", f"I can't tell: there is no {kind}.")


def ask_text_json(page: Page, rng: random.Random) -> Turn | None:
    """The text as JSON."""
    return Turn("json", "What does the text say? Answer in JSON.", json.dumps({"text": page.text}))


PAGE_ASKERS: tuple[tuple[Callable[[Page, random.Random], Turn | None], float], ...] = (
    (ask_text, 4.0),
    (ask_number, 1.2),
    (ask_text_color, 0.4),
    (ask_shapes_on_page, 0.2),
    (ask_text_json, 0.6),
)

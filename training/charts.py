"""Bar charts: two to five bars with letters below, a scale on the left, and questions about values."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from training.dialogue import Pixels, Turn
from training.drawing import RGB, add_noise, sample_rgb
from training.fonts import font_paths, load_font

_BAR_COLORS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown")
_LABELS = "ABCDEFGH"
# Axis maximum: (distance between tick labels, distance between possible values).
_SCALES = {10: (2, 1), 20: (5, 1), 50: (10, 5), 100: (20, 10)}


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars from left to right: labels, values and colours have the same length."""

    width: int
    height: int
    labels: str
    values: tuple[int, ...]
    colors: tuple[str, ...]
    rgbs: tuple[RGB, ...]
    top: int
    background: RGB
    has_grid: bool
    font_index: int
    split: str

    def render(self, rng: random.Random) -> Pixels:
        """The chart as pixels ``(height, width, 3)``."""
        canvas = Image.new("RGB", (self.width, self.height), self.background)
        draw = ImageDraw.Draw(canvas)
        fonts = font_paths(self.split)
        font = load_font(fonts[self.font_index % len(fonts)], 12)
        left, right, upper, lower = 28, self.width - 6, 10, self.height - 20
        unit = (lower - upper) / self.top
        ink = (40, 40, 40)
        for tick in range(0, self.top + 1, _SCALES[self.top][0]):
            y = lower - tick * unit
            if self.has_grid:
                draw.line((left, y, right, y), fill=(205, 205, 205))
            draw.line((left - 3, y, left, y), fill=ink)
            draw.text((left - 5, y), str(tick), fill=ink, font=font, anchor="rm")
        pitch = (right - left) / len(self.values)
        for index, value in enumerate(self.values):
            middle = left + (index + 0.5) * pitch
            half = min(pitch * 0.33, 16)
            box = (middle - half, lower - value * unit, middle + half, lower)
            draw.rectangle(box, fill=self.rgbs[index])
            draw.text((middle, lower + 3), self.labels[index], fill=ink, font=font, anchor="mt")
        draw.line((left, upper, left, lower, right, lower), fill=ink)
        pixels = Image.fromarray(add_noise(rng, _pixels(canvas))) if rng.random() < 0.2 else canvas
        return _pixels(pixels)


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image)


def sample_chart(rng: random.Random, width: int, height: int, split: str) -> Chart:
    """A chart with different values, letters in order, and one colour or one per bar."""
    count = rng.randint(2, 5)
    top = rng.choice((10, 10, 10, 20, 50, 100))
    step = _SCALES[top][1]
    values = rng.sample(range(step, top + 1, step), count)
    start = rng.choice((0, 0, 0, rng.randint(0, len(_LABELS) - count)))
    colors = rng.sample(_BAR_COLORS, count) if rng.random() < 0.7 else [rng.choice(_BAR_COLORS)] * count
    level = rng.choice((255, 255, rng.randint(232, 255)))
    return Chart(
        width=width,
        height=height,
        labels=_LABELS[start : start + count],
        values=tuple(values),
        colors=tuple(colors),
        rgbs=tuple(sample_rgb(rng, color) for color in colors),
        top=top,
        background=(level, level, level),
        has_grid=rng.random() < 0.6,
        font_index=rng.randrange(len(font_paths(split))),
        split=split,
    )


def ask_value(chart: Chart, rng: random.Random) -> Turn | None:
    """The value of a bar, or that there is no such bar."""
    label = rng.choice(chart.labels) if rng.random() < 0.9 else rng.choice(_LABELS)
    question = rng.choice(
        (f"What is the value of bar {label}?", f"What is the value of {label}?", f"How high is bar {label}?")
    )
    if label not in chart.labels:
        return Turn("absent", question, f"I can't tell: there is no bar {label}.")
    return Turn("chart", question, f"The value of {label} is {chart.values[chart.labels.index(label)]}.")


def ask_extreme(chart: Chart, rng: random.Random) -> Turn | None:
    """The highest or lowest bar."""
    word, chosen = rng.choice((("highest", max(chart.values)), ("lowest", min(chart.values))))
    label = chart.labels[chart.values.index(chosen)]
    question = rng.choice((f"Which bar is the {word}?", f"What is the {word} bar?"))
    return Turn("chart", question, f"Bar {label} is the {word}.")


def ask_higher(chart: Chart, rng: random.Random) -> Turn | None:
    """Which of two bars is higher."""
    first, second = rng.sample(range(len(chart.values)), 2)
    winner = first if chart.values[first] > chart.values[second] else second
    question = f"Which is higher, {chart.labels[first]} or {chart.labels[second]}?"
    return Turn("chart", question, f"Bar {chart.labels[winner]} is higher.")


def ask_bar_count(chart: Chart, rng: random.Random) -> Turn | None:
    """How many bars there are."""
    return Turn("counting", "How many bars are there?", f"There are {len(chart.values)} bars.")


def ask_bar_color(chart: Chart, rng: random.Random) -> Turn | None:
    """The colour of a bar."""
    index = rng.randrange(len(chart.labels))
    return Turn(
        "chart", f"What color is bar {chart.labels[index]}?", f"Bar {chart.labels[index]} is {chart.colors[index]}."
    )


def ask_description(chart: Chart, rng: random.Random) -> Turn | None:
    """What kind of picture this is."""
    question = rng.choice(("Describe the image.", "Describe the picture.", "What is in the image?", "What do you see?"))
    return Turn("chart", question, f"This is a bar chart with {len(chart.values)} bars.")


def ask_table(chart: Chart, rng: random.Random) -> Turn | None:
    """All values as JSON."""
    table = dict(zip(chart.labels, chart.values, strict=True))
    return Turn("json", "Give the values of the chart in JSON.", json.dumps(table))


CHART_ASKERS: tuple[tuple[Callable[[Chart, random.Random], Turn | None], float], ...] = (
    (ask_value, 3.0),
    (ask_extreme, 1.0),
    (ask_higher, 0.8),
    (ask_bar_count, 0.5),
    (ask_bar_color, 0.5),
    (ask_description, 0.3),
    (ask_table, 1.0),
)

"""Tests of the training package: generator, tokenizer, training network and the bundled checkpoint."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from training.catalog import DIGITS, SPOKEN_WORDS
from training.speech import SpeechBank
from training.worlds import Source


@pytest.fixture(scope="package", autouse=True)
def pillow_font() -> Iterator[None]:
    """Set texts in the font that Pillow carries, which is no training font and needs no installation.

    For whatever makes items, in fixtures of any scope: those of a module once looked for the machine's fonts.
    """

    def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font

    with pytest.MonkeyPatch.context() as patch:
        for module in ("training.pages", "training.charts"):
            patch.setattr(f"{module}.font_paths", lambda split: (Path("Aileron.ttf"),))
            patch.setattr(f"{module}.load_font", load_font)
        yield


@pytest.fixture(scope="session")
def source() -> Source:
    """Held-out items; words are spoken by noise of a length of their own, since no synthesiser is needed here."""
    rng = np.random.default_rng(0)
    lengths = {word: 4000 + 200 * index for index, word in enumerate((*DIGITS, *SPOKEN_WORDS))}
    waveforms = {word: [rng.uniform(-0.5, 0.5, length).astype(np.float32)] for word, length in lengths.items()}
    return Source("held_out", SpeechBank(waveforms, ("noise",)))


@pytest.fixture
def rng() -> random.Random:
    return random.Random(0)

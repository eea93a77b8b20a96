"""Tests of the training package: generator, tokenizer, training network and the bundled checkpoint."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
from PIL import ImageFont

from training import fonts
from training.catalog import DIGITS, SPOKEN_WORDS
from training.speech import SpeechBank
from training.worlds import Source


@pytest.fixture(autouse=True)
def pillow_font(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set texts in the font that Pillow carries, which is no training font and needs no installation."""

    def load_font(path: Path, size: int) -> ImageFont.FreeTypeFont:
        font = ImageFont.load_default(size)
        assert isinstance(font, ImageFont.FreeTypeFont)
        return font

    for module in ("training.pages", "training.charts"):
        monkeypatch.setattr(f"{module}.font_paths", lambda split: (Path("Aileron.ttf"),))
        monkeypatch.setattr(f"{module}.load_font", load_font)
    fonts.font_paths.cache_clear()


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

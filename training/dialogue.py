"""What a training or evaluation item is: media, then turns of a conversation about them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

Modality = Literal["image", "video", "audio"]
Pixels = npt.NDArray[np.uint8]
Waveform = npt.NDArray[np.float32]
# Sounds have 16 bits, as in files: a sample is a whole number of steps, of which 1.0 has so many.
FULL_SCALE = 32768


@dataclass(frozen=True, slots=True)
class Media:
    """One image ``(height, width, 3)``, clip ``(frames, height, width, 3)`` or 16 kHz waveform ``(samples,)``."""

    modality: Modality
    data: npt.NDArray[Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A question, its one right answer, and the skill that it measures."""

    skill: str
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Item:
    """Media in order, then the turns; ``question_first`` puts the first question before the media."""

    media: tuple[Media, ...]
    turns: tuple[Turn, ...]
    system: str | None = None
    question_first: bool = False

    def messages(self) -> list[dict[str, Any]]:
        """The first turn as chat messages with typed parts, media as ``{"type": modality, modality: data}``."""
        text = {"type": "text", "text": self.turns[0].question}
        parts: list[dict[str, Any]] = [{"type": item.modality, item.modality: item.data} for item in self.media]
        parts = [text, *parts] if self.question_first else [*parts, text]
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": parts}]

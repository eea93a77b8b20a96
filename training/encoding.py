"""From an item to token ids, labels and three-axis positions, in the fixed chat format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from training.blueprint import (
    FRAMES_PER_SECOND,
    MERGE_SIZE,
    PATCH_SIZE,
    POSITION_IDS_PER_SECOND,
    TEMPORAL_PATCH_SIZE,
    TOKEN_ID,
)
from training.dialogue import Item, Media

IGNORE = -100
MODEL_FOLDER = Path(__file__).parent.parent / "sensorium" / "demo_model"
_HOP = 160
_PAD = {"image": "<|IMAGE|>", "video": "<|VIDEO|>", "audio": "<|AUDIO|>"}


@dataclass(frozen=True, slots=True)
class Encoded:
    """One item for training.

    ``input_ids`` and ``labels`` have shape ``(length,)``; a label is the token itself (not shifted) where it is part of
    an answer, else ``IGNORE``. ``positions`` has shape ``(3, length)``: time, height, width.
    """

    input_ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]


@cache
def tokenizer() -> Tokenizer:
    """The tokenizer of the bundled checkpoint."""
    return Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


@lru_cache(maxsize=1 << 16)
def _ids_of(text: str) -> tuple[int, ...]:
    return tuple(tokenizer().encode(text).ids)


def num_audio_tokens(num_samples: int) -> int:
    """Rows of an audio clip: 100 mel frames a second, halved by the convolution and again by the pooling."""
    num_frames = -(-num_samples // _HOP)
    return ((num_frames - 1) // 2 + 1 - 2) // 2 + 1


def merged_grid(media: Media) -> tuple[int, int, int]:
    """Rows of an image or clip as (time, height, width) after merging."""
    frames, height, width = media.data.shape[-4:-1] if media.modality == "video" else (1, *media.data.shape[:2])
    side = PATCH_SIZE * MERGE_SIZE
    return -(-frames // TEMPORAL_PATCH_SIZE) if media.modality == "video" else 1, height // side, width // side


def encode_item(item: Item) -> Encoded:
    """The whole conversation of an item."""
    writer = _Writer()
    if item.system is not None:
        writer.text(f"<|im_start|>system\n{item.system}<|im_end|>\n")
    for index, turn in enumerate(item.turns):
        writer.text("<|im_start|>user\n")
        media = item.media if index == 0 else ()
        if item.question_first:
            writer.text(turn.question)
        for part in media:
            writer.media(part)
        if not item.question_first:
            writer.text(turn.question)
        writer.text("<|im_end|>\n<|im_start|>assistant\n")
        writer.text(f"{turn.answer}<|im_end|>", is_answer=True)
        writer.text("\n")
    return writer.finish()


class _Writer:
    """Appends text and media, keeping the next position as Qwen2.5-Omni counts it.

    Text advances all three axes by one per token. A grid starts at the next position on every axis; what follows it
    starts one past its largest position.
    """

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._labels: list[int] = []
        self._positions: list[npt.NDArray[np.int64]] = []
        self._next = 0

    def text(self, text: str, is_answer: bool = False) -> None:
        ids = _ids_of(text)
        self._ids += ids
        self._labels += ids if is_answer else [IGNORE] * len(ids)
        self._line(len(ids))

    def media(self, media: Media) -> None:
        sense = "audio" if media.modality == "audio" else "vision"
        self.text(f"<|{sense}_bos|>")
        if media.modality == "audio":
            count = num_audio_tokens(len(media.data))
            self._line(count)
        else:
            count = self._grid(merged_grid(media))
        self._ids += [TOKEN_ID[_PAD[media.modality]]] * count
        self._labels += [IGNORE] * count
        self.text(f"<|{sense}_eos|>")

    def finish(self) -> Encoded:
        return Encoded(
            np.array(self._ids, dtype=np.int64),
            np.array(self._labels, dtype=np.int64),
            np.concatenate(self._positions, axis=1),
        )

    def _line(self, count: int) -> None:
        steps = np.arange(self._next, self._next + count, dtype=np.int64)
        self._positions.append(np.broadcast_to(steps, (3, count)))
        self._next += count

    def _grid(self, grid: tuple[int, int, int]) -> int:
        per_slot = TEMPORAL_PATCH_SIZE / FRAMES_PER_SECOND * POSITION_IDS_PER_SECOND
        axes = [
            (np.arange(grid[0]) * per_slot).astype(np.int64),
            np.arange(grid[1], dtype=np.int64),
            np.arange(grid[2], dtype=np.int64),
        ]
        positions = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")]) + self._next
        self._positions.append(positions)
        self._next = int(positions.max()) + 1
        return int(positions.shape[1])

"""Batches from the generator, made by worker processes and the same for any number of them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from training.blueprint import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, TOKEN_ID
from training.dialogue import FULL_SCALE, Item
from training.encoding import IGNORE, encode_item
from training.network import Batch
from training.speech import SpeechBank
from training.worlds import Layout, Source, layout_of, sample_item, world_of

# Whole chunks of two seconds that hold the longest sound.
MAX_SAMPLES = 96_000
_SAMPLES_PER_ROW = 640
_LENGTH_MULTIPLE = 16
# Turns about one item: a picture of many things allows many questions, a line of text hardly more than one.
_TURNS = {
    "scene": (3, 4, 5),
    "chart": (3, 4),
    "clip": (3, 4),
    "pair": (2, 3),
    "page": (1, 1, 1, 2),
    "sound": (1, 2, 2),
    "both": (2, 3),
    "none": (1, 2),
}
_MEDIA_IDS = tuple(TOKEN_ID[name] for name in ("<|IMAGE|>", "<|VIDEO|>", "<|AUDIO|>"))


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """Batch number ``index`` is a function of ``(seed, index)`` alone.

    ``tokens`` sets the size of a batch: about so many rows of the language model, of which those of a picture count
    double, for the vision tower has four patches for each. ``ramp`` is the number of batches over which the difficulty
    grows to its full value.
    """

    seed: int
    bank: Path
    tokens: int
    ramp: int

    def __getitem__(self, index: int) -> Batch:
        return self.make(world_of(index), index)

    def make(self, world: str, index: int) -> Batch:
        """A batch of a given world."""
        rng = random.Random(f"{self.seed} {index}")
        layout = layout_of(world, rng)
        difficulty = min(1.0, 0.25 + 0.75 * index / max(self.ramp, 1))
        source = Source("train", _load_bank(self.bank), difficulty)
        size = max(self.tokens // _expected_cost(layout), 1)
        items = [sample_item(rng, layout, source, rng.choice(_TURNS[layout.world])) for _ in range(size)]
        return collate(items)


@cache
def _load_bank(path: Path) -> SpeechBank:
    return SpeechBank.load(path)


def _expected_cost(layout: Layout) -> int:
    """Rows of an item in the language model by rule of thumb, those of pictures counted double."""
    side = PATCH_SIZE * MERGE_SIZE
    pictures = 2 if layout.world == "pair" else max(layout.num_frames // TEMPORAL_PATCH_SIZE, 1)
    visual = pictures * (layout.height // side) * (layout.width // side)
    audio = 125 if layout.world in ("sound", "both") else 0
    return 2 * visual + audio + 25 * (_TURNS[layout.world][-1] + 1)


def collate(items: list[Item]) -> Batch:
    """Stack items of one layout, padded on the right."""
    encoded = [encode_item(item) for item in items]
    length = max(len(item.input_ids) for item in encoded)
    length += -length % _LENGTH_MULTIPLE
    ids = np.full((len(items), length), TOKEN_ID["<|endoftext|>"], np.int64)
    labels = np.full((len(items), length), IGNORE, np.int64)
    positions = np.zeros((3, len(items), length), np.int64)
    for row, item in enumerate(encoded):
        count = len(item.input_ids)
        ids[row, :count], labels[row, :count], positions[:, row, :count] = item.input_ids, item.labels, item.positions
    pictures = [media.data for item in items for media in item.media if media.modality != "audio"]
    waveforms = [media.data for item in items for media in item.media if media.modality == "audio"]
    frames = torch.from_numpy(np.stack(pictures)) if pictures else None
    if frames is not None and frames.ndim == 4:
        frames = frames[:, None]
    audio = np.zeros((len(waveforms), MAX_SAMPLES), np.int16)
    for row, waveform in enumerate(waveforms):
        audio[row, : len(waveform)] = waveform * FULL_SCALE
    slots, rows = _place_media(ids)
    return Batch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        positions=torch.from_numpy(positions),
        media_slots=torch.from_numpy(slots),
        media_rows=torch.from_numpy(rows),
        frames=frames,
        waveforms=torch.from_numpy(audio) if waveforms else None,
        num_samples=torch.tensor([len(waveform) for waveform in waveforms]) if waveforms else None,
    )


def _place_media(ids: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Slots of the flattened ids that hold media, and the row of the features that goes to each.

    The features are the pictures' rows one after another, then the sounds', each of which owns equally many rows, of
    which it uses the first.
    """
    seen = (ids == _MEDIA_IDS[0]) | (ids == _MEDIA_IDS[1])
    heard = ids == _MEDIA_IDS[2]
    sound_rows = np.cumsum(heard, axis=1) - 1 + np.arange(len(ids))[:, None] * (MAX_SAMPLES // _SAMPLES_PER_ROW)
    slots = np.concatenate([np.flatnonzero(seen), np.flatnonzero(heard)])
    rows = np.concatenate([np.arange(seen.sum()), sound_rows[heard] + seen.sum()])
    return slots, rows


def batches(dataset: Batches, indices: range, num_workers: int) -> Iterator[Batch]:
    """The batches of these numbers, in order. Workers start at once, and share the bank of spoken words."""
    _load_bank(dataset.bank)
    loader = DataLoader(
        dataset,
        batch_size=None,
        sampler=indices,
        num_workers=num_workers,
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=_limit_threads,
        pin_memory=torch.cuda.is_available(),
    )
    return iter(loader)


def _limit_threads(_worker: int) -> None:
    torch.set_num_threads(1)

"""Items as the checkpoint's own Hugging Face processor takes them: what a new model file begins with.

How many tokens an item takes is found by asking the processor for a blank one of its size. That is right for every
family whose processor takes items one at a time, and as slow as a picture; a model file that matters says the numbers
itself, in `pieces_of_size`, as those of this folder do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any

import numpy as np
import torch
from PIL import Image

from sensorium.errors import InvalidTypeError, ModelError
from sensorium.model_executor.models.media_common import Pieces
from sensorium.model_executor.models.media_inputs import MediaInputs, Size
from sensorium.multimodal.byte_pictures import joined
from sensorium.multimodal.hf_items import HFItems, Processed, hf_items
from sensorium.multimodal.image import type_name
from sensorium.multimodal.resize_limits import check_picture, check_pixels
from sensorium.spans import IntArray

MAX_KNOWN_SIZES = 4096
"""Of which the tokens are kept."""
_OF_PROMPT = "token_type_ids"
_LONGEST_SIDES, _NUM_FRAMES, _NUM_SAMPLES = (224, 448, 896, 1792), (2, 8, 32), (16_000, 160_000, 480_000)


class ProcessorInputs(MediaInputs):
    """A modality of the checkpoint's processor. A family gives `modality`, and what it knows better.

    Raises `ModelError` (a `TypeError`) for a processor that takes whole prompts only, or doesn't take the modality.
    """

    @property
    def items(self) -> HFItems:
        """The checkpoint's processor, one item at a time."""
        items = hf_items(self.ctx.model_config)
        if self.modality not in items.placeholders or items.takes_prompts:
            why = items.refusals.get(self.modality, "it takes whole prompts, or has no part for them")
            raise ModelError(
                f"{self.modality} items of this checkpoint's processor: got none one at a time ({why}), expected each "
                "with the tokens that stand for it. Write pieces_of_size and map of the model's inputs."
            )
        return items

    @property
    def prompt_id(self) -> int:
        """The token that the processor takes for an item."""
        token_ids = self.items.placeholders[self.modality].token_ids
        return token_ids[0] if len(token_ids) == 1 else self.row_id

    def pieces_of_size(self, size: Size) -> Pieces:
        """What the processor makes of a blank item of this size."""
        return _pieces_of_blank(self.items, self.modality, size)

    def blank(self, size: Size) -> Any:
        """A black picture, a clip of black frames, or silence."""
        return _BLANK[self.modality](size)

    def map(self, items: Sequence[Any]) -> Mapping[str, Any]:
        """The processor's tensors, under its own names."""
        found = [tensors_of(self.items.process_item(self.modality, item)) for item in items]
        return found[0] if len(found) == 1 else {name: joined([each[name] for each in found]) for name in found[0]}


class ProcessorPictures(ProcessorInputs):
    """Pictures; a size is (height, width)."""

    modality = "image"

    def sizes(self) -> Iterable[Size]:
        """Squares, and pictures twice and four times as wide as high and the other way; a family knows its own."""
        yield from ((side // down, side // across) for side in _LONGEST_SIDES for down, across in _SHAPES)

    def size_of(self, item: Any) -> Size:
        """Height and width. Raises `InvalidTypeError` (a `TypeError`) for what isn't a picture, and
        `InvalidRequestError` (a `ValueError`) for one that the processor would make too large."""
        if not isinstance(item, Image.Image):
            raise InvalidTypeError(
                f"Invalid image type: got {type_name(item)}, expected a PIL image or a list of them."
            )
        check_picture(self.items.processor.image_processor, item.height, item.width)
        return item.height, item.width


_SHAPES = ((1, 1), (1, 2), (2, 1), (1, 4), (4, 1))


class ProcessorClips(ProcessorInputs):
    """Clips; a size is (frames, height, width)."""

    modality = "video"

    @property
    def row_id(self) -> int:
        """The token at whose positions rows stand."""
        return int(self.config.video_token_id)

    def sizes(self) -> Iterable[Size]:
        """Squares of a few lengths; a family knows its own."""
        yield from ((frames, side, side) for frames in _NUM_FRAMES for side in _LONGEST_SIDES[:2])

    def size_of(self, item: Any) -> Size:
        """Frames, height and width. Raises as of pictures."""
        if not isinstance(item, np.ndarray) or item.ndim != 4:
            raise InvalidTypeError(
                f"Invalid video type: got {type_name(item)}, expected an array of frames (frames, height, width, 3)."
            )
        frames, height, width = map(int, item.shape[:3])
        check_pixels("video", height, width, height * width)
        return frames, height, width


class ProcessorSounds(ProcessorInputs):
    """Sounds; a size is (samples,), at the processor's rate."""

    modality = "audio"

    @property
    def row_id(self) -> int:
        """The token at whose positions rows stand."""
        name = "audio_token_id" if hasattr(self.config, "audio_token_id") else "audio_token_index"
        return int(getattr(self.config, name))

    def sizes(self) -> Iterable[Size]:
        """1, 10 and 30 seconds at 16 kHz; a family knows its own."""
        yield from ((num_samples,) for num_samples in _NUM_SAMPLES)

    def pieces(self, item: Any) -> list[Pieces]:
        """What the processor makes of this sound. Raises as of pictures."""
        if isinstance(item, Mapping | torch.Tensor):
            return super().pieces(item)
        samples = item[0] if isinstance(item, tuple) else item
        if not isinstance(samples, np.ndarray) or samples.ndim != 1:
            raise InvalidTypeError(
                f"Invalid audio type: got {type_name(item)}, expected samples (samples,), or a pair of them and their "
                "rate."
            )
        processed = self.items.process_item(self.modality, item)
        self.items.check_heard(item, processed)
        return [pieces_of(processed.token_ids)]


def _blank_picture(size: Size) -> Image.Image:
    return Image.new("RGB", (size[1], size[0]))


def _blank_clip(size: Size) -> np.ndarray[Any, Any]:
    return np.zeros((*size, 3), dtype=np.uint8)


def _silence(size: Size) -> np.ndarray[Any, Any]:
    return np.zeros(size, dtype=np.float32)


_BLANK: Mapping[str, Callable[[Size], Any]] = {"image": _blank_picture, "video": _blank_clip, "audio": _silence}


@lru_cache(maxsize=MAX_KNOWN_SIZES)
def _pieces_of_blank(items: HFItems, modality: str, size: Size) -> Pieces:
    return pieces_of(items.process_item(modality, _BLANK[modality](size)).token_ids)


def tensors_of(processed: Processed) -> dict[str, Any]:
    """What is the item's own: all but the kinds of the prompt's tokens."""
    return {name: value for name, value in processed.tensors.items() if not name.endswith(_OF_PROMPT)}


def pieces_of(token_ids: IntArray) -> Pieces:
    """Tokens as runs: `[1, 9, 9, 2]` is `((1, 1), (9, 2), (2, 1))`."""
    return tuple((token_id, len(list(run))) for token_id, run in groupby(token_ids.tolist()))

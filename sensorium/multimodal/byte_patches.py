"""Pictures that travel as bytes: resized and cut into patches on the host, turned into numbers where the tower is.

After resizing, Hugging Face's processors of the Qwen-VL family rescale and normalise, which is a function of each
single byte. So one table of 256 float32 values per channel, read off the processor itself, replaces it, and a picture
is kept, cached and sent in an eighth of the size (a processor also repeats it for each step of time). Whether that
gives the processor's numbers to the bit is tried once per processor and settings; where it doesn't, the processor's own
output is used.

Source of the layout: `transformers` `Qwen2VLImageProcessorPil`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from sensorium.multimodal import byte_pictures
from sensorium.multimodal.smart_resize import smart_resize

NUM_CHANNELS = 3


@lru_cache(maxsize=64)
def pixel_table(processor: Any) -> torch.Tensor | None:
    """What the processor makes of each byte, `(1, channels, 256)` float32; None where bytes alone don't tell."""
    try:
        side = processor.patch_size * processor.merge_size
        ramp = np.resize(np.arange(256, dtype=np.uint8), (side, side * -(-256 // side**2)))
        known = Image.fromarray(np.repeat(ramp[:, :, None], NUM_CHANNELS, axis=2))
        table = torch.zeros(NUM_CHANNELS, 256)
        patches, _ = _cut(_pixels_of(known), processor.patch_size, processor.merge_size)
        values = _processed(processor, known, do_resize=False)
        by_channel = values.view(len(patches), NUM_CHANNELS, processor.temporal_patch_size, -1)[:, :, 0]
        for channel in range(NUM_CHANNELS):
            table[channel, torch.from_numpy(patches[..., channel].reshape(-1)).long()] = by_channel[
                :, channel
            ].flatten()
        sample = Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (3 * side + 5, 2 * side + 9, NUM_CHANNELS), dtype=np.uint8)
        )
        patches, _ = cut_into_patches(processor, sample)
        made = normalised(torch.from_numpy(patches), table, processor.temporal_patch_size)
        is_equal = torch.equal(made, _processed(processor, sample))
    except Exception:  # noqa: BLE001  a processor of another make: it does the work itself
        return None
    return table[None] if is_equal else None


def map_pictures(processor: Any, pictures: list[Image.Image], table: torch.Tensor) -> dict[str, torch.Tensor]:
    """Pictures as `pixel_bytes` `(patches, patch_size, patch_size, channels)` uint8.

    Beside them `pixel_table` `(pictures, channels, 256)` float32 and `image_grid_thw` `(pictures, 3)`.
    """
    cut = [cut_into_patches(processor, picture) for picture in pictures]
    return {
        "pixel_bytes": torch.from_numpy(np.concatenate([patches for patches, _ in cut])),
        "pixel_table": table.expand(len(pictures), -1, -1),
        "image_grid_thw": torch.tensor([grid for _, grid in cut]),
    }


def cut_into_patches(
    processor: Any, picture: Image.Image
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[int, int, int]]:
    """Patches `(patches, patch_size, patch_size, channels)`, those of each square that is merged together; the grid."""
    patch, merge = processor.patch_size, processor.merge_size
    if processor.do_convert_rgb or picture.mode != "RGB":
        picture = picture.convert("RGB")
    if processor.do_resize:
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        height, width = smart_resize(picture.height, picture.width, patch * merge, least, most)
        picture = picture.resize((width, height), resample=processor.resample)
    return _cut(_pixels_of(picture), patch, merge)


def _pixels_of(picture: Image.Image) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """`(height, width, channels)`: as `numpy.asarray` says it, in a quarter of the time."""
    return np.frombuffer(picture.tobytes(), np.uint8).reshape(picture.height, picture.width, NUM_CHANNELS)


def _cut(
    pixels: np.ndarray[Any, np.dtype[np.uint8]], patch: int, merge: int
) -> tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[int, int, int]]:
    rows, columns = pixels.shape[0] // patch, pixels.shape[1] // patch
    squares = pixels.reshape(rows // merge, merge, patch, columns // merge, merge, patch, NUM_CHANNELS)
    patches = squares.transpose(0, 3, 1, 4, 2, 5, 6).reshape(rows * columns, patch, patch, NUM_CHANNELS)
    return np.ascontiguousarray(patches), (1, rows, columns)


def normalised(patches: torch.Tensor, table: torch.Tensor, num_frames: int) -> torch.Tensor:
    """The processor's `pixel_values` `(patches, channels * num_frames * patch_size^2)` in the table's dtype.

    Args:
        patches: `(patches, patch_size, patch_size, channels)` uint8.
        table: `(channels, 256)`, any dtype: looking up rounded values is rounding what was looked up.
        num_frames: How often a picture is repeated in time.
    """
    channels = torch.arange(0, 256 * NUM_CHANNELS, 256, dtype=torch.int32, device=patches.device)
    values = table.flatten()[patches.to(torch.int32) + channels]
    by_channel = values.permute(0, 3, 1, 2).unsqueeze(2)
    return by_channel.expand(-1, -1, num_frames, -1, -1).reshape(len(patches), -1)


def all_normalised(patches: torch.Tensor, tables: torch.Tensor, sizes: Sequence[int], num_frames: int) -> torch.Tensor:
    """`normalised` of several pictures of `sizes` patches, each by its own table of `(pictures, channels, 256)`."""
    pictures = torch.split(patches, list(sizes))
    return torch.cat([normalised(each, table, num_frames) for each, table in zip(pictures, tables, strict=True)])


def as_processed(kwargs: Mapping[str, Any], num_frames: int) -> dict[str, Any]:
    """Mapped keyword arguments of some pictures as the processor returns them: with `pixel_values` for bytes."""
    others = dict(kwargs)
    patches, tables = others.pop("pixel_bytes", None), others.pop("pixel_table", None)
    if patches is None:
        return others
    if "image_grid_thw" not in kwargs:
        return others | {"pixel_values": byte_pictures.as_numbers(patches, torch.as_tensor(tables))}
    sizes = torch.as_tensor(kwargs["image_grid_thw"]).reshape(-1, 3).prod(-1).tolist()
    pixel_values = all_normalised(torch.as_tensor(patches), torch.as_tensor(tables), sizes, num_frames)
    return others | {"pixel_values": pixel_values}


def _processed(processor: Any, picture: Image.Image, **settings: Any) -> torch.Tensor:
    values: torch.Tensor = processor.preprocess(picture, return_tensors="pt", **settings)["pixel_values"]
    return values

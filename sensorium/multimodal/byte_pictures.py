"""Pictures that travel as bytes: resized and cut by Hugging Face's processor, normalised where the tower is.

After resizing, a processor rescales and normalises, which is a function of each single byte of a channel. So a picture
is kept, cached and sent as bytes, a quarter of the size, with a table of what each byte becomes. Whether that gives the
processor's numbers to the bit is tried once per processor and settings; where it doesn't, the processor's own output is
used. See `byte_patches` for processors whose output are patches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from PIL import Image

from sensorium.multimodal.hf_processors import with_settings
from sensorium.multimodal.image import preprocess
from sensorium.multimodal.inputs import each_item

NUM_CHANNELS = 3
PICTURE_DIMS = 4
"""Axes of a picture, (tiles, channels, height, width); any others in front are the processor's."""
_SAMPLE_SIZE = (83, 61)
_BYTES = {"do_rescale": False, "do_normalize": False}
_OTHERS = ("image_sizes",)
"""What processors say of pictures beside pixels that models need."""


@lru_cache(maxsize=64)
def picture_table(processor: Any) -> torch.Tensor | None:
    """What the processor makes of each byte, `(1, channels, 256)` float32; None where bytes alone don't tell."""
    try:
        values = np.tile(np.arange(256, dtype=np.uint8), (NUM_CHANNELS, 1, 1))
        if processor.do_rescale:
            values = processor.rescale(values, processor.rescale_factor)
        if processor.do_normalize:
            values = processor.normalize(values, processor.image_mean, processor.image_std)
        table = torch.from_numpy(np.asarray(values, dtype=np.float32)).reshape(1, NUM_CHANNELS, 256)
        noise = np.random.default_rng(0).integers(0, 256, (*_SAMPLE_SIZE, NUM_CHANNELS), dtype=np.uint8)
        sample = Image.fromarray(noise)
        made = normalised(_bytes_of(processor, sample)["pixel_values"], table[0])
        is_equal = torch.equal(made, preprocess(processor, sample)["pixel_values"])
    except Exception:  # noqa: BLE001  a processor of another make: it does the work itself
        return None
    return table if is_equal else None


def _bytes_of(processor: Any, picture: Image.Image) -> Mapping[str, Any]:
    """A picture's processed form before it is rescaled: `pixel_values` uint8."""
    return preprocess(with_settings(processor, _BYTES), picture)


def map_pictures(processor: Any, pictures: Sequence[Image.Image]) -> dict[str, Any]:
    """Pictures as a processor returns each of them alone, with bytes in the place of numbers where that is equal.

    `pixel_bytes` uint8 and `pixel_table` `(pictures, channels, 256)` float32, or `pixel_values` float32; of several
    pictures a list. Beside them `image_sizes` `(pictures, 2)` where the processor returns it.
    """
    table = picture_table(processor)
    mapped = [preprocess(processor, each) if table is None else _bytes_of(processor, each) for each in pictures]
    pixels = [each["pixel_values"] for each in mapped]
    kwargs: dict[str, Any] = {"pixel_values": pixels if len(pixels) > 1 else pixels[0]}
    if table is not None:
        kwargs = {"pixel_bytes": kwargs["pixel_values"], "pixel_table": table.expand(len(pictures), -1, -1)}
    return kwargs | {name: torch.cat([each[name] for each in mapped]) for name in _OTHERS if name in mapped[0]}


def pictures_of(pixel_values: Any, pixel_bytes: Any = None, pixel_table: Any = None) -> list[torch.Tensor]:
    """Numbers `(tiles, channels, height, width)` of each picture, from either form, batched in whatever way."""
    if pixel_bytes is None:
        is_flat = isinstance(pixel_values, torch.Tensor) and pixel_values.dim() < PICTURE_DIMS
        return [pixel_values[None]] if is_flat else each_item(pixel_values, PICTURE_DIMS)
    pictures, tables = each_item(pixel_bytes, PICTURE_DIMS), each_item(pixel_table, 2)
    return [normalised(each, table) for each, table in zip(pictures, tables, strict=True)]


def as_numbers(pixel_bytes: Any, pixel_table: torch.Tensor) -> Any:
    """What a mapper returned as bytes, as the processor's numbers: of one picture a tensor, of several a list."""
    if isinstance(pixel_bytes, list):
        return [normalised(torch.as_tensor(each), table) for each, table in zip(pixel_bytes, pixel_table, strict=True)]
    return normalised(torch.as_tensor(pixel_bytes), pixel_table[0])


def normalised(pixels: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """The processor's numbers, in the table's dtype.

    Args:
        pixels: `(..., channels, height, width)` uint8.
        table: `(channels, 256)`, any dtype: looking up rounded values is rounding what was looked up.
    """
    channels = torch.arange(0, 256 * NUM_CHANNELS, 256, dtype=torch.int32, device=pixels.device)
    return table.flatten()[pixels.to(torch.int32) + channels[:, None, None]]


def joined(values: Sequence[Any]) -> torch.Tensor:
    """Tensors of several items in one, as Hugging Face batches them: behind one another, zeros at the ends of axes."""
    tensors = [torch.as_tensor(leaf) for value in values for leaf in (value if isinstance(value, list) else [value])]
    largest = [max(sizes) for sizes in zip(*(each.shape[1:] for each in tensors), strict=True)]

    def padded(tensor: torch.Tensor) -> torch.Tensor:
        missing = [(0, most - size) for most, size in zip(largest, tensor.shape[1:], strict=True)]
        return torch.nn.functional.pad(tensor, [amount for pair in reversed(missing) for amount in pair])

    return torch.cat([padded(each) for each in tensors])

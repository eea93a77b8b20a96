"""Prompts with generated media, which show at load how a model takes media. Each is processed as a whole by the model's
processor, and item by item as the engine does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from sensorium.config import ModelConfig
from sensorium.errors import SensoriumError
from sensorium.logger import get_logger
from sensorium.multimodal.hf_items import HFItems, Processed, dummy_item, expand, hf_items
from sensorium.multimodal.hf_processors import cause
from sensorium.spans import IntArray

logger = get_logger(__name__)

MAX_ITEMS = 2
"""The most items of a prompt. The second has another size than the first."""


@dataclass(frozen=True, slots=True, eq=False)
class ItemPart:
    """The part `[start, end)` of a prompt that an item takes, and the processor's tensors for it."""

    start: int
    end: int
    tensors: Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class MediaPrompt:
    """A prompt with one or two items of one modality."""

    modality: str
    token_ids: IntArray
    tensors: Mapping[str, Any]
    """The processor's output for the whole prompt."""
    parts: tuple[ItemPart, ...]
    """One part for each item, or one for all with a processor that takes whole prompts only."""


def make_media_prompts(model_config: ModelConfig, modalities: tuple[str, ...]) -> list[MediaPrompt]:
    """A prompt for each modality that the checkpoint's processor takes."""
    items = hf_items(model_config)
    return [_make(items, modality) for modality in modalities if modality in items.placeholders]


def _make(items: HFItems, modality: str) -> MediaPrompt:
    placeholder = items.placeholders[modality]
    for num_items in range(MAX_ITEMS, 0, -1):
        data = [dummy_item(modality, i) for i in range(num_items)]
        text = " ".join(f"a {placeholder.text}" for _ in data) + " b c a b c"
        try:
            whole = items.process(text, {modality: data})
        except Exception as error:
            if num_items == 1:
                raise
            logger.info("the processor takes %d %s items in a text only: %s", num_items - 1, modality, cause(error))
            continue
        return MediaPrompt(modality, whole.token_ids, whole.tensors, _parts(items, modality, text, data, whole))
    raise AssertionError("one item is always tried")


def _parts(items: HFItems, modality: str, text: str, data: list[Any], whole: Processed) -> tuple[ItemPart, ...]:
    at_once = (ItemPart(0, len(whole.token_ids), whole.tensors),)
    if items.takes_prompts:
        return at_once
    alone = [items.process_item(modality, each) for each in data]
    ids = np.asarray(items.processor.tokenizer(text, add_special_tokens=False)["input_ids"], dtype=np.int64)
    segments = {modality: [each.token_ids for each in alone]}
    try:
        expanded, ranges = expand(ids, items.placeholders, segments)
    except SensoriumError:
        return at_once
    if not np.array_equal(expanded, whole.token_ids):
        return at_once
    return tuple(
        ItemPart(each["offset"], each["offset"] + each["length"], processed.tensors)
        for each, processed in zip(ranges[modality], alone, strict=True)
    )

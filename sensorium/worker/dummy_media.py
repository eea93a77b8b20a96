"""Dummy media for looking at a model at load: the factory's, with contents that tell items apart.

Factories usually return blank images. Two blank items look the same, and so would their rows wherever they stand;
noise in their place makes a difference between items visible.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import ModelError, SensoriumError
from sensorium.inputs import INPUT_REGISTRY, token_inputs
from sensorium.logger import get_logger
from sensorium.model_executor.failures import told_to_author
from sensorium.multimodal import MULTIMODAL_REGISTRY

logger = get_logger(__name__)

_NUM_TEXT_TOKENS = 64
"""Tokens that the dummy prompt has room for beside its media."""


class NoDummyMediaError(Exception):
    """There is no dummy data with media; the message says why."""


@dataclass(frozen=True, slots=True, eq=False)
class DummyMedia:
    """One dummy prompt with its media, mapped."""

    token_ids: np.ndarray[Any, np.dtype[np.int64]]
    """`(num_tokens,)` expanded prompt."""
    items: Mapping[str, tuple[Mapping[str, Any], ...]]
    """Per modality, the mapped arguments of each item alone, or of the group as one entry."""
    counts: Mapping[str, int]
    """Per modality, the number of items."""
    maps_items_alone: bool
    data: Mapping[str, Sequence[Any]]
    """Per modality, the items before they were mapped."""
    placeholders: Mapping[str, Sequence[Any]] | None = None
    """Per modality the ranges of its items, where the factory says them."""

    @property
    def kwarg_names(self) -> frozenset[str]:
        """Every argument that a mapper returned."""
        return frozenset(name for items in self.items.values() for item in items for name in item)


def make_dummy_media(config: EngineConfig) -> DummyMedia:
    """Run the model's dummy data factory and mappers.

    Raises:
        NoDummyMediaError: The factory returns no media: none was registered, or it is text only.
        ModelError: The factory or a mapper fails; `DummyDataError` (an `AssertionError`) if the factory's prompt is
            too short or has too few items.
    """
    model_config = config.model_config
    limits = {name: n for name, n in MULTIMODAL_REGISTRY.get_mm_limits_per_prompt(model_config).items() if n}
    rows = MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(model_config)
    seq_len = min(model_config.max_model_len, sum(rows.get(m, 0) * n for m, n in limits.items()) + _NUM_TEXT_TOKENS)
    name = model_config.architecture if model_config.model_class is None else model_config.model_class.__name__
    with _blamed(f"{name}: its dummy data factory failed for seq_len={seq_len} and mm_counts={limits}"):
        dummy = INPUT_REGISTRY.dummy_data_for_profiling(model_config, seq_len, MULTIMODAL_REGISTRY)
    if not dummy.multi_modal_data:
        raise NoDummyMediaError(
            "the dummy data has no media. Register a factory with INPUT_REGISTRY.register_dummy_data."
        )
    items: dict[str, tuple[Mapping[str, Any], ...]] = {}
    counts: dict[str, int] = {}
    every: dict[str, Sequence[Any]] = {}
    alone_everywhere = True
    for modality, data in dummy.multi_modal_data.items():
        varied = [vary(each, seed) for seed, each in enumerate(data if isinstance(data, list) else [data])]
        counts[modality], every[modality] = len(varied), varied
        with _blamed(f"{name}: its {modality} mapper failed on its dummy data ({_described(varied[0])})"):
            each_alone = tuple(_map(model_config, modality, [one]) for one in varied)
            together = _map(model_config, modality, varied) if len(varied) > 1 else None
        if together is not None and not maps_alone(each_alone, together):
            alone_everywhere = False
            each_alone = (together,)
        items[modality] = each_alone
    token_ids = np.asarray(dummy.seq_data.prompt_token_ids, dtype=np.int64)
    return DummyMedia(token_ids, items, counts, alone_everywhere, every, dummy.multi_modal_placeholders)


def unexpanded_note(
    config: EngineConfig, dummy: DummyMedia, placeholder_ids: Mapping[str, frozenset[int]]
) -> tuple[str, ...]:
    """A note if the input processor leaves one placeholder where the dummy prompt has one for each row.

    That is right only for a model whose prompts come expanded, or are expanded as text, which isn't tried here.
    """
    notes = []
    for modality, items in dummy.data.items():
        ids = placeholder_ids.get(modality, frozenset())
        num_rows = int(np.isin(dummy.token_ids, list(ids)).sum())
        if len(ids) != 1 or num_rows <= len(items):
            continue
        (placeholder,) = ids
        inputs = token_inputs([placeholder] * len(items), multi_modal_data={modality: list(items)})
        try:
            processed: Any = INPUT_REGISTRY.process_input(config.model_config, inputs)
            left = list(processed["prompt_token_ids"]).count(placeholder)
        except Exception as error:  # it may want another prompt than this one
            logger.debug("the input processor can't be tried on placeholder tokens", exc_info=error)
            continue
        if left == len(items):
            notes.append(
                f"the input processor leaves {left} placeholder tokens for {len(items)} {modality} items of "
                f"{num_rows // len(items)} rows: prompts of token ids must come expanded"
            )
    return tuple(notes)


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Makes what an author's callable raises the load's error. Our own errors keep their class."""
    try:
        yield
    except SensoriumError as error:
        raise type(error)(f"{what}: {error}") from error
    except Exception as error:
        raise ModelError(f"{what}: {told_to_author(error)}. Expected it to take the largest legal input.") from error


def _described(item: Any) -> str:
    """An item's type, and its size where it has one."""
    size = getattr(item, "shape", None) or getattr(item, "size", None)
    return f"{type(item).__name__} of {tuple(size)}" if isinstance(size, tuple) else type(item).__name__


def _map(model_config: ModelConfig, modality: str, items: list[Any]) -> Mapping[str, Any]:
    """Mapped arguments of these items. V0 passed a bare item where the user gave one; a list comes second."""
    data = items[0] if len(items) == 1 else items
    try:
        return MULTIMODAL_REGISTRY.map_input(model_config, {modality: data})
    except TypeError:
        return MULTIMODAL_REGISTRY.map_input(model_config, {modality: items})


def vary(item: Any, seed: int) -> Any:
    """An item of the same type, size and mode with noise for content. Types that are not known stay as they are."""
    rng = np.random.default_rng(seed)
    if isinstance(item, tuple) and item and isinstance(item[0], np.ndarray):
        return (vary(item[0], seed), *item[1:])
    if isinstance(item, np.ndarray):
        if item.dtype == np.uint8:
            return rng.integers(0, 256, item.shape, dtype=np.uint8)
        if item.dtype.kind != "f":
            return item
        noise = rng.standard_normal(item.shape) * 0.1
        return np.asarray(noise, dtype=item.dtype)
    if isinstance(item, torch.Tensor):
        if not item.is_floating_point():
            return item
        return torch.from_numpy(rng.standard_normal(tuple(item.shape))).to(item.dtype)
    if hasattr(item, "mode") and hasattr(item, "size") and hasattr(item, "convert"):
        from PIL import Image

        width, height = item.size
        pixels = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        return Image.fromarray(pixels).convert(item.mode)
    return item


def maps_alone(alone: Sequence[Mapping[str, Any]], together: Mapping[str, Any]) -> bool:
    """Whether mapping items one by one and joining the results equals mapping them together.

    An argument joins along its first axis (LLaVA's images, Qwen2-VL's patches), as a longer list, or is a constant of
    the request (InternVL's token id).
    """
    names = set(together)
    return all(set(each) == names for each in alone) and all(
        _joins([each[name] for each in alone], together[name]) for name in names
    )


def _joins(alone: Sequence[Any], together: Any) -> bool:
    if isinstance(together, list | tuple):
        parts = [list(each) if isinstance(each, list | tuple | torch.Tensor) else [each] for each in alone]
        return _equal([one for part in parts for one in part], list(together))
    if not isinstance(together, torch.Tensor):
        return all(_equal(each, together) for each in alone)
    if all(_equal(each, together) for each in alone):
        return True
    if not all(isinstance(each, torch.Tensor) and each.dim() == together.dim() > 0 for each in alone):
        return False
    if any(each.shape[1:] != together.shape[1:] for each in alone):
        return False
    return _equal(torch.cat(list(alone)), together)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(_equal(a, b) for a, b in zip(one, other, strict=True))
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return bool(np.array_equal(one, other))
    return type(one) is type(other) and bool(one == other)

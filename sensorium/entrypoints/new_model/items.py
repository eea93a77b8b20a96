"""What a processor makes of an item, or, without one, what the model's own methods say that they take."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from sensorium.errors import SensoriumError
from sensorium.model_executor.models.processor_inputs import tensors_of
from sensorium.multimodal.hf_items import HFItems, dummy_item
from sensorium.multimodal.mrope import token_id_of

_MODALITIES = ("image", "video", "audio")
_NOT_OF_MEDIA = ("vision_feature_layer", "vision_feature_select_strategy", "kwargs", "args", "return_dict")
_OF_HOST = ("grid_thw", "sizes", "num_patches", "lengths", "spatial_shapes")
"""Marks in the names of tensors that code reads on the host."""


@dataclass(frozen=True, slots=True)
class ItemOfProcessor:
    """A modality."""

    modality: str
    placeholder: str | None
    """The text that stands for an item; None: there is no processor that says it."""
    tensors: Mapping[str, str]
    """By keyword argument of `encode_media`: what the processor makes of one item, in words."""
    token_id_field: str | None
    """Of the config: the token at whose positions rows stand."""
    num_rows: int | None
    """Of the item that was tried."""
    encoded_by: str
    """The method of transformers that makes rows; empty if there is none of the usual name."""

    @property
    def host_kwargs(self) -> tuple[str, ...]:
        """Arguments that code reads on the host."""
        return tuple(name for name in self.tensors if name.endswith(_OF_HOST))


def items_of(folder: Path | None, config: Any, model: nn.Module) -> tuple[ItemOfProcessor, ...]:
    """What is known of each modality that the model takes."""
    known = _of_processor(folder, config, model) if folder is not None else ()
    return known or tuple(
        ItemOfProcessor(modality, None, _arguments(model, modality), _token_field(config, modality), None, method)
        for modality in _MODALITIES
        if (method := _method(model, modality)) or token_id_of(config, modality) is not None
    )


def _of_processor(folder: Path, config: Any, model: nn.Module) -> tuple[ItemOfProcessor, ...]:
    try:
        items = HFItems(str(folder), trust_remote_code=False, revision=None, backend="auto")
        found = []
        for modality, placeholder in items.placeholders.items():
            processed = items.process_item(modality, dummy_item(modality, 0))
            tensors = {name: _in_words(value) for name, value in tensors_of(processed).items()}
            field = _token_field(config, modality)
            token_id = getattr(config, field) if field else None
            num_rows = int((processed.token_ids == token_id).sum()) if token_id is not None else None
            method = _method(model, modality)
            found.append(ItemOfProcessor(modality, placeholder.text, tensors, field, num_rows, method))
    except SensoriumError:  # there is no processor among the files, or one that needs what isn't installed
        return ()
    return tuple(found)


def _in_words(value: Any) -> str:
    if hasattr(value, "shape"):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    return type(value).__name__


def _method(model: nn.Module, modality: str) -> str:
    name = f"get_{modality}_features"
    return f"{type(model).__name__}.{name}" if hasattr(model, name) else ""


def _arguments(model: nn.Module, modality: str) -> dict[str, str]:
    method = getattr(type(model), f"get_{modality}_features", None)
    names = list(inspect.signature(method).parameters)[1:] if method is not None else []
    media = [name for name in names if name not in _NOT_OF_MEDIA]
    return dict.fromkeys(media or [_USUAL[modality]], "see its processor")


_USUAL = {"image": "pixel_values", "video": "pixel_values_videos", "audio": "input_features"}


def _token_field(config: Any, modality: str) -> str | None:
    fields = (f"{modality}_token_id", f"{modality}_token_index")
    return next((name for name in fields if isinstance(getattr(config, name, None), int)), None)

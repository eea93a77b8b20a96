"""Has the front import and load, while the core loads its weights, what the first request with media would wait for."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import MissingLibraryError
from sensorium.logger import get_logger
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalRegistry

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

logger = get_logger(__name__)

_SIDE = 64
"""Of a picture and a frame, in pixels."""
_NUM_FRAMES = 4
_SAMPLE_RATE = 16_000
"""A sound is one second long."""


def warm_up(model_config: ModelConfig, registry: MultiModalRegistry = MULTIMODAL_REGISTRY) -> None:
    """Map one small item of each modality that the model takes, and forget it.

    Raises `MissingLibraryError` (a `RuntimeError`) if a mapper needs a library that isn't there. Any other error of a
    mapper goes to the request that needs it.
    """
    begin_s = time.monotonic()
    for modality, limit in registry.get_mm_limits_per_prompt(model_config).items():
        make = _SMALL_ITEMS.get(modality)
        if not limit or make is None or not registry.get_plugin(modality).has_input_mapper(model_config.model_class):
            continue
        try:
            registry.map_input(model_config, {modality: make()})
        except MissingLibraryError:
            raise
        except Exception:
            # The author's mapper may well want another item than this one.
            logger.debug("no warm-up for %s", modality, exc_info=True)
    logger.debug("processors of media loaded in %.2f s", time.monotonic() - begin_s)


def _picture() -> Any:
    from PIL import Image

    Image.preinit()  # the decoders of common formats
    return Image.new("RGB", (_SIDE, _SIDE))


_SMALL_ITEMS: dict[str, Callable[[], Any]] = {
    "image": _picture,
    "video": lambda: np.zeros((_NUM_FRAMES, _SIDE, _SIDE, 3), np.uint8),
    "audio": lambda: (np.zeros(_SAMPLE_RATE, np.float32), _SAMPLE_RATE),
}

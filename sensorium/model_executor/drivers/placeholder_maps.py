"""Which embedding rows fill which rows of a batch, for models that merge by map instead of by token id."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sensorium.messages import MediaItem
from sensorium.multimodal.placeholder_map import IndexMap


def index_maps(media: Sequence[MediaItem], start: int = 0) -> dict[str, IndexMap]:
    """Per modality, the map of whole items in a batch whose first row is position `start` of the prompt."""
    src: dict[str, list[int]] = {}
    dest: dict[str, list[int]] = {}
    for item in media:
        rows = np.arange(item.length) if item.is_media is None else np.flatnonzero(item.is_media)
        sources = src.setdefault(item.modality, [])
        sources.extend(range(len(sources), len(sources) + len(rows)))
        dest.setdefault(item.modality, []).extend((rows + item.offset - start).tolist())
    return {name: IndexMap(src=src[name], dest=dest[name]) for name in src}

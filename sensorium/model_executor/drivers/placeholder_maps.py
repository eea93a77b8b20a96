"""Which embedding rows fill which rows of a batch, for models that merge by map instead of by token id."""

from __future__ import annotations

from collections.abc import Sequence

from sensorium.messages import MediaItem
from sensorium.multimodal.placeholder_map import IndexMap


def index_maps(media: Sequence[MediaItem], start: int = 0) -> dict[str, IndexMap]:
    """Per modality, the map of whole items in a batch whose first row is position `start` of the prompt."""
    src: dict[str, list[int]] = {}
    dest: dict[str, list[int]] = {}
    for item in media:
        sources = src.setdefault(item.modality, [])
        sources.extend(range(len(sources), len(sources) + item.span.num_rows))
        dest.setdefault(item.modality, []).extend((item.span.positions() - start).tolist())
    return {name: IndexMap(src=src[name], dest=dest[name]) for name in src}

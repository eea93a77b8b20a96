"""Frames of a clip that also know when they were taken.

To a mapper, a clip is an array of frames. Some models place frames by time, though, so the array carries what
is known of the clip; a mapper that doesn't ask never notices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import numpy as np


class VideoArray(np.ndarray[Any, np.dtype[Any]]):
    """Frames `(num_frames, height, width, 3)` with `metadata`.

    `metadata` has the names of Hugging Face's `VideoMetadata`: `total_num_frames`, `fps`, `duration`, `frames_indices`
    and so on. Views and copies have no metadata, since they may hold other frames.
    """

    metadata: Mapping[str, Any] | None

    def __new__(cls, frames: np.ndarray[Any, Any], metadata: Mapping[str, Any]) -> Self:
        """The same memory as `frames`, with metadata."""
        array = np.asarray(frames).view(cls)
        array.metadata = metadata
        return array

    def __array_finalize__(self, source: object) -> None:
        self.metadata = None

"""Which frames of a clip are looked at: the rules of Hugging Face's video processors, and what they need to know.

A rule turns the number of frames and the frame rate into indices, before anything is decoded. The rules here give the
indices of transformers 5.17 to 5.23 (tests compare them), except that where those raise because a clip is shorter
than the number of frames asked for, all its frames are taken. A model with a rule of its own passes a `FrameSampler`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import InvalidRequestError, MediaError

Rule = Literal["uniform", "temporal_patches", "endpoints"]


@dataclass(frozen=True, slots=True)
class VideoMetadata:
    """What is known of a clip and of the frames taken from it.

    Attributes:
        total_num_frames: frames in the whole clip.
        fps: frames per second on average; None for bare frames without times.
        width: pixels, upright. height: pixels, upright. duration_s: play time, `total_num_frames / fps`; None with
        `fps`. video_backend: what decoded it. frames_indices: index within the clip of each frame handed on; empty
        before sampling.
    """

    total_num_frames: int
    fps: float | None
    width: int
    height: int
    duration_s: float | None
    video_backend: str
    frames_indices: tuple[int, ...] = ()

    @property
    def duration(self) -> float | None:
        """`duration_s` under the name that Hugging Face's sampling functions read."""
        return self.duration_s

    def as_hf(self) -> dict[str, Any]:
        """The fields of `transformers.video_utils.VideoMetadata`, ready for `video_metadata=`."""
        return {
            "total_num_frames": self.total_num_frames,
            "fps": self.fps,
            "width": self.width,
            "height": self.height,
            "duration": self.duration_s,
            "video_backend": self.video_backend,
            "frames_indices": list(self.frames_indices),
        }


class FrameSampler(Protocol):
    """Chooses frames. Two samplers with one `key` must choose alike: the key is part of a decoded clip's identity."""

    @property
    def key(self) -> str:
        """What the choice depends on besides the metadata."""
        ...

    def __call__(self, metadata: VideoMetadata, /) -> Sequence[int]:
        """Indices in `range(metadata.total_num_frames)`, in the order wanted."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoSampling:
    """Sampling by count or by rate; with neither, every frame.

    Attributes:
        num_frames: frames wanted.
        fps: frames wanted per second of play time.
        rule: "uniform" steps evenly from the first frame on (transformers' default processor); "temporal_patches"
            does the same with a count divisible by `temporal_patch_size` (Qwen2-VL, VideoLLaMA 3); "endpoints"
            spreads frames from the first to the last inclusive (Qwen3-VL).
        temporal_patch_size: frames that the encoder takes together, for "temporal_patches".
        min_frames: least count when sampling by rate, for "temporal_patches" and "endpoints".
        max_frames: greatest count when sampling by rate, for "temporal_patches" and "endpoints".

    Raises:
        InvalidRequestError: both count and rate are given, or a value is not positive.
    """

    num_frames: int | None = None
    fps: float | None = None
    rule: Rule = "uniform"
    temporal_patch_size: int = 2
    min_frames: int = 4
    max_frames: int = 768

    def __post_init__(self) -> None:
        if self.num_frames is not None and self.fps is not None:
            raise InvalidRequestError(
                f"video sampling: got num_frames {self.num_frames} and fps {self.fps}, expected one of them. "
                "Leave out num_frames or fps."
            )
        if self.rule not in ("uniform", "temporal_patches", "endpoints"):
            raise InvalidRequestError(
                f"video sampling rule: got {self.rule!r}, expected uniform, temporal_patches or endpoints. Set rule."
            )
        for name in ("num_frames", "fps", "temporal_patch_size", "min_frames", "max_frames"):
            value = getattr(self, name)
            if value is not None and not _is_positive(value, whole=name != "fps"):
                raise InvalidRequestError(
                    f"video sampling: got {name} {value!r}, expected a positive number. Set {name}."
                )

    @property
    def key(self) -> str:
        """See `FrameSampler`."""
        return ",".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))

    def __call__(self, metadata: VideoMetadata, /) -> Sequence[int]:
        """See `FrameSampler`.

        Raises:
            MediaError: sampling by rate, and the clip's rate is not known.
        """
        total = metadata.total_num_frames
        count = self._count(total, metadata.fps)
        if self.rule == "endpoints":
            return _as_list(np.linspace(0, total - 1, count).round())
        if self.rule == "temporal_patches":
            return _as_list(_float_steps(total, count))
        return _as_list(np.arange(count) * total // count)

    def _count(self, total: int, video_fps: float | None) -> int:
        """How many frames to take of `total`."""
        patch = self.temporal_patch_size
        if self.num_frames is None and self.fps is None:
            return min(max(total, self.min_frames), self.max_frames) if self.rule == "endpoints" else total
        if self.num_frames is not None:
            patches = round(self.num_frames / patch) * patch
            wanted = patches if self.rule == "temporal_patches" else self.num_frames
            return wanted if 0 < wanted <= total else total
        return self._count_by_rate(total, total / self._known(video_fps) * (self.fps or 0.0))

    def _count_by_rate(self, total: int, wanted: float) -> int:
        if self.rule == "uniform":
            return min(max(1, int(wanted)), total)
        if self.rule == "endpoints":
            return min(max(int(wanted), self.min_frames), self.max_frames, total)
        patch = self.temporal_patch_size
        most = math.floor(min(self.max_frames, total) / patch) * patch
        return math.floor(min(max(wanted, self.min_frames), most, total) / patch) * patch or total

    def _known(self, video_fps: float | None) -> float:
        if video_fps is None:
            raise MediaError(
                f"video has no frame rate: got fps {self.fps} to sample it by, expected num_frames. "
                "Set num_frames instead of fps."
            )
        return video_fps


def _is_positive(value: object, *, whole: bool) -> bool:
    kinds = int if whole else (int, float)
    return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value) and value > 0


def _float_steps(total: int, count: int) -> NDArray[np.float32]:
    """`torch.arange(0, total, total / count)`: computed in double precision, rounded to single, then cut down.

    The rounding matters: it lifts values a hair below a whole number onto it.
    """
    step = total / count
    return (np.arange(math.ceil(total / step)) * step).astype(np.float32)


def _as_list(indices: NDArray[Any]) -> list[int]:
    return [int(index) for index in indices]

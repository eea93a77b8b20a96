"""Video preprocessing in plain torch: what Hugging Face's video processors compute, without torchvision.

Two forms of output exist. Qwen2-VL and its kin take patches: `pixel_values_videos` `(num_patches, patch_dim)` and
`video_grid_thw` `(num_videos, 3)`. Others take frames: `pixel_values_videos` `(num_videos, num_frames, 3, height,
width)`. Where a checkpoint has only an image processor, frames go through that.

Resizing is torch's antialiased interpolation on 8-bit frames, which is what torchvision calls, so the values equal
those of Hugging Face. Frames are used as given: which of them are worth decoding was decided when the file was read.

Source: `Qwen2VLVideoProcessor` and `BaseVideoProcessor` of Hugging Face transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from sensorium.errors import InvalidTypeError, ProcessorError, UnsupportedFeatureError
from sensorium.multimodal.hf_processors import (
    Backend,
    cached_get_image_processor,
    cause,
    effective_settings,
    read_config_file,
    torchvision_only_class,
    with_settings,
)
from sensorium.multimodal.processor_names import folder_with_current_names
from sensorium.multimodal.resize_limits import MAX_CLIP_PIXELS, check_picture, check_pixels
from sensorium.multimodal.setting_values import check_values, wrong_value
from sensorium.multimodal.smart_resize import smart_resize, smart_resize_clip
from sensorium.multimodal.torchvision import hide_torchvision, is_processor, require_torchvision, torchvision_problem

if TYPE_CHECKING:
    import torch

_CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
_CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
_PATCH_PROCESSOR = "Qwen2VLVideoProcessor"
_CLIP_PROCESSOR = "Qwen3VLVideoProcessor"

_CROPPED_CLIP: Mapping[str, Any] = {
    "size": {"shortest_edge": 224},
    "crop_size": {"height": 224, "width": 224},
    "do_center_crop": True,
}
_SIZE_384: Mapping[str, Any] = {"size": {"height": 384, "width": 384}}

DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    _PATCH_PROCESSOR: {
        "size": {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28},
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    _CLIP_PROCESSOR: {
        "size": {"shortest_edge": 128 * 32 * 32, "longest_edge": 768 * 32 * 32},
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": (0.5, 0.5, 0.5),
        "image_std": (0.5, 0.5, 0.5),
        "max_video_tokens": 768,
        "counts_whole_clip": True,
    },
    "LlavaNextVideoVideoProcessor": _CROPPED_CLIP,
    "VideoLlavaVideoProcessor": _CROPPED_CLIP,
    "LlavaOnevisionVideoProcessor": _SIZE_384,
    "InternVLVideoProcessor": _SIZE_384,
}
"""Hugging Face's video processors that are computed here, with the settings a checkpoint may leave out."""

_TYPE_OF_MODEL: Mapping[str, str] = {
    "qwen2_vl": _PATCH_PROCESSOR,
    "qwen2_5_vl": _PATCH_PROCESSOR,
    "qwen2_5_omni": _PATCH_PROCESSOR,
    "qwen3_vl": _CLIP_PROCESSOR,
    "qwen3_vl_moe": _CLIP_PROCESSOR,
    "llava_next_video": "LlavaNextVideoVideoProcessor",
    "video_llava": "VideoLlavaVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}
"""For checkpoints whose files don't name a video processor: the one of their `model_type`."""

_WAY_OUT = "; or register a mapper with register_video_input_mapper(mapper)"

_OF_PATCHES = frozenset(
    {
        "patch_size",
        "temporal_patch_size",
        "merge_size",
        "cap_pixels_per_frame",
        "max_video_tokens",
        "counts_whole_clip",
        "min_pixels",
        "max_pixels",
    }
)
"""Settings without a meaning where the output is frames."""

_INTERPOLATION = {0: "nearest-exact", 2: "bilinear", 3: "bicubic"}
"""Names in torch of PIL's resampling filters."""


@dataclass(frozen=True, kw_only=True)
class VideoProcessor:
    """The settings of one checkpoint's video processor, and the computation. Field names are Hugging Face's."""

    size: Mapping[str, int]
    do_resize: bool = True
    resample: int = 3
    do_center_crop: bool | None = False
    crop_size: Mapping[str, int] | None = None
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    image_mean: Sequence[float] = _CLIP_MEAN
    image_std: Sequence[float] = _CLIP_STD
    patch_size: int | None = None
    """Side of a patch in pixels; None: the output is frames."""
    temporal_patch_size: int = 2
    """Frames in a patch; a clip is filled up with its last frame."""
    merge_size: int = 2
    """Patches on a side of the square that becomes one decoder row."""
    cap_pixels_per_frame: bool | None = None
    """Bound each frame by its share of a whole clip's pixels."""
    max_video_tokens: int = 128_000
    """Decoder rows from which that share is computed; of a frame, where pixels of a whole clip count."""
    counts_whole_clip: bool = False
    """`size` bounds the pixels of all frames together (Qwen3-VL), not of each. Not one of Hugging Face's settings."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> VideoProcessor:
        """From the contents of a checkpoint's file, in which other names may occur."""
        known = {field.name for field in fields(cls)}
        values = {name: value for name, value in settings.items() if name in known and value is not None}
        return cls(**values | _sizes(settings, values.get("size"), values.get("crop_size")))

    def with_settings(self, settings: Mapping[str, Any]) -> VideoProcessor:
        """With some settings replaced; names that aren't settings are ignored.

        Raises `InvalidRequestError` (a `ValueError`) for values that can't be used.
        """
        known = {field.name for field in fields(self)} | {"min_pixels", "max_pixels"}
        values = {name: value for name, value in settings.items() if name in known and value is not None}
        if not values:
            return self
        check_values(values)
        sizes = _sizes(values, values.get("size", self.size), values.get("crop_size", self.crop_size))
        own = {name: value for name, value in values.items() if name not in ("min_pixels", "max_pixels")}
        processor = replace(self, **own | sizes)
        processor.check()
        return processor

    @property
    def effective_settings(self) -> frozenset[str]:
        """Names of the settings that change what is computed: of patches, or of frames."""
        names = {field.name for field in fields(self)} | {"min_pixels", "max_pixels"}
        if self.patch_size is None:
            names -= _OF_PATCHES
        return frozenset(names)

    def check(self) -> None:
        """Refuse sizes that aren't positive numbers, with `InvalidRequestError`."""
        sizes = {**self.size, **(self.crop_size or {}), "merge_size": self.merge_size}
        sizes |= {"temporal_patch_size": self.temporal_patch_size, "patch_size": self.patch_size or 1}
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise wrong_value(name, value, "a positive integer")
        if not {"shortest_edge", "longest_edge"} <= self.size.keys() and self.patch_size is not None:
            raise wrong_value("size", dict(self.size), "shortest_edge and longest_edge, in pixels of a frame")

    def __call__(self, videos: Any, return_tensors: str = "pt", **kwargs: Any) -> Any:
        """`preprocess` with settings for this call, as Hugging Face's processors call their parts."""
        return self.with_settings(kwargs).preprocess(videos, return_tensors)

    def preprocess(self, videos: Any, return_tensors: str = "pt") -> Any:
        """A `BatchFeature` with `pixel_values_videos`, and `video_grid_thw` where the output is patches.

        `videos`: an array `(num_frames, height, width, 3)`, a list of such arrays, or a list of frames.
        """
        from transformers import BatchFeature

        _check_kind(return_tensors)
        clips = [self._normalized_frames(video) for video in split_videos(videos)]
        if self.patch_size is None:
            return BatchFeature({"pixel_values_videos": _stack_if_equal(clips)}, tensor_type=None)
        import torch

        patches, grids = zip(*(self._patchify(clip) for clip in clips), strict=True)
        data = {"pixel_values_videos": torch.cat(patches), "video_grid_thw": torch.tensor(grids)}
        return BatchFeature(data, tensor_type=None)

    def _normalized_frames(self, video: Any) -> torch.Tensor:
        """Frames `(num_frames, 3, height, width)`: resized, cropped, and float32 with mean and variance taken out."""
        import torch

        array = _as_array(video)
        num_frames, height, width, _ = array.shape
        new_size = self.new_size(num_frames, height, width) if self.do_resize else (height, width)
        self._check_pixels((num_frames, height, width), new_size)
        frames = _as_tensor(array)
        if self.do_resize:
            frames = _resize(frames, new_size, self.resample)
        if self.do_center_crop and self.crop_size is not None:
            frames = _center_crop(frames, self.crop_size["height"], self.crop_size["width"])
        values = frames.to(torch.float32)
        scale = self.rescale_factor if self.do_rescale else 1.0
        if not self.do_normalize:
            return values * scale
        # Subtracting on the scale of the pixels saves a pass, and rounds as the original does.
        mean = torch.tensor(self.image_mean).reshape(-1, 1, 1) * (1.0 / scale)
        std = torch.tensor(self.image_std).reshape(-1, 1, 1) * (1.0 / scale)
        return values.sub_(mean).div_(std)

    def _check_pixels(self, shape: tuple[int, int, int], new_size: tuple[int, int]) -> None:
        """Refuse a clip of this shape (frames, height, width) that would become too large."""
        num_frames, height, width = shape
        pixels = new_size[0] * new_size[1]
        if self.do_center_crop and self.crop_size is not None:
            pixels = max(pixels, self.crop_size["height"] * self.crop_size["width"])
        check_pixels("video", height, width, pixels)
        check_pixels(f"video of {num_frames} frames", height, width, num_frames * pixels, MAX_CLIP_PIXELS)

    def new_size(self, num_frames: int, height: int, width: int) -> tuple[int, int]:
        """Height and width after resizing."""
        if self.patch_size is not None:
            factor, depth = self.patch_size * self.merge_size, self.temporal_patch_size
            if self.counts_whole_clip:
                bounds = self.size["shortest_edge"], self.max_pixels(num_frames)
                return smart_resize_clip(max(num_frames, depth), height, width, factor, depth, *bounds)
            return smart_resize(height, width, factor, self.size["shortest_edge"], self.max_pixels(num_frames))
        if "height" in self.size:
            return self.size["height"], self.size["width"]
        short = self.size["shortest_edge"]
        long = int(short * max(height, width) / min(height, width))
        return (short, long) if height <= width else (long, short)

    def max_pixels(self, num_frames: int) -> int:
        """Most pixels of a frame of a clip of this length, or of all its frames where these count together."""
        most = self.size["longest_edge"]
        if not self.cap_pixels_per_frame or self.patch_size is None:
            return most
        if self.counts_whole_clip:
            of_frame = min(self.max_video_tokens * (self.patch_size * self.merge_size) ** 2, most // num_frames)
            return max(of_frame, int(self.size["shortest_edge"] * 1.05)) * num_frames
        total = int(self.max_video_tokens * (self.patch_size * self.merge_size) ** 2 * 0.9)
        share = total * self.temporal_patch_size // num_frames
        return max(min(most, share), int(self.size["shortest_edge"] * 1.05))

    def _patchify(self, frames: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int, int]]:
        """Cut frames `(num_frames, 3, height, width)` into patches.

        Returns `(t * h * w, 3 * temporal_patch_size * patch_size ** 2)` and the grid (t, h, w). The patches of one
        merged square follow each other, so that the merger can take them as consecutive rows: the order is time,
        square row, square column, row in the square, column in the square.
        """
        import torch

        assert self.patch_size is not None
        patch, merge, depth = self.patch_size, self.merge_size, self.temporal_patch_size
        if missing := -len(frames) % depth:
            frames = torch.cat([frames, frames[-1:].expand(missing, -1, -1, -1)])
        num_frames, channels, height, width = frames.shape
        t, h, w = num_frames // depth, height // patch, width // patch
        blocks = frames.reshape(t, depth, channels, h // merge, merge, patch, w // merge, merge, patch)
        blocks = blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
        return blocks.reshape(t * h * w, channels * depth * patch * patch), (t, h, w)


@dataclass(frozen=True)
class FrameStackProcessor:
    """Videos through an image processor, for checkpoints that have no video processor."""

    image_processor: Any

    @property
    def effective_settings(self) -> frozenset[str]:
        """Those of the image processor."""
        return effective_settings(self.image_processor)

    def __call__(self, videos: Any, return_tensors: str = "pt", **kwargs: Any) -> Any:
        """`preprocess` with settings for this call."""
        return FrameStackProcessor(with_settings(self.image_processor, kwargs)).preprocess(videos, return_tensors)

    def preprocess(self, videos: Any, return_tensors: str = "pt") -> Any:
        """A `BatchFeature` with `pixel_values_videos` `(num_videos, num_frames, 3, height, width)`."""
        from transformers import BatchFeature

        _check_kind(return_tensors)
        clips = [self._frames(_as_array(video)) for video in split_videos(videos)]
        return BatchFeature({"pixel_values_videos": _stack_if_equal(clips)}, tensor_type=None)

    def _frames(self, array: np.ndarray[Any, Any]) -> torch.Tensor:
        check_picture(self.image_processor, *array.shape[1:3])
        processed: torch.Tensor = self.image_processor.preprocess(
            list(_as_tensor(array).numpy()), return_tensors="pt", input_data_format="channels_first"
        )["pixel_values"]
        return processed


def _check_kind(return_tensors: str) -> None:
    """Refuse anything but torch's tensors, since nothing else is made here."""
    if return_tensors != "pt":
        raise wrong_value("return_tensors", return_tensors, "'pt'")


def cached_get_video_processor(
    processor_name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    backend: Backend = "auto",
    **kwargs: Any,
) -> Any:
    """The video processor of a checkpoint, with `kwargs` in place of its file's settings of these names.

    `backend="torchvision"` gives Hugging Face's own, and so does "auto" for those that are not computed here. Raises
    `ProcessorError` (a `RuntimeError`) if the checkpoint has neither a video nor an image processor,
    `MissingLibraryError` if it has one that needs torchvision, and that can't be had.
    """
    if resolve_video_backend(processor_name, revision, backend) == "torchvision":
        return with_settings(_torchvision_video_processor(processor_name, trust_remote_code, revision), kwargs)
    base = _video_processor(processor_name, revision)
    if base is not None:
        return base.with_settings(kwargs)
    return FrameStackProcessor(
        cached_get_image_processor(
            processor_name, trust_remote_code=trust_remote_code, revision=revision, backend=backend, **kwargs
        )
    )


def resolve_video_backend(
    processor_name: str, revision: str | None, backend: Backend
) -> Literal["native", "torchvision"]:
    """Whether a checkpoint's clips are processed by this module, or by Hugging Face's classes on torchvision.

    Raises `MissingLibraryError` (a `RuntimeError`) if torchvision is needed and can't be had, `ProcessorError` (one
    too) if the checkpoint names a video processor that nobody has.
    """
    settle_torchvision(processor_name, revision, backend)
    if backend == "torchvision":
        require_torchvision("mm_processor_backend='torchvision'", "; or set it to 'auto'")
        return "torchvision"
    foreign = foreign_video_processor(processor_name, revision)
    if foreign is not None:
        _check_exists(processor_name, revision)
    if foreign is None or backend == "pil":
        return "native"
    require_torchvision(
        f"the video processor of this checkpoint, {foreign}, exists for torchvision only, and so",
        f"{_WAY_OUT}, or set limit_mm_per_prompt to {{'video': 0}}",
    )
    return "torchvision"


def settle_torchvision(processor_name: str, revision: str | None, backend: Backend) -> None:
    """Import torchvision if any processor of a checkpoint needs it and it can be had; else keep it from being imported.

    Transformers remembers what it finds, so that a checkpoint's processors of all kinds must find the same.
    """
    needed = (
        backend == "torchvision"
        or torchvision_only_class(processor_name, revision) is not None
        or foreign_video_processor(processor_name, revision) is not None
    )
    if not needed or torchvision_problem() is not None:
        hide_torchvision()


@lru_cache(maxsize=16)
def _torchvision_video_processor(processor_name: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoVideoProcessor

    try:
        with folder_with_current_names(processor_name) as folder:
            return AutoVideoProcessor.from_pretrained(folder, trust_remote_code=trust_remote_code, revision=revision)
    except (ImportError, OSError, ValueError) as exc:
        raise ProcessorError(
            f"Video processor: the checkpoint has none that can be loaded ({cause(exc)}). Correct its "
            f"video_preprocessor_config.json{_WAY_OUT}."
        ) from exc


@lru_cache(maxsize=16)
def foreign_video_processor(processor_name: str, revision: str | None) -> str | None:
    """The type of a checkpoint's video processor if it is none of those that are computed here."""
    kind = _video_processor_type(processor_name, revision)
    return None if kind is None or kind in DEFAULTS else kind


def _video_processor_type(processor_name: str, revision: str | None) -> str | None:
    """The type of a checkpoint's video processor; None if its files describe only an image processor."""
    settings = _video_settings(processor_name, revision)
    kind = settings.get("video_processor_type") or _type_by_model(processor_name, revision, settings)
    if kind is None and "temporal_patch_size" in settings:
        kind = settings.get("image_processor_type", "a processor of space-time patches")
    return kind


def _check_exists(processor_name: str, revision: str | None) -> None:
    """Raise `ProcessorError` if a checkpoint names a video processor that neither transformers nor its own code has."""
    settings = _video_settings(processor_name, revision)
    kind, own_code = settings.get("video_processor_type"), settings.get("auto_map") or {}
    if kind is not None and not is_processor(str(kind)) and "AutoVideoProcessor" not in own_code:
        raise ProcessorError(
            f"Video processor: the checkpoint's is {kind}, which transformers doesn't have. Correct "
            f"video_processor_type in its files{_WAY_OUT}, or set limit_mm_per_prompt to "
            "{'video': 0}."
        )


@lru_cache(maxsize=16)
def _video_processor(processor_name: str, revision: str | None) -> VideoProcessor | None:
    """The processor that a checkpoint's files describe; None if they describe only an image processor."""
    kind = _video_processor_type(processor_name, revision)
    if kind is None:
        return None
    if kind not in DEFAULTS:
        raise UnsupportedFeatureError(
            f"Video processor: got {kind}, expected one of {sorted(DEFAULTS)}. Install torchvision and set "
            f"mm_processor_backend to 'auto'{_WAY_OUT}."
        )
    return VideoProcessor.from_settings({**DEFAULTS[kind], **_video_settings(processor_name, revision)})


def split_videos(videos: Any) -> list[Any]:
    """Separate videos: an array of five axes or a list of arrays of four holds several; frames make up one."""
    if isinstance(videos, np.ndarray):
        return list(videos) if videos.ndim == 5 else [videos]
    if isinstance(videos, list | tuple) and videos and np.ndim(videos[0]) == 4:
        return list(videos)
    return [np.stack([np.asarray(frame) for frame in videos])]


def _as_array(video: Any) -> np.ndarray[Any, Any]:
    """Frames `(num_frames, height, width, 3)`; `InvalidTypeError` (a `TypeError`) for any other shape."""
    frames = np.asarray(video)
    if frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape or frames.dtype.kind not in "uif":
        raise InvalidTypeError(
            f"Invalid video: got an array of shape {frames.shape} and type {frames.dtype}, expected "
            f"(num_frames, height, width, 3) of numbers. Stack RGB frames."
        )
    return frames


def _as_tensor(frames: np.ndarray[Any, Any]) -> torch.Tensor:
    """Frames `(num_frames, height, width, 3)` as a tensor `(num_frames, 3, height, width)`, 8-bit where they are."""
    import torch

    if frames.dtype != np.uint8:
        frames = frames.astype(np.float32)
    return torch.from_numpy(np.array(frames.transpose(0, 3, 1, 2), order="C"))


def _resize(frames: torch.Tensor, size: tuple[int, int], resample: int) -> torch.Tensor:
    import torch

    if tuple(frames.shape[-2:]) == size:
        return frames
    mode = _INTERPOLATION.get(resample)
    if mode is None:
        raise UnsupportedFeatureError(
            f"Video processor setting 'resample': got {resample}, expected one of {sorted(_INTERPOLATION)}."
        )
    return torch.nn.functional.interpolate(frames, size, mode=mode, antialias=mode != "nearest-exact")


def _center_crop(frames: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle of each frame; black where the frame is smaller."""
    import torch

    missing_h, missing_w = max(height - frames.shape[-2], 0), max(width - frames.shape[-1], 0)
    if missing_h or missing_w:
        pads = (missing_w // 2, -(-missing_w // 2), missing_h // 2, -(-missing_h // 2))
        frames = torch.nn.functional.pad(frames, pads)
    top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width]


def _stack_if_equal(clips: list[torch.Tensor]) -> torch.Tensor | list[torch.Tensor]:
    import torch

    return torch.stack(clips) if len({clip.shape for clip in clips}) == 1 else clips


def _sizes(settings: Mapping[str, Any], size: Any, crop_size: Any) -> dict[str, Any]:
    """`size` and `crop_size` as dicts of edges; the older `min_pixels` and `max_pixels` win over `size`."""
    for name, value in (("size", size), ("crop_size", crop_size)):
        if not isinstance(value, Mapping | int | None):
            raise wrong_value(name, value, "a dict of edges")
    merged = {"shortest_edge": size} if isinstance(size, int) else dict(size or {})
    for old, new in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        if settings.get(old) is not None:
            merged[new] = settings[old]
    crop = {"height": crop_size, "width": crop_size} if isinstance(crop_size, int) else crop_size
    return {"size": merged, "crop_size": crop}


def _video_settings(processor_name: str, revision: str | None) -> dict[str, Any]:
    """What a checkpoint's files say, the most specific file first."""
    nested = read_config_file(processor_name, "processor_config.json", revision)
    for settings in (
        nested.get("video_processor"),
        read_config_file(processor_name, "video_preprocessor_config.json", revision),
        read_config_file(processor_name, "preprocessor_config.json", revision),
        nested.get("image_processor"),
    ):
        if settings:
            return dict(settings)
    return {}


def _type_by_model(processor_name: str, revision: str | None, settings: Mapping[str, Any]) -> str | None:
    kind = _TYPE_OF_MODEL.get(str(read_config_file(processor_name, "config.json", revision).get("model_type")))
    if kind is None and str(settings.get("image_processor_type", "")).startswith("Qwen2VLImageProcessor"):
        return _PATCH_PROCESSOR
    return kind

"""Which frames of an encoded clip a model looks at: what its checkpoint says, unless the request says
otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sensorium.media import VideoSampling
from sensorium.media.sampling import Rule

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

_RULES: Mapping[str, Rule] = {
    "Qwen2VLVideoProcessor": "temporal_patches",
    "VideoLlama3VideoProcessor": "temporal_patches",
    "Qwen3VLVideoProcessor": "endpoints",
}
"""Hugging Face's video processors with a rule of their own; the others step evenly."""

_BOUNDS = ("temporal_patch_size", "min_frames", "max_frames")


class CheckpointSampling:
    """Makes the sampling of a request's clips.

    A request's `num_frames` or `fps` (in `mm_processor_kwargs`) come first, then the engine's, then the
    checkpoint's if it asks for sampling. With none of them, all frames are taken, as Hugging Face does.
    """

    def __init__(self, model_config: ModelConfig) -> None:
        self._model_config = model_config

    @cached_property
    def _settings(self) -> Mapping[str, Any]:
        from sensorium.multimodal.hf_processors import read_config_file

        config = self._model_config
        for filename in ("video_preprocessor_config.json", "preprocessor_config.json"):
            if settings := read_config_file(config.model, filename, config.revision):
                return settings
        return {}

    @property
    def names(self) -> frozenset[str]:
        """Names of the settings that change which frames are taken, under the rule of the checkpoint."""
        of_rule = {"temporal_patches": _BOUNDS, "endpoints": ("min_frames", "max_frames"), "uniform": ()}
        return frozenset(("num_frames", "fps", *of_rule[self._rule]))

    @property
    def _rule(self) -> Rule:
        return _RULES.get(str(self._settings.get("video_processor_type")), "uniform")

    def __call__(self, mm_processor_kwargs: Mapping[str, Any]) -> VideoSampling:
        """The sampling for a request. Raises `InvalidRequestError` (a `ValueError`) for values that can't be
        used.
        """
        settings = self._settings
        own = settings if settings.get("do_sample_frames") else {}
        for source in (mm_processor_kwargs, self._model_config.mm_processor_kwargs or {}, own):
            wanted = {name: source[name] for name in ("num_frames", "fps") if source.get(name) is not None}
            if wanted:
                break
        bounds = {
            name: value for name in _BOUNDS if (value := mm_processor_kwargs.get(name, settings.get(name))) is not None
        }
        return VideoSampling(**wanted, **bounds, rule=self._rule)

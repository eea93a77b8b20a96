"""Sounds: their plugin. There is no default way to map them, since feature extraction differs from model to model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sensorium.errors import UnsupportedFeatureError
from sensorium.multimodal.base import MultiModalPlugin
from sensorium.multimodal.context import InputContext
from sensorium.multimodal.inputs import MultiModalKwargs

if TYPE_CHECKING:
    import numpy as np

__all__ = ["AudioPlugin", "resample_audio"]


class AudioPlugin(MultiModalPlugin):
    """Audio: a class brings its own mapper and its own largest number of rows."""

    def get_data_key(self) -> str:
        """See `MultiModalPlugin`."""
        return "audio"

    def _default_input_mapper(self, ctx: InputContext, data: Any, **mm_processor_kwargs: Any) -> MultiModalKwargs:
        raise UnsupportedFeatureError(
            "There is no default audio input mapper. Register one with register_audio_input_mapper(mapper)."
        )

    def _default_max_multimodal_tokens(self, ctx: InputContext) -> int:
        raise UnsupportedFeatureError(
            "There is no default maximum number of audio tokens. Register one with register_max_audio_tokens(number)."
        )


def resample_audio(audio: np.ndarray[Any, Any], *, orig_sr: float, target_sr: float) -> np.ndarray[Any, Any]:
    """Samples `(..., num_samples)` at another rate; rates in Hz."""
    from sensorium.media.resample import resample_audio as resample

    return resample(audio, orig_sr, target_sr)

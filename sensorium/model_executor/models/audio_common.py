"""Shared by model files with audio: callers' sounds, checked and resampled to a model's rate."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

from sensorium.config import ModelConfig
from sensorium.errors import InvalidRequestError, InvalidTypeError
from sensorium.multimodal.audio import resample_audio
from sensorium.multimodal.hf_processors import cached_get_feature_extractor
from sensorium.multimodal.item_checks import check_heard

Sound: TypeAlias = Any
"""Samples `(num_samples,)`, or a pair of samples and their rate in Hz; or embeddings `(num_rows, hidden_size)`."""


def feature_extractor(model_config: ModelConfig) -> Any:
    """The checkpoint's feature extractor."""
    return cached_get_feature_extractor(
        model_config.model, trust_remote_code=model_config.trust_remote_code, revision=model_config.revision
    )


def checked(sound: Sound, extractor: Any) -> tuple[np.ndarray[Any, Any], float]:
    """Samples `(num_samples,)` and their rate in Hz.

    Raises:
        InvalidTypeError: Not samples of one channel.
        InvalidRequestError: A rate or a sample is not finite, the rate is not positive, or the sound is longer than the
            model's window, which the reference would cut off.
    """
    samples, rate = sound if isinstance(sound, tuple) and len(sound) == 2 else (sound, extractor.sampling_rate)
    samples = np.asarray(samples)
    if samples.ndim != 1 or samples.dtype.kind not in "fiu":
        raise InvalidTypeError(
            f"Invalid audio type: got an array of shape {samples.shape} and type {samples.dtype}, expected samples "
            "(num_samples,) or a pair (samples, sampling_rate). Mix the channels down to one."
        )
    if not (np.isfinite(rate) and rate > 0 and np.isfinite(samples).all()):
        raise InvalidRequestError(
            f"got samples that are not finite, or a rate of {rate} Hz, expected finite samples and a positive "
            "rate. Check how the sound was decoded.",
            field="audio",
        )
    check_heard("audio", len(samples) / rate, extractor.n_samples / extractor.sampling_rate)
    return samples, rate


def heard_samples(sound: Sound, extractor: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Samples `(num_samples,)` at the model's rate, cut to the model's window: a file's encoder may have padded a sound
    beyond it."""
    samples, rate = checked(sound, extractor)
    resampled = resample_audio(samples.astype(np.float32), orig_sr=rate, target_sr=extractor.sampling_rate)
    return resampled[: extractor.n_samples]


def max_audio_s(model_config: ModelConfig) -> float:
    """The model's window in seconds: the longest sound that it takes."""
    extractor = feature_extractor(model_config)
    return float(extractor.n_samples / extractor.sampling_rate)

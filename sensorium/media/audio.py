"""Sounds: from encoded bytes to mono float32 samples at their own rate.

Canonical: one channel, the mean of all channels; float32, integers scaled so that full scale is 1; the sampling rate of
the file. Resampling to the rate that a model wants is `resample.resample_audio`. Duration and decoded
bytes are counted while decoding, packet by packet: what a header claims is not believed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import MediaError
from sensorium.media import memory_fence
from sensorium.media.container import Deadline, open_container, prepare_decoder, unknown_format
from sensorium.media.limits import MediaLimits, check_encoded_bytes, too_large
from sensorium.media.resample import MAX_RATE, MIN_RATE
from sensorium.media.sniff import find_stream

if TYPE_CHECKING:
    from av import AudioFrame

# Beyond this, squares and sums over a spectrum leave float32. Sound is at most 1 by convention.
MAX_AMPLITUDE = 2.0**20


class AudioClip(NamedTuple):
    """A sound in the `(array, sampling_rate)` form of the extension API.

    Attributes:
        samples: mono, shape `(num_samples,)`, float32, finite.
        sampling_rate: samples per second.
    """

    samples: NDArray[np.float32]
    sampling_rate: int

    @property
    def duration_s(self) -> float:
        """Play time in seconds."""
        return len(self.samples) / self.sampling_rate


def decode_audio(data: bytes, limits: MediaLimits | None = None) -> AudioClip:
    """Decode wav, mp3, flac, ogg (Vorbis, Opus), m4a, aac, aiff or webm bytes, or the sound of a clip.

    Raises:
        MediaTooLargeError: too many bytes, seconds or decoded bytes.
        MediaTypeError: the container or codec is not decoded here.
        MediaError: there is no sound, it is corrupt, or its samples are not finite.
    """
    limits = limits or MediaLimits()
    check_encoded_bytes("audio", len(data), limits)
    found = find_stream(data)
    if found is None or found[0] == "gif":
        raise unknown_format("audio", "wav, mp3, flac, ogg, opus, m4a, aac, aiff, webm")
    demuxer, data = found
    deadline = Deadline("audio", limits)
    with open_container(data, demuxer, "audio", limits, deadline) as container:
        if not container.streams.audio:
            raise MediaError("audio is missing: got a file without a sound track, expected one. Send a sound.")
        memory_fence.allow_all()
        stream = container.streams.audio[0]
        prepare_decoder(stream, "audio", limits)
        mixer = _MonoMixer(limits)
        for packet in container.demux(stream):
            deadline.check()
            for frame in packet.decode():
                mixer.add(frame)
    return mixer.clip()


class _MonoMixer:
    """Collects decoded frames as mono samples. Invariant: what it holds is within the budgets."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._parts: list[NDArray[np.float32]] = []
        self._sampling_rate = 0
        self._num_samples = 0
        self._decoded_bytes = 0

    def add(self, frame: AudioFrame) -> None:
        """Count, check, mix down and keep one frame."""
        if not MIN_RATE <= frame.sample_rate <= MAX_RATE:
            raise MediaError(
                f"audio sampling rate is out of range: got {frame.sample_rate}, expected {MIN_RATE} to {MAX_RATE}. "
                "Convert the audio."
            )
        if self._sampling_rate not in (0, frame.sample_rate):
            raise MediaError(
                f"audio changes its sampling rate: got {self._sampling_rate}, then {frame.sample_rate}, expected one. "
                "Convert the audio."
            )
        self._sampling_rate = frame.sample_rate
        self._num_samples += frame.samples
        self._decoded_bytes += 4 * frame.samples * frame.layout.nb_channels
        self._check()
        self._parts.append(to_mono(frame))

    def _check(self) -> None:
        limits = self._limits
        if self._num_samples > limits.max_audio_s * self._sampling_rate:
            bound = f"{limits.max_audio_s:g} s"
            raise too_large("audio is too long", f"more than {bound}", bound, "Send a shorter sound", "max_audio_s")
        if self._decoded_bytes > limits.max_audio_decoded_bytes:
            bound = str(limits.max_audio_decoded_bytes)
            raise too_large(
                "audio decodes to too many bytes",
                f"more than {bound}",
                bound,
                "Send a shorter sound, or one of fewer channels",
                "max_audio_decoded_bytes",
            )

    def clip(self) -> AudioClip:
        """Everything collected."""
        if not self._num_samples:
            raise MediaError("audio is empty: got 0 samples, expected at least 1. Send a sound.")
        samples = np.concatenate(self._parts)
        check_samples(samples)
        return AudioClip(samples, self._sampling_rate)


def check_samples(samples: NDArray[Any]) -> None:
    """Refuse samples that are not finite or absurdly large. One pass; a NaN fails the comparison.

    Raises:
        MediaError: they are.
    """
    peak = max(-float(samples.min()), float(samples.max()))
    if not peak <= MAX_AMPLITUDE:
        raise MediaError(
            f"audio has invalid samples: got {peak:g}, expected finite values, by convention between -1 and 1. "
            "Check how the sound was written."
        )


def to_mono(frame: AudioFrame) -> NDArray[np.float32]:
    """A decoded frame as mono float32, shape `(num_samples,)`: the mean of its channels, full scale 1."""
    channels = frame.layout.nb_channels
    pcm = frame.to_ndarray()
    # Planar formats come as (channels, samples); interleaved ones as (1, samples x channels).
    pcm = pcm if frame.format.is_planar else pcm.reshape(-1, channels).T
    scaled = _full_scale_to_one(pcm)
    mono: NDArray[np.float32] = scaled[0] if channels == 1 else scaled.mean(axis=0, dtype=np.float32)
    return mono


def _full_scale_to_one(pcm: NDArray[Any]) -> NDArray[np.float32]:
    """Integers divided by their full scale, a power of two; 8-bit samples are unsigned around 128."""
    samples: NDArray[np.float32] = pcm.astype(np.float32)
    if pcm.dtype.kind == "f":
        return samples
    if pcm.dtype == np.uint8:
        samples -= 128.0
    samples *= 2.0 ** (1 - 8 * pcm.dtype.itemsize)
    return samples

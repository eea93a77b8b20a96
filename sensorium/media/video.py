"""Clips: from encoded bytes to the sampled frames and the metadata that Hugging Face's video processors expect.

Three steps: read all packets once, without decoding, to learn the true number of frames (`video_index.py`); let the
sampler choose; decode the chosen frames (`video_decode.py`). If decoding yields fewer frames than there are packets,
the sampler chooses again from the true number. All containers go this way, animated GIF too; JPEG frames sent one by
one (`video/jpeg` data URLs) have their own short way under the same budgets.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import InvalidRequestError, MediaError, SensoriumError
from sensorium.logger import get_logger
from sensorium.media import memory_fence
from sensorium.media.container import Deadline, corrupt, open_container, prepare_decoder, unknown_format
from sensorium.media.image import decode_image
from sensorium.media.limits import MediaLimits, check_encoded_bytes, too_large
from sensorium.media.local import decode_base64, is_jpeg_frames
from sensorium.media.sampling import FrameSampler, VideoMetadata, VideoSampling
from sensorium.media.sniff import find_video_stream
from sensorium.media.video_decode import (
    FrameCollector,
    check_frame_size,
    decode_by_seeking,
    decode_in_sequence,
)
from sensorium.media.video_index import VideoIndex, index_packets

logger = get_logger(__name__)


Allocate: TypeAlias = Callable[[tuple[int, ...]], NDArray[np.uint8]]
"""An uninitialized array of bytes of the given shape."""


def _allocate(shape: tuple[int, ...]) -> NDArray[np.uint8]:
    return np.empty(shape, np.uint8)


@dataclass(frozen=True, slots=True, eq=False)
class VideoFrames:
    """Frames of a clip.

    Attributes:
        frames: shape `(num_frames, height, width, 3)`, uint8, RGB, upright.
        metadata: of the clip, with the index of each frame.
    """

    frames: NDArray[np.uint8]
    metadata: VideoMetadata


def decode_video(
    data: bytes,
    limits: MediaLimits | None = None,
    sampler: FrameSampler | None = None,
    *,
    media_type: str | None = None,
    allocate: Allocate = _allocate,
) -> VideoFrames:
    """Decode the frames of an mp4, mov, webm, mkv, avi or gif that `sampler` chooses; all of them by default.

    Args:
        media_type: "video/jpeg", with an optional ";fps=" parameter, says that `data` are JPEG frames in base64 with
            commas between. Other types are ignored: the content tells.
        allocate: makes the memory of the frames.

    Raises:
        MediaTooLargeError: a budget of bytes, frames, pixels or seconds is exceeded.
        MediaTypeError: the container or codec is not decoded here.
        MediaError: there is no picture track, or it is corrupt.
    """
    limits, sampler = limits or MediaLimits(), sampler or VideoSampling()
    if is_jpeg_frames(media_type):
        return _decode_jpeg_frames(data, media_type or "", limits, sampler, allocate)
    check_encoded_bytes("video", len(data), limits)
    found = find_video_stream(data)
    if found is None:
        raise unknown_format("video", "mp4, mov, webm, mkv, avi, gif")
    demuxer, data = found
    return _ClipDecoder(data, demuxer, limits, allocate).decode(sampler)


class _ClipDecoder:
    """Decodes one clip; passes over it share one deadline and one count of decoded frames."""

    def __init__(self, data: bytes, demuxer: str, limits: MediaLimits, allocate: Allocate) -> None:
        self._data = data
        self._demuxer = demuxer
        self._limits = limits
        self._deadline = Deadline("video", limits)
        self._collector = FrameCollector(limits, self._deadline, allocate)

    def decode(self, sampler: FrameSampler) -> VideoFrames:
        index, metadata = self._index()
        indices = choose_frames(sampler, metadata, self._limits)
        true_count = self._decode(index, indices)
        if true_count is not None:
            if not true_count:
                raise corrupt("video")
            metadata = replace(metadata, total_num_frames=true_count, duration_s=_duration(true_count, metadata.fps))
            indices = choose_frames(sampler, metadata, self._limits)
            if self._decode(replace(index, num_frames=true_count, seek_table=None), indices) is not None:
                raise corrupt("video")
        frames = self._collector.frames()
        wanted = sorted(set(indices))
        if wanted != list(indices):  # a sampler may repeat frames or reorder them
            frames = frames[np.searchsorted(wanted, indices)]
        height, width = frames.shape[1:3]
        return VideoFrames(frames, replace(metadata, width=width, height=height, frames_indices=tuple(indices)))

    def _index(self) -> tuple[VideoIndex, VideoMetadata]:
        with self._open() as (container, stream):
            index = index_packets(container, stream, self._limits, self._deadline)
            context = stream.codec_context
            metadata = VideoMetadata(
                total_num_frames=index.num_frames,
                fps=index.fps,
                width=context.width,
                height=context.height,
                duration_s=_duration(index.num_frames, index.fps),
                video_backend="pyav",
            )
        check_frame_size(metadata.width, metadata.height, 1, self._limits)
        memory_fence.allow_all()
        return index, metadata

    def _decode(self, index: VideoIndex, indices: Sequence[int]) -> int | None:
        """Collect the frames. Returns the true number of frames if it is too small."""
        wanted = sorted(set(indices))
        if index.seek_table is not None:
            self._collector.start_pass(len(wanted))
            with self._open() as (container, stream):
                if decode_by_seeking(container, stream, index.seek_table, wanted, self._collector):
                    return None
        self._collector.start_pass(len(wanted))
        with self._open() as (container, stream):
            return decode_in_sequence(container, stream, wanted, self._collector)

    @contextmanager
    def _open(self) -> Iterator[tuple[Any, Any]]:
        """A fresh container and its first picture track, ready to decode."""
        with open_container(self._data, self._demuxer, "video", self._limits, self._deadline) as container:
            if not container.streams.video:
                raise MediaError("video is missing: got a file without a picture track, expected one. Send a video.")
            stream = container.streams.video[0]
            prepare_decoder(stream, "video", self._limits)
            yield container, stream


def choose_frames(sampler: FrameSampler, metadata: VideoMetadata, limits: MediaLimits) -> list[int]:
    """The sampler's indices, checked against the clip and the budgets.

    Raises:
        MediaTooLargeError: it wants too many frames, or too many pixels by the clip's header.
        InvalidRequestError: it wants none, or one that doesn't exist.
        MediaError: it can't deal with this clip.
    """
    try:
        indices = [int(index) for index in sampler(metadata)]
    except SensoriumError:
        raise
    except Exception:  # samplers come with models
        logger.debug("frame sampler failed", exc_info=True)
        raise cannot_be_sampled(metadata) from None
    if not indices or min(indices) < 0 or max(indices) >= metadata.total_num_frames:
        raise InvalidRequestError(
            f"video sampling: got {len(indices)} frame indices, expected at least one, each from 0 to "
            f"{metadata.total_num_frames - 1}. Change num_frames or fps."
        )
    if len(indices) > limits.max_video_frames:
        raise too_large(
            "video has too many frames",
            str(len(indices)),
            str(limits.max_video_frames),
            "Sample fewer with num_frames or fps",
            "max_video_frames",
        )
    check_frame_size(metadata.width, metadata.height, len(indices), limits)
    return indices


def cannot_be_sampled(metadata: VideoMetadata) -> MediaError:
    """The error for a clip that a model's sampler fails on."""
    return MediaError(
        f"video can't be sampled for this model: got {metadata.total_num_frames} frames, expected a number that "
        "suits the model. Send a longer video, or set num_frames."
    )


def _duration(num_frames: int, fps: float | None) -> float | None:
    return num_frames / fps if fps else None


def _decode_jpeg_frames(
    data: bytes, media_type: str, limits: MediaLimits, sampler: FrameSampler, allocate: Allocate
) -> VideoFrames:
    """Frames that come as base64 JPEG with commas between; only the chosen ones are decoded."""
    total = data.count(b",") + 1
    if total > limits.max_video_decoded_frames:
        bound = str(limits.max_video_decoded_frames)
        raise too_large("video has too many frames", str(total), bound, "Send fewer", "max_video_decoded_frames")
    deadline = Deadline("video", limits)
    parts = data.split(b",")
    fps = _declared_fps(media_type)
    first = _decode_jpeg(parts[0], limits)
    height, width = first.shape[:2]
    metadata = VideoMetadata(total, fps, width, height, _duration(total, fps), "pillow")
    indices = choose_frames(sampler, metadata, limits)
    frames = allocate((len(indices), height, width, 3))
    for place, index in enumerate(indices):
        deadline.check()
        frame = first if index == 0 else _decode_jpeg(parts[index], limits)
        if frame.shape != first.shape:
            raise MediaError("video changes its frame size: got several sizes, expected one. Convert the video.")
        frames[place] = frame
    return VideoFrames(frames, replace(metadata, frames_indices=tuple(indices)))


def _declared_fps(media_type: str) -> float | None:
    """The ";fps=" parameter of a media type."""
    for parameter in media_type.split(";")[1:]:
        name, _, value = parameter.strip().partition("=")
        if name == "fps":
            try:
                fps = float(value)
            except ValueError:
                fps = 0.0
            if not 0.0 < fps <= 1000.0:
                raise MediaError("video/jpeg data URL: got a bad fps, expected a number from 0 to 1000. Correct fps.")
            return fps
    return None


def _decode_jpeg(part: bytes, limits: MediaLimits) -> NDArray[np.uint8]:
    image_limits = replace(limits, max_image_pixels=min(limits.max_image_pixels, limits.max_video_frame_pixels))
    data = decode_base64(part.decode("ascii", "replace"), modality="video", max_bytes=limits.max_image_bytes)
    if not data.startswith(b"\xff\xd8"):
        raise corrupt("video")
    return np.asarray(decode_image(data, image_limits))

"""Opens containers of sound and video with FFmpeg (through PyAV), with narrow permissions.

The demuxer is the one that `sniff.py` named; nested protocols and other demuxers are switched off, so a container can't
make the library open anything else. Only decoders on our lists run. Once the deadline has passed, reads return nothing,
which ends loops inside a demuxer. Library errors are raised as this package's errors.
"""

from __future__ import annotations

import io
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sensorium.errors import MediaError, MediaTooLargeError, MediaTypeError
from sensorium.logger import get_logger
from sensorium.media import memory_fence
from sensorium.media.limits import MediaLimits, takes_too_much_memory, too_large
from sensorium.media.mp4_guard import BYTES_PER_SAMPLE, check_mp4_tables

if TYPE_CHECKING:
    from av.container import InputContainer

logger = get_logger(__name__)

# fmt: off
_VIDEO_DECODERS = frozenset({
    "h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "msmpeg4v2", "msmpeg4", "mpeg1video", "mpeg2video",
    "h263", "mjpeg", "png", "gif", "theora", "prores", "rawvideo", "ffv1", "huffyuv", "qtrle",
})
_AUDIO_DECODERS = frozenset({
    "mp3", "mp3float", "mp2", "mp2float", "aac", "flac", "opus", "libopus", "vorbis", "libvorbis", "alac", "ac3",
    "eac3", "pcm_alaw", "pcm_mulaw", "adpcm_ms", "adpcm_ima_wav", "adpcm_ima_qt",
})
# fmt: on
_PCM_PREFIXES = ("pcm_s", "pcm_u", "pcm_f")
_MAX_DECODER_THREADS = 4
# Decoders are told to refuse frames beyond this many times the budget. Frames between the budget and this bound are
# decoded, so that the error can name their true size.
_FENCE_FACTOR = 4
# What opening and counting packets may take: tables that lie in the file, our own lists, and the frames that a decoder
# holds while it finds out how they are ordered.
_TABLE_BYTES_PER_BYTE = 8
_PROBE_BYTES_PER_PIXEL = 24


class Deadline:
    """A point in time after which decoding one item stops."""

    def __init__(self, modality: str, limits: MediaLimits) -> None:
        self._modality = modality
        self._limit_s = limits.max_decode_s
        self._end = time.monotonic() + limits.max_decode_s

    @property
    def has_passed(self) -> bool:
        """Whether time is up."""
        return time.monotonic() > self._end

    def check(self) -> None:
        """Raise `MediaTooLargeError` if time is up."""
        if self.has_passed:
            raise takes_too_long(self._modality, self._limit_s)


def takes_too_long(modality: str, limit_s: float) -> MediaTooLargeError:
    """The error for an item that isn't decoded in time."""
    remedy = "Send a shorter sound" if modality == "audio" else f"Send a smaller or plainer {modality}"
    return too_large(
        f"{modality} takes too long to decode", f"more than {limit_s:g} s", f"{limit_s:g} s", remedy, "max_decode_s"
    )


class _DeadlineReader(io.BytesIO):
    """The encoded bytes, which appear to end when time is up: every demuxer stops at the end of its file.

    BytesIO shares the memory of the bytes given: no copy.
    """

    def __init__(self, data: bytes, deadline: Deadline) -> None:
        super().__init__(data)
        self._deadline = deadline

    def read(self, size: int | None = -1, /) -> bytes:
        return b"" if self._deadline.has_passed else super().read(size)


@contextmanager
def open_container(
    data: bytes, demuxer: str, modality: str, limits: MediaLimits, deadline: Deadline
) -> Iterator[InputContainer]:
    """Open encoded bytes for demuxing and decoding; library errors in the body become `MediaError` too.

    Raises:
        MediaError: the data are corrupt, at opening or at any time in the body.
        MediaTooLargeError: the container's tables claim absurd sizes, or the deadline passes.
    """
    import av

    num_samples = check_mp4_tables(data, modality) if demuxer == "mov" else 0
    memory_fence.allow(
        memory_fence.HEADER_BYTES
        + _TABLE_BYTES_PER_BYTE * len(data)
        + BYTES_PER_SAMPLE * num_samples
        + _PROBE_BYTES_PER_PIXEL * limits.max_video_frame_pixels
    )
    fences = {
        "protocol_whitelist": "none",
        "format_whitelist": _demuxer_names(demuxer),
        "max_pixels": _max_pixels(limits),  # decoders run while streams are probed, too
    }
    try:
        with av.open(
            _DeadlineReader(data, deadline),
            mode="r",
            format=demuxer,
            options=fences,
            metadata_errors="replace",
        ) as container:
            yield container
    except MediaError:
        deadline.check()
        raise
    except MemoryError:
        raise takes_too_much_memory(modality) from None
    except (av.error.FFmpegError, ValueError, OSError, EOFError, OverflowError) as error:
        logger.debug("%s decoder failed: %r", modality, error)
        deadline.check()
        raise corrupt(modality) from None
    deadline.check()  # a file that ended because time was up looks like a short one


def _max_pixels(limits: MediaLimits) -> str:
    return str(_FENCE_FACTOR * limits.max_video_frame_pixels)


def _demuxer_names(demuxer: str) -> str:
    """The whitelist entry: FFmpeg compares the demuxer's whole name list for some."""
    return {"mov": "mov,mp4,m4a,3gp,3g2,mj2", "matroska": "matroska,webm"}.get(demuxer, demuxer)


def corrupt(modality: str) -> MediaError:
    """The error for data that the decoder doesn't accept."""
    return MediaError(
        f"{modality} can't be decoded: got truncated or corrupt data, expected a whole file. Send it again."
    )


def unknown_format(modality: str, expected: str) -> MediaTypeError:
    """The error for bytes that aren't of an accepted container."""
    return MediaTypeError(
        f"{modality} format is not known: got other bytes, expected one of {expected}. Convert the {modality}."
    )


def prepare_decoder(stream: Any, modality: str, limits: MediaLimits) -> None:
    """Check a stream's decoder against the list and set its limits.

    Raises:
        MediaTypeError: the codec is not decoded here.
    """
    context = stream.codec_context
    name = context.name if context is not None else "unknown"
    if not is_known_decoder(name, stream.type):
        raise MediaTypeError(
            f"{modality} codec is not decoded here: got {name}, expected a common one such as "
            f"{'H.264, VP9 or AV1' if stream.type == 'video' else 'AAC, MP3, FLAC, Opus or PCM'}. "
            f"Convert the {modality}."
        )
    context.thread_count = min(_MAX_DECODER_THREADS, os.cpu_count() or 1) if stream.type == "video" else 1
    if stream.type == "video":
        context.thread_type = "AUTO"
        context.options = {"max_pixels": _max_pixels(limits)}


def is_known_decoder(name: str, kind: str) -> bool:
    """Whether a decoder is on our list for streams of `kind` ("video" or "audio")."""
    if kind == "video":
        return name in _VIDEO_DECODERS
    return name in _AUDIO_DECODERS or name.startswith(_PCM_PREFIXES)

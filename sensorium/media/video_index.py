"""The table of a clip's frames, made by reading all packets once without decoding.

Headers lie about frame counts, or give none (WebM, Matroska), so packets are counted instead. Their timestamps, sorted,
say which frame is the n-th shown. That makes exact seeking possible: to get frame n, start at the last key packet whose
time is not after frame n's, and decode until a frame with exactly frame n's timestamp comes out. Where timestamps are
missing or repeated, and for codecs whose key packets can't be relied on, there is no table, and frames are counted from
the start.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sensorium.errors import MediaError, MediaTooLargeError
from sensorium.media.container import Deadline
from sensorium.media.limits import MediaLimits, too_large

_MAX_PACKETS = 1_000_000  # most packets of one stream; an hour at 240 frames per second has fewer
_SEEKABLE_CODECS = frozenset({"h264", "hevc", "vp8", "vp9", "av1", "libdav1d", "mpeg4", "mjpeg"})
_RATE_TOLERANCE = 0.05  # a header's rate that differs more from the timestamps is ignored


@dataclass(frozen=True, slots=True)
class KeyPacket:
    """A packet that decoding can start from.

    Attributes:
        pts: its frame's presentation time.
        seek_time: the time that makes the demuxer land on it.
        order: its position in decoding order.
    """

    pts: int
    seek_time: int
    order: int


@dataclass(frozen=True, slots=True)
class SeekTable:
    """Invariant: `pts` is strictly increasing, `keys` is sorted by `pts` and not empty.

    Attributes:
        pts: presentation time of every frame, in the order shown.
        keys: the key packets.
        order: position in decoding order of the packet with a presentation time.
    """

    pts: tuple[int, ...]
    keys: tuple[KeyPacket, ...]
    order: dict[int, int]

    def key_before(self, frame: int) -> KeyPacket:
        """The last key packet shown at or before `frame`; the first one for frames before it."""
        return self.keys[max(0, bisect_right(self.keys, self.pts[frame], key=lambda key: key.pts) - 1)]


@dataclass(frozen=True, slots=True)
class VideoIndex:
    """What one pass over the packets tells.

    Attributes:
        num_frames: packets that hold a frame to be shown.
        fps: average frame rate; None where nothing tells it.
        seek_table: None where seeking wouldn't be exact.
    """

    num_frames: int
    fps: float | None
    seek_table: SeekTable | None


def index_packets(container: Any, stream: Any, limits: MediaLimits, deadline: Deadline) -> VideoIndex:
    """Read all packets of `stream`.

    Raises:
        MediaTooLargeError: too many packets, or play time beyond the budget.
        MediaError: there is no frame.
    """
    times: list[int | None] = []
    keys: list[KeyPacket] = []
    ends: list[int] = []
    by_pts = "matroska" in container.format.name  # its demuxer seeks by presentation time, the others by decoding time
    for packet in container.demux(stream):
        if not packet.size or packet.is_discard:  # the end marker; frames cut off by an edit list
            continue
        if len(times) >= _MAX_PACKETS:
            raise MediaTooLargeError(
                f"video has too many frames: got more than {_MAX_PACKETS}, expected at most that. Send a shorter video."
            )
        if packet.pts is not None:
            ends.append(packet.pts + max(packet.duration or 0, 0))
            seek_time = packet.pts if by_pts else packet.dts
            if packet.is_keyframe and seek_time is not None:
                keys.append(KeyPacket(packet.pts, seek_time, len(times)))
        times.append(packet.pts)
        if len(times) % 1024 == 0:
            deadline.check()
    if not times:
        raise MediaError("video is empty: got 0 frames, expected at least 1. Send a video.")
    known = [time for time in times if time is not None]
    seconds = float((max(ends) - min(known)) * (stream.time_base or 0)) if known else 0.0
    fps = _frame_rate(stream.average_rate, len(times), seconds)
    _check_duration(max(seconds, len(times) / fps if fps else 0.0), limits)
    is_seekable = stream.codec_context.name in _SEEKABLE_CODECS
    return VideoIndex(len(times), fps, _seek_table(times, keys) if is_seekable else None)


def _frame_rate(declared: Fraction | None, num_frames: int, seconds: float) -> float | None:
    """Frames per second: the header's value if the timestamps agree with it."""
    measured = num_frames / seconds if seconds > 0 else None
    if declared is None or declared <= 0:
        return measured
    if measured is not None and abs(float(declared) / measured - 1) > _RATE_TOLERANCE:
        return measured
    return float(declared)


def _check_duration(seconds: float, limits: MediaLimits) -> None:
    if seconds > limits.max_video_s:
        raise too_large(
            "video is too long", f"{seconds:.1f} s", f"{limits.max_video_s:g} s", "Send a shorter video", "max_video_s"
        )


def _seek_table(times: Sequence[int | None], keys: list[KeyPacket]) -> SeekTable | None:
    order = {time: position for position, time in enumerate(times) if time is not None}
    if len(order) != len(times) or not keys:
        return None
    return SeekTable(tuple(sorted(order)), tuple(sorted(keys, key=lambda key: key.pts)), order)

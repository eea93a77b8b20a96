"""Decoding chosen frames of a clip, within the budgets: by seeking where that is exact, else from the start."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import MediaError
from sensorium.media.container import Deadline, corrupt
from sensorium.media.limits import MediaLimits, too_large
from sensorium.media.video_index import KeyPacket, SeekTable

if TYPE_CHECKING:
    from av import VideoFrame

# Skipping fewer frames than this by seeking costs more than decoding them.
_MIN_SKIP = 16


class FrameCollector:
    """Takes decoded frames, counts them all, and keeps the wanted ones as RGB.

    Invariant: what has been decoded and what is kept is within the budgets, over all passes over one clip.
    """

    def __init__(self, limits: MediaLimits, deadline: Deadline, allocate: Callable[[tuple[int, ...]], Any]) -> None:
        from av.video.reformatter import VideoReformatter

        self._limits = limits
        self._deadline = deadline
        self._allocate = allocate
        self._reformatter = VideoReformatter()
        self._num_decoded = 0
        self._frames: NDArray[np.uint8] | None = None
        self._num_kept = 0
        self._num_wanted = 0

    def start_pass(self, num_wanted: int) -> None:
        """Drop the kept frames; decoded ones stay counted."""
        self._frames, self._num_kept, self._num_wanted = None, 0, num_wanted

    def count(self) -> None:
        """Count one more decoded frame."""
        self._num_decoded += 1
        bound = self._limits.max_video_decoded_frames
        if self._num_decoded > bound:
            raise too_large(
                "video takes too many decoded frames", f"more than {bound}", str(bound), "Send a shorter video",
                "max_video_decoded_frames",
            )  # fmt: skip
        self._deadline.check()

    def keep(self, frame: VideoFrame) -> None:
        """Store a frame as the next wanted one."""
        if frame.is_corrupt:
            raise corrupt("video")
        pixels = self._upright_rgb(frame)
        if self._frames is None:
            check_frame_size(pixels.shape[1], pixels.shape[0], self._num_wanted, self._limits)
            self._frames = self._allocate((self._num_wanted, *pixels.shape))
        if pixels.shape != self._frames.shape[1:]:
            raise MediaError("video changes its frame size: got several sizes, expected one. Convert the video.")
        self._frames[self._num_kept] = pixels
        self._num_kept += 1

    def frames(self) -> NDArray[np.uint8]:
        """All frames wanted, shape `(num_wanted, height, width, 3)`."""
        assert self._frames is not None
        assert self._num_kept == self._num_wanted
        return self._frames

    def _upright_rgb(self, frame: VideoFrame) -> NDArray[np.uint8]:
        if any(component.is_alpha for component in frame.format.components):
            return _turn(_over_white(self._pixels(frame, "rgba")), frame)
        return _turn(self._pixels(frame, "rgb24"), frame)

    def _pixels(self, frame: VideoFrame, format: str) -> NDArray[np.uint8]:
        return self._reformatter.reformat(frame, format=format).to_ndarray().view(np.uint8)


def check_frame_size(width: int, height: int, num_frames: int, limits: MediaLimits) -> None:
    """Check one frame's size, and that of `num_frames` frames, against the budgets.

    Raises:
        MediaTooLargeError: they exceed them.
    """
    if width * height > limits.max_video_frame_pixels:
        raise too_large(
            "video has too many pixels per frame",
            f"{width} x {height} = {width * height}",
            str(limits.max_video_frame_pixels),
            "Send a smaller video",
            "max_video_frame_pixels",
        )
    if width * height * num_frames > limits.max_video_pixels:
        raise too_large(
            "video has too many pixels",
            f"{num_frames} frames of {width} x {height} = {width * height * num_frames}",
            str(limits.max_video_pixels),
            "Sample fewer frames, send a smaller video",
            "max_video_pixels",
        )


def decode_in_sequence(container: Any, stream: Any, wanted: Sequence[int], collector: FrameCollector) -> int | None:
    """Decode from the start, keeping the frames with the indices `wanted` (sorted, distinct).

    Returns:
        None, or the number of frames if the clip ended before the last wanted one.
    """
    position = kept = 0
    for frame in _decoded(container, stream):
        collector.count()
        if position == wanted[kept]:
            collector.keep(frame)
            kept += 1
            if kept == len(wanted):
                return None
        position += 1
    return position


def decode_by_seeking(
    container: Any, stream: Any, table: SeekTable, wanted: Sequence[int], collector: FrameCollector
) -> bool:
    """As `decode_in_sequence`, skipping ahead to key packets.

    Returns:
        False where a seek landed too late or the frames' times don't follow the table: the caller starts over in
        sequence then, because only that is exact.
    """
    for number, (key, frames) in enumerate(_runs(table, wanted)):
        if number or key.order:
            container.seek(key.seek_time, stream=stream)
        if not _decode_run(container, stream, table, key, frames, collector):
            return False
    return True


def _runs(table: SeekTable, wanted: Sequence[int]) -> Iterator[tuple[KeyPacket, list[int]]]:
    """The wanted frames, grouped so that each group is decoded from one key packet."""
    run: list[int] = []
    start = table.keys[0]
    for frame in wanted:
        key = table.key_before(frame)
        if run and key != start and frame - run[-1] >= _MIN_SKIP:
            yield start, run
            run = []
        if not run:
            start = key
        run.append(frame)
    if run:
        yield start, run


def _decode_run(
    container: Any, stream: Any, table: SeekTable, key: KeyPacket, wanted: Sequence[int], collector: FrameCollector
) -> bool:
    targets = [table.pts[frame] for frame in wanted]
    kept = 0
    is_first_packet = True
    for packet in container.demux(stream):
        if is_first_packet and table.order.get(packet.pts, len(table.pts)) > key.order:
            return False
        is_first_packet = False
        for frame in packet.decode():
            collector.count()
            if frame.pts is None or frame.pts > targets[kept]:
                return False
            if frame.pts == targets[kept]:
                collector.keep(frame)
                kept += 1
                if kept == len(targets):
                    return True
    return False


def _decoded(container: Any, stream: Any) -> Iterator[VideoFrame]:
    for packet in container.demux(stream):
        yield from packet.decode()


def _over_white(rgba: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Composite over white, rounding to nearest."""
    rgb, alpha = rgba[..., :3], rgba[..., 3:]
    if alpha.min() == 255:
        return np.ascontiguousarray(rgb)
    mixed = rgb.astype(np.uint16) * alpha + 255 * (255 - alpha.astype(np.uint16))
    return ((mixed + 127) // 255).astype(np.uint8)


def _turn(pixels: NDArray[np.uint8], frame: VideoFrame) -> NDArray[np.uint8]:
    """Apply the display matrix where it is a quarter turn or a mirror image; others don't occur in practice.

    The matrix maps column and row: x' = a x + c y, y' = b x + d y. Source: ISO/IEC 14496-12, section 8.3.2.
    """
    a, b, c, d = _display_matrix(frame)
    if a and d and not b and not c:
        return pixels[:: _sign(d), :: _sign(a)]
    if b and c and not a and not d:
        return pixels.swapaxes(0, 1)[:: _sign(b), :: _sign(c)]
    return pixels


def _sign(value: int) -> int:
    return 1 if value > 0 else -1


def _display_matrix(frame: VideoFrame) -> tuple[int, int, int, int]:
    from av.sidedata.sidedata import Type

    matrix = frame.side_data.get(Type.DISPLAYMATRIX)
    if matrix is None:
        return 1, 0, 0, 1
    values = np.frombuffer(bytes(matrix), np.int32)
    return int(values[0]), int(values[1]), int(values[3]), int(values[4])

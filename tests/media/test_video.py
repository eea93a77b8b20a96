"""Clips: the frames and metadata that transformers would see, in every container, within budgets."""

import base64
import io
import os
import struct
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import PIL.Image
import pytest
from numpy.typing import NDArray
from transformers.video_utils import load_video

from sensorium.errors import MediaError, MediaTooLargeError, MediaTypeError
from sensorium.media import (
    MediaLimits,
    VideoFrames,
    VideoMetadata,
    VideoSampling,
    decode_video,
    video_decode,
)
from sensorium.media import video as video_module
from sensorium.media.container import Deadline, open_container
from sensorium.media.encode import encode_image, encode_video, frames_to_jpeg_data_url
from sensorium.media.local import read_data_url
from sensorium.media.video_index import VideoIndex
from tests.media.hostile_server import HostileServer
from tests.media.samples import clip, encode_frames, numbered_frames, sound

FORMATS = ["mp4", "mov", "mkv", "webm", "avi", "gif"]


def in_sequence(data: bytes) -> NDArray[np.uint8]:
    """Every frame, decoded from the start, by PyAV alone."""
    with av.open(io.BytesIO(data)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize("format", FORMATS)
def test_all_frames_of_every_container(format: str) -> None:
    decoded = decode_video(clip(format))
    assert decoded.frames.shape == (60, 48, 64, 3)
    assert decoded.frames.dtype == np.uint8
    assert np.array_equal(decoded.frames, in_sequence(clip(format)))
    coarse = 20 if format == "gif" else 10  # 256 fixed colours
    assert np.abs(decoded.frames.astype(int) - numbered_frames()).mean() < coarse
    metadata = decoded.metadata
    assert (metadata.total_num_frames, metadata.fps, metadata.duration_s) == (60, 10.0, 6.0)
    assert (metadata.width, metadata.height, metadata.video_backend) == (64, 48, "pyav")
    assert metadata.frames_indices == tuple(range(60))


@pytest.mark.parametrize(
    ("num_frames", "fps"), [(None, None), (1, None), (7, None), (60, None), (None, 1), (None, 3.3)]
)
@pytest.mark.parametrize("format", ["mp4", "mov", "avi"])
def test_frames_and_metadata_equal_transformers(
    tmp_path: Path, format: str, num_frames: int | None, fps: float | None
) -> None:
    """Containers whose header counts the frames; without that, transformers' reader can't sample."""
    path = tmp_path / f"clip.{format}"
    path.write_bytes(clip(format))
    frames, metadata = load_video(str(path), num_frames=num_frames, fps=fps, backend="pyav")
    decoded = decode_video(clip(format), sampler=VideoSampling(num_frames=num_frames, fps=fps))
    assert np.array_equal(decoded.frames, frames)
    hf = {name: metadata[name] for name in metadata}
    hf["frames_indices"] = list(hf["frames_indices"])
    assert decoded.metadata.as_hf() == hf


# --- seeking ---

SEEKABLE = {
    "h264": ("mp4", "libx264", {"g": "12", "bf": "3"}),
    "h264 open groups": ("mp4", "libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "h264 open groups mkv": ("matroska", "libx264", {"g": "12", "x264-params": "open-gop=1:bframes=3:scenecut=0"}),
    "h264 intra refresh": ("matroska", "libx264", {"g": "12", "x264-params": "intra-refresh=1:bframes=0"}),
    "hevc open groups": ("mp4", "libx265", {"x265-params": "keyint=12:open-gop=1:log-level=none"}),
    "vp8 hidden frames": ("webm", "libvpx", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "vp9 hidden frames": ("webm", "libvpx-vp9", {"g": "12", "auto-alt-ref": "1", "lag-in-frames": "16"}),
    "av1": ("mp4", "libsvtav1", {"g": "12", "preset": "12"}),
    "mpeg4 with b frames": ("mov", "mpeg4", {"g": "12", "bf": "2"}),
    "mpeg4 avi": ("avi", "mpeg4", {"g": "12", "bf": "2"}),
    "mjpeg": ("avi", "mjpeg", {}),
}
if "libsvtav1" not in av.codecs_available:  # the oldest PyAV that we support can decode it, but not encode it
    del SEEKABLE["av1"]


@pytest.mark.parametrize("name", SEEKABLE)
def test_sparse_frames_equal_those_decoded_in_sequence(name: str) -> None:
    """Sampled frames are exact, bit for bit, whatever the codec's frames refer to."""
    format, codec, options = SEEKABLE[name]
    pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
    data = encode_frames(numbered_frames(150), format, codec, pix_fmt, options)
    expected = in_sequence(data)
    for sampling in (VideoSampling(num_frames=5), VideoSampling(num_frames=23), VideoSampling(fps=5)):
        decoded = decode_video(data, sampler=sampling)
        indices = list(decoded.metadata.frames_indices)
        assert decoded.metadata.total_num_frames == len(expected)
        assert np.array_equal(decoded.frames, expected[indices])


@pytest.mark.parametrize("name", ["h264 open groups", "mpeg4 with b frames", "vp9 hidden frames"])
def test_seeks_that_land_too_late_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A demuxer that jumps beyond the frame wanted: the clip is decoded from the start instead."""
    format, codec, options = SEEKABLE[name]
    data = encode_frames(numbered_frames(150), format, codec, "yuv420p", options)
    real = video_module.index_packets

    def misleads(*args: object) -> VideoIndex:
        index = real(*args)  # type: ignore[arg-type]
        assert index.seek_table is not None
        keys = index.seek_table.keys
        later = [*keys[1:], keys[-1]]
        wrong = tuple(replace(key, seek_time=other.seek_time) for key, other in zip(keys, later, strict=True))
        return replace(index, seek_table=replace(index.seek_table, keys=wrong))

    expected = in_sequence(data)
    monkeypatch.setattr(video_module, "index_packets", misleads)
    for num_frames in (3, 7):
        decoded = decode_video(data, sampler=VideoSampling(num_frames=num_frames))
        assert np.array_equal(decoded.frames, expected[list(decoded.metadata.frames_indices)])


def test_encoding_samples_leaves_this_thread_as_it_was() -> None:
    """The AV1 encoder, run by root, turned the whole test process into a real-time one, beside which others starved."""
    if "libsvtav1" in av.codecs_available:
        encode_frames(numbered_frames(3), "mp4", "libsvtav1", "yuv420p", {"preset": "12"})
    assert os.sched_getscheduler(0) == os.SCHED_OTHER


def test_seeking_skips_most_of_a_long_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encode_video(numbered_frames(600), 30, "mp4", {"g": "20"})
    limits = MediaLimits(max_video_decoded_frames=250)
    decoded = decode_video(data, limits, VideoSampling(num_frames=4))
    assert decoded.metadata.frames_indices == (0, 150, 300, 450)
    with pytest.raises(MediaTooLargeError, match="max_video_decoded_frames"):
        decode_video(data, limits, VideoSampling(num_frames=300))
    monkeypatch.setattr(video_module, "decode_by_seeking", lambda *args: False)
    with pytest.raises(MediaTooLargeError, match="max_video_decoded_frames"):
        decode_video(data, limits, VideoSampling(num_frames=4))


def test_unsorted_and_repeated_indices() -> None:
    class Sampler:
        key = "backwards"

        def __call__(self, metadata: VideoMetadata, /) -> list[int]:
            return [59, 0, 0, 30]

    decoded = decode_video(clip("mp4"), sampler=Sampler())
    assert decoded.metadata.frames_indices == (59, 0, 0, 30)
    assert np.array_equal(decoded.frames, in_sequence(clip("mp4"))[[59, 0, 0, 30]])


def test_variable_frame_rate() -> None:
    """Frames are counted, not clocked; the rate is the average."""
    times = [*range(0, 1_000, 100), *range(1_000, 9_000, 400)]
    frames = numbered_frames(len(times))
    for format in ("mp4", "matroska"):
        data = encode_frames(frames, format, "libx264", "yuv420p", {"g": "5"}, times)
        decoded = decode_video(data, sampler=VideoSampling(num_frames=6))
        assert decoded.metadata.total_num_frames == 30
        assert decoded.metadata.fps == pytest.approx(30 / 9.0, rel=0.06)
        assert np.array_equal(decoded.frames, in_sequence(data)[list(decoded.metadata.frames_indices)])


# --- headers that lie ---


def patch(data: bytes, tag: bytes, at: int, layout: str, *values: int) -> bytes:
    """`data` with numbers replaced `at` bytes behind `tag`."""
    where = data.index(tag) + at
    packed = struct.pack(layout, *values)
    return data[:where] + packed + data[where + len(packed) :]


@pytest.mark.parametrize("claimed", [5, 59, 61, 10_000])
def test_avi_that_lies_about_its_frame_count(claimed: int) -> None:
    """transformers' reader would sample the first five frames only, or none of those claimed."""
    data = patch(clip("avi"), b"vids", 32, "<I", claimed)
    data = patch(data, b"avih", 24, "<I", claimed)
    decoded = decode_video(data, sampler=VideoSampling(num_frames=4))
    assert decoded.metadata.total_num_frames == 60
    assert decoded.metadata.frames_indices == (0, 15, 30, 45)
    assert np.array_equal(decoded.frames, in_sequence(clip("avi"))[[0, 15, 30, 45]])


def test_packets_that_hold_no_frame_lead_to_a_second_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """More packets than frames: the sampler chooses again from the true number."""
    real = video_module.index_packets

    def overstates(*args: object) -> object:
        return replace(real(*args), num_frames=90, seek_table=None)  # type: ignore[arg-type]

    monkeypatch.setattr(video_module, "index_packets", overstates)
    decoded = decode_video(clip("mp4"), sampler=VideoSampling(num_frames=5))
    assert decoded.metadata.total_num_frames == 60
    assert decoded.metadata.frames_indices == (0, 12, 24, 36, 48)
    assert decoded.metadata.duration_s == 6.0


def test_container_that_calls_ordinary_frames_key_frames() -> None:
    """Decoding can't start there; only decoding from the start gives the true pictures."""
    data = encode_frames(
        numbered_frames(150), "mov", "mpeg4", "yuv420p", {"g": "30", "bf": "0", "sc_threshold": "1000000000"}
    )
    keys = np.array([1, 31, 61, 91, 121], ">u4")
    assert keys.tobytes() in data
    lying = data.replace(keys.tobytes(), np.array([1, 46, 76, 106, 136], ">u4").tobytes())
    decoded = decode_video(lying, sampler=VideoSampling(num_frames=3))
    assert decoded.metadata.frames_indices == (0, 50, 100)
    assert np.array_equal(decoded.frames, in_sequence(data)[[0, 50, 100]])


def test_declared_size_smaller_than_the_stream() -> None:
    """The container says 16 x 16; the codec's own header says more. The decoder must not follow it."""
    data = encode_video(np.zeros((3, 480, 640, 3), np.uint8), 10, "mp4")
    limits = MediaLimits(max_video_frame_pixels=640 * 480 - 1)
    avc1 = data.index(b"avc1", data.index(b"stsd"))
    lying = data[: avc1 + 28] + struct.pack(">HH", 16, 16) + data[avc1 + 32 :]
    for each in (data, lying):
        with pytest.raises(MediaError):
            decode_video(each, limits)
        assert decode_video(each).frames.shape == (3, 480, 640, 3)


def test_decoders_refuse_huge_frames_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last fence: even if no size that we see is beyond the budget, nothing of that size is allocated."""
    monkeypatch.setattr(video_module, "check_frame_size", lambda *args: None)
    monkeypatch.setattr(video_decode, "check_frame_size", lambda *args: None)
    data = encode_video(np.zeros((3, 480, 640, 3), np.uint8), 10, "mp4")
    with pytest.raises(MediaError, match="corrupt"):
        decode_video(data, MediaLimits(max_video_frame_pixels=480 * 640 // 4 - 1))
    assert decode_video(data, MediaLimits(max_video_frame_pixels=480 * 640)).frames.shape == (3, 480, 640, 3)


# --- orientation and transparency ---

TURNS = {
    "none": ((1, 0, 0, 1), lambda frame: frame),
    "quarter clockwise": ((0, 1, -1, 0), lambda frame: np.rot90(frame, -1)),
    "half": ((-1, 0, 0, -1), lambda frame: np.rot90(frame, 2)),
    "quarter counterclockwise": ((0, -1, 1, 0), lambda frame: np.rot90(frame, 1)),
    "mirrored": ((-1, 0, 0, 1), lambda frame: frame[:, ::-1]),
    "upside down": ((1, 0, 0, -1), lambda frame: frame[::-1]),
}


@pytest.mark.parametrize("name", TURNS)
def test_display_matrix_is_applied(name: str) -> None:
    (a, b, c, d), turn = TURNS[name]
    matrix = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    unit = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    data = clip("mp4")
    where = data.index(unit, data.index(b"tkhd"))
    decoded = decode_video(data[:where] + matrix + data[where + 36 :], sampler=VideoSampling(num_frames=2))
    expected = np.stack([turn(frame) for frame in in_sequence(data)[[0, 30]]])
    assert np.array_equal(decoded.frames, expected)
    assert (decoded.metadata.height, decoded.metadata.width) == expected.shape[1:3]


def test_transparent_gif_lies_on_white() -> None:
    image = PIL.Image.new("P", (8, 8), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 4, 8))
    data = encode_image(image, "GIF", transparency=1)
    frame = decode_video(data).frames[0]
    assert frame[0, 0].tolist() == [255, 255, 255]
    assert frame[0, 7].tolist() == [255, 0, 0]


# --- budgets ---


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("field", "value", "sampling"),
    [
        ("max_video_bytes", 1_000, VideoSampling(num_frames=1)),
        ("max_video_frames", 59, VideoSampling()),
        ("max_video_decoded_frames", 10, VideoSampling(num_frames=50)),
        ("max_video_frame_pixels", 48 * 64 - 1, VideoSampling(num_frames=1)),
        ("max_video_pixels", 48 * 64 * 3, VideoSampling(num_frames=4)),
        ("max_video_s", 5.9, VideoSampling(num_frames=1)),
        ("max_decode_s", 0.001, VideoSampling()),
    ],
)
def test_budgets_hold_in_every_container(format: str, field: str, value: float, sampling: VideoSampling) -> None:
    num_frames = 60
    if field == "max_decode_s":
        num_frames = 600
    data = encode_video(numbered_frames(num_frames), 10, format) if num_frames != 60 else clip(format)
    with pytest.raises(MediaTooLargeError, match=field):
        decode_video(data, MediaLimits(**{field: value}), sampling)  # type: ignore[arg-type]


def test_unlimited_frames_stop_at_the_budget_before_they_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small file of very many frames."""
    frames = np.zeros((3_000, 16, 16, 3), np.uint8)
    data = encode_video(frames, 30, "mp4")
    assert len(data) < 100_000

    def never(*args: object) -> None:
        raise AssertionError("decoded beyond the budget")

    monkeypatch.setattr(video_module, "decode_by_seeking", never)
    monkeypatch.setattr(video_module, "decode_in_sequence", never)
    with pytest.raises(MediaTooLargeError, match="max_video_frames"):
        decode_video(data)


# --- broken and foreign ---


@pytest.mark.parametrize("format", FORMATS)
def test_truncated_clips_end_early_or_are_refused(format: str) -> None:
    data = clip(format)
    for keep in (0, 4, 12, 40, len(data) // 2, len(data) - 100):
        try:
            decoded = decode_video(data[:keep])
        except MediaError:
            continue
        assert len(decoded.frames) == decoded.metadata.total_num_frames <= 60


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"<?xml version='1.0'?><MPD></MPD>",
        b"RIFF\x10\x00\x00\x00WEBPVP8 ",
        b"nothing known",
        b"",
    ],
)
def test_play_lists_and_other_formats_are_refused(data: bytes) -> None:
    with pytest.raises(MediaTypeError, match="mp4, mov"):
        decode_video(data)


def test_sound_only_and_unknown_codecs() -> None:
    with pytest.raises(MediaError, match="picture track"):
        decode_video(sound("m4a"))
    data = encode_frames(numbered_frames(3), "avi", "flv", "yuv420p", {})
    with pytest.raises(MediaTypeError, match="flv"):
        decode_video(data)


def test_a_demuxer_can_open_nothing_else(tmp_path: Path) -> None:
    """Should a play list reach a demuxer for play lists after all, it gets neither the network nor files."""
    server = HostileServer()
    secret = tmp_path / "secret.ts"
    secret.write_bytes(clip("mkv"))
    play_list = (
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{server.url('/ok.ts', host='127.0.0.1')}\n#EXT-X-ENDLIST\n"
    )
    script = f"ffconcat version 1.0\nfile {secret}\n"
    try:
        for demuxer, text in (("hls", play_list), ("concat", script)):
            limits = MediaLimits()
            with (
                pytest.raises(MediaError),
                open_container(text.encode(), demuxer, "video", limits, Deadline("video", limits)) as container,
            ):
                for _ in container.decode(video=0):
                    pass
    finally:
        server.close()
    assert server.requests == []


# --- JPEG frames one by one ---


def jpeg_payload(frames: NDArray[np.uint8], fps: float | None = None) -> tuple[bytes, str]:
    data, media_type = read_data_url(frames_to_jpeg_data_url(frames, fps), "video", MediaLimits())
    assert media_type is not None
    return data, media_type


def test_jpeg_frames() -> None:
    frames = numbered_frames(12)
    data, media_type = jpeg_payload(frames)
    decoded = decode_video(data, media_type=media_type)
    assert decoded.frames.shape == frames.shape
    assert np.abs(decoded.frames.astype(int) - frames).mean() < 10
    assert decoded.metadata == VideoMetadata(12, None, 64, 48, None, "pillow", tuple(range(12)))
    with pytest.raises(MediaError, match="num_frames"):
        decode_video(data, sampler=VideoSampling(fps=1), media_type=media_type)

    data, media_type = jpeg_payload(frames, fps=4)
    sampled = decode_video(data, sampler=VideoSampling(fps=1), media_type=media_type)
    assert sampled.metadata.frames_indices == (0, 4, 8)
    assert (sampled.metadata.fps, sampled.metadata.duration_s) == (4.0, 3.0)
    assert np.array_equal(sampled.frames, decoded.frames[[0, 4, 8]])


def test_jpeg_frames_have_the_same_budgets() -> None:
    data, media_type = jpeg_payload(numbered_frames(12))

    def decode(payload: bytes = data, **limits: int) -> VideoFrames:
        return decode_video(payload, MediaLimits(**limits), media_type=media_type)  # type: ignore[arg-type]

    for field, value in (
        ("max_video_frames", 11),
        ("max_video_decoded_frames", 11),
        ("max_video_pixels", 64 * 48 * 12 - 1),
    ):
        with pytest.raises(MediaTooLargeError, match=field):
            decode(**{field: value})
    with pytest.raises(MediaTooLargeError, match="pixels"):
        decode(max_video_frame_pixels=64 * 48 - 1)
    with pytest.raises(MediaTooLargeError, match="max_video_decoded_frames"):
        decode(b"," * 1_000_000)


def test_jpeg_frames_that_are_none() -> None:
    good = base64.b64encode(encode_image(PIL.Image.new("RGB", (8, 8)), "JPEG"))
    other = base64.b64encode(encode_image(PIL.Image.new("RGB", (9, 8)), "JPEG"))
    png = base64.b64encode(encode_image(PIL.Image.new("RGB", (8, 8)), "PNG"))
    for payload in (b"", b",", good + b",", good + b"," + other, png, b"!!!!", good[:-8], b"\xff" * 8):
        with pytest.raises(MediaError):
            decode_video(payload, media_type="video/jpeg")
    for fps in ("0", "-1", "nan", "inf", "x", "1e9"):
        with pytest.raises(MediaError, match="fps"):
            decode_video(good, media_type=f"video/jpeg;fps={fps}")

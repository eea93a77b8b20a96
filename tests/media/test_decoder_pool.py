"""Media of others are decoded in processes that may be ended: nobody waits behind them, and nothing of them stays."""

from __future__ import annotations

import io
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from sensorium.errors import (
    InvalidRequestError,
    MediaError,
    MediaTooLargeError,
    MediaTypeError,
    SensoriumError,
)
from sensorium.media import (
    AudioClip,
    DecoderPool,
    EncodedMedia,
    MediaLimits,
    MediaLoader,
    VideoFrames,
    VideoMetadata,
    VideoSampling,
)
from sensorium.media.encode import frames_to_jpeg_data_url
from sensorium.media.local import read_data_url
from tests.media.samples import clip, many_scans, numbered_frames, sound

WAIT_S = 120.0
LIMITS = MediaLimits(decode_processes=2, max_decode_s=60.0)


@pytest.fixture(scope="module")
def pool() -> Iterator[DecoderPool]:
    made = DecoderPool(LIMITS)
    yield made
    made.close()


@pytest.fixture
def make_pool() -> Iterator[Callable[..., DecoderPool]]:
    pools = []

    def make(**limits: Any) -> DecoderPool:
        pools.append(DecoderPool(MediaLimits(**limits)))
        return pools[-1]

    yield make
    for each in pools:
        each.close()


def png(seed: int = 0, size: tuple[int, int] = (9, 7), mode: str = "RGB") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    PIL.Image.fromarray(pixels).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def decoded(pool: DecoderPool, media: EncodedMedia) -> Any:
    return pool.submit(media).result(WAIT_S)


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + WAIT_S
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Ids of a process's children that are alive."""
    found = " ".join(each.read_text() for each in Path(f"/proc/{pid}/task").glob("*/children")).split()
    return [int(each) for each in found]


def server_of(pool: DecoderPool) -> int:
    assert pool._server is not None
    return pool._server._process.pid


class EveryOther:
    """A sampler of a model's own, which lives in the front only."""

    key = "every other"

    def __call__(self, metadata: VideoMetadata, /) -> Sequence[int]:
        return range(0, metadata.total_num_frames, 2)


@pytest.mark.parametrize("size", [(9, 7), (1, 1), (700, 900)])
@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "1"])
def test_pictures_are_those_that_this_process_decodes(pool: DecoderPool, size: tuple[int, int], mode: str) -> None:
    media = EncodedMedia("image", png(1, size, mode))
    image, expected = decoded(pool, media), media.decode()
    assert image.mode == "RGB"
    assert image.size == size
    assert image.tobytes() == expected.tobytes()  # type: ignore[union-attr]
    image.putpixel((0, 0), (1, 2, 3))  # it is its caller's


def test_sounds_and_clips_are_those_that_this_process_decodes(pool: DecoderPool) -> None:
    heard = EncodedMedia("audio", sound("flac"))
    got, expected = decoded(pool, heard), heard.decode()
    assert isinstance(got, AudioClip)
    assert isinstance(expected, AudioClip)
    assert got.sampling_rate == expected.sampling_rate
    assert np.array_equal(got.samples, expected.samples)
    jpegs, media_type = read_data_url(frames_to_jpeg_data_url(numbered_frames(4), 2.0), "video", LIMITS)
    for seen in (
        EncodedMedia("video", clip("mp4"), None, VideoSampling(num_frames=7)),
        EncodedMedia("video", clip("webm"), None, EveryOther()),
        EncodedMedia("video", jpegs, media_type),
        EncodedMedia("video", clip("gif"), None, _Repeating()),
    ):
        frames, here = decoded(pool, seen), seen.decode()
        assert isinstance(frames, VideoFrames)
        assert isinstance(here, VideoFrames)
        assert frames.metadata == here.metadata
        assert np.array_equal(frames.frames, here.frames)


class _Repeating:
    key = "repeating"

    def __call__(self, metadata: VideoMetadata, /) -> Sequence[int]:
        return [2, 0, 2]


class _Broken:
    key = "broken"

    def __init__(self, error: Exception) -> None:
        self._error = error

    def __call__(self, metadata: VideoMetadata, /) -> Sequence[int]:
        raise self._error


@pytest.mark.parametrize(
    ("media", "error"),
    [
        (EncodedMedia("image", b"no picture"), MediaTypeError),
        (EncodedMedia("image", b""), MediaError),
        (EncodedMedia("image", png()[:60]), MediaError),
        (EncodedMedia("audio", b"no sound"), MediaTypeError),
        (EncodedMedia("video", sound("m4a")), MediaError),
        (EncodedMedia("video", clip("mp4"), None, _Broken(InvalidRequestError("mine"))), InvalidRequestError),
        (EncodedMedia("video", clip("mp4"), None, _Broken(KeyError("x"))), MediaError),
    ],
)
def test_errors_are_those_that_this_process_raises(
    pool: DecoderPool, media: EncodedMedia, error: type[Exception]
) -> None:
    with pytest.raises(error) as here:
        media.decode(LIMITS)
    with pytest.raises(error) as there:
        decoded(pool, media)
    assert str(there.value) == str(here.value)
    assert type(there.value) is type(here.value)


def test_many_items_at_once_come_back_to_those_who_asked(pool: DecoderPool) -> None:
    items = [EncodedMedia("image", png(seed)) for seed in range(60)]
    for item, future in [(item, pool.submit(item)) for item in items]:
        assert future.result(WAIT_S).tobytes() == item.decode().tobytes()  # type: ignore[union-attr]


def test_a_small_picture_waits_for_none_that_takes_long(pool: DecoderPool) -> None:
    """Progressive JPEGs with a thousand scans, 75 bytes each, took every thread for minutes: everybody waited."""
    hostile = [pool.submit(EncodedMedia("image", many_scans(2_000 + seed))) for seed in range(6)]
    assert decoded(pool, EncodedMedia("image", png(3))).size == (9, 7)
    assert not any(each.done() for each in hostile)
    for each in hostile:
        each.cancel()
    until(lambda: not any(decoder.job for decoder in pool._decoders))


def test_what_takes_too_long_is_ended(make_pool: Callable[..., DecoderPool]) -> None:
    """Pictures have the same deadline as sounds and clips, and the error says which setting it is."""
    pool = make_pool(decode_processes=1, max_decode_s=0.5)
    with pytest.raises(MediaTooLargeError, match="max_decode_s"):
        decoded(pool, EncodedMedia("image", many_scans(5_000)))
    assert decoded(pool, EncodedMedia("image", png())).size == (9, 7)


def test_items_wait_in_the_slow_lane_until_there_is_a_place(make_pool: Callable[..., DecoderPool]) -> None:
    """What had to leave the quick lane while the slow one was full begins anew, and ends as it should."""
    pool = make_pool(decode_processes=1, max_decode_s=1.5)
    hostile = [pool.submit(EncodedMedia("image", many_scans(5_000 + seed))) for seed in range(3)]
    for each in hostile:
        with pytest.raises(MediaTooLargeError, match="max_decode_s"):
            each.result(WAIT_S)


def test_giving_up_ends_the_process(make_pool: Callable[..., DecoderPool]) -> None:
    """Decoding went on when its client had left."""
    pool = make_pool(decode_processes=1)
    decoded(pool, EncodedMedia("image", png()))
    before = children(server_of(pool))
    hostile = pool.submit(EncodedMedia("image", many_scans(5_000)))
    until(lambda: any(decoder.job for decoder in pool._decoders))
    hostile.cancel()
    until(lambda: not set(before) & set(children(server_of(pool))))
    with pytest.raises(CancelledError):
        hostile.result(WAIT_S)


def test_memory_is_fenced_in(make_pool: Callable[..., DecoderPool]) -> None:
    pool = make_pool(decode_processes=1, max_decode_bytes=16 << 20)
    with pytest.raises(MediaTooLargeError, match="memory"):
        decoded(pool, EncodedMedia("image", png(size=(4_000, 4_000), mode="1")))
    assert decoded(pool, EncodedMedia("image", png())).size == (9, 7)


def test_a_process_that_dies_takes_only_its_item_along(make_pool: Callable[..., DecoderPool]) -> None:
    """A decoder that crashes, or that the system ends for its memory, is an error of what it decoded."""
    pool = make_pool(decode_processes=1)
    decoded(pool, EncodedMedia("image", png()))
    hostile = pool.submit(EncodedMedia("image", many_scans(5_000)))
    until(lambda: any(decoder.job for decoder in pool._decoders))
    for pid in children(server_of(pool)):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(MediaError, match="decoder fails"):
        hostile.result(WAIT_S)
    assert decoded(pool, EncodedMedia("image", png())).size == (9, 7)


def test_processes_that_end_are_started_anew(make_pool: Callable[..., DecoderPool]) -> None:
    pool = make_pool(decode_processes=1)
    decoded(pool, EncodedMedia("image", png()))
    hostile = pool.submit(EncodedMedia("image", many_scans(5_000)))
    until(lambda: any(decoder.job for decoder in pool._decoders))
    os.kill(server_of(pool), signal.SIGKILL)
    with pytest.raises(SensoriumError, match="again"):
        hostile.result(WAIT_S)
    assert decoded(pool, EncodedMedia("image", png())).size == (9, 7)


def test_nothing_outlives_the_pool() -> None:
    pool = DecoderPool(LIMITS)
    decoded(pool, EncodedMedia("image", png()))
    server = server_of(pool)
    pids = children(server)
    waiting = [pool.submit(EncodedMedia("image", many_scans(5_000 + seed))) for seed in range(5)]
    assert len(pids) == LIMITS.decode_processes
    pool.close()
    pool.close()
    for each in waiting:
        with pytest.raises(SensoriumError, match="again"):
            each.result(WAIT_S)
    assert not any(Path(f"/proc/{pid}").exists() for pid in (server, *pids))
    with pytest.raises(SensoriumError):
        decoded(pool, EncodedMedia("image", png()))


def test_files_that_processes_share_stay_small(make_pool: Callable[..., DecoderPool]) -> None:
    pool = make_pool(decode_processes=1)
    decoded(pool, EncodedMedia("image", png(size=(3_000, 3_000), mode="1")))
    decoded(pool, EncodedMedia("image", png()))
    until(lambda: all(os.fstat(each.output_fd).st_size < 1 << 20 for each in pool._decoders))


def test_a_loader_shares_what_several_wait_for(make_pool: Callable[..., DecoderPool]) -> None:
    """Who leaves doesn't take the picture from others who sent the same."""
    pool = make_pool(decode_processes=1)
    loader = MediaLoader(decoders=pool)
    media = EncodedMedia("image", many_scans(100, side=800))
    futures = [loader.cache.join(media.digest, lambda: pool.submit(media)) for _ in range(3)]
    futures[0].cancel()
    assert all(each.result(WAIT_S).size == (800, 800) for each in futures[1:])  # type: ignore[union-attr]
    assert loader.cache.stats().misses == 1
    assert loader.decode(media).size == (800, 800)  # type: ignore[union-attr]

"""Identity by content, the cache, and the facade."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from sensorium.errors import MediaError, MediaForbiddenError, MediaTooLargeError, UnknownModalityError
from sensorium.media import (
    AudioClip,
    DecodedMediaCache,
    EncodedMedia,
    FetchPolicy,
    MediaLimits,
    MediaLoader,
    VideoFrames,
    VideoSampling,
    digest,
)
from sensorium.media.encode import audio_to_data_url, encode_image, image_to_data_url, video_to_data_url
from tests.media.samples import clip, numbered_frames, sound, tone

PICTURE = PIL.Image.fromarray(numbered_frames(1)[0])
PNG = encode_image(PICTURE)


# --- identity ---


def test_digest_covers_modality_bytes_and_what_decoding_depends_on() -> None:
    items = [
        EncodedMedia("image", b"a"),
        EncodedMedia("image", b"b"),
        EncodedMedia("image", b""),
        EncodedMedia("audio", b"a"),
        EncodedMedia("video", b"a"),
        EncodedMedia("video", b"a", sampler=VideoSampling(num_frames=4)),
        EncodedMedia("video", b"a", sampler=VideoSampling(fps=4)),
        EncodedMedia("video", b"a", "video/jpeg"),
        EncodedMedia("video", b"a", "video/jpeg;fps=2"),
    ]
    assert len({item.digest for item in items}) == len(items)
    assert all(len(item.digest) == 32 for item in items)


def test_digest_leaves_out_what_decoding_ignores() -> None:
    assert EncodedMedia("image", b"a", "image/png").digest == EncodedMedia("image", b"a").digest
    assert EncodedMedia("video", b"a", "video/mp4").digest == EncodedMedia("video", b"a").digest
    assert EncodedMedia("audio", b"a", sampler=VideoSampling(fps=1)).digest == EncodedMedia("audio", b"a").digest


def test_parts_cannot_run_into_each_other() -> None:
    """Each part is preceded by its length: where options end and bytes begin can't be shifted."""
    shorter, longer = VideoSampling(max_frames=76), VideoSampling(max_frames=768)
    assert longer.key == shorter.key + "8"
    assert EncodedMedia("video", b"8x", sampler=shorter).digest != EncodedMedia("video", b"x", sampler=longer).digest


def test_unknown_modality() -> None:
    with pytest.raises(UnknownModalityError, match="smell"):
        EncodedMedia("smell", b"a")


def test_decode_is_lazy_and_by_modality() -> None:
    assert EncodedMedia("image", PNG).decode().tobytes() == PICTURE.tobytes()  # type: ignore[union-attr]
    assert isinstance(EncodedMedia("audio", sound()).decode(), AudioClip)
    decoded = EncodedMedia("video", clip(), sampler=VideoSampling(num_frames=3)).decode()
    assert isinstance(decoded, VideoFrames)
    assert len(decoded.frames) == 3
    with pytest.raises(MediaTooLargeError):
        EncodedMedia("image", PNG).decode(MediaLimits(max_image_pixels=10))
    assert PNG.decode("latin-1") not in repr(EncodedMedia("image", PNG))


# --- cache ---


def make_cache(max_bytes: int = 100) -> DecodedMediaCache[bytearray]:
    return DecodedMediaCache(max_bytes, size_of=len, copy=bytearray)


def never() -> bytearray:
    raise AssertionError("computed again")


def test_second_caller_gets_the_stored_value() -> None:
    cache = make_cache()
    assert cache.get_or_compute(b"k", lambda: bytearray(b"value")) == b"value"
    assert cache.get_or_compute(b"k", never) == b"value"
    stats = cache.stats()
    assert (stats.hits, stats.misses, stats.num_items, stats.num_bytes) == (1, 1, 1, 5)


def test_nobody_can_change_what_others_get() -> None:
    cache = make_cache()
    for _ in range(3):
        value = cache.get_or_compute(b"k", lambda: bytearray(b"value"))
        assert value == b"value"
        value[0] = 0


def test_least_recently_used_values_go_first_and_bytes_stay_bounded() -> None:
    cache = make_cache(100)
    for key in (b"a", b"b"):
        cache.get_or_compute(key, lambda: bytearray(40))
    cache.get_or_compute(b"a", never)
    cache.get_or_compute(b"c", lambda: bytearray(40))  # b has to go
    cache.get_or_compute(b"a", never)
    cache.get_or_compute(b"c", never)
    assert cache.stats().evictions == 1
    cache.get_or_compute(b"b", lambda: bytearray(1))
    assert cache.get_or_compute(b"big", lambda: bytearray(101)) == bytearray(101)
    assert cache.stats().num_bytes <= 100
    cache.get_or_compute(b"a", never)  # a value too large to keep drives out nothing
    cache.clear()
    assert (cache.stats().num_items, cache.stats().num_bytes) == (0, 0)
    assert make_cache(0).get_or_compute(b"k", lambda: bytearray(1)) == bytearray(1)


def test_bytes_stay_bounded_under_random_use() -> None:
    rng = np.random.default_rng(0)
    cache = make_cache(1_000)
    for _ in range(2_000):
        size = int(rng.integers(0, 400))
        cache.get_or_compute(bytes([rng.integers(40)]), lambda size=size: bytearray(size))  # type: ignore[misc]
        stats = cache.stats()
        assert 0 <= stats.num_bytes <= 1_000
    assert stats.hits + stats.misses == 2_000
    cache.clear()
    assert cache.stats().num_bytes == 0


def test_many_threads_wait_for_one_computation() -> None:
    cache = make_cache()
    computed = 0
    everyone_is_here = threading.Barrier(8)

    def compute() -> bytearray:
        nonlocal computed
        computed += 1
        time.sleep(0.05)
        return bytearray(b"value")

    def ask() -> bytearray:
        everyone_is_here.wait()
        return cache.get_or_compute(b"k", compute)

    with ThreadPoolExecutor(8) as pool:
        values = list(pool.map(lambda _: ask(), range(8)))
    assert values == [b"value"] * 8
    assert computed == 1
    assert len({id(value) for value in values}) == 8
    stats = cache.stats()
    assert stats.misses == 1
    assert stats.hits + stats.shared == 7


def test_failure_reaches_all_who_wait_and_is_not_remembered() -> None:
    cache = make_cache()
    started = threading.Event()

    def fail() -> bytearray:
        started.set()
        time.sleep(0.05)
        raise MediaError("broken")

    def ask_later() -> bytearray:
        started.wait()
        return cache.get_or_compute(b"k", fail)

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(cache.get_or_compute, b"k", fail), *(pool.submit(ask_later) for _ in range(3))]
        for future in futures:
            with pytest.raises(MediaError, match="broken"):
                future.result()
    assert cache.get_or_compute(b"k", lambda: bytearray(b"fine")) == b"fine"


def test_async_waiters_hold_no_thread_and_may_be_cancelled() -> None:
    cache = make_cache()
    computed = 0

    def compute() -> bytearray:
        nonlocal computed
        computed += 1
        time.sleep(0.1)
        return bytearray(b"value")

    async def main() -> None:
        with ThreadPoolExecutor(1) as pool:
            tasks = [asyncio.create_task(cache.aget_or_compute(b"k", compute, pool)) for _ in range(50)]
            await asyncio.sleep(0.02)
            tasks[0].cancel()  # the one that started it
            values = await asyncio.gather(*tasks[1:])
            assert values == [b"value"] * 49
            with pytest.raises(asyncio.CancelledError):
                await tasks[0]
        with pytest.raises(RuntimeError):
            await cache.aget_or_compute(b"other", compute, pool)
        assert cache.get_or_compute(b"other", compute) == b"value"

    asyncio.run(main())
    assert computed == 2


# --- loader ---


def test_loader_takes_every_kind_of_source(tmp_path: Path) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(PNG)
    loader = MediaLoader(policy=FetchPolicy(allowed_local_media_path=tmp_path))
    for source in (PNG, path, str(path), f"file://{path}", image_to_data_url(PICTURE)):
        assert loader.load_image(source).tobytes() == PICTURE.tobytes()
        assert asyncio.run(loader.aload_image(source)).tobytes() == PICTURE.tobytes()
    assert loader.cache.stats().misses == 1
    with pytest.raises(MediaForbiddenError):
        MediaLoader().load_image(path)


def test_repeated_item_is_decoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = 0
    real = digest.decode_image

    def count(*args: object) -> object:
        nonlocal decoded
        decoded += 1
        return real(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(digest, "decode_image", count)
    loader = MediaLoader()
    first = loader.load_image(PNG)
    first.putpixel((0, 0), (1, 2, 3))
    assert loader.load_image(image_to_data_url(PICTURE)).tobytes() == PICTURE.tobytes()
    assert decoded == 1


def test_loader_sounds_and_clips() -> None:
    loader = MediaLoader()
    audio = loader.load_audio(audio_to_data_url(tone(0.5, 16_000), 16_000))
    assert audio.sampling_rate == 16_000
    audio.samples[:] = 0
    assert loader.load_audio(audio_to_data_url(tone(0.5, 16_000), 16_000)).samples.any()

    url = video_to_data_url(numbered_frames(20))
    four = loader.load_video(url, VideoSampling(num_frames=4))
    assert four.metadata.frames_indices == (0, 5, 10, 15)
    four.frames[:] = 0  # arrays handed out may be written to
    assert loader.load_video(url, VideoSampling(num_frames=4)).frames.any()
    assert len(loader.load_video(url).frames) == 20
    again = asyncio.run(loader.aload_video(url, VideoSampling(num_frames=4)))
    assert again.metadata == four.metadata
    assert asyncio.run(loader.aload_audio(sound("flac"))).samples.shape == (48_000,)


def test_async_decoding_runs_in_the_pool() -> None:
    threads: set[str] = set()
    real = digest.decode_image

    def spy(*args: object) -> object:
        threads.add(threading.current_thread().name)
        return real(*args)  # type: ignore[arg-type]

    with ThreadPoolExecutor(1, thread_name_prefix="decode-pool") as pool, pytest.MonkeyPatch.context() as patch:
        patch.setattr(digest, "decode_image", spy)
        asyncio.run(MediaLoader(pool=pool).aload_image(PNG))
    assert threads == {"decode-pool_0"}


def test_errors_come_through_the_cache_each_time() -> None:
    loader = MediaLoader(MediaLimits(max_image_pixels=10))
    for _ in range(2):
        with pytest.raises(MediaTooLargeError):
            loader.load_image(PNG)
        with pytest.raises(MediaTooLargeError):
            asyncio.run(loader.aload_image(PNG))

"""Media kept by name: bounded, the latest under a name, scopes apart."""

from __future__ import annotations

import numpy as np

from sensorium.chat.named_media import NamedMedia
from sensorium.media import EncodedMedia, MediaBudget, VideoSampling

CAT = (b"me", "image", "cat")


def picture(size: int) -> EncodedMedia:
    return EncodedMedia("image", b"x" * size)


def test_the_latest_under_a_name_counts() -> None:
    named = NamedMedia(10_000)
    first, second = picture(1000), picture(2000)
    named.put(CAT, first)
    assert named.get(CAT) == first
    named.put(CAT, second)
    assert named.get(CAT) == second
    assert 2000 < named.num_bytes < 3000
    for key in ((b"you", "image", "cat"), (b"me", "video", "cat"), (b"me", "image", "dog")):
        assert named.get(key) is None


def test_the_least_recently_used_goes_first_and_what_is_too_large_is_not_kept() -> None:
    named = NamedMedia(10_000)
    keys = [(b"me", "image", name) for name in "abc"]
    for key in keys[:2]:
        named.put(key, picture(4000))
    named.get(keys[0])
    named.put(keys[2], picture(4000))
    assert [named.get(key) is not None for key in keys] == [True, False, True]
    named.put(keys[0], picture(20_000))
    assert named.get(keys[0]) is None, "its older content is no longer what the name stands for"
    assert named.get(keys[2]) is not None
    assert named.num_bytes < 5000


def test_what_is_kept_is_not_what_waits() -> None:
    named, budget = NamedMedia(10_000), MediaBudget(10_000)
    named.put(CAT, EncodedMedia("image", b"x" * 1000, lease=budget.lease(1000)))
    assert budget.num_bytes == 0
    assert named.get(CAT).lease is None


def test_tensors_count_their_bytes() -> None:
    named = NamedMedia(10_000)
    named.put(CAT, {"rows": np.zeros((2, 1000), np.float32)})
    assert 8000 < named.num_bytes < 9000
    named.put(CAT, np.zeros(10_000, np.float32))
    assert named.num_bytes == 0


def test_frames_of_a_clip_are_those_that_this_request_wants() -> None:
    named = NamedMedia(10_000)
    clip = EncodedMedia("video", b"x", sampler=VideoSampling(num_frames=4))
    named.put(CAT, clip)
    assert named.get(CAT, VideoSampling(num_frames=4)) == clip
    other = named.get(CAT, VideoSampling(num_frames=8))
    assert (other.data, other.sampler) == (b"x", VideoSampling(num_frames=8))
    assert other.digest != clip.digest

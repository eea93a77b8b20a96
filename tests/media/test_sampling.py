"""Frame choice against the rules of transformers."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers.video_utils import VideoMetadata as HfMetadata
from transformers.video_utils import default_sample_indices_fn

from sensorium.errors import InvalidRequestError, MediaError, MediaTooLargeError
from sensorium.media import MediaLimits, VideoMetadata, VideoSampling
from sensorium.media.video import choose_frames

TOTALS = [1, 2, 3, 4, 5, 7, 8, 16, 29, 30, 31, 47, 60, 97, 100, 101, 240, 299, 300, 719, 1000, 1777]


def clip(total: int, fps: float | None = 25.0) -> VideoMetadata:
    return VideoMetadata(total, fps, 64, 48, total / fps if fps else None, "pyav")


@pytest.mark.parametrize("total", TOTALS)
def test_uniform_rule_equals_the_default_of_transformers(total: int) -> None:
    hf = HfMetadata(total_num_frames=total, fps=25.0)
    assert VideoSampling()(clip(total)) == default_sample_indices_fn(hf).tolist()
    for count in range(1, min(total, 200) + 1):
        assert VideoSampling(num_frames=count)(clip(total)) == default_sample_indices_fn(hf, num_frames=count).tolist()
    for fps in (0.1, 0.5, 1, 2, 3.7, 12.5, 24, 25):
        assert VideoSampling(fps=fps)(clip(total)) == default_sample_indices_fn(hf, fps=fps).tolist()


def qwen2_vl_reference(total: int, video_fps: float, count: int | None, fps: float | None) -> list[int] | None:
    """transformers' Qwen2VLVideoProcessor.sample_frames in torch arithmetic; None where it raises."""
    if count is not None:
        wanted: float = round(count / 2) * 2
    else:
        assert fps is not None
        most = min(768, total) // 2 * 2
        wanted = min(max(total / video_fps * fps, 4), most, total) // 2 * 2
    if not 0 < wanted <= total:
        return None
    return torch.arange(0, total, total / wanted).int().tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("total", TOTALS)
def test_temporal_patches_equal_qwen2_vl(total: int) -> None:
    for count in range(1, min(total, 300) + 2):
        expected = qwen2_vl_reference(total, 25.0, count, None)
        chosen = VideoSampling(num_frames=count, rule="temporal_patches")(clip(total))
        assert chosen == (expected if expected is not None else list(range(total)))
    for video_fps in (10.0, 23.976, 25.0, 29.97):
        for fps in (0.5, 1.0, 2.0, 3.3):
            expected = qwen2_vl_reference(total, video_fps, None, fps)
            chosen = VideoSampling(fps=fps, rule="temporal_patches")(clip(total, video_fps))
            assert chosen == (expected if expected is not None else list(range(total)))


@pytest.mark.parametrize("total", TOTALS)
def test_endpoints_equal_qwen3_vl(total: int) -> None:
    for fps in (0.5, 2.0):
        count = min(max(int(total / 25.0 * fps), 4), 768, total)
        expected = np.linspace(0, total - 1, count).round().astype(int).tolist()
        assert VideoSampling(fps=fps, rule="endpoints")(clip(total)) == expected
    expected = np.linspace(0, total - 1, min(max(total, 4), 768)).round().astype(int).tolist()
    assert VideoSampling(rule="endpoints")(clip(total)) == expected


def test_short_clips_give_all_frames_where_transformers_raises() -> None:
    with pytest.raises(ValueError, match="exceeds"):
        default_sample_indices_fn(HfMetadata(total_num_frames=3, fps=25.0), num_frames=8)
    for rule in ("uniform", "temporal_patches", "endpoints"):
        assert VideoSampling(num_frames=8, rule=rule)(clip(3)) == [0, 1, 2]


@pytest.mark.parametrize(
    "options",
    [
        {"num_frames": 4, "fps": 1.0},
        {"num_frames": 0},
        {"num_frames": -1},
        {"num_frames": 2.5},
        {"num_frames": True},
        {"fps": 0.0},
        {"fps": float("nan")},
        {"fps": float("inf")},
        {"fps": "2"},
        {"rule": "random"},
        {"temporal_patch_size": 0},
        {"max_frames": 0},
    ],
)
def test_options_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(InvalidRequestError, match="video sampling"):
        VideoSampling(**options)  # type: ignore[arg-type]


def test_sampling_by_rate_needs_a_rate() -> None:
    with pytest.raises(MediaError, match="num_frames"):
        VideoSampling(fps=2.0)(clip(10, None))


def test_keys_tell_samplings_apart() -> None:
    samplings = [VideoSampling(), VideoSampling(num_frames=2), VideoSampling(fps=2), VideoSampling(rule="endpoints")]
    assert len({sampling.key for sampling in samplings}) == len(samplings)
    assert VideoSampling(fps=2).key == VideoSampling(fps=2).key


@pytest.mark.parametrize("indices", [[], [-1], [10], [0, 99]])
def test_foreign_samplers_are_checked(indices: list[int]) -> None:
    class Sampler:
        key = "foreign"

        def __call__(self, metadata: VideoMetadata, /) -> list[int]:
            return indices

    with pytest.raises(InvalidRequestError, match="0 to 9"):
        choose_frames(Sampler(), clip(10), MediaLimits())


def test_a_foreign_sampler_that_fails_is_that_clips_error() -> None:
    class Sampler:
        key = "foreign"

        def __call__(self, metadata: VideoMetadata, /) -> list[int]:
            raise ValueError("secret text of a library at /opt")

    with pytest.raises(MediaError, match="sampled for this model") as caught:
        choose_frames(Sampler(), clip(10), MediaLimits())
    assert "secret" not in str(caught.value)


def test_frame_and_pixel_budgets() -> None:
    with pytest.raises(MediaTooLargeError, match="max_video_frames"):
        choose_frames(VideoSampling(), clip(11), MediaLimits(max_video_frames=10))
    with pytest.raises(MediaTooLargeError, match="max_video_pixels"):
        choose_frames(VideoSampling(), clip(11), MediaLimits(max_video_pixels=10 * 64 * 48))
    assert len(choose_frames(VideoSampling(num_frames=10), clip(11), MediaLimits(max_video_pixels=10 * 64 * 48))) == 10


def test_metadata_is_what_transformers_takes() -> None:
    metadata = VideoMetadata(60, 10.0, 64, 48, 6.0, "pyav", (0, 30))
    hf = HfMetadata(**metadata.as_hf())
    assert hf.timestamps == [0.0, 3.0]
    assert hf.duration == metadata.duration == 6.0
    assert SimpleNamespace(**metadata.as_hf()).frames_indices == [0, 30]

"""Clips of checkpoints that have an image processor and no video processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from sensorium.multimodal.hf_processors import cached_get_image_processor
from sensorium.multimodal.video_processor import cached_get_video_processor
from tests.helpers.processors import save_llava, save_qwen2_vl

CLIP = np.random.default_rng(0).integers(0, 256, (3, 40, 60, 3), dtype=np.uint8)


def test_a_calls_settings_count(tmp_path: Path) -> None:
    """They were taken, and the image processor's own were used."""
    path = str(save_llava(tmp_path))
    processor = cached_get_video_processor(path)
    pictures = cached_get_image_processor(path)
    for settings in ({}, {"do_rescale": False}, {"do_normalize": False}):
        got = processor(CLIP, **settings)["pixel_values_videos"][0]
        want = pictures.preprocess(list(CLIP), return_tensors="pt", **settings)["pixel_values"]
        torch.testing.assert_close(got, want)


def test_other_tensors_than_torchs_are_refused(tmp_path: Path) -> None:
    for name, save in (("frames", save_llava), ("patches", save_qwen2_vl)):
        (tmp_path / name).mkdir()
        processor = cached_get_video_processor(str(save(tmp_path / name)))
        with pytest.raises(ValueError, match=r"return_tensors'\]: got 'np', expected 'pt'"):
            processor(CLIP, return_tensors="np")

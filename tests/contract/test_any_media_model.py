"""Architectures with media without a file here run by the modules of transformers, to transformers' own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from sensorium.model_executor.models.transformers import interface
from tests.helpers.generic import load_generic
from tests.helpers.generic_media import (
    generated_media_tokens,
    hf_items,
    media_requests,
    model_config_of,
    served_media_tokens,
)
from tests.helpers.tiny_media import save_tiny_media

FLAT = ("llava_next", "idefics3", "gemma3", "paligemma", "qwen3_vl", "llava_onevision", "glmasr")
"""Types whose decoders run in a flat batch over the paged cache, media captured item by item."""
BY_REQUEST = ("lfm3_vl",)
"""Types whose decoders keep a state: request by request, with transformers' own cache."""


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # transformers itself
@pytest.mark.parametrize("model_type", [*FLAT, *BY_REQUEST])
def test_tokens_equal_those_of_generate(model_type: str, tmp_path: Path) -> None:
    """Two rounds: the second finds items and prefixes in the caches."""
    model = save_tiny_media(model_type, tmp_path)
    items = hf_items(model_config_of(tmp_path))
    assert items.placeholders, items.refusals
    for modality in items.placeholders:
        requests = media_requests(items, modality)
        expected = generated_media_tokens(model, items, requests)
        assert served_media_tokens(tmp_path, requests, num_rounds=2) == expected * 2


def test_towers_attend_as_they_do_untouched(tmp_path: Path) -> None:
    """Some take no masks but those that they are made with: Gemma 4's for sounds has no other attention than eager."""
    save_tiny_media("llava_next", tmp_path)
    model, report = load_generic(tmp_path, max_model_len=2048, num_blocks=400)
    config = model.hf_model.config
    assert report.features.tier == "transformers flat"
    assert config.text_config._attn_implementation == interface.NAME
    assert config.vision_config._attn_implementation == "sdpa"

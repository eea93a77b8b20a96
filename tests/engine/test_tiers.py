"""Classes written from the extension API's page run exactly, on every tier, whatever is cut, cached or preempted.

The reference is the class itself: whole passes through its own `forward`.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLMEngine, SamplingParams
from tests.helpers import toy_models as toys
from tests.helpers.serving import Planned, differing, make_engine, serve

TIERS = {
    toys.SeedPageModel: ("0 auto-split", True),
    toys.TextByIdsModel: ("0 auto-split", True),
    toys.NegativeIdModel: ("0 auto-split", False),
    toys.MarkerModel: ("0 auto-split", False),
    toys.OwnMergeModel: ("0 atomic", False),
    toys.TwoMethodModel: ("1", True),
}
"""Class: its tier, and whether its items are shared between prompts."""

SETTINGS: dict[str, dict[str, Any]] = {
    "chunks of 24": {"max_num_batched_tokens": 24},
    "whole prompts": {"max_num_batched_tokens": 512},
    "few blocks": {"max_num_batched_tokens": 32, "num_blocks": 26, "block_size": 4},
    "no caches": {"enable_prefix_caching": False, "encoder_cache_rows": 0, "mm_processor_cache_bytes": 0},
    "whole prompts only": {"enable_chunked_prefill": False},
    "drafts": {
        "max_num_batched_tokens": 24,
        "speculative_config": {"prompt_lookup_min": 1},  # nearly every token stood somewhere before
    },
}


def engine_for(cls: type, path: Path, **settings: Any) -> LLMEngine:
    toys.save_checkpoint(cls, path)
    return make_engine(path, skip_tokenizer_init=True, limit_mm_per_prompt={"image": 3}, **settings)


def toy_plan(rng: random.Random, count: int) -> list[Planned]:
    """Prompts of random ids with up to three images, from a small pool so that caches have something to do."""
    plan = []
    shared = [rng.randrange(8, 60) for _ in range(20)]
    for i in range(count):
        images = [toys.image(rng.randrange(4), rng.choice([2, 3, 5, 8])) for _ in range(rng.choice([0, 1, 1, 2, 3]))]
        ids = shared[: rng.choice([0, 20])]
        for _ in images:
            ids = [*ids, *(rng.randrange(8, 60) for _ in range(rng.randrange(6))), toys.IMAGE_TOKEN]
        ids = [*ids, *(rng.randrange(8, 60) for _ in range(rng.randrange(1, 8)))]
        prompt = {"prompt_token_ids": ids} | ({"multi_modal_data": {"image": images}} if images else {})
        params = SamplingParams(
            temperature=0, max_tokens=rng.randrange(1, 24), ignore_eos=True, logit_bias=toys.NO_MEDIA_TOKENS
        )
        plan.append(Planned(f"r{i}", prompt, params, arrival_step=rng.randrange(6)))
    return plan


def expected_tokens(engine: LLMEngine, each: Planned) -> list[int]:
    request = engine.preprocess("again", each.prompt, each.params).engine_request
    images = each.prompt.get("multi_modal_data", {}).get("image", [])
    model = engine.core.executor.worker.model  # type: ignore[attr-defined]
    assert each.params.max_tokens is not None
    return toys.reference_tokens(model, list(request.prompt_token_ids), images, each.params.max_tokens)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("cls", TIERS, ids=lambda cls: cls.__name__)
def test_tokens_equal_the_class_run_whole(cls: type, settings: str, tmp_path: Path) -> None:
    engine = engine_for(cls, tmp_path, **SETTINGS[settings])
    plan = toy_plan(random.Random(settings), 16)

    served = serve(engine, plan)

    for each in plan:
        expected = expected_tokens(engine, each)
        assert served.tokens(each.request_id) == expected, differing(served.tokens(each.request_id), expected)
    engine.core.scheduler.check_idle()
    if settings == "few blocks":
        assert engine.core.stats().num_preemptions > 0, "this setting is meant to force preemptions"
    if settings == "drafts":
        assert engine.core.stats().num_draft_tokens > 10


@pytest.mark.parametrize("cls", TIERS, ids=lambda cls: cls.__name__)
def test_the_tier_is_found_and_reported(cls: type, tmp_path: Path) -> None:
    report = engine_for(cls, tmp_path).report
    tier, shares_items = TIERS[cls]
    assert report.features.tier == tier
    assert report.features.shares_items is shares_items
    if tier != "1":
        assert report.features.notes, "what is off, or where media are split, must be said"
    assert any(tier in line for line in report.lines())


def test_an_image_seen_before_is_not_encoded_again(tmp_path: Path) -> None:
    engine = engine_for(toys.SeedPageModel, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    for i, first in enumerate([11, 12]):
        prompt = {"prompt_token_ids": [first, 7, 9], "multi_modal_data": {"image": toys.image(0, 8)}}
        serve(engine, [Planned(f"r{i}", prompt, params)])
    stats = engine.core.stats()
    assert (stats.num_encoder_queries, stats.num_encoder_hits) == (2, 1)


def test_a_repeated_prompt_with_its_image_comes_from_the_prefix_cache(tmp_path: Path) -> None:
    engine = engine_for(toys.SeedPageModel, tmp_path)
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True)
    prompt = {"prompt_token_ids": [*range(10, 20), 7, *range(20, 40)], "multi_modal_data": {"image": toys.image(0, 8)}}
    other = {**prompt, "multi_modal_data": {"image": toys.image(1, 8)}}
    cached = [
        serve(engine, [Planned(f"r{i}", each, params)]).outputs[f"r{i}"].num_cached_tokens
        for i, each in enumerate([prompt, prompt, other])
    ]
    assert cached == [0, 32, 0], "another image in the first block must not hit"


def test_two_images_with_swapped_lengths_share_no_blocks(tmp_path: Path) -> None:
    """Equal token ids, equal images by content of each half: only the offset within the item tells blocks apart."""
    engine = engine_for(toys.SeedPageModel, tmp_path, block_size=4)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, logit_bias=toys.NO_MEDIA_TOKENS)
    rows = toys.image(0, 5)
    plans = [
        Planned(f"r{i}", {"prompt_token_ids": [7, 7, 9, 10], "multi_modal_data": {"image": images}}, params)
        for i, images in enumerate([[rows[:3], rows[3:]], [rows[:2], rows[2:]]])
    ]
    for each in plans:
        assert serve(engine, [each]).tokens(each.request_id) == expected_tokens(engine, each)

"""Images that are cut into tiles with separators between them are shared, cut and batched like any others.

A separator between an image's own rows once made its span unknown: no image was shared between prompts at tier 0, and
all images of a prompt were one item.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sensorium import LLMEngine, ModelRegistry, SamplingParams
from sensorium.inputs import INPUT_REGISTRY, DummyData
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.sequence import SequenceData
from tests.helpers import toy_models as toys
from tests.helpers.serving import Planned, make_engine, serve
from tests.helpers.toy_models import IMAGE_TOKEN

TILE_ROWS = 3
BREAK = 6


def expansion(num_rows: int) -> list[int]:
    ids: list[int] = []
    for start in range(0, num_rows, TILE_ROWS):
        ids += [BREAK] * (start > 0) + [IMAGE_TOKEN] * min(TILE_ROWS, num_rows - start)
    return ids


def expand(ctx: Any, inputs: Any) -> Any:
    images = inputs.get("multi_modal_data", {}).get("image", [])
    sizes = iter([len(image) for image in (images if isinstance(images, list) else [images])])
    ids = [
        t for each in inputs["prompt_token_ids"] for t in (expansion(next(sizes)) if each == IMAGE_TOKEN else [each])
    ]
    return {**inputs, "prompt_token_ids": ids}


def dummy_data(ctx: Any, seq_len: int, mm_counts: Any) -> DummyData:
    ids = [t for _ in range(mm_counts["image"]) for t in [2, *expansion(toys.MAX_ROWS)]]
    images = [np.ones((toys.MAX_ROWS, toys.IMAGE_WIDTH), np.float32)] * mm_counts["image"]
    return DummyData(SequenceData([*ids, *[1] * (seq_len - len(ids))]), {"image": images})


def adjacent_dummy_data(ctx: Any, seq_len: int, mm_counts: Any) -> DummyData:
    ids = expansion(toys.MAX_ROWS) * mm_counts["image"]
    images = [np.ones((toys.MAX_ROWS, toys.IMAGE_WIDTH), np.float32)] * mm_counts["image"]
    return DummyData(SequenceData([*ids, *[1] * max(seq_len - len(ids), 1)]), {"image": images})


class Tiled(toys.SeedPageModel):
    pass


class TiledSideBySide(toys.SeedPageModel):
    pass


class TiledInHalves(toys.TwoMethodModel):
    pass


for _cls in (Tiled, TiledSideBySide, TiledInHalves):
    INPUT_REGISTRY.register_input_processor(expand)(_cls)
    INPUT_REGISTRY.register_dummy_data(adjacent_dummy_data if _cls is TiledSideBySide else dummy_data)(_cls)
    MULTIMODAL_REGISTRY.register_max_image_tokens(toys.MAX_ROWS)(_cls)
    ModelRegistry.register_model(_cls.__name__, _cls)


def engine_for(cls: type, path: Path, **settings: Any) -> LLMEngine:
    toys.save_checkpoint(cls, path)
    return make_engine(path, skip_tokenizer_init=True, **{"limit_mm_per_prompt": {"image": 3}, **settings})


PARAMS = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, logit_bias=toys.NO_MEDIA_TOKENS)


def expected(engine: LLMEngine, prompt: Any) -> list[int]:
    request = engine.preprocess("again", prompt, PARAMS).engine_request
    model = engine.core.executor.worker.model  # type: ignore[attr-defined]
    ids = list(request.prompt_token_ids)
    return toys.reference_tokens(model, ids, prompt["multi_modal_data"]["image"], PARAMS.max_tokens or 0)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("cls", [Tiled, TiledSideBySide, TiledInHalves])
def test_a_tiled_image_is_shared_between_prompts(cls: type, limit: int, tmp_path: Path) -> None:
    engine = engine_for(cls, tmp_path, limit_mm_per_prompt={"image": limit})
    assert engine.report.features.shares_items, engine.report.features.notes
    for i, first in enumerate([11, 12]):
        prompt = {"prompt_token_ids": [first, IMAGE_TOKEN, 9], "multi_modal_data": {"image": [toys.image(0, 8)]}}
        assert serve(engine, [Planned(f"r{i}", prompt, PARAMS)]).tokens(f"r{i}") == expected(engine, prompt)
    stats = engine.core.stats()
    assert (stats.num_encoder_queries, stats.num_encoder_hits) == (2, 1)


@pytest.mark.parametrize("cls", [Tiled, TiledInHalves])
@pytest.mark.parametrize("max_tokens", [8, 64])
def test_images_with_text_between_them_are_items_of_their_own(cls: type, max_tokens: int, tmp_path: Path) -> None:
    engine = engine_for(cls, tmp_path, max_num_batched_tokens=max_tokens)
    images = [toys.image(0, 7), toys.image(1, 4)]
    one = {"prompt_token_ids": [1, IMAGE_TOKEN, 20, IMAGE_TOKEN, 9], "multi_modal_data": {"image": images}}
    other = {"prompt_token_ids": [2, IMAGE_TOKEN, 21, IMAGE_TOKEN, 9], "multi_modal_data": {"image": images[::-1]}}
    assert len(engine.preprocess("look", one, PARAMS).engine_request.media) == 2
    for i, prompt in enumerate([one, other]):
        assert serve(engine, [Planned(f"r{i}", prompt, PARAMS)]).tokens(f"r{i}") == expected(engine, prompt)
    stats = engine.core.stats()
    assert (stats.num_encoder_queries, stats.num_encoder_hits) == (4, 2), "the same two images in another order"


@pytest.mark.parametrize("cls", [Tiled, TiledInHalves])
def test_images_that_nothing_tells_apart_are_one_item_and_exact(cls: type, tmp_path: Path) -> None:
    engine = engine_for(cls, tmp_path)
    images = [toys.image(0, 7), toys.image(1, 4)]
    prompt = {"prompt_token_ids": [1, IMAGE_TOKEN, IMAGE_TOKEN, 9], "multi_modal_data": {"image": images}}
    assert serve(engine, [Planned("r", prompt, PARAMS)]).tokens("r") == expected(engine, prompt)

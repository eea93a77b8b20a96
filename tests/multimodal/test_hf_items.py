"""A processor asked item by item: prompts are expanded by what each item becomes, and refused where they don't fit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from sensorium import LLM, EngineArgs, SamplingParams
from sensorium.errors import ConfigError, InvalidRequestError, ModelError
from sensorium.model_executor.drivers.captured import CapturedDriver
from sensorium.multimodal.hf_items import HFItems, Placeholder, Processed, as_kwargs, expand, of_item, segment_of
from tests.helpers.generic_media import dummy_item, hf_items, media_requests, model_config_of
from tests.helpers.tiny_media import media_config, save_tiny_media

PLACEHOLDERS = {"image": Placeholder("P", (9,)), "audio": Placeholder("Q R", (7, 8))}


def ids(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def test_items_of_several_kinds_take_the_places_of_their_placeholders() -> None:
    segments = {"image": [ids(5, 1, 1, 6), ids(5, 1, 6)], "audio": [ids(2, 2)]}
    expanded, ranges = expand(ids(3, 9, 4, 7, 8, 9, 3), PLACEHOLDERS, segments)
    assert expanded.tolist() == [3, 5, 1, 1, 6, 4, 2, 2, 5, 1, 6, 3]
    assert ranges == {
        "image": [{"offset": 1, "length": 4}, {"offset": 8, "length": 3}],
        "audio": [{"offset": 6, "length": 2}],
    }


def test_a_prompt_that_comes_expanded_is_left_as_it_is() -> None:
    """Its placeholder is the token of its rows, so that counting tokens says nothing about items."""
    segments = {"image": [ids(9, 9, 9), ids(9, 9)]}
    prompt = ids(3, 9, 9, 9, 4, 9, 9, 3)
    expanded, ranges = expand(prompt, PLACEHOLDERS, segments)
    assert expanded.tolist() == prompt.tolist()
    assert ranges == {"image": [{"offset": 1, "length": 3}, {"offset": 5, "length": 2}]}


@pytest.mark.parametrize("prompt", [ids(3, 4), ids(9, 9, 3), ids(), ids(9, 9, 9, 9)])
def test_more_or_fewer_placeholders_than_items_are_refused(prompt: np.ndarray) -> None:
    with pytest.raises(InvalidRequestError, match=r"image placeholders in the prompt: got \d, expected 1"):
        expand(prompt, PLACEHOLDERS, {"image": [ids(5, 1, 6)]})


@pytest.mark.parametrize(("modality", "is_whole"), [("image", False), ("prompt", True)])
def test_arguments_keep_apart_what_several_kinds_of_items_have_in_common(modality: str, is_whole: bool) -> None:
    kwargs = as_kwargs(Processed(ids(5, 1), {"token_type_ids": 3}), modality)
    assert kwargs.keys() == {f"{modality}.token_type_ids", f"{modality}.input_ids"}
    assert segment_of(kwargs).tolist() == [5, 1]
    assert of_item(kwargs) == ({"token_type_ids": 3}, is_whole)


def test_an_item_is_captured_once_however_often_it_is_sent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its key is its content's: beside other items, alone and in a second round, of two items two are captured."""
    save_tiny_media("idefics3", tmp_path)
    requests = media_requests(hf_items(model_config_of(tmp_path)), "image")
    encoded: list[str] = []
    encode_one = CapturedDriver._encode_one
    monkeypatch.setattr(CapturedDriver, "_encode_one", lambda self, job: encoded.append(job) or encode_one(self, job))
    settings = {
        "model_impl": "transformers",
        "max_model_len": 512,
        "num_blocks": 64,
        "limit_mm_per_prompt": {"image": 2},
    }
    llm = LLM(str(tmp_path), device="cpu", **settings)
    prompts = [{"prompt": text, "multi_modal_data": data} for text, data in requests if data]
    for _ in range(2):
        llm.generate(prompts, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)
    assert len(encoded) == 2
    with pytest.raises(InvalidRequestError, match="image placeholders in the prompt: got 0, expected 1"):
        llm.generate({**prompts[1], "prompt": "no place for it"}, use_tqdm=False)


def test_an_encoder_with_cross_attention_is_refused_by_name(tmp_path: Path) -> None:
    config = media_config("pix2struct")
    config.architectures = ["Pix2StructForConditionalGeneration"]
    config.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"Pix2StructForConditionalGeneration: got an encoder with cross-attention"):
        model_config_of(tmp_path)


def test_settings_of_the_processor_are_the_engines_and_the_requests(tmp_path: Path) -> None:
    """A picture that is processed at a larger size takes more rows; what stands for it stays."""
    save_tiny_media("qwen2_5_vl", tmp_path)
    plain = hf_items(model_config_of(tmp_path))
    larger = {"size": {"shortest_edge": 112 * 112, "longest_edge": 224 * 224}}
    picture = dummy_item("image", 0)
    rows = len(plain.process_item("image", picture).token_ids)
    own = plain.with_settings(larger)
    assert len(own.process_item("image", picture).token_ids) > rows
    assert len(plain.process_item("image", picture).token_ids) == rows
    assert plain.with_settings({}) is plain
    engine = EngineArgs(model=str(tmp_path), device="cpu", model_impl="transformers", mm_processor_kwargs=larger)
    of_engine = hf_items(engine.create_engine_config().model_config)
    assert of_engine is not plain
    assert len(of_engine.process_item("image", picture).token_ids) == len(own.process_item("image", picture).token_ids)


def test_requests_bring_settings_and_unknown_ones_are_refused(tmp_path: Path) -> None:
    save_tiny_media("qwen2_5_vl", tmp_path)
    text, data = media_requests(hf_items(model_config_of(tmp_path)), "image")[1]
    llm = LLM(str(tmp_path), device="cpu", model_impl="transformers", max_model_len=512, num_blocks=64)
    larger = {"size": {"shortest_edge": 112 * 112, "longest_edge": 224 * 224}}
    prompts = [{"prompt": text, "multi_modal_data": data, "mm_processor_kwargs": each} for each in ({}, larger)]
    plain, other = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False)
    assert len(other.prompt_token_ids) > len(plain.prompt_token_ids)
    for unknown in ({"sizes": larger["size"]}, {"images_kwargs": {}}):
        with pytest.raises(InvalidRequestError, match="which nothing of this model takes"):
            llm.generate({**prompts[0], "mm_processor_kwargs": unknown}, use_tqdm=False)
    with pytest.raises(InvalidRequestError, match=r"mm_processor_kwargs\['size'\]"):
        llm.generate({**prompts[0], "mm_processor_kwargs": {"size": "large"}}, use_tqdm=False)
    with pytest.raises(ConfigError, match="which nothing of this model takes"):
        LLM(str(tmp_path), device="cpu", model_impl="transformers", mm_processor_kwargs={"sizes": 3})


def test_the_frames_of_a_clip_are_not_chosen_again() -> None:
    """They were when it was decoded; a processor that samples refuses clips of fewer frames than it wants."""

    class Sampling:
        video_processor = SimpleNamespace(do_sample_frames=True)

        def __call__(self, *, videos: Any, do_sample_frames: bool = True, **_: Any) -> dict[str, Any]:
            assert not do_sample_frames
            return {"input_ids": [[1] * len(videos[0])]}

    items = object.__new__(HFItems)
    items.processor, items._arguments = Sampling(), {"video": "videos"}
    assert len(items.process("v", {"video": [dummy_item("video", 0)]}).token_ids) == 4


def test_placeholders_may_want_what_opens_and_closes_them(tmp_path: Path) -> None:
    save_tiny_media("hunyuan_vl", tmp_path)
    items = hf_items(model_config_of(tmp_path))
    assert items.placeholders["image"].text == "<image_start_token><image><image_end_token>"

"""Multimodal models equal Hugging Face's in float32: each modality, many items, chunks, decoding, given rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.multimodal import MultiModalKwargs
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.direct import DirectRun, Prepared, hf_logits, load, prepare, relative_error
from tests.helpers.mixed_requests import MEDIA
from tests.helpers.processors import make_image, make_video

TOLERANCE = 1e-5
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
VIDEO = "<|vision_start|><|video_pad|><|vision_end|>"
SOUND = "<|audio_bos|><|AUDIO|><|audio_eos|>"
CONTINUATION = list(b" and so on")


def make_sound(num_samples: int, rate: int = 16000, seed: int = 0) -> tuple[np.ndarray[Any, Any], int]:
    return np.random.default_rng(seed).standard_normal(num_samples).astype(np.float32), rate


@dataclass(frozen=True)
class Case:
    """A prompt with media."""

    prompt: str
    data: Mapping[str, Any]

    def __str__(self) -> str:
        return "+".join(f"{len(items)} {modality}" for modality, items in self.data.items()) or "text"


IMAGES = [make_image(100, 60, seed=1), make_image(56, 200, seed=2), make_image(30, 28, seed=3)]
CLIPS = [make_video(5, 60, 90, seed=1), make_video(2, 100, 60, seed=2)]
QWEN_CASES = [
    Case("No picture at all.", {}),
    Case(f"Look: {IMAGE} What is it?", {"image": IMAGES[:1]}),
    Case(f"{IMAGE}{IMAGE} and {IMAGE}", {"image": IMAGES}),
    Case(f"Watch {VIDEO}!", {"video": CLIPS[:1]}),
    Case(f"{VIDEO} or {IMAGE} or {VIDEO}{IMAGE}", {"image": IMAGES[:2], "video": CLIPS}),
]
LLAVA_CASES = [
    Case("No picture at all.", {}),
    Case("<image>\nWhat is it?", {"image": IMAGES[:1]}),
    Case("<image><image> and <image>", {"image": IMAGES}),
]
FRAMES = [make_video(5, 60, 90, seed=1)]


def tile_case(placeholder: str, num_images: int = 3) -> Case:
    """Pictures of odd sizes, each cut in another way."""
    return Case("Look: " + f"{placeholder} and ".join([""] * num_images) + placeholder, {"image": IMAGES[:num_images]})


AUDIO_CASES = [
    Case("No sound at all.", {}),
    Case(f"Listen: {SOUND} What is it?", {"audio": [make_sound(9000)]}),
    Case(
        f"{SOUND}{SOUND} and {SOUND}{SOUND}",
        {"audio": [make_sound(16000), make_sound(3000, 8000, 1), make_sound(500, seed=2), make_sound(15000, seed=3)]},
    ),
]
CASES = [
    *[("qwen2_vl", case) for case in QWEN_CASES],
    *[("qwen2_5_vl", case) for case in QWEN_CASES],
    *[("llava", case) for case in LLAVA_CASES],
    *[("llava_siglip", case) for case in LLAVA_CASES],
    *[("llava_many_features", case) for case in LLAVA_CASES[1:]],
    *[("qwen2_audio", case) for case in AUDIO_CASES],
    ("llava_pixtral", tile_case("[IMG]")),
    ("llava_next", tile_case("<image>")),
    ("llava_onevision", tile_case("<image>", 1)),
    ("llava_onevision", Case("Watch <video>!", {"video": FRAMES})),
    ("internvl", tile_case("<IMG_CONTEXT>")),
    ("internvl", Case("Watch <video>!", {"video": FRAMES})),
    ("internvl_normed", tile_case("<IMG_CONTEXT>")),
    ("mistral3", tile_case("[IMG]")),
    ("idefics3", tile_case("<image>")),
]
WITH_SEPARATORS = ("mistral3", "idefics3")
"""Families in which the size of a picture says what stands between its rows."""
WITH_MEDIA = [(family, case) for family, case in CASES if case.data]


def loaded(family: str, case: Case) -> tuple[Any, Any, Prepared]:
    model, config = load(make_checkpoint(family), limit_mm_per_prompt={"image": 8, "video": 8, "audio": 8})
    return model, config, prepare(config, case.prompt, {name: list(items) for name, items in case.data.items()})


def embed(model: Any, prepared: Prepared) -> torch.Tensor:
    """The prompt's decoder inputs, media encoded item by item as the engine does."""
    ids = torch.tensor(prepared.token_ids)
    with torch.inference_mode():
        embeddings: torch.Tensor = model.get_input_embeddings(ids)
        for token_id, rows in model.encode_media(**prepared.batched).items():
            embeddings[ids == token_id] = torch.cat(list(rows))
    return embeddings


@pytest.mark.parametrize(("family", "case"), CASES, ids=str)
def test_whole_prompt_with_media_in_forward(family: str, case: Case) -> None:
    model, config, prepared = loaded(family, case)
    expected = hf_logits(make_hf_model(family), prepared.token_ids, prepared.kwargs)
    logits = DirectRun(model, config).step(prepared.token_ids, prepared.positions, **prepared.batched)
    assert relative_error(logits, expected) < TOLERANCE


@pytest.mark.parametrize(
    ("family", "case"),
    [
        ("llava_onevision", tile_case("<image>", 2)),  # pictures that aren't cut
        ("llava_onevision", Case("<video> or <image>", {"image": IMAGES[:1], "video": FRAMES})),
        ("smolvlm", tile_case("<image>", 2)),
    ],
    ids=str,
)
def test_whole_prompts_of_models_that_share_all_else(family: str, case: Case) -> None:
    test_whole_prompt_with_media_in_forward(family, case)


@pytest.mark.parametrize(("family", "case"), WITH_MEDIA, ids=str)
def test_chunks_through_media_and_decoding(family: str, case: Case) -> None:
    model, config, prepared = loaded(family, case)
    ids = [*prepared.token_ids, *CONTINUATION]
    expected = hf_logits(make_hf_model(family), ids, prepared.kwargs)
    positions, num_prompt = prepared.continued(len(CONTINUATION)), len(prepared.token_ids)
    embeddings = embed(model, prepared)
    run, parts = DirectRun(model, config), []
    for start in range(0, num_prompt, 7):
        end = min(start + 7, num_prompt)
        parts.append(run.step(ids[start:end], positions[..., start:end], inputs_embeds=embeddings[start:end]))
    parts += [run.step(ids[i : i + 1], positions[..., i : i + 1]) for i in range(num_prompt, len(ids))]
    assert relative_error(torch.cat(parts), expected) < TOLERANCE


@pytest.mark.parametrize(("family", "case"), WITH_MEDIA, ids=str)
def test_media_rows_of_items_together_equal_those_of_items_alone(family: str, case: Case) -> None:
    model, config, prepared = loaded(family, case)
    with torch.inference_mode():
        together = model.get_multimodal_embeddings(**prepared.batched)
    alone, counts = [], []
    for modality, items in case.data.items():
        for item in items:
            one = prepare(config, case_prompt(modality, family), {modality: [item]})
            with torch.inference_mode():
                alone += model.get_multimodal_embeddings(**one.batched)
            counts.append(sum(token in model.placeholder_token_ids() for token in one.token_ids))
    assert [len(rows) for rows in together] == counts
    for rows, expected in zip(together, alone, strict=True):
        assert relative_error(rows, expected) < TOLERANCE


def case_prompt(modality: str, family: str) -> str:
    if family in MEDIA and not family.startswith("qwen"):
        return MEDIA[family][modality].placeholder
    if "llava" in family:
        return "<image>"
    if "internvl" in family:
        return "<IMG_CONTEXT>"
    return {"image": IMAGE, "video": VIDEO, "audio": SOUND}[modality]


@pytest.mark.parametrize(("family", "case"), WITH_MEDIA, ids=str)
def test_items_of_several_requests_in_one_call(family: str, case: Case) -> None:
    """The engine batches items of different requests; each arrives as a prompt with one item."""
    model, config, _ = loaded(family, case)
    singles = [
        prepare(config, case_prompt(modality, family), {modality: [item]})
        for modality, items in case.data.items()
        for item in items
        if modality == next(iter(case.data))
    ]
    batched = MultiModalKwargs.batch([each.kwargs for each in singles])
    with torch.inference_mode():
        together = model.get_multimodal_embeddings(**batched)
        for rows, each in zip(together, singles, strict=True):
            assert relative_error(rows, model.get_multimodal_embeddings(**each.batched)[0]) < TOLERANCE


@pytest.mark.parametrize(("family", "case"), [each for each in WITH_MEDIA if each[0] != "llava_pixtral"], ids=str)
def test_given_rows_take_the_place_of_media(family: str, case: Case) -> None:
    """Rows that a caller computed give the logits that the media themselves give."""
    model, config, prepared = loaded(family, case)
    with torch.inference_mode():
        by_token = {token: list(rows) for token, rows in model.encode_media(**prepared.batched).items()}
    data = {}
    for (modality, items), rows in zip(case.data.items(), by_token.values(), strict=True):
        data[modality] = [
            given(family, modality, prepared, index, rows[index], items[index]) for index in range(len(items))
        ]
    again = prepare(config, case.prompt, data)
    assert again.token_ids == prepared.token_ids
    assert np.array_equal(again.positions, prepared.positions)
    assert not any(name.startswith(("pixel_", "input_features")) for name in again.kwargs)
    expected = DirectRun(model, config).step(prepared.token_ids, prepared.positions, **prepared.batched)
    logits = DirectRun(model, config).step(again.token_ids, again.positions, **again.batched)
    assert relative_error(logits, expected) < TOLERANCE


def given(family: str, modality: str, prepared: Prepared, index: int, rows: torch.Tensor, item: Any) -> Any:
    """An item as rows, in the form that its model takes."""
    grids = prepared.kwargs.get(f"{modality}_grid_thw")
    if grids is None:
        if family in WITH_SEPARATORS:
            return {"image_embeds": rows, "image_sizes": torch.tensor([[item.height, item.width]])}
        return rows
    as_dict = {f"{modality}_embeds": rows, f"{modality}_grid_thw": grids[index]}
    if modality == "video" and "second_per_grid_ts" in prepared.kwargs:
        as_dict["second_per_grid_ts"] = prepared.kwargs["second_per_grid_ts"][index]
    return as_dict


def test_one_dict_may_hold_the_rows_of_several_images() -> None:
    case = QWEN_CASES[2]
    model, config, prepared = loaded("qwen2_vl", case)
    with torch.inference_mode():
        rows = torch.cat(model.get_multimodal_embeddings(**prepared.batched))
    item = {"image_embeds": rows, "image_grid_thw": prepared.kwargs["image_grid_thw"]}
    again = prepare(config, case.prompt, {"image": item})
    assert again.token_ids == prepared.token_ids
    expected = DirectRun(model, config).step(prepared.token_ids, prepared.positions, **prepared.batched)
    logits = DirectRun(model, config).step(again.token_ids, again.positions, **again.batched)
    assert relative_error(logits, expected) < TOLERANCE


def test_one_tensor_may_hold_the_rows_of_several_images() -> None:
    case = LLAVA_CASES[2]
    model, config, prepared = loaded("llava", case)
    with torch.inference_mode():
        rows = torch.stack(model.get_multimodal_embeddings(**prepared.batched))
    again = prepare(config, case.prompt, {"image": rows})
    assert again.token_ids == prepared.token_ids
    expected = DirectRun(model, config).step(prepared.token_ids, **prepared.batched)
    assert relative_error(DirectRun(model, config).step(again.token_ids, **again.batched), expected) < TOLERANCE


def test_a_text_row_in_a_batch_with_media_is_untouched() -> None:
    """The embeddings method puts rows at placeholders only."""
    model, _, prepared = loaded("llava", LLAVA_CASES[1])
    ids = torch.tensor(prepared.token_ids)
    rows = torch.full((int((ids == model.config.image_token_id).sum()), 64), 7.0)
    merged = model.get_input_embeddings(ids, [rows])
    is_media = ids == model.config.image_token_id
    assert (merged[is_media] == 7).all()
    assert torch.equal(merged[~is_media], model.get_input_embeddings(ids)[~is_media])

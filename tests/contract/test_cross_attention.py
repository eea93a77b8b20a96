"""Models whose decoder attends to an encoder's rows: who holds them, for how long, and what they cost."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium import LLMEngine, SamplingParams
from sensorium.cache_spec import CacheKind
from sensorium.errors import InvalidRequestError, ModelError
from sensorium.model_executor.models.registry import ModelRegistry
from sensorium.model_executor.models.whisper import WhisperForConditionalGeneration
from sensorium.scheduler.cross_manager import CrossManager
from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import Layout, make_checkpoint, make_hf_model
from tests.helpers.graphs import HostReplay
from tests.helpers.hf_reference import hf_greedy
from tests.helpers.mixed_requests import picture, sound
from tests.helpers.serving import Planned, alone, make_engine, quiet_engine, serve

TASK = "<|startoftranscript|><|en|><|transcribe|><|notimestamps|>"
BLOCKS = 4
"""Of 16 rows, which a sound of 50 takes."""


def plan(request_id: str, seed: int, text: str = "", max_tokens: int = 6, **params: Any) -> Planned:
    greedy = {"temperature": 0, "max_tokens": max_tokens, "ignore_eos": True}
    prompt = {"prompt": TASK + text, "multi_modal_data": {"audio": sound(seed)}}
    return Planned(request_id, prompt, SamplingParams(**{**greedy, **params}))


@cache
def reference() -> dict[str, list[int]]:
    """Tokens of some requests, each alone and without caches."""
    engine = quiet_engine(make_checkpoint("whisper"))
    return alone(engine, [plan(f"{seed}", seed) for seed in range(4)])


def cross(engine: LLMEngine) -> CrossManager:
    [manager] = engine.core.scheduler._kv_cache._cross
    return manager


def test_rows_stand_in_a_group_of_their_own_which_the_report_names() -> None:
    engine = make_engine(make_checkpoint("whisper"), num_blocks=28)
    full, rows = engine.core.report.cache_groups
    assert (full.kind, rows.kind) == (CacheKind.FULL, CacheKind.CROSS)
    assert rows.max_rows == 50
    assert rows.num_bytes == rows.num_blocks * 16 * 2 * 64 * 4 * 3
    assert "cross-attention in 3 layers: 28 blocks of 16 rows = 448 rows" in "\n".join(engine.core.report.lines())
    assert engine.core.report.num_blocks == 28, "what would have to be asked for"


def test_rows_are_held_from_admission_to_the_end_and_shared_by_requests_with_the_same_sound() -> None:
    """Six outputs of one sound used six times the memory."""
    engine = make_engine(make_checkpoint("whisper"))
    for name, seed in (("a", 0), ("b", 1)):
        engine.add_request(name, plan(name, seed).prompt, plan(name, seed).params)
    engine.step()
    pool = cross(engine).pool
    assert pool.num_blocks - pool.num_free == 2 * BLOCKS
    for name in ("c", "d"):
        engine.add_request(name, plan(name, 0).prompt, plan(name, 0).params)
    before = engine.core.stats().num_encoded_rows
    engine.step()
    assert pool.num_blocks - pool.num_free == 2 * BLOCKS, "theirs are those of the first"
    assert engine.core.stats().num_encoded_rows == before
    while engine.has_unfinished_requests():
        engine.step()
    assert pool.num_free == pool.num_blocks
    served = serve(engine, [plan("e", 0, n=3)])
    assert [list(each.token_ids) for each in served.outputs["e"].outputs] == [reference()["0"]] * 3


def test_where_rows_lack_room_requests_wait_and_none_is_lost() -> None:
    engine = make_engine(make_checkpoint("whisper"), num_blocks=9, enable_prefix_caching=False)
    assert cross(engine).pool.num_blocks == 9, "two sounds"
    served = serve(engine, [plan(f"{seed}", seed) for seed in range(4)])
    assert {name: served.tokens(name) for name in served.outputs} == reference()
    engine.core.scheduler.check_idle()


def test_two_equal_sounds_in_one_step_cost_one_encoding() -> None:
    engine = make_engine(make_checkpoint("whisper"))
    served = serve(engine, [plan(name, 2) for name in ("a", "b", "c")])
    assert engine.core.stats().num_encoded_rows == 50
    assert {served.tokens(name) == reference()["2"] for name in ("a", "b", "c")} == {True}


def test_rows_of_a_failed_request_are_not_found_by_others() -> None:
    engine = make_engine(make_checkpoint("whisper"))
    driver: Any = engine.core.executor.worker.runner.passes._driver  # type: ignore[attr-defined]
    forward = driver.forward

    def fails(inputs: Any) -> Any:
        forward(inputs)
        raise RuntimeError("injected")

    driver.forward = fails
    assert serve(engine, [plan("a", 3)]).outputs["a"].error is not None
    driver.forward = forward
    assert cross(engine).pool.num_cached == 0
    assert serve(engine, [plan("b", 3)]).tokens("b") == reference()["3"]


def test_a_pass_that_is_repeated_request_by_request_writes_the_same_rows() -> None:
    engine = make_engine(make_checkpoint("whisper"))
    driver: Any = engine.core.executor.worker.runner.passes._driver  # type: ignore[attr-defined]
    forward = driver.forward

    def fails_together(inputs: Any) -> Any:
        hidden = forward(inputs)
        if inputs.attn_metadata.num_seqs > 1:
            raise RuntimeError("injected")
        return hidden

    driver.forward = fails_together
    served = serve(engine, [plan(f"{seed}", seed) for seed in range(4)])
    assert {name: served.tokens(name) for name in served.outputs} == reference()


def test_decodes_are_recorded_and_the_report_says_that_others_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = HostReplay()
    monkeypatch.setattr(Worker, "_graph_capture", lambda worker: capture)
    engine = make_engine(make_checkpoint("whisper"), max_num_seqs=4)
    served = serve(engine, [plan(f"{seed}", seed) for seed in range(4)])
    assert {name: served.tokens(name) for name in served.outputs} == reference()
    assert capture.num_replays >= 5
    worker: Any = engine.core.executor.worker  # type: ignore[attr-defined]
    monkeypatch.setattr(worker, "_device", type("Device", (), {"type": "cuda"}))
    assert "decodes as CUDA graphs, others call by call" in worker._steps_line()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "audio: got 0 sounds, expected one"),
        ([sound(0), sound(1)], "At most 1 audio"),
        ((np.zeros(20_000, dtype=np.float32), 16_000), "got a sound of 1.2 s, expected at most the 1 s"),
    ],
)
def test_a_prompt_without_exactly_one_sound_that_is_heard_whole_is_refused(data: Any, message: str) -> None:
    engine = make_engine(make_checkpoint("whisper"))
    prompt = {"prompt": TASK, "multi_modal_data": {} if data is None else {"audio": data}}
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("a", prompt, SamplingParams())


def test_the_decoder_begins_with_what_the_prompt_says() -> None:
    """What a tokenizer puts around texts, a beginning and an end, is not for prompts of a decoder."""
    engine = make_engine(make_checkpoint("whisper"))
    begin = engine.config.model_config.hf_config.decoder_start_token_id
    for text, expected in ((TASK, 4), ("", 1), ("ab", 3)):
        prompt: Any = {"prompt": text, "multi_modal_data": {"audio": sound(0)}}
        ids = engine.preprocess("a", prompt, SamplingParams()).engine_request.prompt_token_ids
        assert (len(ids), ids[0]) == (expected, begin)


def test_a_prompt_may_come_in_halves() -> None:
    """As older engines took prompts of models with an encoder."""
    engine = make_engine(make_checkpoint("whisper"))
    halves = {
        "encoder_prompt": {"prompt": "", "multi_modal_data": {"audio": sound(1)}},
        "decoder_prompt": TASK,
    }
    assert serve(engine, [Planned("a", halves, plan("a", 1).params)]).tokens("a") == reference()["1"]
    for wrong in ({**halves, "decoder_prompt": halves["encoder_prompt"]}, {**halves, "encoder_prompt": "listen"}):
        with pytest.raises(InvalidRequestError, match="expected an encoder's half of media"):
            engine.add_request("b", wrong, SamplingParams())
    text = make_engine(make_checkpoint("llama"))
    with pytest.raises(InvalidRequestError, match="Cannot pass encoder-decoder prompt to decoder-only models"):
        text.add_request("c", {"encoder_prompt": "a", "decoder_prompt": "b"}, SamplingParams())


TILES = [(56, 56), (112, 56), (56, 200), (112, 112)]
"""Sizes of pictures that take 1, 2, 4 and 4 tiles of 56 x 56."""


@pytest.mark.parametrize("before", ["", "look at this "])
def test_tokens_before_a_picture_see_other_rows_than_those_behind(before: str) -> None:
    """As in the reference, whose mask lets tokens before the picture see tiles that are not there."""
    engine = make_engine(make_checkpoint("mllama"), max_num_batched_tokens=64)
    params = SamplingParams(temperature=0, max_tokens=5, ignore_eos=True)
    model, rng = make_hf_model("mllama"), np.random.default_rng(3)
    pictures = [Image.fromarray(rng.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in TILES]
    prompts = [f"{before}<|image|>what is it?" for _ in pictures]
    plans = [
        Planned(f"{i}", {"prompt": prompt, "multi_modal_data": {"image": picture}}, params)
        for i, (prompt, picture) in enumerate(zip(prompts, pictures, strict=True))
    ]
    plans.append(Planned("text", "no picture at all", params))
    served = serve(engine, plans)
    for each in plans:
        request = engine.preprocess("x", each.prompt, params).engine_request
        assert served.tokens(each.request_id) == hf_greedy(model, request, 5)
        if request.media:
            [item] = request.media
            tiles = [1, 2, 4, 4][int(each.request_id)]
            assert (item.cross_rows, item.seen_rows, item.span.end) == (4 * 17, tiles * 17, len(before) + 1)


@pytest.mark.parametrize(
    ("prompt", "count", "message"),
    [
        ("two <|image|><|image|>", 1, "got 1 pictures and 2 times"),
        ("none", 1, "got 1 pictures and 0 times"),
        ("stray <|image|>", 0, "got 0 pictures and 1 times"),
    ],
)
def test_a_picture_stands_once_in_its_prompt(prompt: str, count: int, message: str) -> None:
    engine = make_engine(make_checkpoint("mllama"))
    data = {"image": [picture(0)] * count} if count else {}
    with pytest.raises(InvalidRequestError, match=message):
        engine.add_request("a", {"prompt": prompt, "multi_modal_data": data}, SamplingParams())


@pytest.mark.parametrize("layout", ["hub", "saved"])
@pytest.mark.parametrize("tied", [False, True])
def test_checkpoints_of_every_layout_are_read(layout: Layout, tied: bool) -> None:
    engine = make_engine(make_checkpoint("whisper", layout=layout, tied=tied, sharded=layout == "saved"))
    each = plan("a", 0)
    request = engine.preprocess("a", each.prompt, each.params).engine_request
    assert serve(engine, [each]).tokens("a") == hf_greedy(make_hf_model("whisper", tied=tied), request, 6)


class OwnWhisper(WhisperForConditionalGeneration):
    """A class of an author's own, which is tried out at load."""


class MiscountedWhisper(WhisperForConditionalGeneration):
    @classmethod
    def get_num_encoder_rows(cls, model_config: Any, modality: str, kwargs: Any) -> int:
        return 49


class DeafWhisper(WhisperForConditionalGeneration):
    def forward(self, input_ids: Any, positions: Any, kv_caches: Any, attn_metadata: Any) -> Any:
        return self.decoder(input_ids, positions, kv_caches, attn_metadata, None)


def own_class(monkeypatch: pytest.MonkeyPatch, model_class: type) -> LLMEngine:
    monkeypatch.setitem(ModelRegistry._models, "WhisperForConditionalGeneration", model_class)
    return make_engine(make_checkpoint("whisper"))


def test_a_class_of_an_authors_own_is_tried_out_and_served(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = own_class(monkeypatch, OwnWhisper)
    assert engine.core.features.tier == "X"
    assert serve(engine, [plan("a", 0)]).tokens("a") == reference()["0"]


@pytest.mark.parametrize(
    ("model_class", "message"),
    [
        (
            MiscountedWhisper,
            "returned 50 rows for an item of its dummy data.*expected 49, as get_num_encoder_rows",
        ),
        (DeafWhisper, "got SupportsCrossAttention without a parameter encoder_outputs of forward"),
    ],
)
def test_what_a_class_gets_wrong_is_an_error_of_loading(
    monkeypatch: pytest.MonkeyPatch, model_class: type, message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        own_class(monkeypatch, model_class)

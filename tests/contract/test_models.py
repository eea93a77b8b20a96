"""The contract that every registered model keeps, judged against Hugging Face's class on the same checkpoint.

Chunked = whole, batched = alone, cached = cold, preempted = undisturbed, placeholders = encoder rows, dummy data = the
worst legal input. A model joins by an entry in `FAMILIES`.
"""

from __future__ import annotations

import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from sensorium import LLMEngine, SamplingParams
from sensorium.errors import ConfigError
from sensorium.inputs import INPUT_REGISTRY
from sensorium.multimodal import MULTIMODAL_REGISTRY
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.far_tensors import put_far
from tests.helpers.hf_reference import hf_greedy
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import Planned, differing, make_engine, quiet_engine, serve

TEXT = ("llama", "qwen2", "gemma3", "qwen3", "qwen3_5", "qwen3_moe", "gpt_oss")
CROSS = ("whisper", "mllama")
"""Whose decoders attend to media by cross-attention."""
TILES = ("llava_next", "llava_onevision", "internvl", "llava_pixtral", "mistral3", "idefics3")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe", "qwen2_audio", "qwen2_5_omni_thinker")
PREFIXES = ("paligemma2",)
"""Whose prompts see all of themselves, and so are computed in one step."""
PLACED = ("gemma3_vision", *PREFIXES, "llava", *TILES, *QWEN)
MULTIMODAL = (*PLACED, *CROSS)
FAMILIES = (*TEXT, *MULTIMODAL)

WAYS: dict[str, dict[str, Any]] = {
    "batched and cached": {},
    "chunks of 16": {"max_num_batched_tokens": 16},
    "chunks of 33, small encoder cache": {
        "max_num_batched_tokens": 33,
        "encoder_cache_rows": 30,
        "max_num_encoder_rows": 30,
    },
    "preempted": {"num_blocks": 40, "block_size": 8, "max_num_batched_tokens": 64},
    "without caches": {"enable_prefix_caching": False, "encoder_cache_rows": 0, "mm_processor_cache_bytes": 0},
    "whole prompts only": {"enable_chunked_prefill": False, "max_num_batched_tokens": 64},
}


@cache
def checkpoint(family: str) -> Path:
    return make_checkpoint(family)


def engine_for(family: str, **settings: Any) -> LLMEngine:
    if family in PREFIXES:
        least = {"max_num_batched_tokens": 256, "max_num_encoder_rows": 32}
        settings |= {name: max(settings[name], most) for name, most in least.items() if name in settings}
    return make_engine(checkpoint(family), limit_mm_per_prompt=limits(family), **settings)


@cache
def plan_and_reference(family: str) -> tuple[list[Planned], dict[str, list[int]]]:
    """Ten requests that arrive within a few steps, and their tokens by Hugging Face, one by one."""
    engine = quiet_engine(checkpoint(family), limit_mm_per_prompt=limits(family))
    model = make_hf_model(family)
    plan = random_plan(family, 10, random.Random(family), spread=4, aborts=0)
    reference = {}
    for each in plan:
        request = engine.preprocess(each.request_id, each.prompt, each.params).engine_request
        assert each.params.max_tokens is not None
        reference[each.request_id] = hf_greedy(model, request, each.params.max_tokens)
    return plan, reference


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_hugging_face(family: str, way: str) -> None:
    if family == "mllama" and not WAYS[way].get("enable_chunked_prefill", True):
        with pytest.raises(ConfigError, match="enable_chunked_prefill: got false for Mllama"):
            engine_for(family, **WAYS[way])
        return
    engine = engine_for(family, **WAYS[way])
    plan, reference = plan_and_reference(family)

    # Twice: the second time every prefix, item and mapping that can be cached is.
    for _ in range(2):
        served = serve(engine, plan)
        for each in plan:
            got, expected = served.tokens(each.request_id), reference[each.request_id]
            assert got == expected, f"request {each.request_id} {differing(got, expected)}"
    engine.core.scheduler.check_idle()


@pytest.mark.parametrize("family", MULTIMODAL)
def test_repeated_media_cost_neither_mapping_nor_encoding(family: str) -> None:
    engine = engine_for(family)
    plan, _ = plan_and_reference(family)
    serve(engine, plan)
    before, mapped = engine.core.stats(), engine.preprocessor.statistics()
    serve(engine, plan)
    after, mapped_after = engine.core.stats(), engine.preprocessor.statistics()
    assert after.num_encoded_rows == before.num_encoded_rows
    assert mapped_after.misses == mapped.misses
    assert after.num_prefix_hit_tokens > before.num_prefix_hit_tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_hugging_face_to_one_part_in_ten_thousand(family: str) -> None:
    """Through the engine: the log probabilities of every prompt token, whole and in chunks."""
    plan, _ = plan_and_reference(family)
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    model = make_hf_model(family)
    for settings in ({}, {"max_num_batched_tokens": 16}):
        engine = engine_for(family, **settings)
        for each in plan[:4]:
            request = engine.preprocess("probe", each.prompt, params).engine_request
            reference = reference_logprobs(model, request)
            output = serve(engine, [Planned("r", each.prompt, params)]).outputs["r"]
            assert output.prompt_logprobs is not None
            assert len(output.prompt_logprobs) == len(request.prompt_token_ids)
            for position, entry in enumerate(output.prompt_logprobs[1:], 1):
                token = request.prompt_token_ids[position]
                if token >= reference.shape[1]:  # a picture's, of which no probability is told
                    assert entry is None
                    continue
                assert entry is not None
                expected = float(reference[position - 1, token])
                assert entry[token].logprob == pytest.approx(expected, abs=2e-4), f"at position {position}"


@torch.inference_mode()
def reference_logprobs(model: Any, request: Any) -> torch.Tensor:
    """Log probabilities `(prompt length, vocabulary)` by Hugging Face."""
    from tests.helpers.hf_reference import hf_inputs

    logits = model(**hf_inputs(request, model)).logits[0].float()
    return torch.log_softmax(logits, dim=-1)


@pytest.mark.parametrize("family", MULTIMODAL)
def test_placeholders_and_encoder_rows_agree(family: str) -> None:
    """Every item of many random prompts has as many rows from the encoder as in the prompt."""
    engine = engine_for(family)
    worker = engine.core.executor.worker  # type: ignore[attr-defined]
    from sensorium.model_executor.drivers import EncodeJob

    with torch.inference_mode():
        for each in random_plan(family, 8, random.Random(1), spread=0, aborts=0):
            request = engine.preprocess("r", each.prompt, each.params).engine_request
            jobs = [EncodeJob(request, item) for item in request.media]
            for job, rows in zip(jobs, worker._driver.encode(jobs), strict=True):
                assert isinstance(rows, torch.Tensor), rows
                assert len(rows) == job.item.num_rows
                assert job.item.num_rows <= engine.core.features.max_item_rows[job.item.modality]


@pytest.mark.parametrize("family", MULTIMODAL)
@torch.inference_mode()
def test_encoders_read_nothing_off_the_device(family: str) -> None:
    """Reading a picture's size off a GPU waits for all steps in flight: `mm_host_kwargs` says what stays."""
    engine = engine_for(family)
    driver = engine.core.executor.worker._driver  # type: ignore[attr-defined]
    for each in random_plan(family, 4, random.Random(1), spread=0, aborts=0):
        request = engine.preprocess("r", each.prompt, each.params).engine_request
        for item in request.media:
            kwargs = driver.encoder_kwargs([item.kwargs or {}])
            far = {name: put_far(value) for name, value in kwargs.items() if name not in driver.host_kwargs}
            driver.call_encoder({**kwargs, **far})


@pytest.mark.parametrize("family", PLACED)
def test_dummy_data_is_the_worst_legal_input(family: str) -> None:
    """Allowed one item of a modality, the dummy prompt holds one of the largest size that the model declares."""
    for modality in limits(family):
        engine = make_engine(checkpoint(family), limit_mm_per_prompt={**dict.fromkeys(limits(family), 0), modality: 1})
        model_config = engine.config.model_config
        largest = engine.core.features.max_item_rows[modality]
        seq_len = model_config.max_model_len
        dummy = INPUT_REGISTRY.dummy_data_for_profiling(model_config, seq_len, MULTIMODAL_REGISTRY)
        assert dummy.multi_modal_data is not None
        assert list(dummy.multi_modal_data) == [modality]
        ids = list(dummy.seq_data.prompt_token_ids)
        placeholders = MULTIMODAL_REGISTRY.get_placeholder_tokens(model_config)[modality]
        num_rows = sum(token in placeholders for token in ids)
        # A clip that fills the whole context leaves no room for the tokens around it, and comes in steps of frames.
        assert largest >= num_rows >= (0.97 * largest if largest > seq_len - 200 else largest)

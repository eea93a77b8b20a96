"""`mm_processor_kwargs`: two sources, a filter, and who wins."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, token_inputs
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.multimodal.callables import accepted_kwargs, resolve_mm_processor_kwargs
from sensorium.sequence import SequenceData
from tests.helpers.configs import make_model_config
from tests.helpers.processors import make_image, save_qwen2_vl

DEFAULT, ENGINE, REQUEST = 4, 8, 16


def mapper(ctx: InputContext, data: object, *, num_crops: int = DEFAULT) -> MultiModalKwargs:
    return MultiModalKwargs({"num_crops": torch.tensor(num_crops)})


def processor(ctx: InputContext, inputs: Any, *, num_crops: int = DEFAULT) -> Any:
    return token_inputs([0] * num_crops)


def max_tokens(ctx: InputContext, *, num_crops: int = DEFAULT) -> int:
    return num_crops


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Any, *, num_crops: int = DEFAULT) -> DummyData:
    return DummyData(SequenceData.from_prompt_token_counts((1, num_crops), (0, seq_len)))


@MULTIMODAL_REGISTRY.register_image_input_mapper(mapper)
@MULTIMODAL_REGISTRY.register_max_image_tokens(max_tokens)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(processor)
class Model(nn.Module, SupportsMultiModal):
    pass


def seen_by(callable_name: str, engine: Any, request: Any = None) -> int:
    """The `num_crops` that one of the four callables gets."""
    config = make_model_config(Model, mm_processor_kwargs=engine)
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    if callable_name == "mapper":
        return int(MULTIMODAL_REGISTRY.map_input(config, {"image": "x"}, request)["num_crops"])
    if callable_name == "processor":
        inputs = token_inputs([1], mm_processor_kwargs=request)
        processed: Any = INPUT_REGISTRY.process_input(config, inputs)
        return len(processed["prompt_token_ids"])
    if callable_name == "max_tokens":
        return MULTIMODAL_REGISTRY.get_max_multimodal_tokens(config)
    dummy = INPUT_REGISTRY.dummy_data_for_profiling(config, 3, MULTIMODAL_REGISTRY)
    return dummy.seq_data.prompt_token_ids.count(1)


@pytest.mark.parametrize(
    ("engine", "request_", "expected"),
    [
        (None, None, DEFAULT),
        ({"num_crops": ENGINE}, None, ENGINE),
        (None, {"num_crops": REQUEST}, REQUEST),
        ({"num_crops": ENGINE}, {"num_crops": REQUEST}, REQUEST),
        ({"unknown": 1}, {"unknown": 2}, DEFAULT),
        ({"ctx": 1}, {"ctx": 2}, DEFAULT),
        ({"num_crops": ENGINE}, {"ctx": 2, "unknown": 3}, ENGINE),
    ],
)
@pytest.mark.parametrize("callable_name", ["mapper", "processor"])
def test_a_request_wins_over_the_engine(callable_name: str, engine: Any, request_: Any, expected: int) -> None:
    assert seen_by(callable_name, engine, request_) == expected


@pytest.mark.parametrize(
    ("engine", "expected"),
    [(None, DEFAULT), ({"num_crops": ENGINE}, ENGINE), ({"unknown": 1}, DEFAULT), ({"ctx": 1}, DEFAULT)],
)
@pytest.mark.parametrize("callable_name", ["max_tokens", "dummy_data"])
def test_at_startup_only_the_engine_speaks(callable_name: str, engine: Any, expected: int) -> None:
    assert seen_by(callable_name, engine) == expected


@pytest.mark.parametrize("name", ["unknown", "ctx", "data"])
@pytest.mark.parametrize("source", ["engine", "request"])
def test_other_names_are_dropped_with_a_warning(name: str, source: str, caplog: pytest.LogCaptureFixture) -> None:
    def mapper(ctx: object, data: object, *, num_crops: int = 1, **others: object) -> None: ...

    mapper.__qualname__ = f"{source}_{name}"  # warnings about the engine's own are given once
    kwargs = {name: 1}
    resolved = resolve_mm_processor_kwargs(
        kwargs if source == "engine" else None, kwargs if source == "request" else None, mapper
    )
    assert resolved == {}
    assert f"{name!r} is not a keyword-only parameter of {source}_{name}" in caplog.text


def test_warnings_about_the_engines_own_are_given_once(caplog: pytest.LogCaptureFixture) -> None:
    def function_that_warns_once(ctx: object) -> None: ...

    for _ in range(3):
        resolve_mm_processor_kwargs({"other": 1}, None, function_that_warns_once)
    assert len(caplog.records) == 1


def test_a_partials_bound_keyword_and_what_follows_count_as_keyword_only() -> None:
    def function(ctx: object, data: object, modality: str, num_crops: int = 1) -> None: ...

    partial = functools.partial(function, modality="image")
    assert resolve_mm_processor_kwargs({"num_crops": 3}, None, partial) == {"num_crops": 3}
    assert resolve_mm_processor_kwargs({"data": 3}, None, partial) == {}
    assert resolve_mm_processor_kwargs({"num_crops": 3}, None, functools.partial(function)) == {}


def test_a_hugging_face_call_also_takes_positional_names() -> None:
    def processor(text: str, padding: bool = False, *, truncation: bool = False) -> None: ...

    kwargs = {"padding": True, "truncation": True, "unknown": 1}
    assert accepted_kwargs(processor, kwargs) == {"padding": True, "truncation": True}

    def open_processor(text: str, **kwargs: object) -> None: ...

    assert accepted_kwargs(open_processor, kwargs) == kwargs


def test_what_the_processor_leaves_out_is_filled_in_for_the_mapper() -> None:
    """A processor that builds fresh inputs must not lose what the request asked of the mapper."""
    config = make_model_config(Model, mm_processor_kwargs={"num_crops": ENGINE})
    inputs = token_inputs([1], mm_processor_kwargs={"min_pixels": 5})
    processed: Any = INPUT_REGISTRY.process_input(config, inputs)
    assert processed["mm_processor_kwargs"] == {"num_crops": ENGINE, "min_pixels": 5}


# The default mapper hands everything to the Hugging Face processor, which picks.


@pytest.fixture(scope="module")
def qwen2_vl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_qwen2_vl(tmp_path_factory.mktemp("qwen2_vl"))


@pytest.mark.parametrize(
    ("engine", "request_", "patches"),
    [
        (None, None, 4 * 4),
        ({"min_pixels": 56 * 112}, None, 6 * 6),
        ({"min_pixels": 56 * 112}, {"min_pixels": 112 * 112}, 8 * 8),
        ({"unknown": 1}, {"ctx": 1, "data": 2, "return_unused_kwargs": True, "subfolder": "x"}, 4 * 4),
    ],
)
def test_the_default_mapper_passes_settings_on(qwen2_vl: Path, engine: Any, request_: Any, patches: int) -> None:
    model = MULTIMODAL_REGISTRY.register_image_input_mapper()(type("Default", (nn.Module, SupportsMultiModal), {}))
    config = make_model_config(model, model=qwen2_vl, mm_processor_kwargs=engine)
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    mapped = MULTIMODAL_REGISTRY.map_input(config, {"image": make_image(56, 56)}, request_)
    assert len(mapped["pixel_values"]) == patches


def test_no_request_chooses_files_or_code(qwen2_vl: Path, tmp_path: Path) -> None:
    """The settings of a request reach a processor's constructor, never the loader of its files."""
    model = MULTIMODAL_REGISTRY.register_image_input_mapper()(type("Guarded", (nn.Module, SupportsMultiModal), {}))
    config = make_model_config(model, model=qwen2_vl)
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    hostile = {
        "processor_name": str(tmp_path),
        "trust_remote_code": True,
        "revision": "evil",
        "backend": "torchvision",
        "tokenizer": "x",
        "cache_dir": str(tmp_path),
        "image_processor_filename": "config.json",
        "_from_auto": True,
        "device": "meta",
        "return_tensors": "np",
    }
    mapped = MULTIMODAL_REGISTRY.map_input(config, {"image": make_image(56, 56)}, hostile)
    assert len(mapped["pixel_values"]) == 4 * 4
    assert mapped["pixel_values"].device.type == "cpu"
    assert not list(tmp_path.iterdir())

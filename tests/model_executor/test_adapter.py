"""Models are constructed and called by their own signatures."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.model_executor.adapter import (
    ForwardAdapter,
    check_accepted,
    construct_model,
    constructor_kwargs,
    current_engine_config,
)
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.sequence import IntermediateTensors
from tests.helpers.configs import make_engine_config

CONFIG = make_engine_config(None)
HF_CONFIG = CONFIG.model_config.hf_config


# Constructors


def init_current(self: Any, *, config: Any, prefix: str = "") -> None: ...
def init_current_annotated(self: Any, config: EngineConfig, prefix: str = "") -> None: ...
def init_vllm(self: Any, *, vllm_config: Any, prefix: str = "") -> None: ...
def init_vllm_without_prefix(self: Any, vllm_config: Any) -> None: ...
def init_hf(self: Any, config: Any) -> None: ...
def init_hf_annotated(self: Any, *, config: PretrainedConfig, prefix: str = "") -> None: ...
def init_older(self: Any, config: Any, cache_config: Any = None, quant_config: Any = None) -> None: ...
def init_oldest(self: Any, config: Any, multimodal_config: Any, cache_config: Any, quant_config: Any) -> None: ...
def init_older_keywords(self: Any, *, config: Any, lora_config: Any, scheduler_config: Any, prefix: str) -> None: ...
def init_mixed(self: Any, config: Any, *, vllm_config: Any, prefix: str = "") -> None: ...
def init_with_defaults(self: Any, *, config: Any, temperature: float = 1.0) -> None: ...


def class_with(init: Any) -> type:
    return type("Model", (nn.Module, SupportsMultiModal), {"__init__": init})


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (init_current, {"config": CONFIG, "prefix": "p"}),
        (init_current_annotated, {"config": CONFIG, "prefix": "p"}),
        (init_vllm, {"vllm_config": CONFIG, "prefix": "p"}),
        (init_vllm_without_prefix, {"vllm_config": CONFIG}),
        (init_hf, {"config": HF_CONFIG}),
        (init_hf_annotated, {"config": HF_CONFIG, "prefix": "p"}),
        (init_older, {"config": HF_CONFIG, "cache_config": CONFIG.cache_config, "quant_config": None}),
        (
            init_oldest,
            {
                "config": HF_CONFIG,
                "multimodal_config": None,
                "cache_config": CONFIG.cache_config,
                "quant_config": None,
            },
        ),
        (
            init_older_keywords,
            {
                "config": HF_CONFIG,
                "lora_config": None,
                "scheduler_config": CONFIG.scheduler_config,
                "prefix": "p",
            },
        ),
        (init_mixed, {"config": HF_CONFIG, "vllm_config": CONFIG, "prefix": "p"}),
        (init_with_defaults, {"config": CONFIG}),
    ],
)
def test_every_form_of_constructor_gets_what_it_names(init: Any, expected: dict[str, Any]) -> None:
    kwargs = constructor_kwargs(class_with(init), CONFIG, "p")
    assert kwargs.keys() == expected.keys()
    for name, value in expected.items():
        assert kwargs[name] is value or kwargs[name] == value == "p"


@pytest.mark.parametrize(
    ("annotation", "takes_engine_config"),
    [
        ("EngineConfig", True),
        ("sensorium.config.EngineConfig", True),
        ("VllmConfig", True),
        ("EngineConfig | None", True),
        (EngineConfig, True),
        ("typing.Any", True),
        (Any, True),
        ("LlamaConfig", False),
        (LlamaConfig, False),
        ("PretrainedConfig", False),
    ],
)
def test_the_annotation_says_which_config_is_meant(annotation: Any, takes_engine_config: bool) -> None:
    def init(self: Any, *, config: Any) -> None: ...

    init.__annotations__["config"] = annotation
    assert (constructor_kwargs(class_with(init), CONFIG)["config"] is CONFIG) == takes_engine_config


def test_keywords_that_are_passed_on_are_found_in_the_base() -> None:
    class Base(nn.Module):
        def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
            super().__init__()
            self.seen = (vllm_config, prefix)

    class Wrapper(Base):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    model: Any = construct_model(Wrapper, CONFIG, "p")
    assert model.seen == (CONFIG, "p")


def test_new_may_return_another_class() -> None:
    class Inner(nn.Module):
        pass

    class Registered(nn.Module):
        def __new__(cls, *, vllm_config: Any, prefix: str = "") -> Any:
            assert vllm_config is CONFIG
            return Inner()

    assert type(construct_model(Registered, CONFIG)) is Inner


def test_a_constructor_that_asks_for_more_is_told_what_there_is() -> None:
    def init(self: Any, *, config: Any, tokenizer: Any) -> None: ...

    with pytest.raises(TypeError, match=r"required parameters \['tokenizer'\].*vllm_config"):
        construct_model(class_with(init), CONFIG)


def test_the_engines_config_is_current_inside_a_constructor_only() -> None:
    class Model(nn.Module):
        def __init__(self, config: Any) -> None:
            super().__init__()
            self.config = current_engine_config()

    model: Any = construct_model(Model, CONFIG)
    assert model.config is CONFIG
    with pytest.raises(ModelError, match="no model is being constructed"):
        current_engine_config()


# Forward


def recording(forward: Any) -> nn.Module:
    """A model whose `forward` returns what it was given."""
    model: nn.Module = type("Model", (nn.Module,), {"forward": forward})()
    return model


IDS, POSITIONS, CACHES, METADATA = torch.ones(2), torch.zeros(2), ["cache"], object()
EMBEDS, PIXELS = torch.ones(2, 3), torch.ones(1, 3)


def call(model: nn.Module, *, inputs_embeds: Any = None, **media: Any) -> dict[str, Any]:
    seen: dict[str, Any] = ForwardAdapter(model)(
        input_ids=IDS,
        positions=POSITIONS,
        kv_caches=CACHES,
        attn_metadata=METADATA,
        inputs_embeds=inputs_embeds,
        **media,
    )
    seen.pop("self")
    return seen


def seed_page(self: Any, input_ids: Any, positions: Any, kv_caches: Any, attn_metadata: Any, pixel_values: Any) -> Any:
    return dict(locals())


def with_intermediate(
    self: Any,
    input_ids: Any,
    positions: Any,
    kv_caches: Any,
    attn_metadata: Any,
    intermediate_tensors: IntermediateTensors | None,
    pixel_values: Any = "default",
    inputs_embeds: Any = "default",
) -> Any:
    return dict(locals())


def with_kwargs(self: Any, input_ids: Any, positions: Any, **kwargs: Any) -> Any:
    return {"self": self, "input_ids": input_ids, "positions": positions, "kwargs": kwargs}


def keyword_only(self: Any, *, positions: Any, attn_metadata: Any, input_ids: Any, a: Any, b: Any = 2) -> Any:
    return dict(locals())


ENGINE = {"input_ids": IDS, "positions": POSITIONS, "kv_caches": CACHES, "attn_metadata": METADATA}


def test_the_forward_of_the_page_gets_none_where_no_media_are() -> None:
    model = recording(seed_page)
    assert call(model) == {**ENGINE, "pixel_values": None}
    assert call(model, pixel_values=PIXELS) == {**ENGINE, "pixel_values": PIXELS}


def test_defaults_stay_and_intermediate_tensors_are_none() -> None:
    model = recording(with_intermediate)
    expected = {**ENGINE, "intermediate_tensors": None, "inputs_embeds": None}
    assert call(model) == {**expected, "pixel_values": "default"}
    seen = call(model, inputs_embeds=EMBEDS, pixel_values=PIXELS)
    assert seen == {**expected, "inputs_embeds": EMBEDS, "pixel_values": PIXELS}


def test_var_keywords_get_media_and_nothing_else() -> None:
    model = recording(with_kwargs)
    assert call(model)["kwargs"] == {}
    assert call(model, pixel_values=PIXELS, image_sizes=1)["kwargs"] == {"pixel_values": PIXELS, "image_sizes": 1}


def test_parameters_may_be_keyword_only_and_in_any_order() -> None:
    seen = call(recording(keyword_only), b=3)
    assert seen == {"positions": POSITIONS, "attn_metadata": METADATA, "input_ids": IDS, "a": None, "b": 3}


def test_what_an_adapter_knows() -> None:
    adapter = ForwardAdapter(recording(with_intermediate))
    assert adapter.accepts("inputs_embeds")
    assert not adapter.accepts("image_sizes")
    assert adapter.media_parameters == ("pixel_values",)
    assert not adapter.takes_any_media
    assert ForwardAdapter(recording(keyword_only)).media_parameters == ("a", "b")
    assert ForwardAdapter(recording(with_kwargs)).takes_any_media
    assert not ForwardAdapter(recording(with_kwargs)).accepts("inputs_embeds")


def test_embeddings_need_a_parameter() -> None:
    for forward in (seed_page, with_kwargs):
        with pytest.raises(TypeError, match="inputs_embeds: torch"):
            call(recording(forward), inputs_embeds=EMBEDS)


def test_hooks_of_the_model_run() -> None:
    model = recording(seed_page)
    calls: list[str] = []
    model.register_forward_pre_hook(lambda *_: calls.append("pre"))
    call(model)
    assert calls == ["pre"]


def test_a_forward_that_was_replaced_on_the_instance_is_the_one_that_counts() -> None:
    model: Any = recording(seed_page)
    model.forward = lambda positions, image: {"self": None, "image": image}
    assert ForwardAdapter(model).media_parameters == ("image",)
    assert call(model) == {"image": None}


def test_positional_only_parameters_are_refused() -> None:
    def forward(self: Any, input_ids: Any, /, positions: Any) -> None: ...

    with pytest.raises(TypeError, match=r"'input_ids'.*Remove the '/'"):
        ForwardAdapter(recording(forward))


def test_a_mapper_key_that_forward_lacks_is_an_error_at_load() -> None:
    class MyModel(nn.Module):
        pass

    adapter = ForwardAdapter(recording(with_intermediate))
    adapter.check_media_parameters(["pixel_values"], MyModel)
    with pytest.raises(TypeError, match=r"mapper of MyModel: .*\['image_sizes'\].*takes: \['pixel_values'\]"):
        adapter.check_media_parameters(["pixel_values", "image_sizes"], MyModel)
    with pytest.raises(TypeError, match="'kv_caches'"):
        adapter.check_media_parameters(["kv_caches"], MyModel)
    ForwardAdapter(recording(with_kwargs)).check_media_parameters(["anything"], MyModel)


def test_the_check_serves_other_methods_too() -> None:
    class Model: ...

    with pytest.raises(TypeError, match="get_multimodal_embeddings takes"):
        check_accepted(["audio"], {"pixel_values"}, False, "get_multimodal_embeddings", Model)
    check_accepted(["audio"], {"pixel_values"}, True, "get_multimodal_embeddings", Model)


def test_a_call_costs_microseconds() -> None:
    """The adapter is on the step loop, where host work has a budget of a millisecond."""
    model = recording(seed_page)
    adapter = ForwardAdapter(model)
    best = float("inf")
    for _ in range(5):
        start = time.thread_time()
        for _ in range(200):
            adapter(input_ids=IDS, positions=POSITIONS, kv_caches=CACHES, attn_metadata=METADATA)
        best = min(best, (time.thread_time() - start) / 200)
    assert best < 100e-6


# Mistakes in forward


def test_a_misspelt_argument_of_the_engine_is_named() -> None:
    """It would be taken for a media parameter, and be None in every step."""

    class Misspelt(nn.Module):
        def forward(self, input_ids: Any, position: Any, kv_caches: Any, attn_metadata: Any) -> Any:
            return input_ids

    with pytest.raises(ModelError, match="got the parameter 'position', expected 'positions'"):
        ForwardAdapter(Misspelt())

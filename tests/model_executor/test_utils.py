"""What model files share: merging, weights by name, inner models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlavaConfig

from sensorium.config import EngineConfig
from sensorium.errors import WeightsError
from sensorium.model_executor.adapter import construct_model
from sensorium.model_executor.models.registry import ModelRegistry
from sensorium.model_executor.models.utils import (
    AutoWeightsLoader,
    PPMissingLayer,
    WeightsMapper,
    default_weight_loader,
    embed_multimodal,
    flatten_bn,
    init_registered_model,
    init_vllm_registered_model,
    is_pp_missing_parameter,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
    merge_multimodal_embeddings,
    merge_multimodal_embeddings_from_map,
)
from sensorium.multimodal import IndexMap
from tests.helpers.configs import make_engine_config

P = 7
SEPARATOR = 8


def rows(*shape: int) -> torch.Tensor:
    return torch.arange(1, torch.Size(shape).numel() + 1, dtype=torch.float32).reshape(shape)


# Merging


@pytest.mark.parametrize(
    "embeddings",
    [
        rows(4, 2),
        rows(2, 2, 2),
        rows(1, 2, 2, 2),
        [rows(2, 2), rows(2, 2) + 4],
        (rows(1, 2), rows(3, 2) + 2),
        [[rows(2, 2)], [rows(1, 2) + 4, rows(1, 2) + 6]],
        [rows(1, 2, 2), rows(2, 2) + 4],
        rows(4, 2).double(),
    ],
)
def test_rows_of_any_nesting_are_merged_in_place(embeddings: Any) -> None:
    ids = torch.tensor([1, P, P, 2, P, 3, P])
    inputs_embeds = torch.zeros(7, 2)
    merged = merge_multimodal_embeddings(ids, inputs_embeds, embeddings, P)
    assert merged is inputs_embeds
    assert torch.equal(merged[ids == P], rows(4, 2))
    assert not merged[ids != P].any()


def test_rows_for_separators_stand_among_the_others() -> None:
    ids = torch.tensor([P, SEPARATOR, 1, P])
    merged = merge_multimodal_embeddings(ids, torch.zeros(4, 2), rows(3, 2), [P, SEPARATOR])
    assert torch.equal(merged[[0, 1, 3]], rows(3, 2))


@pytest.mark.parametrize(
    ("embeddings", "expression"),
    [
        (rows(2, 3, 2), r"2 x 3 = 6 multimodal tokens to 2 placeholders"),
        ([rows(2, 2), rows(1, 2)], r"\(2\) \+ \(1\) = 3 multimodal tokens to 2 placeholders"),
        (rows(1, 2), r"1 = 1 multimodal tokens to 2 placeholders"),
    ],
)
def test_counts_that_differ_are_a_value_error_that_shows_both(embeddings: Any, expression: str) -> None:
    ids = torch.tensor([P, P, 1])
    with pytest.raises(ValueError, match=f"Attempted to assign {expression}"):
        merge_multimodal_embeddings(ids, torch.zeros(3, 2), embeddings, P)
    with pytest.raises(ValueError, match=f"Attempted to assign {expression}"):
        embed_multimodal(ids, P, lambda text: torch.zeros(len(text), 2), embeddings)


def test_merging_by_map() -> None:
    inputs_embeds = torch.zeros(5, 2)
    merge_multimodal_embeddings_from_map(inputs_embeds, [rows(2, 2), rows(2, 2) + 4], IndexMap([1, 2], [4, 0]))
    assert torch.equal(inputs_embeds[[4, 0]], rows(4, 2)[1:3])
    assert not inputs_embeds[1:4].any()


def test_only_text_tokens_are_embedded() -> None:
    """The placeholder's id may lie beyond the vocabulary, so it must never reach the table."""
    table = nn.Embedding(4, 2)
    beyond = 1000
    ids = torch.tensor([1, beyond, 3, beyond])
    merged = embed_multimodal(ids, beyond, table, rows(1, 2, 2))
    assert torch.equal(merged[[1, 3]], rows(2, 2))
    assert torch.equal(merged[[0, 2]], table(torch.tensor([1, 3])))


def test_flatten_bn_undoes_batching() -> None:
    x = rows(2, 3, 4)
    assert torch.equal(flatten_bn(x), x.reshape(6, 4))
    ragged = [rows(2, 4), rows(1, 4)]
    assert [tuple(member.shape) for member in flatten_bn(ragged)] == [(4,), (4,), (4,)]
    assert torch.equal(flatten_bn(ragged, concat=True), torch.cat(ragged))


# Constructor helpers


def test_names_of_sub_modules() -> None:
    assert maybe_prefix("", "model") == "model"
    assert maybe_prefix("language_model", "model") == "language_model.model"


def test_layers_are_made_with_their_names() -> None:
    names: list[str] = []

    def layer(prefix: str) -> nn.Module:
        names.append(prefix)
        return nn.Identity()

    start, end, layers = make_layers(3, layer, "model.layers")
    assert (start, end, len(layers)) == (0, 3, 3)
    assert names == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_empty_intermediate_tensors() -> None:
    tensors = make_empty_intermediate_tensors_factory(["a", "b"], 4)(3, torch.float16, torch.device("cpu"))
    assert tensors["a"].shape == (3, 4)
    assert tensors["b"].dtype == torch.float16


def test_layers_of_another_stage() -> None:
    layer = PPMissingLayer(3, bias=False)
    assert layer(1, 2) == 1
    assert layer(hidden=5) == 5
    model = nn.ModuleDict({"here": nn.Linear(1, 1), "there": PPMissingLayer()})
    assert is_pp_missing_parameter("there.weight", model)
    assert not is_pp_missing_parameter("here.weight", model)
    assert not is_pp_missing_parameter("thereafter.weight", model)


# Inner models


class InnerModel(nn.Module):
    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.seen = (config.model_config.hf_config, config.cache_config, prefix, config.model_config.architecture)


ModelRegistry.register_model("InnerModelForTest", InnerModel)
TEXT_CONFIG = LlamaConfig(architectures=["InnerModelForTest"])
ENGINE_CONFIG = make_engine_config(None, hf_config=LlavaConfig(text_config=TEXT_CONFIG))


def current_form(config: EngineConfig) -> nn.Module:
    return init_registered_model(config, prefix="language_model", hf_config=TEXT_CONFIG)


def with_architectures(config: EngineConfig) -> nn.Module:
    hf_config = LlamaConfig(**{**TEXT_CONFIG.to_dict(), "architectures": None})
    return init_registered_model(
        config, prefix="language_model", hf_config=hf_config, architectures=["InnerModelForTest"]
    )


def form_of_0_6_4(config: EngineConfig) -> nn.Module:
    return init_vllm_registered_model(TEXT_CONFIG, vllm_config=config, prefix="language_model")


def form_of_0_6_3(config: EngineConfig) -> nn.Module:
    return init_vllm_registered_model(TEXT_CONFIG, config.cache_config, None, prefix="language_model")


@pytest.mark.parametrize("form", [current_form, with_architectures, form_of_0_6_4, form_of_0_6_3])
def test_every_form_makes_the_inner_model(form: Any) -> None:
    class Outer(nn.Module):
        def __init__(self, *, config: EngineConfig) -> None:
            super().__init__()
            self.language_model = form(config)

    outer: Any = construct_model(Outer, ENGINE_CONFIG)
    hf_config, cache_config, prefix, architecture = outer.language_model.seen
    assert hf_config.model_type == "llama"
    assert hf_config is TEXT_CONFIG or form is with_architectures
    assert cache_config is ENGINE_CONFIG.cache_config
    assert (prefix, architecture) == ("language_model", "InnerModelForTest")


def test_an_inner_config_without_architectures_gets_the_causal_model_of_its_type() -> None:
    from sensorium.model_executor.models.modules import inner_architectures

    assert inner_architectures(LlamaConfig()) == ["LlamaForCausalLM"]
    with pytest.raises(TypeError, match=r"Pass architectures=\[...\]"):
        inner_architectures(LlavaConfig().vision_config)


# Weights


def test_the_default_loader_copies_and_fills() -> None:
    param = nn.Parameter(torch.zeros(2, 3))
    default_weight_loader(param, rows(2, 3))
    assert torch.equal(param, rows(2, 3))
    scalar = nn.Parameter(torch.zeros(1))
    default_weight_loader(scalar, torch.tensor(5.0))
    assert scalar.item() == 5
    with pytest.raises(AssertionError, match=r"got shape \(3, 2\), expected \(2, 3\)"):
        default_weight_loader(param, rows(3, 2))


def test_names_are_mapped_by_parts_prefixes_and_suffixes() -> None:
    mapper = WeightsMapper(
        orig_to_new_substr={".attention.": ".attn.", ".inv_freq": None},
        orig_to_new_prefix={"model.": "language_model.", "vision.": None},
        orig_to_new_suffix={".gamma": ".weight", ".beta": None},
    )
    names = ["model.attention.q", "vision.x", "model.norm.gamma", "norm.beta", "rope.inv_freq", "other"]
    mapped = [(name, float(x)) for name, x in mapper.apply((name, torch.tensor(1.0)) for name in names)]
    assert mapped == [("language_model.attn.q", 1.0), ("language_model.norm.weight", 1.0), ("other", 1.0)]


class Fused(nn.Module):
    """Two checkpoint tensors in one parameter, by a loader on the parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.weight.weight_loader = lambda param, loaded: param.data.add_(loaded)  # type: ignore[attr-defined]


class OwnLoader(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.got: list[str] = []

    def load_weights(self, weights: Any) -> set[str]:
        for name, tensor in weights:
            self.got.append(name)
            self.weight.data.copy_(tensor)
        return {"weight"}


class Loaded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.fused = Fused()
        self.own = OwnLoader()
        self.blocks = nn.ModuleList([nn.Linear(1, 1), nn.Linear(1, 1)])
        self.scale = nn.Parameter(torch.zeros(1))
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("positions", torch.zeros(2), persistent=False)
        self.missing = PPMissingLayer()


WEIGHTS = {
    "linear.weight": rows(2, 2),
    "linear.bias": rows(2),
    "fused.weight": rows(2, 2),
    "own.a.b": rows(1),
    "blocks.0.weight": rows(1, 1),
    "blocks.1.weight": rows(1, 1) + 1,
    "scale": torch.tensor(3.0),
    "mean": rows(2),
    "positions": rows(2),
    "missing.weight": rows(1),
}


def test_weights_find_their_parameters() -> None:
    model = Loaded()
    loaded = AutoWeightsLoader(model).load_weights(WEIGHTS.items())
    assert loaded == {
        "linear.weight",
        "linear.bias",
        "fused.weight",
        "own.weight",
        "blocks.0.weight",
        "blocks.1.weight",
        "scale",
        "mean",
    }
    assert torch.equal(model.linear.weight, rows(2, 2))
    assert torch.equal(model.fused.weight, rows(2, 2))
    assert model.own.got == ["a.b"]
    assert [block.weight.item() for block in model.blocks] == [1, 2]  # type: ignore[operator]
    assert model.scale.item() == 3
    assert torch.equal(model.get_buffer("mean"), rows(2))
    assert not model.get_buffer("positions").any()


def test_scattered_weights_find_their_parameters_too() -> None:
    model = Loaded()
    names = list(WEIGHTS)
    AutoWeightsLoader(model).load_weights((name, WEIGHTS[name]) for name in names[::2] + names[1::2])
    assert torch.equal(model.linear.weight, rows(2, 2))
    assert torch.equal(model.linear.bias, rows(2))


@pytest.mark.parametrize(
    "name", ["unknown", "unknown.weight", "linear.unknown", "linear.unknown.weight", "scale.weight", "blocks.2.weight"]
)
def test_a_name_that_the_module_lacks_is_a_value_error(name: str) -> None:
    with pytest.raises(ValueError, match=name.replace(".", r"\.")) as caught:
        AutoWeightsLoader(Loaded()).load_weights([(name, rows(1))])
    assert isinstance(caught.value, WeightsError)


def test_prefixes_are_skipped_and_ignored() -> None:
    weights = {**WEIGHTS, "head.weight": rows(1), "extra.a": rows(1), "linear.extra": rows(1)}
    model = Loaded()
    loader = AutoWeightsLoader(
        model, skip_prefixes=["head.", "linear.bias", "own."], ignore_unexpected_prefixes=["extra", "linear.ex"]
    )
    loaded = loader.load_weights(weights.items())
    assert "linear.bias" not in loaded
    assert not model.own.got
    assert torch.equal(model.linear.weight, rows(2, 2))


def test_a_wrong_shape_names_the_weight() -> None:
    with pytest.raises(AssertionError, match=r"linear\.weight: .*got shape \(3, 3\)"):
        AutoWeightsLoader(Loaded()).load_weights([("linear.weight", rows(3, 3))])


def test_a_mapper_renames_before_loading() -> None:
    model = Loaded()
    mapper = WeightsMapper(orig_to_new_prefix={"old.": ""})
    loaded = AutoWeightsLoader(model).load_weights([("old.linear.bias", rows(2))], mapper=mapper)
    assert loaded == {"linear.bias"}

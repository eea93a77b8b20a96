"""Modules of transformers divided by their own plans give what they gave whole."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

from sensorium.distributed import TensorParallel
from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.model_loader import load_model
from sensorium.model_executor.models.transformers import division
from sensorium.model_executor.models.transformers.division import divide
from sensorium.model_executor.models.transformers.packing import KernelLinear, SetAside
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.direct import engine_config
from tests.helpers.ranks import on_ranks

IDS = torch.tensor([[5, 6, 7, 80, 9, 10, 11]])


def shares(model: Any, num_ranks: int, *, is_checked: bool = True) -> list[tuple[torch.Tensor, int]]:
    """Each rank's logits, and how many parameters it has."""

    def run(group: TensorParallel) -> tuple[torch.Tensor, int]:
        own = copy.deepcopy(model)
        divide(own, group, is_checked=is_checked)
        logits: torch.Tensor = own(input_ids=IDS, use_cache=False).logits
        return logits, sum(each.numel() for each in own.parameters())

    return on_ranks(num_ranks, run)


@pytest.mark.parametrize(
    ("family", "most"),
    [("llama_biased", 0.8), ("qwen3", 0.8), ("qwen3_moe", 0.7), ("mixtral", 0.7), ("gemma3", 0.8), ("llava", 0.95)],
)
def test_logits_are_those_of_the_whole_model(family: str, most: float) -> None:
    """Biases behind a sum are added once; of towers and embeddings each rank has all."""
    model = make_hf_model(family)
    whole = sum(each.numel() for each in model.parameters())
    with torch.inference_mode():
        expected = model(input_ids=IDS, use_cache=False).logits
    for logits, num_parameters in shares(model, 2):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        assert num_parameters < most * whole


def test_one_rank_is_left_alone() -> None:
    model = make_hf_model("llama")
    names = {name: each.shape for name, each in model.named_parameters()}
    divide(model, TensorParallel(), is_checked=True)
    assert {name: each.shape for name, each in model.named_parameters()} == names


def tiny_gpt2() -> Any:
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=99)).eval()


def test_what_can_not_be_divided_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"got 4 for 2 key/value heads of LlamaModel, .* expected a divisor of 2"):
        shares(make_hf_model("llama"), 4)
    with pytest.raises(ConfigError, match="got 2 for GPT2LMHeadModel, which has no layers that ranks can share by a"):
        shares(tiny_gpt2(), 2)


def test_a_style_that_is_not_known_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_hf_model("llama")
    model.model.config.base_model_tp_plan = {"layers.*.mlp.down_proj": "by_moon_phase"}
    with pytest.raises(ConfigError, match=r"has layers\.0\.mlp\.down_proj \(Linear\), which .* as 'by_moon_phase'"):
        shares(model, 2)


def test_a_plan_that_changes_what_is_computed_is_noticed() -> None:
    """Here the MLP is summed twice."""
    model = make_hf_model("llama")
    plan = {**model.model.config.base_model_tp_plan, "layers.*.mlp": division.EXPERTS}
    model.model.config.base_model_tp_plan = plan
    with pytest.raises(ModelError, match=r"divided over 2 ranks .* logits that differ by"):
        shares(model, 2)
    assert len(shares(model, 2, is_checked=False)) == 2


def test_loading_divides() -> None:
    config = engine_config(make_checkpoint("llama"), model_impl="transformers", tensor_parallel_size=2)

    def run(group: TensorParallel) -> tuple[int, ...]:
        model: Any = load_model(config.as_rank_of(group))
        return tuple(model.hf_model.model.layers[0].mlp.down_proj.weight.shape)

    assert on_ranks(2, run) == [(64, 48), (64, 48)]


def test_a_layer_that_takes_a_shares_place_is_summed() -> None:
    """As loading lets the engine's kernels take the places of linear layers."""
    model = make_hf_model("llama")
    with torch.inference_mode():
        expected = model(input_ids=IDS, use_cache=False).logits

    def run(group: TensorParallel) -> torch.Tensor:
        own = copy.deepcopy(model)
        divide(own, group, is_checked=False)

        def once() -> torch.Tensor:
            logits: torch.Tensor = own(input_ids=IDS, use_cache=False).logits
            return logits

        SetAside(own, once).hand_over()
        assert isinstance(own.model.layers[0].mlp.down_proj.share, KernelLinear)
        return once()

    for logits in on_ranks(2, run):
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)

"""Mixtures of experts: the choice and the sum are Hugging Face's, however weights are stored, held and shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from sensorium.distributed import ONE_RANK, Division, TensorParallel, constructing_for
from sensorium.errors import ConfigError, ModelError, WeightsError
from sensorium.kernels import FP8, native
from sensorium.kernels.grouped_linear import RowGroups, grouped_linear
from sensorium.model_executor.layers.activation import ClampedSwigluAndMul, SiluAndMul
from sensorium.model_executor.layers.grouped_linear import GroupedLinear
from sensorium.model_executor.layers.mixture_of_experts import CHUNK_ROWS, Experts, MixtureOfExperts, Routing, route
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.quantization.fp8 import Fp8Config, ScaleLayout
from sensorium.model_executor.layers.quantization.int8 import Int8Config
from sensorium.model_executor.model_loader.loader import finish_loading
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from tests.helpers.ranks import on_ranks

NUM_EXPERTS, HIDDEN, INNER, TOP_K = 6, 16, 24, 2
Tensors = dict[str, torch.Tensor]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["native", "plain torch"])
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "plain torch":
        monkeypatch.setenv("SENSORIUM_NATIVE", "0")
        native._load.cache_clear()
    yield request.param
    native._load.cache_clear()


def weights() -> Tensors:
    """Of a mixture, stacked as `transformers` modules have them."""
    return {
        "gate.weight": random_tensor(NUM_EXPERTS, HIDDEN, seed=1),
        "experts.gate_up_proj": random_tensor(NUM_EXPERTS, 2 * INNER, HIDDEN, seed=2) / HIDDEN**0.5,
        "experts.down_proj": random_tensor(NUM_EXPERTS, HIDDEN, INNER, seed=3) / INNER**0.5,
    }


def apart(stacked: Tensors) -> Tensors:
    """The same with a tensor for each projection of each expert."""
    parts = {"gate.weight": stacked["gate.weight"]}
    for index in range(NUM_EXPERTS):
        gate, up = stacked["experts.gate_up_proj"][index].chunk(2)
        down = stacked["experts.down_proj"][index]
        for name, tensor in (("gate", gate), ("up", up), ("down", down)):
            parts[f"experts.{index}.{name}_proj.weight"] = tensor.clone()
    return parts


def exchanged(stacked: Tensors) -> Tensors:
    """The same with inputs before outputs."""
    return {name: t.transpose(1, 2).contiguous() if t.dim() == 3 else t for name, t in stacked.items()}


def mixture(tensors: Tensors, quant_config: QuantizationConfig | None = None, **routing: Any) -> MixtureOfExperts:
    experts = Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul(), quant_config=quant_config, prefix="experts")
    layer = MixtureOfExperts(experts, Routing(TOP_K, **routing), HIDDEN)
    load_fused_weights(layer, tensors.items(), FUSED_WEIGHTS)
    finish_loading(layer)
    return layer


def by_hugging_face(tensors: Tensors, x: torch.Tensor, **settings: Any) -> torch.Tensor:
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        experts_implementation="eager",
        **settings,
    )
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    block = Qwen3MoeSparseMoeBlock(config)
    block.load_state_dict(tensors)
    with torch.inference_mode():
        output: torch.Tensor = block(x[None])[0]
    return output


@torch.inference_mode()
@pytest.mark.parametrize("stored", [dict, apart, exchanged], ids=["stacked", "apart", "exchanged"])
@pytest.mark.parametrize("num_rows", [1, 2, 70])
@pytest.mark.usefixtures("kernels")
def test_the_sum_is_that_of_hugging_face(stored: Callable[[Tensors], Tensors], num_rows: int) -> None:
    x = random_tensor(num_rows, HIDDEN)
    for is_normalized in (False, True):
        got = mixture(stored(weights()), is_normalized=is_normalized)(x)
        want = by_hugging_face(weights(), x, norm_topk_prob=is_normalized)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@torch.inference_mode()
def test_a_row_does_not_depend_on_those_beside_it() -> None:
    """To the last bit, also where rows are so many that they go in pieces."""
    layer, x = mixture(weights()), random_tensor(CHUNK_ROWS + 30, HIDDEN)
    together = layer(x)
    for rows in (slice(0, 1), slice(7, 40), slice(CHUNK_ROWS - 3, CHUNK_ROWS + 2)):
        assert torch.equal(layer(x[rows]), together[rows])
    assert layer(x[:0]).shape == (0, HIDDEN)


@torch.inference_mode()
def test_experts_without_rows_are_not_asked() -> None:
    layer = mixture(weights())
    asked = []
    for index, expert in enumerate(layer.experts.down_proj.layers):
        expert._multiply = lambda layer, x, bias, index=index: asked.append(index) or x.new_zeros(len(x), HIDDEN)
    x = random_tensor(1, HIDDEN)
    layer(x)
    _, chosen = route(layer.gate(x)[0], layer.routing)
    assert sorted(asked) == sorted(chosen[0].tolist())


# The choice


def routers() -> Mapping[str, tuple[str, str, dict[str, Any], Routing]]:
    """By model: its module and router class, its config's settings, and the rule here."""
    sizes = {"hidden_size": HIDDEN, "num_experts_per_tok": 3}
    return {
        "qwen3_moe": (
            *("Qwen3MoeTopKRouter", "Qwen3MoeConfig"),
            *({**sizes, "num_experts": 12}, Routing(3, is_normalized=False)),
        ),
        "mixtral": ("MixtralTopKRouter", "MixtralConfig", {**sizes, "num_local_experts": 12}, Routing(3)),
        "gpt_oss": ("GptOssTopKRouter", "GptOssConfig", {**sizes, "num_local_experts": 12}, Routing(3)),
    }


@torch.inference_mode()
@pytest.mark.parametrize("model", routers())
def test_the_choice_is_that_of_hugging_face(model: str) -> None:
    name, config_name, settings, routing = routers()[model]
    module = __import__(f"transformers.models.{model}.modeling_{model}", fromlist=[name])
    router = getattr(module, name)(getattr(transformers, config_name)(**settings))
    x = random_tensor(50, HIDDEN)
    for seed, parameter in enumerate(router.parameters()):
        parameter.copy_(random_tensor(*parameter.shape, seed=seed))
    logits, want_weights, want_experts = router(x)
    weights, experts = route(logits, routing)
    want = torch.zeros(50, 12).scatter(1, want_experts, want_weights)
    torch.testing.assert_close(torch.zeros(50, 12).scatter(1, experts, weights), want)


def test_groups_of_experts_are_chosen_first() -> None:
    """DeepSeek-V3's rule, row by row: two of four groups, by the sums of their two best corrected scores; in them three
    experts, by their corrected scores; weights are the scores as they were, divided by their sum, times a factor."""
    logits, correction = random_tensor(50, 12), random_tensor(12, seed=9) / 3
    weights, experts = route(logits, Routing(3, "sigmoid", True, 2.5, 4, 2), correction)
    for row, scores in enumerate(logits.sigmoid().tolist()):
        corrected = [score + each for score, each in zip(scores, correction.tolist(), strict=True)]
        sums = [sum(sorted(corrected[3 * group : 3 * group + 3])[1:]) for group in range(4)]
        best = sorted(range(4), key=lambda group: -sums[group])[:2]
        chosen = sorted((i for i in range(12) if i // 3 in best), key=lambda i: -corrected[i])[:3]
        total = sum(scores[i] for i in chosen)
        assert experts[row].tolist() == chosen
        assert weights[row].tolist() == pytest.approx([2.5 * scores[i] / total for i in chosen])


@torch.inference_mode()
def test_a_correction_is_loaded_and_counts_for_the_choice_alone() -> None:
    experts = Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul())
    layer = MixtureOfExperts(experts, Routing(TOP_K, "sigmoid"), HIDDEN, has_correction=True)
    correction = torch.tensor([0.0, 5, 0, 0, 5, 0])
    load_fused_weights(layer, {**weights(), "gate.e_score_correction_bias": correction}.items(), FUSED_WEIGHTS)
    finish_loading(layer)
    x = random_tensor(4, HIDDEN)
    chosen = layer.gate(x)[0][:, [1, 4]].sigmoid()
    outputs = torch.stack([by_one_expert(x, index) for index in (1, 4)], 1)
    want = (outputs * (chosen / chosen.sum(1, keepdim=True)).unsqueeze(-1)).sum(1)
    torch.testing.assert_close(layer(x), want, rtol=1e-5, atol=1e-5)


def by_one_expert(x: torch.Tensor, index: int) -> torch.Tensor:
    tensors = weights()
    gate, up = (x @ tensors["experts.gate_up_proj"][index].t()).chunk(2, -1)
    return (nn.functional.silu(gate) * up) @ tensors["experts.down_proj"][index].t()


def test_gates_are_cut_off_as_in_hugging_face() -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

    reference = GptOssExperts(transformers.GptOssConfig(hidden_size=8, intermediate_size=4, num_local_experts=2))
    reference.limit = 1.5
    x = random_tensor(50, 40) * 3
    want = reference._apply_gate(x.view(50, 2, 20).transpose(1, 2).flatten(1))  # where they take turns
    torch.testing.assert_close(ClampedSwigluAndMul(1.702, 1.5)(x), want)


# Ranks


@pytest.mark.parametrize("stored", [dict, apart, exchanged], ids=["stacked", "apart", "exchanged"])
@pytest.mark.parametrize(("num_ranks", "has_whole"), [(2, False), (4, False), (2, True), (3, True), (6, True)])
def test_ranks_share_the_experts(stored: Callable[[Tensors], Tensors], num_ranks: int, has_whole: bool) -> None:
    """Some inner channels of each, or some of them whole: with as many ranks as experts, one."""
    x = random_tensor(9, HIDDEN)

    def run(group: TensorParallel) -> torch.Tensor:
        with constructing_for(group, Division(experts=has_whole)):
            layer = mixture(stored(weights()))
        assert layer.experts.gate_up_proj.output_size == NUM_EXPERTS * 2 * INNER // group.size
        output: torch.Tensor = layer(x)
        return output

    with torch.inference_mode():
        alone = run(ONE_RANK)
    for result in on_ranks(num_ranks, run):
        torch.testing.assert_close(result, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("num_ranks", "has_whole"), [(4, False), (3, True)])
def test_biases_are_added_once(num_ranks: int, has_whole: bool) -> None:
    x, experts = random_tensor(3, HIDDEN), torch.tensor([[0, 1], [2, 1], [5, 0]])
    tensors = {name.removeprefix("experts."): each for name, each in weights().items() if name != "gate.weight"}
    tensors["gate_up_proj_bias"] = random_tensor(NUM_EXPERTS, 2 * INNER, seed=4)
    tensors["down_proj_bias"] = random_tensor(NUM_EXPERTS, HIDDEN, seed=5)

    def run(group: TensorParallel) -> torch.Tensor:
        with constructing_for(group, Division(experts=has_whole)):
            layer = Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul(), bias=True)
        load_fused_weights(layer, tensors.items(), FUSED_WEIGHTS)
        finish_loading(layer)
        output: torch.Tensor = layer(x, torch.ones(3, 2), experts)
        return output

    want = torch.zeros(3, HIDDEN)
    for row, chosen in enumerate(experts.tolist()):
        for index in chosen:
            inner = x[row] @ tensors["gate_up_proj"][index].t() + tensors["gate_up_proj_bias"][index]
            gate, up = inner.chunk(2)
            want[row] += (nn.functional.silu(gate) * up) @ tensors["down_proj"][index].t()
            want[row] += tensors["down_proj_bias"][index]
    with torch.inference_mode():
        alone = run(ONE_RANK)
    for result in [alone, *on_ranks(num_ranks, run)]:
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)


def test_what_ranks_can_not_share_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"tensor_parallel_size: got 5 for 24 output channels of x\.gate_up_proj"):
        on_ranks(5, lambda _group: Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul(), prefix="x"))

    def by_expert(group: TensorParallel) -> Experts:
        with constructing_for(group, Division(experts=True)):
            return Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul(), prefix="x")

    with pytest.raises(ConfigError, match=r"tensor_parallel_size: got 4 for 6 experts of x\.gate_up_proj"):
        on_ranks(4, by_expert)


# Quantizations


@torch.inference_mode()
def test_experts_in_int8() -> None:
    """Each expert's weights are rounded on their own; the router's aren't."""
    if native.native_refusal() is not None:
        pytest.skip("no native kernels on this machine")
    x = random_tensor(40, HIDDEN)
    layer, in_float = mixture(weights(), Int8Config()), mixture(weights())
    assert torch.equal(layer.gate(x)[0], in_float.gate(x)[0])
    error = layer(x) - in_float(x)
    assert 0 < error.pow(2).mean().sqrt() < 0.03 * in_float(x).std()
    assert layer.experts.down_proj.method.name == "int8"


@torch.inference_mode()
@pytest.mark.parametrize("block", [None, (8, 8)])
def test_experts_that_a_checkpoint_has_in_8_bit_floats(block: tuple[int, int] | None) -> None:
    """With a scale for each of a checkpoint's tensors, or for each block: the product is that with the rounded values,
    also where a kernel takes floats alone, as on a GPU."""
    stored, rounded = {}, {"gate.weight": weights()["gate.weight"]}
    for name, tensor in apart(weights()).items():
        if name == "gate.weight":
            continue
        values, scale = (tensor * 9).to(FP8), torch.tensor(1 / 9)
        stored[name] = values
        shape = [-(-size // part) for size, part in zip(tensor.shape, block, strict=True)] if block else [1]
        stored[name.replace("weight", "weight_scale")] = scale.expand(shape)
        rounded[name] = values.float() / 9
    config = Fp8Config(ScaleLayout(block))
    layer = mixture({**stored, "gate.weight": weights()["gate.weight"]}, config)
    x = random_tensor(20, HIDDEN)
    torch.testing.assert_close(layer(x), mixture(rounded)(x), rtol=1e-5, atol=1e-5)

    unfinished = GroupedLinear(NUM_EXPERTS, HIDDEN, [INNER, INNER], quant_config=config, prefix="gate_up_proj")
    for name, tensor in stored.items():
        _, index, projection, kind = name.split(".")
        if projection != "down_proj":
            parameter: Any = unfinished.get_parameter(kind)
            parameter.weight_loader(parameter, tensor, (int(index), int(projection == "up_proj")))
    unfinished._hold_together()
    ids = torch.arange(20).sort().values % NUM_EXPERTS
    groups = RowGroups.of_sorted(ids.sort().values, NUM_EXPERTS)
    want = torch.cat([rounded[f"experts.{i}.{n}_proj.weight"] for i in range(NUM_EXPERTS) for n in ("gate", "up")])
    torch.testing.assert_close(unfinished(x, groups), grouped_linear(x, want.view(NUM_EXPERTS, -1, HIDDEN), groups))


# Refusals


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("experts.6.gate_proj.weight", (INNER, HIDDEN)),
        ("experts.0.gate_proj.weight", (INNER, HIDDEN + 1)),
        ("experts.0.gate_proj.bias", (INNER,)),
        ("experts.gate_up_proj", (NUM_EXPERTS - 1, 2 * INNER, HIDDEN)),
        ("experts.gate_up_proj", (NUM_EXPERTS, INNER, HIDDEN)),
        ("experts.down_proj", (NUM_EXPERTS, HIDDEN, INNER, 1)),
    ],
)
def test_tensors_that_do_not_fit_are_refused(name: str, shape: tuple[int, ...]) -> None:
    layer = MixtureOfExperts(Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul()), Routing(TOP_K), HIDDEN)
    with pytest.raises(WeightsError):
        load_fused_weights(layer, [(name, torch.zeros(shape))], FUSED_WEIGHTS)


def test_adapters_on_experts_are_refused() -> None:
    with pytest.raises(ModelError, match=r"adapter of .*down_proj: got one for the experts of a mixture"):
        mixture(weights()).experts.down_proj.wrap_method(lambda method: method)


def test_more_experts_a_row_than_there_are_is_the_models_error() -> None:
    with pytest.raises(ModelError, match="experts of a row: got 7, expected 1 to 6"):
        MixtureOfExperts(Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul()), Routing(7), HIDDEN)

"""What every way to hold a weight keeps to, for every kind of layer: the product is that with the weight as it is
rounded, whole or part by part, with a bias or without, for any number of channels."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import FrameType
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from sensorium.distributed import TensorParallel, constructing_for
from sensorium.errors import ConfigError, ModelError, WeightsError
from sensorium.kernels import FP8, native
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.parameters import Axes
from sensorium.model_executor.layers.quantization import (
    LinearMethod,
    QuantizationConfig,
    fp8,
    quantization_class,
    register_quantization,
    registry,
    resolve_quantization,
)
from sensorium.model_executor.layers.quantization.compressed_tensors import CompressedTensorsConfig
from sensorium.model_executor.layers.quantization.fp8 import Fp8Config, ScaleLayout
from sensorium.model_executor.layers.quantization.int8 import Int8Config
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.layers.quantization.unquantized import FLOAT
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding

Tensors = dict[str, torch.Tensor]


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Ways to hold a weight: what a checkpoint has of a part, and the float weight that it means.


def in_float(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return {"weight": weight}, weight


def in_blocks(weight: torch.Tensor, size: tuple[int, int], suffix: str = "") -> tuple[Tensors, torch.Tensor]:
    """8-bit floats with a scale per block, which the last row and column of blocks fill in part."""
    outputs, inputs = weight.shape
    scales = torch.empty(-(-outputs // size[0]), -(-inputs // size[1]))
    values = torch.empty(weight.shape, dtype=FP8)
    rounded = torch.empty(weight.shape)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = (slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1]))
            scales[i, j] = weight[block].abs().max() / 448
            values[block] = (weight[block] / scales[i, j]).to(FP8)
            rounded[block] = values[block].float() * scales[i, j]
    return {"weight": values, "weight_scale": scales}, rounded


def per_channel(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return in_blocks(weight, (1, weight.shape[1]))


def per_channel_flat(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    """Some files have a vector of scales where others have a column."""
    tensors, rounded = per_channel(weight)
    return tensors | {"weight_scale": tensors["weight_scale"].flatten()}, rounded


def per_tensor(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, rounded = in_blocks(weight, (weight.shape[0], weight.shape[1]))
    return tensors | {"weight_scale": tensors["weight_scale"].reshape(())}, rounded


def per_tensor_static(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, rounded = per_tensor(weight)
    return tensors | {"input_scale": torch.tensor([6 / 448])}, rounded


@dataclass(frozen=True)
class Way:
    config: QuantizationConfig | None
    stored: Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
    error: float
    """Bound on the root mean square error relative to the result's."""
    methods: tuple[str, ...]
    """Names of the methods that may end up with the layer."""
    on_fp8_device: bool = False
    uses_native: bool = True


FP8_LAYOUTS: dict[str, tuple[QuantizationConfig, Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]]] = {
    "fp8 of blocks": (Fp8Config(ScaleLayout((8, 16))), partial(in_blocks, size=(8, 16))),
    "fp8 of tensors": (Fp8Config(ScaleLayout()), per_tensor),
    "fp8 of tensors, static": (Fp8Config(ScaleLayout(has_input_scale=True)), per_tensor_static),
    "compressed-tensors of channels": (CompressedTensorsConfig(ScaleLayout(per_channel=True)), per_channel),
    "compressed-tensors, flat": (CompressedTensorsConfig(ScaleLayout(per_channel=True)), per_channel_flat),
}
WAYS: dict[str, Way] = {
    "float": Way(None, in_float, 1e-6, ("packed float", "float")),
    "float without native kernels": Way(None, in_float, 1e-6, ("float",), uses_native=False),
    "int8": Way(Int8Config(), in_float, 0.03, ("int8",)),
    "fp8 at load": Way(Fp8Config(), in_float, 0.05, ("packed float", "float")),
    "fp8 at load on its device": Way(Fp8Config(), in_float, 0.08, ("fp8",), on_fp8_device=True),
    **{name: Way(config, stored, 1e-5, ("packed float", "float")) for name, (config, stored) in FP8_LAYOUTS.items()},
    **{
        f"{name} on its device": Way(
            config,
            stored,
            1e-5 if "blocks" in name else 0.06,
            ("packed float", "float") if "blocks" in name else ("fp8",),
            on_fp8_device=True,
        )
        for name, (config, stored) in FP8_LAYOUTS.items()
    },
}


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Way]:
    chosen = WAYS[request.param]
    if chosen.on_fp8_device:  # torch multiplies 8-bit floats on a CPU, too, slowly
        monkeypatch.setattr(fp8, "fp8_refusal", lambda device: None)
    if not chosen.uses_native:
        monkeypatch.setenv("SENSORIUM_NATIVE", "0")
        native._load.cache_clear()
    yield chosen
    monkeypatch.undo()
    native._load.cache_clear()


# Kinds of layers, and the sizes of the parts that a checkpoint has

INPUTS = 44  # neither a multiple of 16 nor of a block
KINDS: dict[str, tuple[Callable[..., Any], dict[int | str | None, int]]] = {
    "replicated": (partial(ReplicatedLinear, INPUTS, 37), {None: 37}),
    "column": (partial(ColumnParallelLinear, INPUTS, 64), {None: 64}),
    "row": (partial(RowParallelLinear, INPUTS, 1), {None: 1}),
    "merged": (partial(MergedColumnParallelLinear, INPUTS, [20, 9, 33]), {0: 20, 1: 9, 2: 33}),
    "qkv": (partial(QKVParallelLinear, INPUTS, 12, 3, 1), {"q": 36, "k": 12, "v": 12}),
    "head": (partial(ParallelLMHead, 50, INPUTS), {None: 50}),
}


def load(layer: WeightedLayer, way: Way, parts: dict[int | str | None, int], num_inputs: int = INPUTS) -> torch.Tensor:
    """Fill a layer from what a checkpoint has of its parts; returns the weight that this means."""
    rounded = []
    for seed, (shard, size) in enumerate(parts.items()):
        # Parts of very different magnitude, which share no scale.
        tensors, means = way.stored(random_tensor(size, num_inputs, seed=seed) * 10.0**seed)
        rounded.append(means)
        for name, tensor in tensors.items():
            parameter = layer.get_parameter(name)
            parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))  # type: ignore[operator]
    return torch.cat(rounded)


def relative_rms(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).pow(2).mean().sqrt() / want.double().pow(2).mean().sqrt())


def multiply(layer: WeightedLayer, x: torch.Tensor) -> torch.Tensor:
    return LogitsProcessor(50)(layer, x) if isinstance(layer, ParallelLMHead) else layer(x)[0]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_is_the_product_with_the_weight_as_it_is_rounded(way: Way, kind: str, bias: bool) -> None:
    make, parts = KINDS[kind]
    layer = make(bias=bias, quant_config=way.config)
    weight = load(layer, way, parts)
    added = None
    if bias:
        added = random_tensor(len(weight), seed=9)
        layer.bias.weight_loader(layer.bias, added)
    layer.process_weights_after_loading()
    assert layer.method.name in way.methods
    x = random_tensor(5, INPUTS, seed=5)
    got, alone, start = multiply(layer, x), multiply(layer, x[3:4]), 0
    for size in parts.values():  # part by part, so that a small one's error can't hide behind a large one's values
        rows = slice(start, start + size)
        want = F.linear(x, weight[rows], None if added is None else added[rows])
        assert relative_rms(got[:, rows], want) < way.error
        assert relative_rms(alone[0, rows], got[3, rows]) < 1e-6  # whatever else is computed
        start += size
    assert multiply(layer, x[:0]).shape == (0, len(weight))


FUSED: dict[str, Callable[..., Any]] = {
    "merged": partial(MergedColumnParallelLinear, INPUTS, [16, 8, 24]),
    "qkv": partial(QKVParallelLinear, INPUTS, 8, 4, 1),
}


@pytest.mark.parametrize("kind", FUSED)
def test_checkpoints_may_have_fused_tensors(way: Way, kind: str) -> None:
    """With one scale for all parts, where a tensor has one; blocks end where parts do."""
    layer = FUSED[kind](bias=False, quant_config=way.config)
    weight = load(layer, way, {None: layer.output_size})
    layer.process_weights_after_loading()
    x = random_tensor(5, INPUTS, seed=5)
    assert relative_rms(multiply(layer, x), F.linear(x, weight)) < way.error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_stay_as_they_are(way: Way, dtype: torch.dtype) -> None:
    layer = ReplicatedLinear(INPUTS, 37, params_dtype=dtype, quant_config=way.config)
    weight = load(layer, way, {None: 37})
    layer.bias.weight_loader(layer.bias, torch.zeros(37))  # type: ignore[union-attr]
    layer.process_weights_after_loading()
    x = random_tensor(2, 3, INPUTS, seed=5).to(dtype)
    got = layer(x)[0]
    assert got.dtype == dtype
    assert relative_rms(got, F.linear(x.float(), weight)) < way.error + 0.01


def test_memory_is_given_back(way: Way) -> None:
    """Whatever a method makes of a weight, the tensor that the checkpoint filled isn't held beside it."""
    layer = ReplicatedLinear(INPUTS, 37, quant_config=way.config, bias=False)
    load(layer, way, {None: 37})
    layer.process_weights_after_loading()
    held = [t for t in (*layer.parameters(), *layer.buffers()) if not t.is_meta]
    assert held
    assert sum(t.nbytes for t in held) <= 64 * 48 * 4  # one weight, padded, and scales


# Ranks


class Rank(TensorParallel):
    """One of two, whose sum over ranks is left to the test."""

    size = 2

    def __init__(self, rank: int) -> None:
        self.rank = rank


SHARED: dict[str, tuple[Callable[..., Any], dict[int | str | None, int]]] = {
    "column": (partial(ColumnParallelLinear, 64, 48), {None: 48}),
    "merged": (partial(MergedColumnParallelLinear, 64, [32, 16]), {0: 32, 1: 16}),
    "qkv": (partial(QKVParallelLinear, 64, 16, 4, 2), {"q": 64, "k": 32, "v": 32}),
    "qkv with fewer key heads than ranks": (partial(QKVParallelLinear, 64, 16, 4, 1), {"q": 64, "k": 16, "v": 16}),
    "row": (partial(RowParallelLinear, 64, 48), {None: 48}),
}


@pytest.mark.parametrize("is_fused", [False, True])
@pytest.mark.parametrize("kind", SHARED)
def test_ranks_have_their_shares_of_weights_and_scales(way: Way, kind: str, is_fused: bool) -> None:
    make, parts = SHARED[kind]
    x, weights, results = random_tensor(5, 64, seed=5), [], []
    for rank in (0, 1):
        with constructing_for(Rank(rank)):
            layer = make(bias=False, quant_config=way.config)
        weights.append(load(layer, way, {None: sum(parts.values())} if is_fused else parts, num_inputs=64))
        layer.process_weights_after_loading()
        results.append(multiply(layer, x[:, rank * 32 : rank * 32 + 32] if kind == "row" else x))
    assert torch.equal(*weights), "both read the same file"
    if kind == "row":
        assert relative_rms(results[0] + results[1], F.linear(x, weights[0])) < way.error
        return
    start = 0
    for size, shares in zip(parts.values(), zip(*(layer_parts(r, kind) for r in results), strict=True), strict=True):
        want = F.linear(x, weights[0][start : start + size])
        got = torch.cat(shares, -1) if sum(share.shape[-1] for share in shares) == size else shares[0]
        assert relative_rms(got, want) < way.error
        assert len(shares) * shares[0].shape[-1] == size or torch.equal(*shares)
        start += size


def layer_parts(result: torch.Tensor, kind: str) -> list[torch.Tensor]:
    """A rank's output, part by part."""
    sizes = {"column": [24], "merged": [16, 8], "qkv": [32, 16, 16]}.get(kind, [32, 16, 16])
    return list(torch.split(result, sizes, -1))


# Heads that are the embeddings


@pytest.mark.parametrize("how", ["tied", "assigned", "the table itself"])
def test_a_head_that_shares_the_table_leaves_it_as_it_is(way: Way, how: str) -> None:
    table = random_tensor(50, INPUTS, seed=1)
    embedding = VocabParallelEmbedding(50, INPUTS, quant_config=way.config)
    head: VocabParallelEmbedding = embedding
    if how == "tied":
        head = ParallelLMHead(50, INPUTS, quant_config=way.config).tie_weights(embedding)
    elif how == "assigned":
        head = ParallelLMHead(50, INPUTS, quant_config=way.config)
        head.weight = embedding.weight
        head.share_given_weight()
    embedding.weight_loader(embedding.weight, table)
    if how != "the table itself":
        head.process_weights_after_loading()  # type: ignore[operator]
    x = random_tensor(5, INPUTS, seed=5)
    assert relative_rms(LogitsProcessor(50)(head, x), x @ table.T) < way.error + 0.05 * (way.config is not None)
    assert torch.equal(embedding(torch.tensor([4, 49])), table[[4, 49]])


# What doesn't fit is refused

STORED = [name for name, way in WAYS.items() if way.config is not None and way.stored is not in_float]


@pytest.mark.parametrize("name", STORED)
def test_a_layer_that_comes_in_float_is_a_float_layer(name: str) -> None:
    """Checkpoints leave some layers in float, under names that needn't be those of this model."""
    layer = QKVParallelLinear(INPUTS, 12, 3, 1, bias=False, quant_config=WAYS[name].config)
    old = layer.weight
    weight = load(layer, WAYS["float"], KINDS["qkv"][1])
    layer.process_weights_after_loading()
    assert layer.method.name in WAYS["float"].methods
    assert [n for n, _ in layer.named_parameters()] == ["weight"]
    x = random_tensor(5, INPUTS, seed=5)
    torch.testing.assert_close(layer(x)[0], F.linear(x, weight))
    scale = torch.ones(())
    late = ReplicatedLinear(INPUTS, 37, bias=False, quant_config=WAYS[name].config)
    scale_parameter = late.get_parameter("weight_scale")
    late.weight.weight_loader(late.weight, random_tensor(37, INPUTS))  # type: ignore[operator]
    with pytest.raises(WeightsError, match="weight_scale: got it beside a weight in float"):
        late.weight_loader(scale_parameter, scale)
    assert old.dtype == FP8


@pytest.mark.parametrize("name", STORED)
@pytest.mark.parametrize("first", ["float", "fp8"])
def test_parts_of_two_kinds_are_refused(name: str, first: str) -> None:
    layer = MergedColumnParallelLinear(INPUTS, [20, 20], bias=False, quant_config=WAYS[name].config)
    parts = [random_tensor(20, INPUTS), WAYS[name].stored(random_tensor(20, INPUTS))[0]["weight"]]
    if first == "fp8":
        parts.reverse()
    parameter = layer.weight
    layer.weight_loader(parameter, parts[0], 0)
    with pytest.raises(WeightsError, match=r"expected one kind|expected torch\.float32"):
        layer.weight_loader(parameter, parts[1], 1)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64])
@pytest.mark.parametrize("name", ["float", "int8", "fp8 at load"])
def test_quantized_values_never_land_in_a_float_weight(name: str, dtype: torch.dtype) -> None:
    """An int8 checkpoint without a quantization_config loaded as if 127 were a weight."""
    layer = ReplicatedLinear(INPUTS, 37, quant_config=WAYS[name].config, prefix="model.mlp")
    with pytest.raises(
        WeightsError, match=r"dtype of model\.mlp\.weight: got torch\.\w+ from the checkpoint, expected"
    ):
        layer.weight_loader(layer.weight, torch.ones(37, INPUTS).to(dtype))


def test_a_wrong_part_names_the_layer() -> None:
    merged = MergedColumnParallelLinear(8, [4, 4], prefix="model.gate_up")
    for shard in (2, -1, "q"):
        with pytest.raises(WeightsError, match=r"shard id of model\.gate_up\.weight: got"):
            merged.weight_loader(merged.weight, torch.ones(4, 8), shard)


def test_a_stored_weight_is_not_used_before_it_is_laid_out() -> None:
    layer = ReplicatedLinear(8, 4, quant_config=Fp8Config(ScaleLayout()))
    with pytest.raises(ModelError, match="before finish_loading"):
        layer(torch.ones(1, 8))


# Configs by name


class Doubling(LinearMethod):
    """As short as a method can be."""

    name = "doubling"

    def create_weights(self, layer: WeightedLayer) -> None:
        layer.add_parameter("weight", layer.output_size, layer.input_size, axes=Axes(input=1))

    def after_loading(self, layer: WeightedLayer) -> None:
        layer.packed = 2 * layer.weight.detach()

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return F.linear(x, layer.packed, bias)


@dataclass(frozen=True)
class DoublingConfig(QuantizationConfig):
    name = "doubling"
    reads_checkpoints = True
    only: str = ""

    @classmethod
    def at_load(cls) -> DoublingConfig:
        return cls()

    @classmethod
    def from_checkpoint(cls, settings: Any) -> DoublingConfig:
        return cls(settings["only"])

    def method_for(self, prefix: str, layer: WeightedLayer) -> LinearMethod:
        return Doubling() if prefix.startswith(self.only) else FLOAT


class Config:
    """A checkpoint's config."""

    def __init__(self, settings: dict[str, Any] | None) -> None:
        self.quantization_config = settings

    def get_text_config(self) -> Config:
        return self


def test_a_quantization_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_CLASSES", dict(registry._CLASSES))
    register_quantization("doubling", f"{__name__}:DoublingConfig")
    assert quantization_class("doubling") is DoublingConfig
    assert resolve_quantization("doubling", Config(None), "cpu") == DoublingConfig()
    config = resolve_quantization(None, Config({"quant_method": "doubling", "only": "model.mlp"}), "cpu")
    assert config == DoublingConfig("model.mlp")
    for prefix, factor in (("model.mlp.up", 2), ("model.attn", 1)):
        layer = ReplicatedLinear(8, 4, bias=False, quant_config=config, prefix=prefix)
        weight = random_tensor(4, 8)
        layer.weight_loader(layer.weight, weight)
        layer.process_weights_after_loading()
        x = random_tensor(3, 8, seed=1)
        torch.testing.assert_close(layer(x)[0], factor * (x @ weight.T))


@pytest.mark.parametrize(
    ("name", "settings", "error", "message"),
    [
        ("compressed-tensors", None, ConfigError, "'compressed-tensors' for a checkpoint with float weights"),
        (
            "int8",
            {"quant_method": "fp8"},
            ConfigError,
            "'int8' for a checkpoint quantized by fp8, expected 'fp8' or None",
        ),
        (None, {"quant_method": "gptq"}, ModelError, "by gptq, expected float weights or 'compressed-tensors', 'fp8'"),
        (None, {"quant_method": "int8"}, ModelError, "by int8, expected float weights or"),
        (None, {"quant_method": "fp8", "fmt": "e5m2"}, ModelError, "fp8 of format 'e5m2'"),
        (None, {"quant_method": "fp8", "activation_scheme": "odd"}, ModelError, "activation_scheme 'odd'"),
        (None, {"quant_method": "fp8", "weight_block_size": [128]}, ModelError, r"got \[128\], expected two numbers"),
        (None, {"quant_method": "compressed-tensors"}, ModelError, "no config_groups"),
    ],
)
def test_what_can_not_be_served_is_said(
    name: str | None, settings: dict[str, Any] | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        resolve_quantization(name, Config(settings), "cpu")


def group(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "config_groups": {"group_0": {"weights": weights, "input_activations": inputs}},
    }


FLOAT_8 = {"type": "float", "num_bits": 8, "symmetric": True}
DYNAMIC = {**FLOAT_8, "dynamic": True, "strategy": "token"}


@pytest.mark.parametrize(
    ("settings", "layout"),
    [
        (group({**FLOAT_8, "strategy": "channel"}, DYNAMIC), ScaleLayout(per_channel=True)),
        (group({**FLOAT_8, "strategy": "tensor"}), ScaleLayout()),
        (
            group({**FLOAT_8, "strategy": "tensor"}, {**FLOAT_8, "strategy": "tensor", "dynamic": False}),
            ScaleLayout(has_input_scale=True),
        ),
        (group({**FLOAT_8, "strategy": "block", "block_structure": [128, 128]}, DYNAMIC), ScaleLayout((128, 128))),
    ],
)
def test_compressed_tensors_of_8_bit_floats(settings: dict[str, Any], layout: ScaleLayout) -> None:
    assert resolve_quantization(None, Config(settings), "cpu") == CompressedTensorsConfig(layout)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (group({"type": "int", "num_bits": 4, "strategy": "group"}), "type 'int' with 4 bits"),
        (group({"type": "int", "num_bits": 8, "strategy": "channel"}, DYNAMIC), "type 'int' with 8 bits"),
        (group({**FLOAT_8, "strategy": "channel"}, {"type": "int", "num_bits": 8}), "all alike"),
        (group({**FLOAT_8, "strategy": "channel"}) | {"kv_cache_scheme": {"num_bits": 4}}, "kv_cache_scheme"),
        (
            group({**FLOAT_8, "strategy": "channel"}) | {"kv_cache_scheme": FLOAT_8 | {"dynamic": True}},
            "kv_cache_scheme",
        ),
        (group({**FLOAT_8, "strategy": "channel"}) | {"sparsity_config": {"format": "sparse-24"}}, "sparse-24"),
    ],
)
def test_other_compressed_tensors_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        resolve_quantization(None, Config(settings), "cpu")


def test_little_stands_between_a_layer_and_its_kernel(way: Way) -> None:
    """A decoding step calls some hundred layers: `forward`, the method's `apply`, and the kernel is all."""
    layer = ReplicatedLinear(INPUTS, 37, bias=False, quant_config=way.config)
    load(layer, way, {None: 37})
    layer.process_weights_after_loading()
    x, called = random_tensor(1, INPUTS), []

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.append(frame.f_code.co_name)

    sys.setprofile(note)
    try:
        layer.forward(x)
    finally:
        sys.setprofile(None)
    kernel = next(i for i, name in enumerate(called) if name.endswith("linear"))
    assert [name for name in called[:kernel] if name != "__getattr__"] == ["forward", "apply"]

"""Linear layers equal torch's, loaded whole or part by part, before and after weights are laid out."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from sensorium.errors import ModelError, WeightsError
from sensorium.model_executor.layers.decoder import GatedMLP
from sensorium.model_executor.layers.encoder import EncoderMLP
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    aligned_width,
    widen_inner,
)


def random_tensor(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def fill(layer: LinearBase, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Load random weights through the parameters' own loaders, and return them."""
    weight = random_tensor(*layer.weight.shape, seed=seed)
    layer.weight.weight_loader(layer.weight, weight)  # type: ignore[attr-defined]
    if layer.bias is None:
        return weight, None
    bias = random_tensor(*layer.bias.shape, seed=seed + 1)
    layer.bias.weight_loader(layer.bias, bias)  # type: ignore[attr-defined]
    return weight, bias


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", [ReplicatedLinear, ColumnParallelLinear, RowParallelLinear])
def test_linear_equals_torch(kind: type[LinearBase], bias: bool, packed: bool) -> None:
    layer = kind(24, 40, bias=bias)
    weight, b = fill(layer)
    if packed:
        layer.process_weights_after_loading()
    x = random_tensor(7, 24, seed=5)
    output, returned_bias = layer(x)
    assert returned_bias is None
    torch.testing.assert_close(output, F.linear(x, weight, b))


def test_skip_bias_add_returns_the_bias_instead_of_adding_it() -> None:
    layer = ColumnParallelLinear(8, 16, skip_bias_add=True)
    weight, bias = fill(layer)
    x = random_tensor(3, 8, seed=5)
    output, returned_bias = layer(x)
    torch.testing.assert_close(output, F.linear(x, weight))
    assert bias is not None
    assert torch.equal(returned_bias, bias)


def test_merged_layer_is_its_parts_side_by_side() -> None:
    layer = MergedColumnParallelLinear(8, [4, 6, 2], bias=True)
    parts = [random_tensor(rows, 8, seed=rows) for rows in (4, 6, 2)]
    biases = [random_tensor(rows, seed=10 + rows) for rows in (4, 6, 2)]
    for shard in (2, 0, 1):  # in any order
        layer.weight.weight_loader(layer.weight, parts[shard], shard)  # type: ignore[attr-defined]
        layer.bias.weight_loader(layer.bias, biases[shard], shard)  # type: ignore[union-attr]
    x = random_tensor(5, 8, seed=5)
    expected = torch.cat([F.linear(x, w, b) for w, b in zip(parts, biases, strict=True)], dim=-1)
    torch.testing.assert_close(layer(x)[0], expected)


def test_qkv_layer_is_its_parts_side_by_side_with_fewer_kv_heads() -> None:
    layer = QKVParallelLinear(8, head_size=4, total_num_heads=6, total_num_kv_heads=2, bias=False)
    parts = {
        "q": random_tensor(24, 8, seed=1),
        "k": random_tensor(8, 8, seed=2),
        "v": random_tensor(8, 8, seed=3),
    }
    for shard, part in parts.items():
        layer.weight.weight_loader(layer.weight, part, shard)  # type: ignore[attr-defined]
    layer.process_weights_after_loading()
    x = random_tensor(5, 8, seed=5)
    for part, output in zip(parts.values(), layer.split(layer(x)[0]), strict=True):
        torch.testing.assert_close(output, F.linear(x, part))


def test_qkv_layer_loads_a_fused_tensor() -> None:
    layer = QKVParallelLinear(8, head_size=4, total_num_heads=2)
    weight, bias = fill(layer)
    x = random_tensor(5, 8, seed=5)
    torch.testing.assert_close(layer(x)[0], F.linear(x, weight, bias))


def test_loading_converts_the_dtype() -> None:
    layer = ReplicatedLinear(8, 4, bias=False, params_dtype=torch.bfloat16)
    weight = random_tensor(4, 8)
    layer.weight.weight_loader(layer.weight, weight)  # type: ignore[attr-defined]
    assert torch.equal(layer.weight.data, weight.bfloat16())


def test_a_wrong_shape_is_an_error_that_names_layer_and_part() -> None:
    layer = QKVParallelLinear(8, head_size=4, total_num_heads=4, total_num_kv_heads=2, prefix="model.layers.3.qkv")
    with pytest.raises(WeightsError, match=r"model\.layers\.3\.qkv\.weight \(part 'k'\): got \(16, 8\)"):
        layer.weight.weight_loader(layer.weight, random_tensor(16, 8), "k")  # type: ignore[attr-defined]


def test_what_is_no_quantization_is_refused() -> None:
    with pytest.raises(ModelError, match=r"quant_config of model\.head: got object, expected a QuantizationConfig"):
        ReplicatedLinear(8, 4, quant_config=object(), prefix="model.head")  # type: ignore[arg-type]


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_an_mlp_of_unaligned_width_gives_the_same_when_widened(bias: bool, gated: bool) -> None:
    """The tower of Qwen2.5-VL has 3420 inner channels, which GPUs read at a fraction of their speed."""
    mlp = GatedMLP(24, 44, "silu", bias) if gated else EncoderMLP(24, 44, "sigmoid", bias)  # sigmoid(0) is not 0
    up, down = (mlp.gate_up_proj, mlp.down_proj) if isinstance(mlp, GatedMLP) else (mlp.fc1, mlp.fc2)
    fill(up), fill(down, seed=3)
    x = random_tensor(5, 24, seed=9)
    want = mlp(x)
    mlp.process_weights_after_loading()
    assert down.input_size == 44  # on a CPU as it was
    widen_inner(up, down, 2 if gated else 1)
    assert (up.output_size, down.input_size) == (128 if gated else 64, 64)
    torch.testing.assert_close(mlp(x), want, atol=2e-6, rtol=2e-6)


def test_aligned_widths() -> None:
    assert [aligned_width(n) for n in (3420, 4304, 11008, 1, 64)] == [3456, 4304, 11008, 64, 64]

"""Lays adapters over a loaded model: reads them, finds their layers, takes a rank's share, wraps the methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from sensorium.config import EngineConfig
from sensorium.errors import WeightsError
from sensorium.kernels import PackedWeight, pack
from sensorium.lora import read_adapter
from sensorium.model_executor.layers.linear import LinearBase
from sensorium.model_executor.layers.parameters import Axes, new_parameter
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from sensorium.model_executor.lora.method import LayerDelta, LoRAMethod, UpProjection
from sensorium.model_executor.lora.targets import Target, TargetFinder
from sensorium.model_executor.lora.tensors import Pair, read_pairs
from sensorium.model_executor.model_loader import build_without_memory

_DOWN, _UP = Axes(input=1, output_block=None), Axes()
"""The inputs of the first matrix are divided over ranks as the layer's are, and the outputs of the second."""


@dataclass(frozen=True, slots=True)
class LoadedAdapters:
    """What lies over a model now."""

    methods: dict[str, tuple[LoRAMethod, str]]
    """By the paths of the layers: their methods, and for messages the first adapter that has weights for them."""

    @property
    def num_bytes(self) -> int:
        """Memory that all adapters take."""
        return sum(method.num_bytes for method, _ in self.methods.values())


class _Adapter:
    """One adapter while it is loaded."""

    def __init__(self, name: str, adapter_id: int) -> None:
        self.what = f"lora_modules[{name!r}]"
        self.id = adapter_id
        self.parts: dict[str, list[tuple[Target, Pair, str]]] = {}
        """By the path of the layer that they belong to."""


def load_adapters(model: nn.Module, config: EngineConfig) -> LoadedAdapters:
    """Lay all adapters of the configuration over a model whose weights are loaded.

    Raises:
        ConfigError: An adapter isn't served.
        WeightsError: Its tensors are damaged, or fit no linear layer of the model.
    """
    lora = config.lora_config
    if lora is None:
        return LoadedAdapters({})
    finder = TargetFinder(build_without_memory(config))
    adapters = [_Adapter(name, number) for number, name in enumerate(lora.modules, 1)]
    for adapter, (name, folder) in zip(adapters, lora.modules.items(), strict=True):
        settings = read_adapter(name, Path(folder), lora.max_lora_rank)
        for hf_name, pair in read_pairs(adapter.what, Path(folder), settings):
            target = _checked_target(adapter.what, hf_name, pair, model, finder)
            adapter.parts.setdefault(target.layer, []).append((target, pair, hf_name))
    return _laid_over(model, adapters, torch.device(config.device_config.device))


def _checked_target(what: str, hf_name: str, pair: Pair, model: nn.Module, finder: TargetFinder) -> Target:
    """Where a pair belongs. Raises `WeightsError` if there is no linear layer for it."""
    target = finder.find(hf_name, (len(pair.up), pair.down.shape[1]))
    layer = None if target is None else model.get_submodule(target.layer)
    if target is None or not isinstance(layer, LinearBase | ParallelLMHead):
        kind = "" if layer is None else f" but a {type(layer).__name__}"
        raise WeightsError(
            f"{what}: got weights for {hf_name!r:.160}, which is no linear layer of {type(model).__name__}{kind} that "
            "adapters can be added to. Check that the adapter belongs to this model, or merge it into the model."
        )
    if target.layer in finder.shared:
        raise WeightsError(
            f"{what}: got weights for {hf_name!r:.160}, whose weight is the embeddings' too, expected a layer with a "
            "weight of its own. Merge the adapter into the model."
        )
    expected = _num_outputs(layer, target.part), layer.input_size * layer.input_shard.count
    if (len(pair.up), pair.down.shape[1]) != expected:
        raise WeightsError(
            f"{what}: got {len(pair.up)} outputs and {pair.down.shape[1]} inputs for {hf_name!r:.160}, expected "
            f"{expected[0]} and {expected[1]}. Check that the adapter belongs to this model."
        )
    return target


def _num_outputs(layer: WeightedLayer, part: int | str | None) -> int:
    """Outputs of a part of a layer over all ranks."""
    if isinstance(layer, ParallelLMHead):
        return layer.org_vocab_size
    sizes = [size * shard.count for size, shard in zip(layer.output_sizes, layer.output_shards, strict=True)]
    return sum(sizes) if part is None else sizes[layer.part_index(part)]


def _laid_over(model: nn.Module, adapters: Sequence[_Adapter], device: torch.device) -> LoadedAdapters:
    methods: dict[str, tuple[LoRAMethod, str]] = {}
    for path in dict.fromkeys(path for adapter in adapters for path in adapter.parts):
        layer = model.get_submodule(path)
        assert isinstance(layer, WeightedLayer)
        having = [adapter for adapter in adapters if path in adapter.parts]
        deltas = {adapter.id: _delta(layer, adapter.parts[path], device) for adapter in having}
        layer.wrap_method(partial(LoRAMethod, deltas=deltas))
        assert isinstance(layer.method, LoRAMethod)
        methods[path] = layer.method, f"{having[0].what}: got weights for {having[0].parts[path][0][2]!r:.160}"
    return LoadedAdapters(methods)


def _delta(layer: WeightedLayer, parts: Sequence[tuple[Target, Pair, str]], device: torch.device) -> LayerDelta:
    """What one adapter adds to a layer, of all its parts; this rank's share."""
    downs, ups, first_rank = [], [], 0
    for target, pair, hf_name in parts:
        index = None if target.part is None else layer.part_index(target.part)
        downs.append(layer.share_of(_stand_in(_DOWN), pair.down, None, hf_name))
        up = layer.share_of(_stand_in(_UP), pair.up, index, hf_name)
        first_channel = sum(layer.output_sizes[: index or 0])
        ups.append(UpProjection(_packed(up, layer.params_dtype, device), first_channel, first_rank))
        first_rank += len(pair.down)
    return LayerDelta(_packed(torch.cat(downs), layer.params_dtype, device), tuple(ups))


def _stand_in(axes: Axes) -> nn.Parameter:
    """A parameter of the layer's that has these axes, for `WeightedLayer.share_of`."""
    return new_parameter(0, axes=axes)


def _packed(matrix: torch.Tensor, dtype: torch.dtype, device: torch.device) -> PackedWeight:
    return pack(matrix.to(device=device, dtype=dtype).contiguous())

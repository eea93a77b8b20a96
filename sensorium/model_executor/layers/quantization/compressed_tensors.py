"""Checkpoints in 8-bit floats that `compressed-tensors` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from sensorium.errors import ModelError
from sensorium.model_executor.layers.quantization.base_config import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.fp8 import ScaleLayout, StoredFp8Method, block_size

if TYPE_CHECKING:
    from sensorium.config import KVCacheDtype
    from sensorium.model_executor.layers.quantization.layer import WeightedLayer


@dataclass(frozen=True, slots=True)
class CompressedTensorsConfig(QuantizationConfig):
    """Weights in 8-bit floats with scales per tensor, channel or block, and perhaps a scheme for cached keys and values
    in such floats."""

    name = "compressed-tensors"
    reads_checkpoints = True
    layout: ScaleLayout
    has_kv_cache_scheme: bool = False

    @property
    def kv_cache_dtype(self) -> KVCacheDtype:
        """See `QuantizationConfig`."""
        return "fp8_e4m3" if self.has_kv_cache_scheme else "auto"

    @classmethod
    def from_checkpoint(cls, settings: Mapping[str, Any]) -> Self:
        """See `QuantizationConfig`."""
        groups = list((settings.get("config_groups") or {}).values())
        found = [_layout(group) for group in groups if isinstance(group, Mapping)]
        if not found or len(found) != len(groups) or None in found or len(set(found)) > 1:
            raise _unsupported(settings, _summary(groups), "weights of type 'float' with 8 bits, all alike")
        scheme = settings.get("kv_cache_scheme")
        if scheme is not None and not _is_scale_per_layer(scheme):
            got = f"a kv_cache_scheme of {scheme!r:.200}"
            raise _unsupported(settings, got, "none, or 8-bit floats with fixed scales per tensor")
        sparsity = (settings.get("sparsity_config") or {}).get("format", "dense")
        if sparsity != "dense":
            raise _unsupported(settings, f"weights of sparsity format {sparsity!r}", "'dense'")
        assert found[0] is not None
        return cls(found[0], has_kv_cache_scheme=scheme is not None)

    def method_for(self, prefix: str, layer: WeightedLayer) -> LinearMethod:
        """See `QuantizationConfig`."""
        return StoredFp8Method(self.layout)


def _is_scale_per_layer(scheme: Any) -> bool:
    """Whether cached numbers are 8-bit floats with one scale for a layer's keys, and one for its values."""
    return (
        isinstance(scheme, Mapping)
        and (scheme.get("type"), scheme.get("num_bits")) == ("float", 8)
        and scheme.get("strategy", "tensor") == "tensor"
        and scheme.get("symmetric", True) is True
        and not scheme.get("dynamic", False)
    )


def _layout(group: Mapping[str, Any]) -> ScaleLayout | None:
    """The layout of a group's scales; None if its weights aren't symmetric 8-bit floats, or its inputs are quantized
    otherwise."""
    weights, inputs = group.get("weights") or {}, group.get("input_activations") or {}
    for each in (weights, *([inputs] if inputs else [])):
        if each.get("type") != "float" or each.get("num_bits") != 8 or not each.get("symmetric", True):
            return None
    is_static = bool(inputs) and not inputs.get("dynamic", False)
    if is_static and inputs.get("strategy") != "tensor":
        return None
    match weights.get("strategy"):
        case "tensor":
            return ScaleLayout(has_input_scale=is_static)
        case "channel":
            return ScaleLayout(per_channel=True, has_input_scale=is_static)
        case "block":
            return ScaleLayout(block_size(weights.get("block_structure")), has_input_scale=is_static)
    return None


def _summary(groups: list[Any]) -> str:
    """Describes a config's weights, for an error."""
    weights = [(group.get("weights") or {}) if isinstance(group, Mapping) else {} for group in groups]
    kinds = {f"type {each.get('type')!r} with {each.get('num_bits')} bits" for each in weights}
    return f"weights of {' and '.join(sorted(kinds))}" if kinds else "no config_groups"


def _unsupported(settings: Mapping[str, Any], got: str, expected: str) -> ModelError:
    return ModelError(
        f"quantization_config in config.json: got a checkpoint quantized by compressed-tensors "
        f"({settings.get('format', 'of no named format')}) with {got}, expected {expected}. Use the checkpoint that it "
        "was made from; quantization='int8' or 'fp8' quantizes that at load."
    )

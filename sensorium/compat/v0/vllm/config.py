"""The engine's configuration as constructors of V0 get it: with its names, and what holds for their code.

`as_v0` makes it. Some classes of V0 refuse an engine with prefix caching, because V0's could not tell media apart by
their tokens; here a block is known by the media in it, so they are told that there is none.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from sensorium.config import CacheConfig as OurCacheConfig
from sensorium.config import EngineConfig
from sensorium.config import ParallelConfig as OurParallelConfig
from sensorium.model_executor.layers.quantization import QuantizationConfig

__all__ = ["CacheConfig", "ParallelConfig", "QuantizationConfig", "VllmConfig", "as_v0"]


@dataclass(frozen=True, slots=True)
class CacheConfig(OurCacheConfig):
    """The caches' sizes, and what V0 kept beside them."""

    sliding_window: int | None = None
    """Of the text model, if all its layers have one."""


@dataclass(frozen=True, slots=True)
class ParallelConfig(OurParallelConfig):
    """The ranks. Layers are never divided into stages."""

    pipeline_parallel_size: int = 1

    @property
    def world_size(self) -> int:
        """All ranks."""
        return self.tensor_parallel_size


@dataclass(frozen=True)
class VllmConfig(EngineConfig):
    """The engine's configuration. Settings of parts that there are none of here are None."""

    prompt_adapter_config: None = None
    decoding_config: None = None
    observability_config: None = None
    compilation_config: None = None
    kv_transfer_config: None = None


def as_v0(config: EngineConfig) -> VllmConfig:
    """The configuration for the constructor of a class of V0."""
    if isinstance(config, VllmConfig):
        return config
    text = config.model_config.hf_text_config
    window = None if getattr(text, "layer_types", None) else getattr(text, "sliding_window", None)
    cache = CacheConfig(**_values(replace(config.cache_config, enable_prefix_caching=False)), sliding_window=window)
    parallel = ParallelConfig(**_values(config.parallel_config))
    return VllmConfig(**_values(config) | {"cache_config": cache, "parallel_config": parallel})


def _values(config: Any) -> dict[str, Any]:
    return {each.name: getattr(config, each.name) for each in fields(config)}

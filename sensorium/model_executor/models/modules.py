"""Building blocks of model constructors: names of sub-modules, stacks of layers, inner models."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.model_executor.adapter import construct_model, current_engine_config
from sensorium.model_executor.models.registry import ModelRegistry
from sensorium.sequence import IntermediateTensors

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def maybe_prefix(prefix: str, name: str) -> str:
    """The full name of a sub-module: `prefix.name`, or `name` at the top."""
    return f"{prefix}.{name}" if prefix else name


class PPMissingLayer(nn.Identity):
    """Replaces a layer that is on another pipeline stage; returns its first argument."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The first argument, positional or keyword."""
        return args[0] if args else next(iter(kwargs.values()))


def make_layers(
    num_hidden_layers: int, layer_fn: Callable[..., nn.Module], prefix: str
) -> tuple[int, int, nn.ModuleList]:
    """A stack of layers, each made by `layer_fn(prefix=...)`, and the range of this stage's layers, which is all."""
    layers = nn.ModuleList(layer_fn(prefix=f"{prefix}.{i}") for i in range(num_hidden_layers))
    return 0, num_hidden_layers, layers


def make_empty_intermediate_tensors_factory(
    keys: list[str], hidden_size: int
) -> Callable[[int, torch.dtype, torch.device], IntermediateTensors]:
    """A function that makes zeros `(batch_size, hidden_size)` under each key, in the form that stages pass on."""

    def make(batch_size: int, dtype: torch.dtype, device: torch.device) -> IntermediateTensors:
        return IntermediateTensors(
            {key: torch.zeros((batch_size, hidden_size), dtype=dtype, device=device) for key in keys}
        )

    return make


def is_pp_missing_parameter(name: str, model: nn.Module) -> bool:
    """Whether a parameter belongs to a layer that is on another pipeline stage."""
    missing = [f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer)]
    return any(name.startswith(prefix) for prefix in missing)


def init_registered_model(
    *args: Any,
    prefix: str = "",
    hf_config: PretrainedConfig | None = None,
    architectures: list[str] | None = None,
    vllm_config: EngineConfig | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Make an inner model, mostly the text model of a multimodal one, with its class from the registry.

    `init_registered_model(config, prefix=..., hf_config=..., architectures=...)` is the form to use: `config` is the
    engine's configuration, `hf_config` the inner model's (by default the outer model's). Two older forms work too:
    `(hf_config, vllm_config=config, prefix=...)`, and `(hf_config, cache_config, quant_config, ...)`, which takes the
    configuration of the model that is being constructed.

    Raises `ConfigError` (a `ValueError`) if no class is registered for the inner model.
    """
    config = vllm_config
    for value in args:
        if isinstance(value, EngineConfig):
            config = value
        elif hf_config is None and hasattr(value, "get_text_config"):
            hf_config = value
    if hf_config is None:
        hf_config = kwargs.get("config")
    config = config or current_engine_config()
    hf_config = hf_config or config.model_config.hf_config
    model_class, architecture = ModelRegistry.resolve(architectures or inner_architectures(hf_config), "native")
    return construct_model(model_class, config.with_hf_config(hf_config, [architecture]), prefix)


def missing_inner_model(hf_config: PretrainedConfig) -> str | None:
    """Why `init_registered_model` would refuse an inner model, which is that no class is registered for it; None if
    there is one."""
    architectures = inner_architectures(hf_config)
    if set(architectures) & set(ModelRegistry.get_supported_archs()):
        return None
    return f"its inner model {architectures[0]} has no class here"


init_vllm_registered_model = init_registered_model
"""`init_registered_model` under the name that classes written for vLLM import."""


def inner_architectures(hf_config: PretrainedConfig) -> list[str]:
    """Architectures of a config; an inner one that names none gets the causal model of its type.

    Raises `ModelError` (a `TypeError`) if transformers has no causal model of its type.
    """
    named = getattr(hf_config, "architectures", None)
    if named:
        return list(named)
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(hf_config.model_type)
    if architecture is None:
        raise ModelError(
            f"Inner model: its config of type {hf_config.model_type!r} names no architectures. "
            f"Pass architectures=[...]."
        )
    return [architecture]

"""Helpers for model files that Sensorium's module of this name lacks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sensorium.compat.v0.inner_models import class_of_room, with_names_of_v0
from sensorium.compat.v0.vllm.attention.selector import _Backend
from sensorium.model_executor.adapter import construct_model, current_engine_config
from sensorium.model_executor.models.modules import PPMissingLayer, init_registered_model, inner_architectures

__all__ = [
    "LLMWrapper",
    "extract_layer_index",
    "get_pp_missing_layer_names",
    "get_vit_attn_backend",
    "init_vllm_registered_model",
]


def init_vllm_registered_model(*args: Any, **kwargs: Any) -> nn.Module:
    """`sensorium.model_executor.models.modules.init_registered_model`, of a model that outer classes of V0 can use.

    Of architectures without a registered class, this room may have one.
    """
    hf_config = kwargs.get("hf_config") or next((each for each in args if hasattr(each, "get_text_config")), None)
    model_class = None
    if hf_config is not None:
        model_class = class_of_room(kwargs.get("architectures") or inner_architectures(hf_config))
    if model_class is None:
        return with_names_of_v0(init_registered_model(*args, **kwargs))
    config = kwargs.get("vllm_config") or current_engine_config()
    return construct_model(model_class, config.with_hf_config(hf_config), kwargs.get("prefix", ""))


class LLMWrapper(nn.Module):
    """A language model under a name, for checkpoints that have it one level deeper.

    What is asked of the wrapper is asked of the model.
    """

    def __init__(self, llm: nn.Module, name: str) -> None:
        super().__init__()
        self.model_name = name
        setattr(self, name, llm)

    def __getattr__(self, key: str) -> Any:
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(self._modules[self.__dict__["model_name"]], key)

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the model."""
        return self._modules[self.model_name](*args, **kwargs)  # type: ignore[no-any-return, misc]


def get_vit_attn_backend(support_fa: bool = False) -> _Backend:
    """Which backend's way a tower takes: that of xformers, whose operations are Sensorium's attention here."""
    return _Backend.XFORMERS


def get_pp_missing_layer_names(model: nn.Module) -> list[str]:
    """Prefixes of the names of parameters that another stage has."""
    return [f"{name}." for name, module in model.named_modules() if isinstance(module, PPMissingLayer)]


def extract_layer_index(layer_name: str) -> int:
    """The one number in a layer's name. Raises AssertionError if there isn't exactly one."""
    numbers = [int(part) for part in layer_name.split(".") if part.isdigit()]
    assert len(numbers) == 1, f"{layer_name!r} has {len(numbers)} numbers"
    return numbers[0]

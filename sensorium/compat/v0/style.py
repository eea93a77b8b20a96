"""What the engine must do differently for classes that were written for vLLM 0.6. Other packages get this module by
name, see `sensorium.plugins.style_of`."""

from __future__ import annotations

from types import ModuleType
from typing import TYPE_CHECKING, Any

from torch import nn

import sensorium.compat.v0.vllm.transformers_utils.configs  # noqa: F401  transformers gets to know them
from sensorium.compat.v0.hf_configs import as_of_release
from sensorium.compat.v0.vllm.config import VllmConfig, as_v0
from sensorium.model_executor.models.interfaces import SupportsTwoWaySpans
from sensorium.model_executor.models.registry import ModelRegistry, in_tree_class

if TYPE_CHECKING:
    from sensorium.config import EngineConfig, ModelConfig


ARCHITECTURES = {
    "ChatGLMForCausalLM": ("ChatGLMModel", "ChatGLMForConditionalGeneration"),
    "NVLM_D_Model": ("NVLM_D",),
}
"""Names of architectures in checkpoints for V0's classes with another name."""


def register_classes(module: ModuleType) -> None:
    """If a plug-in registers no models, as vllm's own files do, register its classes by their names and by those in
    `ARCHITECTURES`."""
    classes = [each for each in vars(module).values() if _is_model(each) and each.__module__ == module.__name__]
    if not any(ModelRegistry.architectures_of(each) for each in classes):
        for model_class in classes:
            for architecture in (model_class.__name__, *ARCHITECTURES.get(model_class.__name__, ())):
                ModelRegistry.register_model(architecture, model_class)


def _is_model(value: object) -> bool:
    methods = ("forward", "compute_logits", "load_weights")
    return isinstance(value, type) and issubclass(value, nn.Module) and all(hasattr(value, name) for name in methods)


def config_for_constructor(config: EngineConfig) -> VllmConfig:
    """The engine's configuration in the form that V0's constructors take."""
    return as_v0(config)


def adapt_hf_config(hf_config: Any, model_class: type, architecture: str) -> None:
    """Add to a checkpoint's config, in place, the names that configs of transformers had at the time of V0."""
    as_of_release(hf_config)
    if issubclass(_knowing_class(model_class, architecture), SupportsTwoWaySpans):
        # The engine passes two-way spans to the layers; a decoder alone would refuse a config with this flag.
        hf_config.get_text_config().use_bidirectional_attention = False


def class_that_knows_spans(model_class: type, model_config: ModelConfig) -> type:
    """The class that defines two-way spans. V0's API had no such thing, but Sensorium's own class for the architecture
    may define them."""
    return _knowing_class(model_class, model_config.architecture)


def _knowing_class(model_class: type, architecture: str) -> type:
    if issubclass(model_class, SupportsTwoWaySpans):
        return model_class
    return in_tree_class(architecture) or model_class

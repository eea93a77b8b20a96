"""Quantizations by name, and the choice for a model: its checkpoint's own, or the one that is configured."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.layers.quantization.base_config import QuantizationConfig

_HERE = "sensorium.model_executor.layers.quantization"
_CLASSES: dict[str, str | type[QuantizationConfig]] = {
    "compressed-tensors": f"{_HERE}.compressed_tensors:CompressedTensorsConfig",
    "fp8": f"{_HERE}.fp8:Fp8Config",
    "int8": f"{_HERE}.int8:Int8Config",
    "mxfp4": f"{_HERE}.mxfp4:Mxfp4Config",
}
"""A class, or its name as `"module:Class"`, which is imported when it is needed."""


def register_quantization(name: str, config_class: str | type[QuantizationConfig]) -> None:
    """Register the class for `quantization=name`, and for checkpoints whose `quant_method` is `name`.

    Args:
        name: Replaces the class of that name, if there is one.
        config_class: The class, or its name as `"module:Class"`. Register it in a plug-in, so that every process does.
    """
    _CLASSES[name] = config_class


def quantization_names() -> list[str]:
    """All registered names, sorted."""
    return sorted(_CLASSES)


def quantization_class(name: str) -> type[QuantizationConfig] | None:
    """The class registered under a name, if any."""
    found = _CLASSES.get(name)
    if isinstance(found, str):
        module, _, class_name = found.partition(":")
        found = _CLASSES[name] = getattr(importlib.import_module(module), class_name)
    assert not isinstance(found, str)
    return found


def check_quantization(name: str | None, device_type: str) -> None:
    """Raise `ConfigError` unless the setting `quantization` names one that runs on the device type ("cpu" or
    "cuda")."""
    if name is None:
        return
    config_class = quantization_class(name)
    if config_class is None:
        raise ConfigError(
            f"quantization: got {name!r}, expected {_listed(quantization_names())} or None. Set quantization "
            "(--quantization) to one of them."
        )
    config_class.check_device(device_type)


def resolve_quantization(name: str | None, hf_config: Any, device_type: str) -> QuantizationConfig | None:
    """A model's quantization, or None for float weights.

    Args:
        name: The setting `quantization`, checked.
        hf_config: The checkpoint's config, which may have a `quantization_config`.
        device_type: "cpu" or "cuda".

    Raises:
        ConfigError: The quantization doesn't suit this checkpoint or device.
        ModelError: No registered class reads the checkpoint's quantization.
    """
    settings = checkpoint_settings(hf_config)
    if settings is not None:
        config = _of_checkpoint(name, settings)
        config.check_device(device_type)
        return config
    config_class = None if name is None else quantization_class(name)
    return None if config_class is None else config_class.at_load()


def _of_checkpoint(name: str | None, settings: Mapping[str, Any]) -> QuantizationConfig:
    method = _method_name(settings)
    config_class = quantization_class(method)
    if config_class is None or not config_class.reads_checkpoints:
        classes = {each: quantization_class(each) for each in quantization_names()}
        readable = [each for each, found in classes.items() if found is not None and found.reads_checkpoints]
        raise ModelError(
            f"quantization_config in config.json: got a checkpoint quantized by {method}, expected float weights"
            f"{f' or {_listed(readable)}' if readable else ''}. Use the checkpoint that it was made from; "
            "quantization='int8' or 'fp8' quantizes that at load."
        )
    if name not in (None, method):
        raise ConfigError(
            f"quantization: got {name!r} for a checkpoint quantized by {method}, expected {method!r} or None. "
            "Leave quantization out."
        )
    return config_class.from_checkpoint(settings)


def checkpoint_settings(hf_config: Any) -> Mapping[str, Any] | None:
    """The checkpoint's quantization settings, from the model's config or its text config."""
    for config in (hf_config, hf_config.get_text_config()):
        for name in ("quantization_config", "compression_config"):
            settings = getattr(config, name, None)
            if settings:
                return settings if isinstance(settings, Mapping) else dict(getattr(settings, "__dict__", {}))
    return None


def _method_name(settings: Mapping[str, Any]) -> str:
    """The name of a quantization method: `quant_method`, or what the flags of older files imply."""
    if settings.get("load_in_8bit") or settings.get("load_in_4bit"):
        return "bitsandbytes"
    name = settings.get("quant_method") or settings.get("format") or "an unknown method"
    return str(getattr(name, "value", name))


def _listed(names: list[str]) -> str:
    return ", ".join(repr(name) for name in names)

"""Low-rank adapters as users name them and as their folders describe them. Weights are the worker's business.

An adapter is a folder that PEFT wrote: `adapter_config.json`, read here, and `adapter_model.safetensors`. It adds
`scale * up(down(x))` to the outputs of some linear layers, with `down` `(rank, inputs)` and `up` `(outputs, rank)`.
Source: Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models"; the settings are those of PEFT's
class for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from sensorium.checkpoint import read_json
from sensorium.errors import ConfigError, InvalidRequestError, ModelError

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
_OWN_INITIALIZATIONS = (True, False, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the model's own weights as they are. Others subtract from them what the
adapter begins with."""
_READ = ("peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights", "bias")
_WITHOUT_EFFECT = (
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("task_type", "lora_dropout", "fan_in_fan_out", "megatron_config", "megatron_core", "qalora_group_size"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "eva_config", "loftq_config"),
)
"""Settings that matter while an adapter is trained, or that its tensors show as well."""

_Number = TypeVar("_Number", int, float)


@dataclass(frozen=True, slots=True)
class LoRARequest:
    """The adapter that a request is to be answered with.

    Args:
        lora_name: A name of `lora_modules`.
        lora_int_id: Taken for programs that number their adapters; the name alone counts.
        lora_path: If given, it must be the folder that `lora_modules` has under this name.
    """

    lora_name: str
    lora_int_id: int | None = None
    lora_path: str | None = None


@dataclass(frozen=True, slots=True)
class AdapterSettings:
    """What an adapter's `adapter_config.json` says of its layers."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Values of layers whose names end in a key, a regular expression."""
    is_rank_stabilized: bool = False

    def rank_of(self, layer: str) -> int:
        """The rank of a layer, by its name in the Hugging Face model."""
        return _by_pattern(self.rank_pattern, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        """The factor on what the adapter adds to a layer: `alpha / rank`, or `alpha / sqrt(rank)` if stabilized."""
        rank = self.rank_of(layer)
        return _by_pattern(self.alpha_pattern, layer, self.alpha) / (
            math.sqrt(rank) if self.is_rank_stabilized else rank
        )


def _by_pattern(pattern: Mapping[str, _Number], layer: str, default: _Number) -> _Number:
    return next((value for key, value in pattern.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), default)


def read_adapter(name: str, folder: Path, max_rank: int) -> AdapterSettings:
    """The settings of the adapter `name`, whose folder this is.

    Raises:
        ConfigError: It is no adapter, has a larger rank than `max_rank`, or needs what isn't served.
    """
    what = f"lora_modules[{name!r}]"
    if not (folder / CONFIG_NAME).is_file():
        raise ConfigError(
            f"{what}: got a folder without {CONFIG_NAME}, expected an adapter that PEFT saved. Correct it."
        )
    if not (folder / WEIGHTS_NAME).is_file():
        raise ConfigError(
            f"{what}: got a folder without {WEIGHTS_NAME}, expected an adapter with safe tensors. Weights in a pickle "
            "are never read; save the adapter again with safe_serialization=True."
        )
    try:
        config = read_json(folder / CONFIG_NAME)
    except ModelError as error:
        raise ConfigError(f"{what}: {error}") from error
    _refuse_others(what, config)
    settings = AdapterSettings(
        rank=_rank(what, "r", config.get("r", 8)),
        alpha=_alpha(what, "lora_alpha", config.get("lora_alpha", 8)),
        rank_pattern={key: _rank(what, "rank_pattern", rank) for key, rank in _pattern(what, config, "rank_pattern")},
        alpha_pattern={
            key: _alpha(what, "alpha_pattern", each) for key, each in _pattern(what, config, "alpha_pattern")
        },
        is_rank_stabilized=bool(config.get("use_rslora")),
    )
    largest = max(settings.rank, *settings.rank_pattern.values(), 0)
    if largest > max_rank:
        raise ConfigError(
            f"{what}: got rank {largest}, expected at most {max_rank}. Raise max_lora_rank (--max-lora-rank)."
        )
    return settings


def _refuse_others(what: str, config: Mapping[str, Any]) -> None:
    """Raise `ConfigError` for an adapter of another kind, and for a setting that would have to change what is done."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise _unserved(what, "peft_type", kind, "'LORA'")
    if config.get("bias", "none") != "none":
        raise _unserved(what, "bias", config["bias"], "'none'")
    initialization = config.get("init_lora_weights", True)
    if initialization not in _OWN_INITIALIZATIONS:
        raise ConfigError(
            f"{what}: got init_lora_weights {initialization!r:.60}, which changes the model's own weights too, "
            "expected an adapter of the model as it is. Convert it: PEFT's save_pretrained takes "
            "path_initial_model_for_weight_conversion."
        )
    for key, value in config.items():
        if value and key not in _READ and key not in _WITHOUT_EFFECT:
            raise _unserved(what, key, value, "a plain low-rank adapter, without it")


def _unserved(what: str, key: str, value: object, expected: str) -> ConfigError:
    return ConfigError(
        f"{what}: got {key} {value!r:.80} in {CONFIG_NAME}, expected {expected}. Merge the adapter into the model, or "
        "leave it out of lora_modules."
    )


def _rank(what: str, key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(
            f"{what}: got {key} {value!r:.60} in {CONFIG_NAME}, expected a whole number from 1. Correct it."
        )
    return value


def _alpha(what: str, key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ConfigError(f"{what}: got {key} {value!r:.60} in {CONFIG_NAME}, expected a finite number. Correct it.")
    return value


def _pattern(what: str, config: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    found = config.get(key) or {}
    try:
        if isinstance(found, Mapping):
            return [(name, value) for name, value in found.items() if re.compile(name)]
    except re.error:
        pass
    raise ConfigError(
        f"{what}: got {key} {found!r:.80} in {CONFIG_NAME}, expected names of layers and their values. Correct it."
    )


def adapter_id(modules: Mapping[str, str], request: LoRARequest | str | None) -> int:
    """The id of the adapter that a request names, of those that an engine has; 0 for none.

    Raises:
        InvalidRequestError: There is none of this name.
    """
    if request is None:
        return 0
    asked = LoRARequest(request) if isinstance(request, str) else request
    if asked.lora_name not in modules:
        known = f"one of {list(modules)}" if modules else "None, since the engine has no adapters"
        raise InvalidRequestError(
            f"got {asked.lora_name!r:.120}, expected {known}. Adapters are loaded with the model: name "
            "it in lora_modules (--lora-modules).",
            field="lora_request",
        )
    own = modules[asked.lora_name]
    if asked.lora_path is not None and Path(asked.lora_path).expanduser().resolve() != Path(own).resolve():
        raise InvalidRequestError(
            f"got another path for {asked.lora_name!r:.120} than lora_modules has, expected the same. "
            "Leave lora_path out, or give the other adapter a name of its own in lora_modules.",
            field="lora_request",
        )
    return list(modules).index(asked.lora_name) + 1

"""Weights by Hugging Face's own loading: its conversions of names and layouts, its tied parameters, its file order.

Parameters are created without memory, and each tensor of the files is copied once.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import ModelError, WeightsError
from sensorium.logger import get_logger
from sensorium.model_executor.models.transformers.architectures import text_architectures
from sensorium.model_executor.models.transformers.division import divide

logger = get_logger(__name__)

MAX_NAMED = 8
"""How many names an error message lists."""


def load_hf_model(config: EngineConfig) -> nn.Module:
    """The checkpoint's own class with its weights, on the configured device, in the configured dtype, in evaluation
    mode.

    Raises:
        ModelError: transformers has no such class, or can't make it from this config.
        WeightsError: The files don't fill every parameter.
    """
    return _loaded(config, hf_class_of(config.model_config), _remote_code(config.model_config))


def load_pooling_model(config: EngineConfig) -> nn.Module:
    """As `load_hf_model`, for a model that doesn't generate: the class with the head for its task, or without a head
    for vectors."""
    model_config = config.model_config
    auto_class = _AUTO_CLASSES[model_config.pooler.tasks[0]]
    if model_config.trust_remote_code and auto_class in (getattr(model_config.hf_config, "auto_map", None) or {}):
        import transformers

        options = {"trust_remote_code": True, "code_revision": model_config.code_revision}
        return _loaded(config, getattr(transformers, auto_class), options)
    return _loaded(config, _pooling_class(model_config, auto_class), {})


_AUTO_CLASSES = {
    "embed": "AutoModel",
    "token_embed": "AutoModel",
    "classify": "AutoModelForSequenceClassification",
    "token_classify": "AutoModelForTokenClassification",
}
"""The auto class for the first task of a model."""


def _pooling_class(model_config: ModelConfig, auto_class: str) -> Any:
    import transformers

    name = model_config.architecture
    if auto_class != "AutoModel" or (name.endswith("Model") and name not in text_architectures()):
        found = getattr(transformers, name, None)
    else:
        found = transformers.AutoModel._model_mapping.get(type(model_config.hf_config), None)  # noqa: SLF001  no public one
        found = found[0] if isinstance(found, list | tuple) else found
    if found is None:
        raise ModelError(
            f"architectures: got {model_config.architecture}, expected one that transformers has a class for. Set "
            "trust_remote_code (--trust-remote-code) if the checkpoint brings its class."
        )
    return found


def _loaded(config: EngineConfig, hf_class: Any, options: Mapping[str, Any]) -> nn.Module:
    model_config = config.model_config
    hf_config = copy.deepcopy(model_config.hf_config)  # classes write into it
    if config.load_config.load_format == "dummy":
        model = _made(hf_class, hf_config, model_config, options)
    else:
        model = _read(hf_class, hf_config, model_config, options)
    is_checked = model_config.load_check == "auto"
    divide(model.eval(), config.parallel_config.group, is_checked=is_checked)
    placed: nn.Module = model.to(torch.device(config.device_config.device))
    return placed.eval().requires_grad_(False)


def hf_class_of(model_config: ModelConfig) -> Any:
    """The class of transformers that a checkpoint names, or an auto class for one whose code comes with the
    checkpoint."""
    import transformers

    if _is_remote(model_config):
        return transformers.AutoModelForCausalLM
    return getattr(transformers, model_config.architecture)


def _is_remote(model_config: ModelConfig) -> bool:
    auto_map = getattr(model_config.hf_config, "auto_map", None)
    return model_config.trust_remote_code and "AutoModelForCausalLM" in (auto_map or {})


def _remote_code(model_config: ModelConfig) -> dict[str, Any]:
    if not _is_remote(model_config):
        return {}
    return {"trust_remote_code": True, "code_revision": model_config.code_revision}


def _made(hf_class: Any, hf_config: Any, model_config: ModelConfig, options: Mapping[str, Any]) -> Any:
    """The class with randomly initialized weights, seeded."""
    make = hf_class.from_config if options else hf_class._from_config  # noqa: SLF001  a model class has no public one
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_config.seed)
        try:
            return make(hf_config, dtype=model_config.dtype, **options)
        except Exception as error:  # whatever a constructor raises on what is written in the config
            raise _cannot_make(model_config, error) from error


def _read(hf_class: Any, hf_config: Any, model_config: ModelConfig, options: Mapping[str, Any]) -> Any:
    try:
        with _without_bars():
            model, info = hf_class.from_pretrained(
                model_config.model,
                config=hf_config,
                dtype=model_config.dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
                **options,
                **_without_pooler(hf_class),
            )
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"weights of {model_config.model}: transformers can't load them into {model_config.architecture}: "
            f"{_first_line(error)}. Check that config.json belongs to these weights, or download them again."
        ) from error
    except Exception as error:
        raise _cannot_make(model_config, error) from error
    _check_filled(model_config, info)
    return model


def _without_pooler(hf_class: Any) -> dict[str, Any]:
    """Options that leave out a pooler as BERT's: vectors are pooled from last states."""
    names = inspect.signature(hf_class).parameters if isinstance(hf_class, type) else {}
    return {"add_pooling_layer": False} if "add_pooling_layer" in names else {}


@contextmanager
def _without_bars() -> Iterator[None]:
    """Within it, transformers draws no progress bars."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def _check_filled(model_config: ModelConfig, info: Mapping[str, Any]) -> None:
    """Refuse parameters without a value; unused keys are only logged, as in transformers."""
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(map(str, info.get(kind) or ())):
            raise WeightsError(
                f"parameters of {model_config.architecture} without a value in the checkpoint: got {_listing(names)}, "
                "expected none. Check that config.json belongs to these weights, or download them again."
            )
    if unused := sorted(map(str, info.get("unexpected_keys") or ())):
        logger.info("Checkpoint keys that %s has no use for: %s", model_config.architecture, _listing(unused))


def _cannot_make(model_config: ModelConfig, error: Exception) -> ModelError:
    return ModelError(
        f"{model_config.architecture} of transformers: it can't be made from this config: {type(error).__name__}: "
        f"{_first_line(error)}. Correct config.json, or set another value in hf_overrides (--hf-overrides)."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")[:300]


def _listing(names: Iterable[str]) -> str:
    every = list(names)
    shown = ", ".join(every[:MAX_NAMED])
    return shown if len(every) <= MAX_NAMED else f"{shown} and {len(every) - MAX_NAMED} more"

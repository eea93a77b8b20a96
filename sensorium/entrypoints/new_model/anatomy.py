"""The parts of a model that Hugging Face has: towers, projectors and decoder, found on modules without memory."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sensorium.engine.hf_config import load_hf_config
from sensorium.entrypoints.new_model.items import ItemOfProcessor, items_of
from sensorium.entrypoints.new_model.names import Renaming, renamings
from sensorium.entrypoints.new_model.parts import Part, part_of
from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.models.registry import IN_TREE
from sensorium.model_executor.models.transformers.architectures import media_architectures

_TABLES = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "SPEECH_SEQ_2_SEQ", "CAUSAL_LM")


@dataclass(frozen=True, slots=True)
class Decoder:
    """The language model."""

    hf_class: str
    path: str
    architecture: str | None
    """A class of this engine for it; None: there is none."""
    is_by_type: bool
    """Whether the config's type says so; otherwise, only the parameters are the same."""


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What is known of a model before a line of it is written."""

    architecture: str
    model_type: str
    module: str
    """Of transformers, where its class is."""
    folder: Path | None
    """Of the checkpoint, where there is one."""
    has_weights: bool
    base_class: str
    """The class that holds tower, projector and decoder."""
    decoder: Decoder
    parts: tuple[Part, ...]
    renamings: tuple[Renaming, ...]
    items: tuple[ItemOfProcessor, ...]
    """Per modality."""
    is_mrope: bool
    """Whether positions have three rows."""
    sub_configs: tuple[str, ...]
    """Names of the config's own parts with layers."""


def read(source: str) -> Anatomy:
    """The anatomy of a checkpoint's folder, of a config's file, or of a model type with its default sizes.

    Raises:
        ConfigError: There is no such thing, or it takes no media.
        ModelError: transformers can't make it.
    """
    config, folder = _config_of(source)
    architecture = _architecture_of(config, source)
    model = _on_meta(architecture, config)
    path = _decoder_path(model, architecture)
    parent_path, _, _ = path.rpartition(".")
    parent = model.get_submodule(parent_path)
    parts = tuple(part_of(name, part, config) for name, part in _children(parent) if name != path.rpartition(".")[2])
    decoder = _decoder_of(model.get_submodule(path), path, config)
    return Anatomy(
        architecture=architecture,
        model_type=config.model_type,
        module=type(model).__module__,
        folder=folder,
        has_weights=folder is not None and any(folder.glob("*.safetensors")),
        base_class=type(parent).__name__,
        decoder=decoder,
        parts=parts,
        renamings=renamings(model, path, [each.name for each in parts]),
        items=items_of(folder, config, parent),
        is_mrope=hasattr(parent, "get_rope_index"),
        sub_configs=tuple(_layered(config)),
    )


def _config_of(source: str) -> tuple[Any, Path | None]:
    path = Path(source)
    if path.is_dir():
        return load_hf_config(path, trust_remote_code=False, code_revision=None, overrides={}).hf_config, path.resolve()
    from transformers import CONFIG_MAPPING, AutoConfig

    if path.is_file():
        try:
            written = json.loads(path.read_text(encoding="utf-8"))
            return AutoConfig.for_model(**written), None
        except Exception as error:  # whatever a file holds, and whatever a config class says to it
            raise ModelError(
                f"config: transformers can't read {path.name}: {type(error).__name__}: {error}. Expected a config.json "
                "with a model_type that it knows."
            ) from error
    if source in CONFIG_MAPPING:
        return CONFIG_MAPPING[source](), None
    raise ConfigError(
        f"config: got {source!r}, expected a checkpoint's folder, the path of a config.json, or a model type that "
        "transformers knows, such as 'llava'."
    )


def _architecture_of(config: Any, source: str) -> str:
    """The class that takes the media. Raises `ConfigError` if there is none."""
    from transformers.models.auto import modeling_auto

    named = list(getattr(config, "architectures", None) or ())
    for table in _TABLES:
        value = getattr(modeling_auto, f"MODEL_FOR_{table}_MAPPING_NAMES").get(config.model_type)
        named += [value] if isinstance(value, str) else list(value or ())
    found: str | None = next((name for name in named if name in media_architectures()), None)
    if found is None:
        raise ConfigError(
            f"config: got {source!r} of type {config.model_type!r}, which takes no media, expected a multimodal model. "
            "`sensorium models` says how a model of text runs, and docs/architecture.md where its parts come from."
        )
    return found


def _on_meta(architecture: str, config: Any) -> Any:
    import transformers

    try:
        with torch.device("meta"):
            return getattr(transformers, architecture)(config).eval()
    except Exception as error:  # whatever a constructor raises on what is written in the config
        raise ModelError(
            f"{architecture} of transformers: it can't be made from this config: {type(error).__name__}: {error}. "
            "Correct the config, or give the folder of a checkpoint."
        ) from error


def _decoder_path(model: Any, architecture: str) -> str:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    path = next((name for name, module in model.named_modules() if module is decoder), "")
    if not path or getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(
            f"{architecture}: got no decoder that rows of media are put in front of, expected one. A decoder that "
            "looks at an encoder's rows is a class with SupportsCrossAttention: whisper.py is one."
        )
    return path


def _children(parent: nn.Module) -> Iterator[tuple[str, nn.Module | nn.Parameter]]:
    """Modules with parameters, and bare parameters."""
    for name, module in parent.named_children():
        if any(True for _ in module.parameters()):
            yield name, module
    yield from parent.named_parameters(recurse=False)


def _decoder_of(decoder: nn.Module, path: str, config: Any) -> Decoder:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    text = config.get_text_config()
    by_type = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text.model_type)
    if by_type in IN_TREE:
        return Decoder(type(decoder).__name__, path, by_type, is_by_type=True)
    same = next((name for name in _TEXT if _has_same_names(decoder, name)), None)
    return Decoder(type(decoder).__name__, path, same, is_by_type=False)


_TEXT = tuple(name for name, target in IN_TREE.items() if name.endswith("ForCausalLM") and "gpt_oss" not in target)


def _has_same_names(decoder: nn.Module, architecture: str) -> bool:
    """Whether a class of text has the same parameters in a layer as this decoder."""
    import transformers

    hf_class = getattr(transformers, architecture)
    small = hf_class.config_class(num_hidden_layers=1, vocab_size=8)
    with torch.device("meta"):
        other = hf_class(small).get_decoder()
    return _first_layer(other) == _first_layer(decoder)


def _first_layer(decoder: nn.Module) -> frozenset[str]:
    return frozenset(
        name for name, _ in decoder.named_parameters() if ".1." not in name and _layer_of(name) in ("", "0")
    )


def _layer_of(name: str) -> str:
    return next((part for part in name.split(".") if part.isdigit()), "")


def _layered(config: Any) -> Iterator[str]:
    values: Mapping[str, Any] = vars(config)
    for name, value in values.items():
        if name.endswith("_config") and hasattr(value, "to_dict") and hasattr(value, "num_hidden_layers"):
            yield name

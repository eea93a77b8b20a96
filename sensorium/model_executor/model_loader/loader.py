"""From an engine configuration to a loaded model: build, read, check both ways, lay out for the kernels."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from sensorium.checkpoint import other_weight_files, weight_files
from sensorium.config import EngineConfig
from sensorium.distributed import TensorParallel, constructing_for
from sensorium.errors import ConfigError, ModelError, SensoriumError, WeightsError
from sensorium.logger import get_logger
from sensorium.model_executor.failures import told_to_author
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.model_loader.initialize import build_empty, build_on_meta, fill_with_random
from sensorium.model_executor.model_loader.kv_scales import KVScales
from sensorium.model_executor.model_loader.output_head import HEAD, ties_head, with_actual_head
from sensorium.model_executor.model_loader.weight_utils import safetensors_weights
from sensorium.model_executor.weight_tracking import LoadTracker
from sensorium.plugins import style_of

logger = get_logger(__name__)

DERIVED_WEIGHTS = (
    "*rotary_emb.inv_freq",
    "*rotary_pos_emb.inv_freq",
    "*.position_ids",
    "*.masked_bias",
    "*.num_batches_tracked",
)
"""Keys that older checkpoints hold and that every model computes by itself."""
MAX_NAMES_IN_MESSAGE = 10


@runtime_checkable
class LoadsItself(Protocol):
    """A model class whose weights aren't read by name from here."""

    @classmethod
    def load_from_checkpoint(cls, config: EngineConfig) -> nn.Module:
        """The model with its weights. Raises what `load_model` raises."""
        ...


@runtime_checkable
class ProcessesWeights(Protocol):
    """A layer that lays its weights out once they are loaded."""

    def process_weights_after_loading(self) -> None:
        """Called once, after every parameter has its value."""


def load_model(config: EngineConfig, model_class: type | None = None) -> nn.Module:
    """Build the model that `config` describes and fill it from its checkpoint.

    Args:
        config: The resolved configuration; `model_config.model_class` is built unless `model_class` is given.
        model_class: Another class to build.

    Returns:
        The model in evaluation mode, on its device, in its dtype, without gradients.

    Raises:
        ModelError: The class can't be constructed or has no `load_weights`; the index of the files is malformed.
        WeightsError: The files are missing or damaged; a key was neither used nor ignored; a parameter was
            left empty.
    """
    model_config = config.model_config
    model_class = model_class or model_config.model_class
    if model_class is None:
        raise ModelError("model class: got none, expected a registered class. Set architectures in config.json.")
    start = time.perf_counter()
    if isinstance(model_class, LoadsItself):
        model = model_class.load_from_checkpoint(config)
    elif config.load_config.load_format == "dummy":
        model = _build(model_class, config)
        fill_with_random(model, model_config.seed)
    else:
        files = weight_files(Path(model_config.model))
        actual = with_actual_head(config, model_class, safetensors_weights(files))
        model = _build(model_class, actual)
        _fill_from_files(model, actual, files)
    finish_loading(model)
    logger.info("Loaded %s in %.2f s", model_class.__name__, time.perf_counter() - start)
    return model


def build_without_memory(config: EngineConfig) -> nn.Module:
    """The model that `load_model` builds from a checkpoint, as a float one would have it, without memory for its
    parameters. Raises what `load_model` raises.
    """
    model_class = config.model_config.model_class
    assert model_class is not None, "the model itself has been loaded"
    config = replace(config, quant_config=None)
    if config.load_config.load_format != "dummy":
        files = weight_files(Path(config.model_config.model))
        config = with_actual_head(config, model_class, safetensors_weights(files))
    return _constructed(model_class, config, build_on_meta)


def _build(model_class: type, config: EngineConfig) -> nn.Module:
    """The model without values."""
    model = _constructed(model_class, config, build_empty)
    for module in model.modules():
        if isinstance(module, WeightedLayer):
            module.share_given_weight()
    _check_divided(model, config.parallel_config.group)
    return model


def _constructed(model_class: type, config: EngineConfig, build: Callable[..., nn.Module]) -> nn.Module:
    """What `build` makes of the class. What its constructor raises is an error of loading that names the class."""
    device, group = torch.device(config.device_config.device), config.parallel_config.group
    try:
        with constructing_for(group, config.parallel_config.division):
            return build(lambda: _construct(model_class, config), dtype=config.model_config.dtype, device=device)
    except (SensoriumError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise ModelError(
            f"{model_class.__name__}: its constructor failed: {told_to_author(error)}. Expected a module for what "
            f"config.json describes. Correct the constructor, or give config.json what it reads."
        ) from error


def _check_divided(model: nn.Module, group: TensorParallel) -> None:
    """Raise `ConfigError` if several ranks would all compute the whole model."""
    layers = [module for module in model.modules() if isinstance(module, WeightedLayer)]
    if group.size > 1 and all(layer.tensor_parallel.size == 1 for layer in layers):
        raise ConfigError(
            f"tensor_parallel_size: got {group.size} for {type(model).__name__}, which has no layers that ranks can "
            "share, expected 1. Leave tensor_parallel_size out."
        )


def _construct(model_class: type, config: EngineConfig) -> nn.Module:
    from sensorium.model_executor.adapter import construct_model

    return construct_model(model_class, config)


def _fill_from_files(model: nn.Module, config: EngineConfig, files: Sequence[Path]) -> None:
    """`fill_model` from a checkpoint's files. Raises what it raises, with the likely cause and the way out."""
    # Of a tied head, a class may read the checkpoint's copy or pass it over.
    is_tied = ties_head(config)
    optional = (f"*{HEAD}",) if is_tied else ()
    if style_of(config.model_config.model_class or type(model)) is not None:
        optional = ("*",)  # V0 asked of no class that it says which keys it leaves out
    try:
        weights = _named_weights(config, files)
        if config.quant_config is not None and config.quant_config.reads_checkpoints:
            scales = KVScales()
            fill_model(model, scales.taken_from(weights), may_be_unused=optional)
            scales.give_to(model)
        else:
            fill_model(model, weights, may_be_unused=optional)
    except UnfilledError as error:
        raise WeightsError(f"{error} {_way_out(error.names, model, config, files)}") from None


def _named_weights(config: EngineConfig, files: Sequence[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """A checkpoint's tensors, named as the layers of its quantization name their parameters."""
    rename = (lambda name: name) if config.quant_config is None else config.quant_config.checkpoint_name
    return ((rename(name), tensor) for name, tensor in safetensors_weights(files))


def _way_out(names: Sequence[str], model: nn.Module, config: EngineConfig, files: Sequence[Path]) -> str:
    """What most likely left parameters without a value, and what to do about it."""
    heads = [name for name in names if _is_head(name, model, config)]
    if heads and all(name.startswith(heads[0].removesuffix("weight")) for name in names):
        if ties_head(config):
            return (
                f"The checkpoint's config ties its output head to the embeddings (tie_word_embeddings), so it has no "
                f"tensor for {heads[0]}: let {type(model).__name__} use the embeddings' weight there, with "
                "ParallelLMHead.tie_weights or `self.lm_head.weight = self.embed_tokens.weight`."
            )
        return (
            f"The checkpoint has no tensor for the output head {heads[0]}, and its config doesn't tie it to the "
            "embeddings. If the model ties it, set tie_word_embeddings to true in config.json or hf_overrides."
        )
    if others := other_weight_files(Path(config.model_config.model), files):
        read = ", ".join(file.name for file in files[:MAX_NAMES_IN_MESSAGE])
        return f"Only {read} was read, not {_listing(others)}: correct the index, or download the checkpoint again."
    return "Check that config.json belongs to these weights, and that load_weights takes all their names."


def _is_head(name: str, model: nn.Module, config: EngineConfig) -> bool:
    """Whether a parameter is an output head: by its name, or a table of the embeddings' shape that isn't theirs."""
    if name.endswith(HEAD):
        return True
    text = config.model_config.hf_text_config
    shape = (getattr(text, "vocab_size", None), getattr(text, "hidden_size", None))
    return tuple(model.get_parameter(name).shape) == shape and "embed" not in name


class UnfilledError(WeightsError):
    """Parameters were left without a value. `names` are theirs."""

    def __init__(self, message: str, names: Sequence[str]) -> None:
        super().__init__(message)
        self.names = tuple(names)


def fill_model(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], *, may_be_unused: Sequence[str] = ()
) -> None:
    """Run the model's `load_weights` over checkpoint tensors and check both ways.

    A model lists keys that it doesn't want in a class attribute `ignored_weights`, as shell patterns.

    Args:
        model: Whose parameters have their memory.
        weights: Names and tensors of the checkpoint.
        may_be_unused: Patterns of keys that the model gets and need not read.

    Raises:
        WeightsError: See `load_model`.
        ModelError: The model has no `load_weights`.
    """
    load_weights: Callable[[Iterator[tuple[str, torch.Tensor]]], Any] | None = getattr(model, "load_weights", None)
    if load_weights is None:
        raise ModelError(
            f"{type(model).__name__}: got no load_weights method, expected load_weights(self, weights). "
            "Add one that fills the parameters from (name, tensor) pairs."
        )
    ignored = (*DERIVED_WEIGHTS, *getattr(model, "ignored_weights", ()))
    tracker = LoadTracker(dict(model.named_parameters()))
    wanted = ((name, tensor) for name, tensor in weights if not _matches(name, ignored))
    try:
        with torch.no_grad(), tracker:
            reported = load_weights(tracker.watch(wanted))
    except (WeightsError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a class's own method raises
        raise WeightsError(
            f"loading checkpoint key {tracker.current_key!r} into {type(model).__name__}: got {error!r}, expected it "
            "to fit. Check that config.json belongs to these weights and that load_weights knows their names."
        ) from error
    if unused := [name for name in tracker.unused_keys() if not _matches(name, may_be_unused)]:
        raise WeightsError(
            f"checkpoint keys that {type(model).__name__} didn't use: got {_listing(unused)}, expected none. "
            "Load them in load_weights, or list them (patterns allowed) in the class attribute "
            "ignored_weights."
        )
    tracker.refuse_other_dtypes(model)
    names = reported if isinstance(reported, set | frozenset) else ()
    if unfilled := tracker.unfilled_parameters(model, names):
        raise UnfilledError(
            f"parameters of {type(model).__name__} without a (complete) value in the checkpoint: got "
            f"{_listing(unfilled)}, expected none.",
            unfilled,
        )


def finish_loading(model: nn.Module) -> None:
    """Let each layer lay its weights out, as its method does; evaluation mode, no gradients."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, ProcessesWeights):
                module.process_weights_after_loading()
    model.eval().requires_grad_(False)


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:MAX_NAMES_IN_MESSAGE])
    return shown if len(names) <= MAX_NAMES_IN_MESSAGE else f"{shown} and {len(names) - MAX_NAMES_IN_MESSAGE} more"

"""Chooses how a model runs that has no class here: the first way in which transformers' modules compute, in chunks
beside each other, what they compute alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ModelError, SensoriumError
from sensorium.logger import get_logger
from sensorium.model_executor.drivers import ModelDriver, TextDriver
from sensorium.model_executor.drivers.captured import CapturedDriver
from sensorium.model_executor.failures import told_to_author
from sensorium.model_executor.models.transformers.by_request import ByRequestWay
from sensorium.model_executor.models.transformers.media_model import TransformersForConditionalGeneration
from sensorium.model_executor.models.transformers.model import Tier, TransformersForCausalLM
from sensorium.model_executor.models.transformers.norms import KernelNorms
from sensorium.model_executor.models.transformers.packing import SetAside
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.multimodal.hf_items import hf_items
from sensorium.worker.dummy_steps import DummySteps
from sensorium.worker.kv_cache import CacheLayout
from sensorium.worker.reference_check import (
    TOLERANCE,
    check_prompts,
    largest_error,
    largest_media_error,
    media_references,
    reference_logits,
)

logger = get_logger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class _References:
    """What the untouched modules compute, of text and of media; empty where nothing is checked."""

    text: list[torch.Tensor] = field(default_factory=list)
    media: list[torch.Tensor] = field(default_factory=list)


def choose_tier(
    model: TransformersForCausalLM, config: EngineConfig, device: torch.device
) -> tuple[ModelDriver, ModelFeatures]:
    """Let a model run by its best tier that is right; returns what drives it, and what the load report says of it.

    Raises `ModelError` (a `TypeError`) if none is, with the reason for each.
    """
    is_checked = config.model_config.load_check != "off"
    references = _references(model, config) if is_checked else _References()
    _check_width(references.text, config)
    reasons: dict[str, str] = {}
    for tier in model.tiers():
        try:
            model.use(tier)
            error = _error(model, config, device, references) if is_checked else 0.0
        except CannotRunError as reason:
            reasons[tier.name] = str(reason)
            continue
        except Exception as raised:  # whatever modules raise when they are called like this
            logger.debug("tier %s fails", tier.name, exc_info=raised)
            reasons[tier.name] = f"it fails: {told_to_author(raised)}"
            continue
        if error <= TOLERANCE[config.model_config.dtype]:
            if is_checked:
                use_kernels(
                    model,
                    partial(_references, model, config),
                    partial(_error, model, config, device, references),
                    config,
                )
            notes = (*_notes(model, error, is_checked), *_not(reasons, tier))
            features = ModelFeatures(tier=tier.name, notes=notes)
            return _driver(model, config, device), _with_media(model, features)
        reasons[tier.name] = f"logits differ by {error:.1e} of their spread from those of the untouched modules"
    raise ModelError(
        f"{config.model_config.architecture} by the modules of transformers: got none that runs as in transformers "
        f"({listed_reasons(reasons)}). Register a class for it."
    )


def listed_reasons(reasons: Mapping[str, str]) -> str:
    """Why each of several ways was not taken."""
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items())


def _references(model: TransformersForCausalLM, config: EngineConfig) -> _References:
    """Raises `ModelError` (a `TypeError`) where the untouched modules can't be run."""
    what = "text alone"
    try:
        text = reference_logits(model)
        what = "media"
        if not isinstance(model, TransformersForConditionalGeneration):
            return _References(text)
        return _References(text, media_references(model))
    except SensoriumError:
        raise
    except Exception as raised:  # whatever modules and processors raise
        raise ModelError(
            f"{config.model_config.architecture} of transformers: got a failure of its untouched modules on {what} "
            f"({told_to_author(raised)}), expected logits. Check that the files of the checkpoint belong together; "
            "models that take no text without media are not served by the modules of transformers yet."
        ) from raised


def _check_width(references: list[torch.Tensor], config: EngineConfig) -> None:
    """Refuse logits of another width than the vocabulary's, which every request would fail on."""
    width, vocab_size = (references[0].shape[-1] if references else None), config.model_config.vocab_size
    if width not in (None, vocab_size):
        raise ModelError(
            f"{config.model_config.architecture} of transformers: got logits of width {width}, expected {vocab_size}, "
            "the vocab_size of its config. Correct config.json, or set vocab_size in hf_overrides (--hf-overrides)."
        )


def _driver(model: TransformersForCausalLM, config: EngineConfig, device: torch.device) -> ModelDriver:
    if not isinstance(model, TransformersForConditionalGeneration):
        return TextDriver(model)
    vocab_size = config.model_config.vocab_size
    return CapturedDriver(model, vocab_size=vocab_size, device=device, embeds_media=model.brings_rows_only)


def _with_media(model: TransformersForCausalLM, features: ModelFeatures) -> ModelFeatures:
    """What was found out about spans and media beside."""
    if not isinstance(model, TransformersForConditionalGeneration):
        return replace(features, two_way=model.two_way)
    refused = hf_items(model.model_config).refusals
    refusals = tuple(f"no {modality} items: {reason}" for modality, reason in refused.items())
    return replace(
        features,
        placeholder_token_ids=model.placeholder_token_ids(),
        shares_items=not model.takes_prompts,
        two_way=model.two_way,
        notes=(*features.notes, *refusals),
    )


def _error(
    model: TransformersForCausalLM, config: EngineConfig, device: torch.device, references: _References
) -> float:
    steps = DummySteps(config, CacheLayout.of(model, config), device)
    driver = _driver(model, config, device)
    try:
        error = largest_error(model, driver, steps, references.text)
        if isinstance(model.way, ByRequestWay):
            model.way.states.measure([len(prompt) for prompt in check_prompts(model)])
        if isinstance(model, TransformersForConditionalGeneration) and error <= TOLERANCE[steps.dtype]:
            error = max(error, largest_media_error(model, driver, steps, references.media))
        return error
    finally:
        if isinstance(model.way, ByRequestWay):
            model.way.states.clear()


def request_cache_bytes(model: nn.Module, config: EngineConfig) -> dict[str, int]:
    """For the memory report: what caches of Hugging Face take at most, which no plan bounds; none for other models."""
    if not isinstance(model, TransformersForCausalLM) or not isinstance(model.way, ByRequestWay):
        return {}
    each = model.way.states.bytes_of(config.model_config.max_model_len)
    return {"caches of requests (at most, unplanned)": each * config.scheduler_config.max_num_seqs}


def use_kernels(model: nn.Module, run: Callable[[], object], check: Callable[[], float], config: EngineConfig) -> None:
    """Let norms and linear layers run by this engine's kernels, where the model computes the same without the linear
    layers' weights in their places. These hold their weights as the configuration says.

    `run`: passes of the untouched modules. `check`: the error of the model as it runs. Raises `ModelError` (a
    `TypeError`) where weights can't be quantized as asked for.
    """
    norms, weights = KernelNorms(model), SetAside(model, run)
    reason = "it computes something else without the weights in their places"
    try:
        is_equal = check() <= TOLERANCE[config.model_config.dtype]
    except Exception as raised:  # noqa: BLE001  whatever modules raise on a weight that isn't there
        reason, is_equal = told_to_author(raised), False
    if is_equal:
        weights.hand_over(config.quant_config)
        return
    weights.restore()
    norms.restore()
    if config.quant_config is not None:
        raise ModelError(
            f"quantization: got {config.quant_config.name!r} for {config.model_config.architecture}, whose modules "
            f"read weights of linear layers themselves ({reason}), expected None. Leave quantization out."
        )
    logger.info("Linear layers run by torch: a module reads their weights itself (%s)", reason)


def _notes(model: TransformersForCausalLM, error: float, is_checked: bool) -> tuple[str, ...]:
    if not is_checked:
        return (model.described, "load_check is off")
    return (f"{model.described}; checked at load: logits differ from theirs by {error:.0e} of their spread",)


def _not(reasons: dict[str, str], tier: Tier) -> tuple[str, ...]:
    return tuple(f"not {name}: {reason}" for name, reason in reasons.items() if name != tier.name)

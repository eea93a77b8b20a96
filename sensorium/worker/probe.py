"""Finds out at load which tier a model is on, and which features are provably right for it.

A class is looked at first: does it override the methods of tier 1, has it declared its placeholder tokens? What it does
not declare is observed on dummy data. Tier 0 is split only if running it split equals running it whole; otherwise it is
served atomically, and the report says why.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ModelError
from sensorium.logger import get_logger
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers import (
    AtomicDriver,
    AutoSplitDriver,
    EmbeddingsDriver,
    ModelDriver,
    TextDriver,
)
from sensorium.model_executor.drivers.carrier import Carrier, find_candidates
from sensorium.model_executor.models.interfaces import EMBED_INPUT_METHODS, EMBED_MULTIMODAL_METHODS, find_override
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.worker.dummy_media import DummyMedia, NoDummyMediaError, make_dummy_media
from sensorium.worker.kv_cache import LayerShape
from sensorium.worker.split_check import observe_embeddings, observe_split

logger = get_logger(__name__)


def probe_model(
    model: nn.Module, config: EngineConfig, shapes: Sequence[LayerShape], device: torch.device
) -> tuple[ModelDriver, ModelFeatures]:
    """The driver for a loaded model, and the features that are on for it.

    Raises:
        ModelError: The mapper returns arguments that `forward` doesn't take, or dummy data breaks its rules.
    """
    if not config.model_config.is_multimodal_model:
        return TextDriver(model), ModelFeatures(tier="text")
    max_rows = MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config.model_config)
    features = ModelFeatures(
        atomic_items=bool(getattr(type(model), "mm_atomic_items", False)),
        placeholder_token_ids=MULTIMODAL_REGISTRY.get_placeholder_tokens(config.model_config),
        max_item_rows={modality: rows for modality, rows in max_rows.items() if rows},
    )
    encode = find_override(type(model), EMBED_MULTIMODAL_METHODS)
    embed = find_override(type(model), EMBED_INPUT_METHODS)
    adapter = ForwardAdapter(model)
    if encode and embed and adapter.accepts("inputs_embeds"):
        return _probe_tier_one(model, config, features, encode, embed, device)
    if encode and embed and not adapter.media_parameters and not adapter.takes_any_media:
        raise ModelError(
            f"forward of {type(model).__name__}: got no parameter 'inputs_embeds', expected one beside {encode} and "
            f"{embed}. Add `inputs_embeds: torch.Tensor | None = None`, and pass it on to the decoder."
        )
    return _probe_tier_zero(model, config, features, shapes, device)


def _probe_tier_one(
    model: nn.Module,
    config: EngineConfig,
    features: ModelFeatures,
    encode: str,
    embed: str,
    device: torch.device,
) -> tuple[ModelDriver, ModelFeatures]:
    driver = EmbeddingsDriver(
        model,
        encode_method=encode,
        embed_method=embed,
        vocab_size=config.model_config.vocab_size,
        dtype=config.model_config.dtype,
        device=device,
    )
    if features.placeholder_token_ids.keys() >= features.max_item_rows.keys():
        return driver, replace(features, tier="2")
    dummy = _dummy_or_reason(config)
    if isinstance(dummy, str):
        return driver, replace(features, tier="1", notes=(f"placeholder tokens unknown at load: {dummy}",))
    observed = observe_embeddings(driver, dummy, config, device)
    driver.merges_itself = observed.merges_itself
    return driver, replace(
        features,
        tier="1",
        placeholder_token_ids={**observed.placeholder_token_ids, **features.placeholder_token_ids},
        maps_items_alone=dummy.maps_items_alone,
        # A merge by the model itself looks for placeholders in the chunk, so items go in whole.
        atomic_items=features.atomic_items or observed.merges_itself,
        notes=_mapping_note(dummy) + observed.notes,
    )


def _probe_tier_zero(
    model: nn.Module,
    config: EngineConfig,
    features: ModelFeatures,
    shapes: Sequence[LayerShape],
    device: torch.device,
) -> tuple[ModelDriver, ModelFeatures]:
    dummy = _dummy_or_reason(config)
    if isinstance(dummy, str):
        return _atomic(model, features, dummy)
    ForwardAdapter(model).check_media_parameters(dummy.kwarg_names, type(model))
    features = replace(features, maps_items_alone=dummy.maps_items_alone, notes=_mapping_note(dummy))
    if config.model_config.mm_split == "off":
        return _atomic(model, features, "mm_split is off")
    reasons = []
    for module, name, kind in find_candidates(model):
        carrier = Carrier(module, name, kind)
        driver = _auto_split_driver(model, carrier, config, shapes, device)
        try:
            observed = observe_split(driver, model, dummy, config, shapes, device)
        except Exception as error:
            reasons.append(f"at {name}: {type(error).__name__}: {error}")
            carrier.remove()
            continue
        if observed.refusal is not None:
            reasons.append(f"at {name}: {observed.refusal}")
            carrier.remove()
            continue
        driver.shares_items = observed.shares_items
        return driver, replace(
            features,
            tier="0 auto-split",
            placeholder_token_ids={**observed.placeholder_token_ids, **features.placeholder_token_ids},
            shares_items=observed.shares_items,
            notes=(*features.notes, f"media rows are read and written at {name} ({kind})", *observed.notes),
        )
    return _atomic(model, features, "; ".join(reasons) or "no module stands in front of all attention layers")


def _auto_split_driver(
    model: nn.Module, carrier: Carrier, config: EngineConfig, shapes: Sequence[LayerShape], device: torch.device
) -> AutoSplitDriver:
    return AutoSplitDriver(
        model,
        carrier,
        num_kv_caches=len(shapes),
        vocab_size=config.model_config.vocab_size,
        dtype=config.model_config.dtype,
        device=device,
        uses_mrope=config.model_config.uses_mrope,
    )


def _atomic(model: nn.Module, features: ModelFeatures, reason: str) -> tuple[ModelDriver, ModelFeatures]:
    logger.warning("media are not split from text, so chunks hold whole items: %s", reason)
    note = f"media are not split from text: {reason}"
    return AtomicDriver(model), replace(
        features,
        tier="0 atomic",
        splits_media=False,
        atomic_items=True,
        shares_items=False,
        notes=(*features.notes, note),
    )


def _dummy_or_reason(config: EngineConfig) -> DummyMedia | str:
    try:
        return make_dummy_media(config)
    except NoDummyMediaError as reason:
        return str(reason)


def _mapping_note(dummy: DummyMedia) -> tuple[str, ...]:
    if dummy.maps_items_alone:
        return ()
    return ("mapping items one by one differs from mapping them together: a request's items form one group",)

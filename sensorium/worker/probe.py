"""Finds out at load which tier a model is on, and which features are provably right for it.

A class is looked at first: does it override the methods of tier 1, has it declared its placeholder tokens? Then it is
tried out, on text and on its own dummy media (`trial`), and what it does not declare is observed there. Tier 0 is split
only if running it split equals running it whole; otherwise it is served atomically, and the report says why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sensorium.attention import LayerCache
from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ConfigError, ModelError
from sensorium.logger import get_logger
from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.drivers import (
    AtomicDriver,
    AutoSplitDriver,
    CrossDriver,
    EmbeddingsDriver,
    ModelDriver,
    TextDriver,
)
from sensorium.model_executor.drivers.carrier import Carrier, find_candidates
from sensorium.model_executor.models.interfaces import (
    EMBED_INPUT_METHODS,
    EMBED_MULTIMODAL_METHODS,
    find_override,
    supports_cross_attention,
    two_way_spans_of,
)
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.mrope import token_id_of
from sensorium.worker.dummy_media import DummyMedia, NoDummyMediaError, make_dummy_media, unexpanded_note
from sensorium.worker.dummy_steps import DummySteps
from sensorium.worker.kv_cache import CacheLayout
from sensorium.worker.split_check import dummy_kwargs, joined, observe_embeddings, observe_split, placeholder_maps
from sensorium.worker.trial import Trial, described, is_own_class

logger = get_logger(__name__)


def probe_model(
    model: nn.Module, config: EngineConfig, layout: CacheLayout, device: torch.device
) -> tuple[ModelDriver, ModelFeatures]:
    """The driver for a loaded model, and the features that are on for it.

    Raises:
        ModelError: The class fails on text or on its own dummy data, or they break their rules.
    """
    driver, features = _probe(model, config, layout, device)
    return driver, replace(features, two_way=two_way_spans_of(model, config.model_config))


def _probe(
    model: nn.Module, config: EngineConfig, layout: CacheLayout, device: torch.device
) -> tuple[ModelDriver, ModelFeatures]:
    steps = DummySteps(config, layout, device)
    trial = Trial(model, config, steps)
    if not config.model_config.is_multimodal_model:
        driver = TextDriver(model)
        return driver, ModelFeatures(tier="text", notes=trial.run_text(driver, ()))
    max_rows = MULTIMODAL_REGISTRY.get_max_tokens_per_item_by_modality(config.model_config)
    features = ModelFeatures(
        atomic_items=bool(getattr(type(model), "mm_atomic_items", False)),
        placeholder_token_ids=MULTIMODAL_REGISTRY.get_placeholder_tokens(config.model_config),
        max_item_rows={modality: rows for modality, rows in max_rows.items() if rows},
    )
    if supports_cross_attention(model):
        return _probe_tier_x(model, config, features, trial, steps)
    encode = find_override(type(model), EMBED_MULTIMODAL_METHODS)
    embed = find_override(type(model), EMBED_INPUT_METHODS)
    adapter = ForwardAdapter(model)
    if encode and embed and adapter.accepts("inputs_embeds"):
        return _probe_tier_one(model, config, features, (encode, embed), trial, steps)
    if encode and embed and not adapter.media_parameters and not adapter.takes_any_media:
        raise ModelError(
            f"forward of {type(model).__name__}: got no parameter 'inputs_embeds', expected one beside {encode} and "
            f"{embed}. Add `inputs_embeds: torch.Tensor | None = None`, and pass it on to the decoder."
        )
    return _probe_tier_zero(model, config, features, layout, trial, steps)


def _probe_tier_one(
    model: nn.Module,
    config: EngineConfig,
    features: ModelFeatures,
    methods: tuple[str, str],
    trial: Trial,
    steps: DummySteps,
) -> tuple[ModelDriver, ModelFeatures]:
    encode, embed = methods
    driver = EmbeddingsDriver(
        model,
        encode_method=encode,
        embed_method=embed,
        vocab_size=config.model_config.vocab_size,
        dtype=steps.dtype,
        device=steps.device,
    )
    declared = features.placeholder_token_ids
    tier = "2" if declared.keys() >= features.max_item_rows.keys() else "1"
    dummy = None if tier == "2" and is_own_class(model) else _dummy_or_reason(config)
    text_notes = trial.run_text(driver, _not_text(config, features, dummy))
    features = replace(features, tier=tier, notes=text_notes)
    if dummy is None or isinstance(dummy, str):
        unknown = (f"placeholder tokens unknown at load: {dummy}",) if dummy and tier == "1" else ()
        return driver, replace(features, notes=features.notes + unknown)
    observed = observe_embeddings(driver, methods, dummy, declared, trial, steps)
    driver.merges_itself = observed.merges_itself
    driver.batchable = driver.batchable and not observed.mixes_items
    ids = {**observed.placeholder_token_ids, **declared}
    features = _with_observed_rows(features, dummy, ids)
    return driver, replace(
        features,
        placeholder_token_ids=ids,
        maps_items_alone=dummy.maps_items_alone,
        # A merge by the model itself looks for placeholders in the chunk, so items go in whole.
        atomic_items=features.atomic_items or observed.merges_itself,
        notes=features.notes + _mapping_note(dummy) + observed.notes + unexpanded_note(config, dummy, ids),
    )


def _probe_tier_x(
    model: nn.Module, config: EngineConfig, features: ModelFeatures, trial: Trial, steps: DummySteps
) -> tuple[ModelDriver, ModelFeatures]:
    """A decoder that attends to an encoder's rows by cross-attention."""
    encode = find_override(type(model), EMBED_MULTIMODAL_METHODS)
    if encode is None or not ForwardAdapter(model).accepts("encoder_outputs"):
        raise ModelError(
            f"{type(model).__name__}: got SupportsCrossAttention without "
            f"{'get_multimodal_embeddings' if encode is None else 'a parameter encoder_outputs of forward'}, expected "
            "both. Encode media in the former, and turn the rows that forward gets into keys and values."
        )
    if hasattr(type(model), "get_num_seen_rows") and not config.scheduler_config.enable_chunked_prefill:
        raise ConfigError(
            f"enable_chunked_prefill: got false for {type(model).__name__}, expected true: tokens up to an item's "
            "place see other rows of it than those behind, so a prompt is cut there. Leave enable_chunked_prefill on."
        )
    driver = CrossDriver(model, encode_method=encode, dtype=steps.dtype, device=steps.device)
    dummy = None if is_own_class(model) else _dummy_or_reason(config)
    notes = trial.run_text(driver, _not_text(config, features, dummy))
    if isinstance(dummy, DummyMedia):
        trial.run_encoder_rows(driver, encode, dummy, _rows_of_dummies(model, config, dummy))
        features = replace(features, maps_items_alone=dummy.maps_items_alone)
    return driver, replace(features, tier="X", notes=notes)


def _rows_of_dummies(model: nn.Module, config: EngineConfig, dummy: DummyMedia) -> dict[str, int]:
    """What the class says that its encoder makes of a dummy item, by modality."""
    model_class: Any = type(model)
    return {
        modality: int(model_class.get_num_encoder_rows(config.model_config, modality, items[0]))
        for modality, items in dummy.items.items()
    }


def _probe_tier_zero(
    model: nn.Module,
    config: EngineConfig,
    features: ModelFeatures,
    layout: CacheLayout,
    trial: Trial,
    steps: DummySteps,
) -> tuple[ModelDriver, ModelFeatures]:
    dummy = _dummy_or_reason(config)
    adapter = ForwardAdapter(model)
    if not isinstance(dummy, str):
        adapter.check_media_parameters(dummy.kwarg_names, type(model))
    notes = trial.run_text(TextDriver(model), _not_text(config, features, dummy), adapter.media_parameters)
    features = replace(features, notes=notes)
    if isinstance(dummy, str):
        return _atomic(model, features, dummy)
    features = replace(features, maps_items_alone=dummy.maps_items_alone, notes=notes + _mapping_note(dummy))
    kwargs = dummy_kwargs(dummy, steps)
    whole = trial.run_whole(dummy, joined(kwargs), placeholder_maps(dummy))
    reasons = ["mm_split is off"] if config.model_config.mm_split == "off" else []
    for module, name, kind in [] if reasons else find_candidates(model):
        carrier = Carrier(module, name, kind)
        driver = _auto_split_driver(model, carrier, config, layout.empty(steps.device), steps)
        try:
            observed = observe_split(driver, dummy, whole, config, steps)
        except Exception as error:  # noqa: BLE001  what a model's code raises speaks against this place
            reasons.append(f"at {name}: {type(error).__name__}: {error}")
            carrier.remove()
            continue
        if observed.refusal is not None:
            reasons.append(f"at {name}: {observed.refusal}")
            carrier.remove()
            continue
        driver.shares_items = observed.shares_items
        ids = {**observed.placeholder_token_ids, **features.placeholder_token_ids}
        features = _with_observed_rows(features, dummy, ids)
        where = f"media rows are read and written at {name} ({kind})"
        return driver, replace(
            features,
            tier="0 auto-split",
            placeholder_token_ids=ids,
            shares_items=observed.shares_items,
            notes=(*features.notes, where, *observed.notes, *unexpanded_note(config, dummy, ids)),
        )
    _check_media_matter(trial, dummy, kwargs, whole)
    return _atomic(model, features, "; ".join(reasons) or "no module stands in front of all attention layers")


def _check_media_matter(
    trial: Trial, dummy: DummyMedia, kwargs: Mapping[str, Mapping[str, Any]], whole: torch.Tensor
) -> None:
    """Refuse a model that takes a modality's arguments and computes the same without them."""
    for modality in kwargs:
        others = joined({name: each for name, each in kwargs.items() if name != modality})
        if trial.ignores_media(dummy, others, whole, placeholder_maps(dummy)):
            raise ModelError(
                f"{trial.name}: forward returned the same hidden states with and without "
                f"{described(dummy, kwargs[modality], modality)}, expected other ones. Read these arguments by their "
                f"names in forward, and put the media's rows where placeholder tokens stand in the dummy prompt."
            )


def _with_observed_rows(
    features: ModelFeatures, dummy: DummyMedia, placeholder_ids: Mapping[str, frozenset[int]]
) -> ModelFeatures:
    """The features with items as large as those of the dummy data, where the class has registered a smaller maximum."""
    most, notes = dict(features.max_item_rows), list(features.notes)
    token_ids = dummy.token_ids.tolist()
    for modality, ids in placeholder_ids.items():
        count = dummy.counts.get(modality, 0)
        rows = -(-sum(map(token_ids.count, ids)) // count) if count else 0
        if 0 < most.get(modality, 0) < rows:
            notes.append(
                f"register_max_multimodal_tokens({modality!r}, ...) says {most[modality]} rows, but an item of the "
                f"dummy data has {rows}, which counts"
            )
            most[modality] = rows
    return replace(features, max_item_rows=most, notes=tuple(notes))


def _not_text(config: EngineConfig, features: ModelFeatures, dummy: DummyMedia | str | None) -> set[int]:
    """Token ids that may stand for media: those of the dummy prompt, the declared, and those that the config names."""
    found = {each for ids in features.placeholder_token_ids.values() for each in ids}
    named = (token_id_of(config.model_config.hf_config, modality) for modality in MULTIMODAL_REGISTRY.modalities)
    found |= {each for each in named if each is not None}
    return found | (set(dummy.token_ids.tolist()) if isinstance(dummy, DummyMedia) else set())


def _auto_split_driver(
    model: nn.Module, carrier: Carrier, config: EngineConfig, empty_caches: list[LayerCache], steps: DummySteps
) -> AutoSplitDriver:
    return AutoSplitDriver(
        model,
        carrier,
        empty_caches=empty_caches,
        vocab_size=config.model_config.vocab_size,
        dtype=steps.dtype,
        device=steps.device,
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

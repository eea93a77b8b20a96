"""Chooses how transformers' modules run that make vectors or scores: the first way in which they compute, for prompts
beside each other, what they compute untouched, for each prompt alone."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from sensorium.config import EngineConfig, ModelFeatures
from sensorium.errors import ModelError
from sensorium.logger import get_logger
from sensorium.model_executor.failures import told_to_author
from sensorium.model_executor.models.transformers.pooling import FlatPooling, TransformersForPooling
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.worker.dummy_steps import DummySteps, IdArray
from sensorium.worker.kv_cache import CacheLayout
from sensorium.worker.reference_check import TOLERANCE, split_prompts
from sensorium.worker.transformers_tiers import listed_reasons, use_kernels

logger = get_logger(__name__)

_LENGTHS = (23, 12, 8)


def choose_pooling_tier(model: TransformersForPooling, config: EngineConfig, device: torch.device) -> ModelFeatures:
    """Let a model run by its best tier that is right; returns what the load report says of it.

    Raises `ModelError` (a `TypeError`) if none is, with the reason for each.
    """
    is_checked = config.model_config.load_check != "off"
    check = _Check(model, config, device) if is_checked else None
    reasons: dict[str, str] = {}
    for tier in model.tiers():
        try:
            model.use(tier)
            error = check.error() if check is not None else 0.0
        except CannotRunError as reason:
            reasons.setdefault(tier.name, str(reason))
            continue
        except Exception as raised:  # whatever modules raise when they are called like this
            logger.debug("tier %s fails", tier.name, exc_info=raised)
            reasons.setdefault(tier.name, f"it fails: {told_to_author(raised)}")
            continue
        dtype = config.model_config.dtype
        if error <= TOLERANCE[dtype]:
            note = f"{model.described}; load_check is off"
            if check is not None:
                check.look_behind_stack()
                use_kernels(model, check.run_reference, check.error, config)
                note = f"{model.described}; checked at load: outputs differ from theirs by {error:.0e} of the largest"
            notes = (note, *(f"not {name}: {why}" for name, why in reasons.items() if name != tier.name))
            return ModelFeatures(
                tier=tier.name, notes=notes, whole_prompts=True, max_prompt_tokens=model.max_prompt_tokens
            )
        reasons[tier.name] = f"outputs differ by {error:.1e} of the largest from those of the untouched modules"
    raise ModelError(
        f"{config.model_config.architecture} by the modules of transformers: got none that runs as in transformers "
        f"({listed_reasons(reasons)}). Serve another checkpoint."
    )


class _Check:
    """Compares a model with its untouched self, on a few prompts."""

    def __init__(self, model: TransformersForPooling, config: EngineConfig, device: torch.device) -> None:
        self._model = model
        self._steps = DummySteps(config, CacheLayout.of(model, config), device)
        longest = config.model_config.max_model_len
        self._prompts = split_prompts(model.text_token_ids, [min(length, longest) for length in _LENGTHS])
        if model.end_token_id is not None:
            for ids in self._prompts:
                ids[-1] = model.end_token_id
        self._types = [[i % 2 for i in range(len(ids))] if model.takes_type_ids else None for ids in self._prompts]
        self.run_reference = partial(model.reference, self._prompts[-1].tolist(), self._types[-1])
        try:
            self._references = [
                model.reference(ids.tolist(), types) for ids, types in zip(self._prompts, self._types, strict=True)
            ]
        except Exception as raised:  # whatever modules raise
            raise ModelError(
                f"{config.model_config.architecture} of transformers: got a failure of its untouched modules on a few "
                f"tokens ({told_to_author(raised)}), expected outputs. Check that config.json belongs to the weights, "
                "or set load_check (--load-check) to 'off'."
            ) from raised

    def error(self) -> float:
        """The largest difference of an output, over the largest output. Infinite where something is no number."""
        rows = self._rows()
        outputs = self._model.outputs(rows, [ids.tolist() for ids in self._prompts])
        return _difference(outputs, self._references)

    def look_behind_stack(self) -> None:
        """Let last states be taken as they leave the stack, if nothing is done to them behind it."""
        way = self._model.way
        if not isinstance(way, FlatPooling):
            return
        rows = self._rows()
        outputs = self._model.outputs(rows, [ids.tolist() for ids in self._prompts])
        way.has_states_behind = all(map(torch.equal, rows, outputs))

    def _rows(self) -> Sequence[torch.Tensor]:
        lens = [len(ids) for ids in self._prompts]
        pieces: list[tuple[IdArray, int, int]] = [(ids, 0, len(ids)) for ids in self._prompts]
        step = self._steps.step(pieces, self._steps.caches(max(lens), num_sequences=len(lens)))
        types = [types for types in self._types if types is not None]
        joined = torch.tensor([each for own in types for each in own], device=self._steps.device) if types else None
        hidden = self._model(step.input_ids, step.positions, step.kv_caches, step.attn_metadata, joined)
        return torch.split(hidden, lens)


def _difference(got: Sequence[torch.Tensor], expected: Sequence[torch.Tensor]) -> float:
    if any(one.shape != other.shape for one, other in zip(got, expected, strict=True)):
        return float("inf")
    largest = max(float(each.float().abs().max()) for each in expected)
    differences = [float((one.float() - other.float()).abs().max()) for one, other in zip(got, expected, strict=True)]
    error = max(differences) / max(largest, 1e-12)
    return error if error == error else float("inf")

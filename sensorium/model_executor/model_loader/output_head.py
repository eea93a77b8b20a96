"""Which output head a checkpoint has: one of its own, or the embeddings' table. Its tensors say so, not its flags.

`tie_word_embeddings` stands at several levels of a config, is left out where a class has a default, and is wrong in
checkpoints whose head was trained apart after they were made. Other parts of a checkpoint, such as a model of speech
beside the one that is served, have embeddings and heads of their own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Any

import torch

from sensorium.config import EngineConfig
from sensorium.logger import get_logger
from sensorium.model_executor.models.weights import WeightsMapper

logger = get_logger(__name__)

HEAD = "lm_head.weight"
EMBEDDINGS = "embed_tokens.weight"
_MAPPERS = ("names", "hf_to_vllm_mapper")
"""Attributes under which classes keep their table of names."""


def with_actual_head(
    config: EngineConfig, model_class: type, weights: Iterable[tuple[str, torch.Tensor]]
) -> EngineConfig:
    """The configuration with `tie_word_embeddings`, at every level, as the checkpoint's tensors have it.

    A head that differs from the embeddings is the model's own, whatever the flags say, as in `transformers`
    `PreTrainedModel.tie_weights`. Where there is no head, or it equals the embeddings, it is tied if any level says so.
    """
    head, embeddings = _head_and_embeddings(weights, model_class, config)
    if head is not None and embeddings is None:
        return config  # nothing to compare it with
    is_own = head is not None and embeddings is not None and not _equal(head, embeddings)
    is_tied = ties_head(config) and not is_own
    if is_own and ties_head(config):
        logger.info("The output head is not tied to the embeddings: the checkpoint has another one.")
    return _with_flag(config, is_tied)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same; a quantized one equals no float one."""
    return one.dtype == other.dtype and torch.equal(one, other)


def ties_head(config: EngineConfig) -> bool:
    """Whether any level of the model's config ties the head to the embeddings."""
    return any(getattr(level, "tie_word_embeddings", False) for level in _levels(config.model_config.hf_config))


def _levels(hf_config: Any) -> tuple[Any, Any]:
    return hf_config, hf_config.get_text_config()


def _with_flag(config: EngineConfig, is_tied: bool) -> EngineConfig:
    levels = _levels(config.model_config.hf_config)
    if all(getattr(level, "tie_word_embeddings", None) is is_tied for level in levels):
        return config
    hf_config = copy.deepcopy(config.model_config.hf_config)
    for level in _levels(hf_config):
        level.tie_word_embeddings = is_tied
    return replace(config, model_config=replace(config.model_config, hf_config=hf_config))


def _head_and_embeddings(
    weights: Iterable[tuple[str, torch.Tensor]], model_class: type, config: EngineConfig
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The head and the embeddings of the part that the class serves; None for what isn't there."""
    is_served = _served_names(model_class)
    found = {name: each for name, each in weights if name.endswith((HEAD, EMBEDDINGS)) and is_served(name)}
    heads = [name for name in found if name.endswith(HEAD)]
    text = config.model_config.hf_text_config
    shape = (getattr(text, "vocab_size", None), getattr(text, "hidden_size", None))
    # The decoder's own head lies least deep; heads of other sizes belong to other parts.
    heads.sort(key=lambda name: (tuple(found[name].shape) != shape, name.count("."), name))
    if not heads:
        return None, None
    head = heads[0]
    twins = [name for name in found if name.endswith(EMBEDDINGS) and found[name].shape == found[head].shape]
    if not twins:
        return found[head], None
    return found[head], found[max(twins, key=lambda name: (_shared_parts(name, head), -name.count(".")))]


def _served_names(model_class: type) -> Callable[[str], bool]:
    """Whether a class takes a name of the checkpoint, as far as its tables say."""
    ignored = tuple(getattr(model_class, "ignored_weights", ()))
    tables = [getattr(model_class, name, None) for name in _MAPPERS]
    mappers = [table for table in tables if isinstance(table, WeightsMapper)]

    def is_served(name: str) -> bool:
        dropped = any(mapper.map_name(name) is None for mapper in mappers)
        return not dropped and not any(fnmatchcase(name, pattern) for pattern in ignored)

    return is_served


def _shared_parts(one: str, other: str) -> int:
    """Parts that two names have in common in front."""
    count = 0
    for left, right in zip(one.split("."), other.split("."), strict=False):
        if left != right:
            break
        count += 1
    return count

"""Configurations for tests of single rooms, without a checkpoint unless one is named."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, PretrainedConfig

from sensorium.config import EngineConfig, ModelConfig, MultiModalConfig
from sensorium.model_executor.models.interfaces import supports_multimodal


def make_model_config(
    model_class: type | None = None,
    *,
    model: str | Path = "no-checkpoint",
    hf_config: PretrainedConfig | None = None,
    limits: Mapping[str, int] | None = None,
    **fields: Any,
) -> ModelConfig:
    """A `ModelConfig` of the class; `limits` are those per prompt. A class that takes no media has no media limits."""
    is_multimodal = supports_multimodal(model_class)
    return ModelConfig(
        model=str(model),
        tokenizer=str(model),
        hf_config=hf_config or LlamaConfig(vocab_size=64, hidden_size=16, num_attention_heads=2),
        dtype_name="float32",
        max_model_len=4096,
        model_class=model_class,
        multimodal_config=MultiModalConfig(limits or {}) if is_multimodal else None,
        **fields,
    )


def make_engine_config(model_class: type | None = None, **fields: Any) -> EngineConfig:
    """An `EngineConfig` around `make_model_config`."""
    return EngineConfig(model_config=make_model_config(model_class, **fields))

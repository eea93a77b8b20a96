"""Questions about Hugging Face configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sensorium.config import rope_parameters

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["get_hf_text_config", "uses_mrope"]


def uses_mrope(config: PretrainedConfig) -> bool:
    """Whether positions have three rows."""
    return "mrope_section" in rope_parameters(config) or "mrope_section" in rope_parameters(get_hf_text_config(config))


def get_hf_text_config(config: PretrainedConfig) -> PretrainedConfig:
    """The part that describes the language model."""
    return config.get_text_config()

"""Qwen2, with V0's constructors."""

from __future__ import annotations

from sensorium.compat.v0.text_models import TextDecoder, TextModel
from sensorium.model_executor.models.qwen2 import Qwen2ForCausalLM as RegisteredQwen2

__all__ = ["Qwen2ForCausalLM", "Qwen2Model"]


class Qwen2Model(TextDecoder):
    """The decoder."""

    model_class = RegisteredQwen2


class Qwen2ForCausalLM(TextModel, RegisteredQwen2):
    """The decoder, and its output head."""

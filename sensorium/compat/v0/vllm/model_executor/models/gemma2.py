"""Gemma 2, with V0's constructors. Its decoder scales whatever rows it is given, as V0's did."""

from __future__ import annotations

from sensorium.compat.v0.inner_models import ScalingDecoder
from sensorium.compat.v0.text_models import TextDecoder, TextModel
from sensorium.model_executor.models.gemma import Gemma2ForCausalLM as RegisteredGemma2

__all__ = ["Gemma2ForCausalLM", "Gemma2Model"]


class Gemma2Model(ScalingDecoder, TextDecoder):
    """The decoder."""

    model_class = RegisteredGemma2


class Gemma2ForCausalLM(TextModel, RegisteredGemma2):
    """The decoder, and its output head."""

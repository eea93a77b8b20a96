"""Gemma, with V0's constructors. Its decoder scales whatever rows it is given, as V0's did."""

from __future__ import annotations

from sensorium.compat.v0.inner_models import ScalingDecoder
from sensorium.compat.v0.text_models import TextDecoder, TextModel
from sensorium.model_executor.models.gemma import GemmaForCausalLM as RegisteredGemma

__all__ = ["GemmaForCausalLM", "GemmaModel"]


class GemmaModel(ScalingDecoder, TextDecoder):
    """The decoder."""

    model_class = RegisteredGemma


class GemmaForCausalLM(TextModel, RegisteredGemma):
    """The decoder, and its output head."""

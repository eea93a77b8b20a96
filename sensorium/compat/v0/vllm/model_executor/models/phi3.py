"""Phi-3, with V0's constructor: Llama, of which checkpoints have the fused layers as they are."""

from __future__ import annotations

from typing import ClassVar

from sensorium.compat.v0.vllm.model_executor.models.llama import LlamaForCausalLM

__all__ = ["Phi3ForCausalLM"]


class Phi3ForCausalLM(LlamaForCausalLM):
    """The decoder, and its output head."""

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = {
        "qkv_proj": ["qkv_proj"],
        "gate_up_proj": ["gate_up_proj"],
    }

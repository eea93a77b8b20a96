"""MiniCPM, with V0's constructors: Llama with factors on embeddings, on what each layer adds, and on logits.

Paper: Hu et al. 2024, "MiniCPM", section 3.1 and table 1.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sensorium.compat.v0.text_models import TextDecoder, TextModel
from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.models.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

__all__ = ["MiniCPMForCausalLM", "MiniCPMModel"]


class Registered(LlamaForCausalLM):
    """The model by Sensorium's constructor."""

    scales_given_rows = False

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__(config=config, prefix=prefix)
        text = config.model_config.hf_text_config
        self.logits_processor.scale = text.dim_model_base / text.hidden_size

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Raises `ModelError` for a mixture of experts."""
        if getattr(text_config, "num_experts", 0):
            raise ModelError(
                f"num_experts of MiniCPM: got {text_config.num_experts}, expected none. Serve a model without experts."
            )
        return replace(
            LlamaForCausalLM.decoder_options(text_config),
            embed_scale=float(text_config.scale_emb),
            output_scale=text_config.scale_depth / text_config.num_hidden_layers**0.5,
        )


class MiniCPMModel(TextDecoder):
    """The decoder. Rows that it is given are scaled already, as its own embeddings are."""

    model_class = Registered


class MiniCPMForCausalLM(TextModel, Registered):
    """The decoder, and its output head."""

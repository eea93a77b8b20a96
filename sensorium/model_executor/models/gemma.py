"""Gemma 1 to 3: Llama's decoder with scaled embeddings, norms with zero-centered weights, and a GELU in the MLP's gate.

Gemma 2 norms attention and MLP before and after, has a window in every other layer, and caps the scores of attention
and the logits. Gemma 3 norms queries and keys per head instead of capping scores, and has a window in five layers of
six, which have their own rotary frequencies.

Papers: Gemma team 2024, "Gemma"; 2024, "Gemma 2"; 2025, "Gemma 3 Technical Report", section 2. Reference:
`transformers` `GemmaForCausalLM`, `Gemma2ForCausalLM`, `Gemma3ForCausalLM`. Text only; `gemma3.py` and `paligemma.py`
add pictures.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from sensorium.cache_spec import SpanRule
from sensorium.config import EngineConfig
from sensorium.errors import ModelError
from sensorium.model_executor.layers.decoder import DecoderOptions
from sensorium.model_executor.layers.layernorm import ZeroCenteredRMSNorm
from sensorium.model_executor.models.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class GemmaForCausalLM(LlamaForCausalLM):
    """A decoder and its output head, which is mostly tied to the embeddings.

    Raises:
        ModelError: The config has bidirectional attention, as embedding models of this family do.
    """

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        if getattr(config.model_config.hf_text_config, "use_bidirectional_attention", False):
            raise ModelError(
                "use_bidirectional_attention of config.json: got true, expected false. Serve a model that generates."
            )
        super().__init__(config=config, prefix=prefix)

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """The options that all three share."""
        bias = bool(text_config.attention_bias)
        return DecoderOptions(
            qkv_bias=bias, output_bias=bias, norm=ZeroCenteredRMSNorm, embed_scale=text_config.hidden_size**0.5
        )


class Gemma2ForCausalLM(GemmaForCausalLM):
    """A decoder and its output head."""

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Four norms a layer, and scores with their own factor and a soft cap."""
        return replace(
            GemmaForCausalLM.decoder_options(text_config),
            output_norms=True,
            query_scale=text_config.query_pre_attn_scalar**-0.5,
            score_soft_cap=text_config.attn_logit_softcapping,
        )


class Gemma3ForCausalLM(Gemma2ForCausalLM):
    """A decoder and its output head. In layers with a window, rows of a picture see one another within the window
    only."""

    @staticmethod
    def decoder_options(text_config: PretrainedConfig) -> DecoderOptions:
        """Normed queries and keys instead of the cap, and two kinds of rotary frequencies."""
        return replace(
            Gemma2ForCausalLM.decoder_options(text_config),
            score_soft_cap=None,
            qk_norm=True,
            rope_by_layer_type=True,
            spans=SpanRule.WITHIN_REACH,
        )

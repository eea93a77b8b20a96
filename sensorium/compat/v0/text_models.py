"""Sensorium's text models with the constructors of V0.

Files of 0.6.4 and later pass `vllm_config` and `prefix`. Earlier ones pass the Hugging Face config and parts of the
engine's configuration; these parts are ignored here, and the configuration of the model in construction is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from sensorium.compat.v0.inner_models import with_names_of_v0
from sensorium.config import EngineConfig
from sensorium.model_executor.adapter import current_engine_config
from sensorium.model_executor.layers.decoder import Decoder
from sensorium.model_executor.models.llama import LlamaForCausalLM

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
"""The `packed_modules_mapping` of most decoders: the parts of each fused layer."""


def engine_config_of(config: PretrainedConfig | None, vllm_config: EngineConfig | None) -> EngineConfig:
    """The engine's configuration for a model that is given `vllm_config`, or else a Hugging Face config.

    Raises `ModelError` outside of a constructor, where only a Hugging Face config is given.
    """
    if vllm_config is not None:
        return vllm_config
    current = current_engine_config()
    return current if config is None else current.with_hf_config(config)


class TextModel:
    """A mixin with the constructor of V0; it stands before a model of Sensorium in a class's bases.

    `config` is an attribute, because V0's code reads it.
    """

    packed_modules_mapping: ClassVar[dict[str, list[str]]] = PACKED

    def __init__(
        self,
        config: PretrainedConfig | None = None,
        cache_config: Any = None,
        quant_config: Any = None,
        lora_config: Any = None,
        prefix: str = "",
        *,
        vllm_config: EngineConfig | None = None,
    ) -> None:
        engine_config = engine_config_of(config, vllm_config)
        super().__init__(config=engine_config, prefix=prefix)  # type: ignore[call-arg]
        self.config = engine_config.model_config.hf_text_config
        with_names_of_v0(self)  # type: ignore[arg-type]


class DecoderOfModel(Decoder):
    """The decoder of a model alone, with Sensorium's constructor."""

    model_class: ClassVar[type[LlamaForCausalLM]]
    """The model whose decoder it is."""

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        options = self.model_class.decoder_options(config.model_config.hf_text_config)
        super().__init__(config=config, options=options, prefix=prefix)


class TextDecoder(TextModel, DecoderOfModel):
    """A decoder without a head, with the constructor of V0."""

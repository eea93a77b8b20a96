"""Ultravox's config: an audio tower and a decoder, each described here, or by a checkpoint of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

__all__ = ["UltravoxConfig"]


class UltravoxConfig(PretrainedConfig):  # type: ignore[misc]
    """Values by the names of checkpoints.

    `text_model_id` and `audio_model_id` name folders whose `config.json` counts instead of `text_config` and
    `audio_config`.
    """

    model_type = "ultravox"

    def __init__(
        self,
        audio_config: Mapping[str, Any] | None = None,
        text_config: Mapping[str, Any] | None = None,
        audio_model_id: str | None = None,
        text_model_id: str | None = None,
        ignore_index: int = -100,
        audio_token_index: int = 32000,
        hidden_size: int = 4096,
        stack_factor: int = 8,
        norm_init: float = 0.4,
        projector_act: str = "swiglu",
        text_model_lora_config: Mapping[str, Any] | None = None,
        audio_model_lora_config: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.audio_model_id, self.text_model_id = audio_model_id, text_model_id
        self.audio_config = _part(audio_model_id, audio_config, "whisper")
        self.text_config = _part(text_model_id, text_config, "llama")
        self.ignore_index = ignore_index
        self.audio_token_index = audio_token_index
        self.hidden_size = hidden_size
        self.stack_factor = stack_factor
        self.norm_init = norm_init
        self.projector_act = projector_act
        self.text_model_lora_config = dict(text_model_lora_config or {})
        self.audio_model_lora_config = dict(audio_model_lora_config or {})
        self.vocab_size = self.text_config.vocab_size
        self.initializer_range = self.text_config.initializer_range
        super().__init__(**settings)


def _part(folder: str | None, given: Any, default_type: str) -> PretrainedConfig:
    if folder is not None:
        config: PretrainedConfig = AutoConfig.from_pretrained(folder, local_files_only=True)
        return config
    if isinstance(given, PretrainedConfig):
        return given
    values = dict(given or {})
    made: PretrainedConfig = CONFIG_MAPPING[values.pop("model_type", default_type)](**values)
    return made


AutoConfig.register("ultravox", UltravoxConfig, exist_ok=True)

"""Configs that transformers has no class for."""

from __future__ import annotations

from pathlib import Path

import transformers

from sensorium.compat.v0.vllm.transformers_utils.configs import (
    ChatGLMConfig,
    InternVLChatConfig,
    UltravoxConfig,
)


def test_chatglm_as_it_stands_in_checkpoints(tmp_path: Path) -> None:
    vision = {"image_size": 16, "patch_size": 4}
    ChatGLMConfig(num_layers=3, padded_vocab_size=99, seq_length=70, vision_config=vision).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ChatGLMConfig)
    assert (config.num_hidden_layers, config.vocab_size, config.max_position_embeddings) == (3, 99, 70)
    assert config.vision_config == vision
    assert config.kv_channels == 128


def test_ultravox_has_its_parts_inside_or_in_folders(tmp_path: Path) -> None:
    text = {"model_type": "mistral", "vocab_size": 77}
    UltravoxConfig(text_config=text, audio_config={"d_model": 24}, stack_factor=4).save_pretrained(tmp_path / "whole")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "whole")
    assert isinstance(config, UltravoxConfig)
    assert isinstance(config.text_config, transformers.MistralConfig)
    assert (config.vocab_size, config.audio_config.hidden_size, config.stack_factor) == (77, 24, 4)
    transformers.LlamaConfig(vocab_size=55).save_pretrained(tmp_path / "text")
    assert UltravoxConfig(text_model_id=str(tmp_path / "text")).vocab_size == 55


def test_internvl_has_its_parts_by_their_own_classes(tmp_path: Path) -> None:
    text = {"model_type": "qwen2", "vocab_size": 77, "architectures": ["Qwen2ForCausalLM"]}
    vision = {"model_type": "intern_vit_6b", "hidden_size": 24}
    InternVLChatConfig(vision_config=vision, llm_config=text, use_thumbnail=True).save_pretrained(tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, InternVLChatConfig)
    assert isinstance(config.text_config, transformers.Qwen2Config)
    assert config.get_text_config() is config.text_config
    assert config.text_config.architectures == ["Qwen2ForCausalLM"]
    assert (config.text_config.vocab_size, config.vision_config.hidden_size) == (77, 24)
    assert (config.use_thumbnail, config.select_layer) == (True, -1)

"""ChatGLM's config, with GLM-4V's, whose `vision_config` is a mapping."""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import AutoConfig, PretrainedConfig

__all__ = ["ChatGLMConfig"]

DEFAULTS: dict[str, Any] = {
    "num_layers": 28,
    "padded_vocab_size": 65024,
    "hidden_size": 4096,
    "ffn_hidden_size": 13696,
    "kv_channels": 128,
    "num_attention_heads": 32,
    "seq_length": 2048,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "layernorm_epsilon": 1e-5,
    "rmsnorm": True,
    "apply_residual_connection_post_layernorm": False,
    "post_layer_norm": True,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "interleaved_qkv": False,
    "bias_dropout_fusion": True,
    "multi_query_attention": False,
    "multi_query_group_num": 1,
    "apply_query_key_layer_scaling": True,
    "attention_softmax_in_fp32": True,
    "fp32_residual_connection": False,
    "quantization_bit": 0,
    "pre_seq_len": None,
    "prefix_projection": False,
}


class ChatGLMConfig(PretrainedConfig):  # type: ignore[misc]
    """Values by the names of checkpoints, each with a default."""

    model_type = "chatglm"
    attribute_map: ClassVar[dict[str, str]] = {
        "num_hidden_layers": "num_layers",
        "n_head_kv": "multi_query_group_num",
    }

    def __init__(self, **settings: Any) -> None:
        values = {name: settings.pop(name, default) for name, default in DEFAULTS.items()}
        for name, value in values.items():
            setattr(self, name, value)
        self.vocab_size = values["padded_vocab_size"]
        self.max_position_embeddings = values["seq_length"]
        super().__init__(**{name: value for name, value in settings.items() if name not in self.attribute_map})


AutoConfig.register("chatglm", ChatGLMConfig, exist_ok=True)

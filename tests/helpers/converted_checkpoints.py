"""Checkpoints as they were before transformers had classes for their models: the weights of such a class, under the
names that files of those months load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file

from tests.helpers.checkpoints import make_tokenizer, text_settings
from tests.helpers.tiny_architectures import spread


def renamed(name: str, names: Mapping[str, str]) -> str:
    """A name with each part that `names` has replaced, in their order."""
    for old, new in names.items():
        name = name.replace(old, new)
    return name


def _save(folder: Path, config: Mapping[str, Any], state: Mapping[str, torch.Tensor]) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, folder / "model.safetensors")


GLM_NAMES = {
    "model.embed_tokens": "transformer.embedding.word_embeddings",
    "model.layers": "transformer.encoder.layers",
    "model.norm": "transformer.encoder.final_layernorm",
    "lm_head": "transformer.output_layer",
    "self_attn.o_proj": "self_attention.dense",
    "self_attn.q_proj": "self_attention.query_key_value",
    "mlp.gate_up_proj": "mlp.dense_h_to_4h",
    "mlp.down_proj": "mlp.dense_4h_to_h",
}


def chatglm_checkpoint(folder: Path) -> transformers.PreTrainedModel:
    """GLM-4's text model as `ChatGLMModel`; returns Hugging Face's model of it."""
    settings = text_settings(head_dim=16, partial_rotary_factor=0.5)
    config = transformers.GlmConfig(**settings)
    torch.manual_seed(0)
    reference = transformers.GlmForCausalLM(config).eval()
    spread(reference, 0)
    given, state = reference.state_dict(), {}
    with torch.no_grad():
        for name, tensor in given.items():
            if name.endswith("bias"):
                tensor.normal_(generator=torch.Generator().manual_seed(len(name)))
    for name in given:
        if ".k_proj." not in name and ".v_proj." not in name:
            parts = [given[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
            state[renamed(name, GLM_NAMES)] = torch.cat(parts) if ".q_proj." in name else given[name]
    own = {
        "architectures": ["ChatGLMModel"],
        "model_type": "chatglm",
        "num_layers": config.num_hidden_layers,
        "padded_vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "ffn_hidden_size": config.intermediate_size,
        "kv_channels": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "multi_query_attention": True,
        "multi_query_group_num": config.num_key_value_heads,
        "add_qkv_bias": True,
        "rmsnorm": True,
        "layernorm_epsilon": config.rms_norm_eps,
        "seq_length": config.max_position_embeddings,
        "tie_word_embeddings": False,
        "eos_token_id": settings["eos_token_id"],
        "dtype": "float32",
    }
    _save(folder, own, state)
    make_tokenizer().save_pretrained(folder)
    return reference

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


INTERNVL_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.vision_tower.": "vision_model.",
    "model.multi_modal_projector.layer_norm": "mlp1.0",
    "model.multi_modal_projector.linear_1": "mlp1.1",
    "model.multi_modal_projector.linear_2": "mlp1.3",
    "embeddings.cls_token": "embeddings.class_embedding",
    "embeddings.patch_embeddings.projection": "embeddings.patch_embedding",
    "embeddings.position_embeddings": "embeddings.position_embedding",
    "encoder.layer.": "encoder.layers.",
    "attention.q_proj": "attn.qkv",
    "attention.projection_layer": "attn.proj",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "lambda_1": "ls1",
    "lambda_2": "ls2",
}


def internvl_chat_checkpoint(folder: Path) -> transformers.PreTrainedModel:
    """InternVL 2 with Qwen2 as `InternVLChatModel`; returns Hugging Face's model of it."""
    tokenizer = make_tokenizer(["<img>", "</img>", "<IMG_CONTEXT>"])
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = text_settings(vocab_size=len(tokenizer))
    config = transformers.InternVLConfig(
        vision_config={**vision, "image_size": [28, 28], "patch_size": [7, 7], "attention_bias": True},
        text_config={"model_type": "qwen2", **text},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
    )
    torch.manual_seed(0)
    reference = transformers.InternVLForConditionalGeneration(config).eval()
    spread(reference, 0)
    for name, parameter in reference.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):  # so that the answer depends on what stands before
            parameter.data.mul_(8)
    given, state = reference.state_dict(), {}
    for name in given:
        in_tower = "vision_tower" in name
        if in_tower and (".k_proj." in name or ".v_proj." in name):
            continue
        parts = [given[name.replace(".q_proj.", f".{part}_proj.")] for part in "qkv"]
        is_fused = in_tower and ".q_proj." in name
        state[renamed(name, INTERNVL_NAMES)] = torch.cat(parts) if is_fused else given[name]
    tower = config.vision_config
    tower_settings = {"norm_type": tower.norm_type, "layer_norm_eps": tower.layer_norm_eps, "hidden_act": "gelu"}
    sizes = {"image_size": 28, "patch_size": 7, "qkv_bias": True, "qk_normalization": False}
    own = {
        "architectures": ["InternVLChatModel"],
        "model_type": "internvl_chat",
        "vision_config": {"model_type": "intern_vit_6b", **vision, **sizes, **tower_settings},
        "llm_config": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], **text},
        "dynamic_image_size": True,
        "use_thumbnail": True,
        "max_dynamic_patch": 3,
        "ps_version": "v2",
        "dtype": "float32",
    }
    _save(folder, own, state)
    tokenizer.save_pretrained(folder)
    return reference

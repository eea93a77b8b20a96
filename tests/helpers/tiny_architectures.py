"""Tiny models of every architecture of text that transformers has: its own defaults, shrunk by the names of values."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING, PretrainedConfig, PreTrainedModel

VOCAB_SIZE = 320
NUM_LAYERS = 4
MAX_POSITION = 512

SIZES: Mapping[str, int] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "model_dim", "embed_dim", "hidden_dim"), 64),
    **dict.fromkeys(("emb_dim", "embedding_size", "word_embed_proj_dim", "embedding_dim"), 64),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "d_ff"), 96),
    **dict.fromkeys(("dff", "ffn_hidden_size", "ffn_size", "shared_intermediate_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "expert_ffn_hidden_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("intermediate_size_mlp", "moe_shared_expert_intermediate_size", "n_shared_intermediate"), 32),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "swa_num_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "n_head_kv"), 2),
    **dict.fromkeys(
        ("head_dim", "attention_head_dim", "head_size", "swa_head_dim", "v_head_dim", "qk_nope_head_dim"), 16
    ),
    **dict.fromkeys(("kv_channels", "swa_v_head_dim", "global_head_dim"), 16),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "index_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank",), 24),
    **dict.fromkeys(("kv_lora_rank",), 16),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "top_k", "topk_method_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "num_expert_groups", "num_expert_group"), 1),
    **dict.fromkeys(("n_shared_experts", "moe_num_shared_experts", "num_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "moe_layer_start_index", "num_dense_layers"), 1),
    **dict.fromkeys(("sliding_window", "window_size", "attention_window_size", "local_attention"), 6),
    **dict.fromkeys(("attention_chunk_size", "chunk_size_attention"), 8),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "seq_length"), MAX_POSITION),
    **dict.fromkeys(("max_target_positions", "max_source_positions"), MAX_POSITION),
    **dict.fromkeys(("mamba_d_state", "state_size", "ssm_state_size"), 8),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), 2),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "linear_head_dim"), 16),
    **dict.fromkeys(("linear_num_heads",), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_decoder_layers",), NUM_LAYERS),
    **dict.fromkeys(("encoder_layers",), NUM_LAYERS),
    **dict.fromkeys(("hidden_size_per_layer_input",), 16),
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "decoder_vocab_size"), VOCAB_SIZE),
    "index_n_heads": 16,  # with few, all score zero at times, and which of equals is taken is chance
    **dict.fromkeys(("index_topk",), 8),
    **dict.fromkeys(("time_step_rank", "dt_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("num_kv_shared_layers",), 2),
    **dict.fromkeys(("laurel_rank", "altup_lora_rank"), 8),
}
"""Values by their name, wherever a config has one that is larger."""
_SPECIAL_IDS: Mapping[str, int] = {
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "sep_token_id": 3,
    "decoder_start_token_id": 1,
}


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_MIXED = ["linear_attention", "full_attention"] * 2
_HYBRID = ["linear_attention", "hybrid"] * 2
_SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": _MIXED},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": _HYBRID},
    "zamba2": {
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "mamba_headdim": 16,
        "layers_block_type": _HYBRID,
        "hybrid_layer_ids": [1, 3],
    },
    "cohere_compass_text": {
        "rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), _ROPE),
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "hrm_text": {
        "num_hidden_layers": 4,
        "num_layers_per_stack": 1,
        "H_cycles": 2,
        "L_cycles": 1,
        "L_bp_cycles": [1, 1],
        "head_dim": 16,
    },
    **{
        name: {
            "indexer_n_heads": 16,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 16,
            "indexer_budget": 8,
            "indexer_compress_ratio": 2,
        }
        for name in ("qwen4_exp", "qwen4_exp_text")
    },
    **{name: {"per_layer_config": {}} for name in ("dots3_note", "dots3_note_text")},
    "reformer": {"axial_pos_embds_dim": [32, 32], "axial_pos_shape": [16, 32], "attn_layers": ["local", "lsh"] * 2},
    "rwkv": {"attention_hidden_size": 64},
    "xlm": {"causal": True},
    "xlstm": {"hidden_size": 128, "embedding_dim": 128, "num_blocks": NUM_LAYERS},
    **{name: {"head_dim": 16} for name in ("hunyuan_v1_dense", "hunyuan_v1_moe", "ministral")},
    **{
        name: {"per_layer_config": {at: {"head_dim": 32} for at in ("01", "03")}}
        for name in ("gemma4_text", "gemma4_unified_text")
    },
    "deepseek_v2": {"head_dim": 8, "num_experts_per_tok": 2, "first_k_dense_replace": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "blenderbot": {"max_position_embeddings": 128, "encoder_layers": NUM_LAYERS},
    "bailing_hybrid": {"head_dim": 16},
    "longcat_flash": {"head_dim": 8, "qk_head_dim": 24},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "moshi": {"sliding_window": MAX_POSITION},  # as by default; beyond it, caches hide what whole passes see
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "qwen2_moe": {"sliding_window": 6},
    "xmod": {"default_language": "en_XX"},
}
"""What shrinking by name doesn't get right, by type."""


def text_types() -> dict[str, str]:
    """Model types with the class that continues their texts."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def seq2seq_types() -> dict[str, str]:
    """Model types with the class whose encoder reads a text and whose decoder writes another."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES

    return dict(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def tiny_config(model_type: str, class_name: str = "", **settings: Any) -> PretrainedConfig:
    """The defaults of a type with sizes of some dozens."""
    # A type may name the config of a whole with media, and a class that takes its part for text.
    config_class = getattr(getattr(transformers, class_name, None), "config_class", None) or CONFIG_MAPPING[model_type]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        default = config_class()
        values = shrunk(default.to_dict(), _num_layers(default)) | _SETTINGS.get(model_type, {}) | settings
        agree_on_heads(values)
        if hasattr(default, "is_decoder") and class_name != seq2seq_types().get(model_type):
            values["is_decoder"] = True
        return config_class(**values)


def agree_on_heads(values: dict[str, Any]) -> None:
    """Let the numbers and sizes of heads of latent attention fit each other, in nested configs too."""
    if "qk_rope_head_dim" in values and "head_dim" in values:
        values["head_dim"] = values["qk_rope_head_dim"]
    if "kv_lora_rank" in values and "num_key_value_heads" in values:
        values["num_key_value_heads"] = values["num_attention_heads"]
    for value in values.values():
        if isinstance(value, dict):
            agree_on_heads(value)


def _num_layers(config: Any) -> int:
    return int(getattr(config, "num_hidden_layers", 0) or 0)


def shrunk(values: Mapping[str, Any], num_layers: int, sizes: Mapping[str, int] = SIZES) -> dict[str, Any]:
    """Values of a config, those that are larger than `sizes` in the place of their own."""
    small: dict[str, Any] = {}
    for name, value in values.items():
        if name in ("transformers_version", "model_type", "architectures", "auto_map", "dtype"):
            continue
        if name in _SPECIAL_IDS:
            small[name] = _SPECIAL_IDS[name]
        elif isinstance(value, bool) or value is None:
            small[name] = value
        elif name in sizes and isinstance(value, int):
            small[name] = min(sizes[name], value)
        elif isinstance(value, list) and num_layers and len(value) == num_layers:
            small[name] = _few(value)
        elif isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = shrunk(value, int(value.get("num_hidden_layers") or 0), sizes)
            small[name] |= {each: value[each] for each in ("model_type",) if each in value}
        else:
            small[name] = value
    return small


def _few(per_layer: list[Any]) -> list[Any]:
    """As many entries as there are layers left, of each kind at least one."""
    kinds = list(dict.fromkeys(map(repr, per_layer)))
    first = [next(each for each in per_layer if repr(each) == kind) for kind in kinds][:NUM_LAYERS]
    return (first * NUM_LAYERS)[:NUM_LAYERS] if len(first) > 1 else per_layer[:NUM_LAYERS]


def tiny_model(model_type: str, seed: int = 0, class_name: str = "", **settings: Any) -> PreTrainedModel:
    """A model of a type, with weights that make a misplaced tensor or a wrong mask show."""
    class_name = class_name or text_types()[model_type]
    config = tiny_config(model_type, class_name, **settings)
    model = getattr(transformers, class_name)
    torch.manual_seed(seed)
    made: PreTrainedModel = model(config).eval()
    if config.is_encoder_decoder and made.generation_config.decoder_start_token_id is None:
        made.generation_config.decoder_start_token_id = _SPECIAL_IDS["decoder_start_token_id"]
    spread(made, seed)
    return made


def spread(model: PreTrainedModel, seed: int) -> None:
    """Draw matrices larger than models initialize them, so that attention looks at some rows more than at others."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:  # computed, and not always saved
                continue
            if not parameter.is_floating_point() or parameter.dim() < 2 or "A_log" in name or "conv" in name:
                continue
            fan_in = parameter.shape[-1] if "embed" not in name else 1
            parameter.normal_(0, 1.2 * fan_in**-0.5, generator=generator)


def save_tiny(model_type: str, folder: Path, seed: int = 0, class_name: str = "", **settings: Any) -> PreTrainedModel:
    """Write a tiny checkpoint without tokenizer; returns the model."""
    model = tiny_model(model_type, seed, class_name, **settings)
    model.save_pretrained(folder)
    return model

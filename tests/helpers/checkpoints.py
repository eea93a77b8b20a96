"""Tiny checkpoints with random weights, made on the spot from Hugging Face config classes; one directory per
variant.

A checkpoint has everything that a real one has: config, generation config, weights, tokenizer, processor
settings and a chat template. Weights are drawn so that greedy output varies and that a misplaced, missing or
swapped tensor changes the logits: norms and biases are random too.
"""

from __future__ import annotations

import atexit
import functools
import inspect
import json
import math
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

Layout = Literal["hub", "saved", "module"]
"""Names of weights: as on the model hub, as `save_pretrained` writes them, or as the Hugging Face modules have them."""

VOCAB_SIZE = 320
HIDDEN_SIZE = 64
IMAGE_SIZE = 56
PATCH_SIZE = 14
MIN_PIXELS = 4 * 28 * 28
MAX_PIXELS = 24 * 28 * 28

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<image>", "<|AUDIO|>", "<|audio_bos|>", "<|audio_eos|>"),
    *("<video>", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "<IMG_CONTEXT>", "<img>", "</img>"),
    *("<fake_token_around_image>", "<global-img>", "<row_1_col_1>", "<row_1_col_2>", "<row_2_col_1>", "<row_2_col_2>"),
)

CHAT_TEMPLATE = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}\
{% elif part['type'] in ('image', 'image_url') %}IMAGE_PLACEHOLDER\
{% elif part['type'] in ('video', 'video_url') %}VIDEO_PLACEHOLDER\
{% elif part['type'] in ('audio', 'audio_url', 'input_audio') %}AUDIO_PLACEHOLDER\
{% endif %}{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
QWEN_PLACEHOLDERS = {
    "IMAGE": "<|vision_start|><|image_pad|><|vision_end|>",
    "VIDEO": "<|vision_start|><|video_pad|><|vision_end|>",
}


@functools.cache
def _root() -> Path:
    root = Path(tempfile.mkdtemp(prefix="sensorium-checkpoints-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root


# --- tokenizer ---


def make_tokenizer(extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """One token per byte, and the special tokens of all families behind them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=2048
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL_TOKENS, *extra_tokens]})
    return tokenizer


@functools.cache
def token_ids() -> dict[str, int]:
    """Ids of the special tokens."""
    tokenizer = make_tokenizer()
    return {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}


# --- families ---


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one architecture are made."""

    model_class: str
    config: Callable[[], transformers.PretrainedConfig]
    hub_names: Mapping[str, str] = field(default_factory=dict)
    """Prefix of a module's name to the prefix on the hub; the first that matches applies."""
    placeholders: Mapping[str, str] = field(default_factory=dict)
    processor_files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    extra_tokens: tuple[str, ...] = ()
    """Special tokens behind those of all families."""
    generation: Callable[[], Mapping[str, Any]] = dict
    """What its generation config says beside the ends."""


def text_settings(**settings: Any) -> dict[str, Any]:
    """A decoder of 3 layers with 4 query and 2 key/value heads."""
    return {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": HIDDEN_SIZE,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "bos_token_id": None,
        "eos_token_id": token_ids()["<|im_end|>"],
        "pad_token_id": token_ids()["<|endoftext|>"],
        **settings,
    }


def gemma3_config() -> transformers.PretrainedConfig:
    """Windows of 24 on two layers of three, with rotary frequencies of their own; the third's are scaled."""
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
    }
    types = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]
    own = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24, "layer_types": types}
    settings = text_settings(num_hidden_layers=4, rope_parameters=rope, final_logit_softcapping=30.0, **own)
    return transformers.Gemma3TextConfig(**settings)


def expert_settings(**settings: Any) -> dict[str, Any]:
    """Eight experts, of which three serve a token."""
    return text_settings(**{"num_experts_per_tok": 3, **settings})


def qwen3_moe_config() -> transformers.PretrainedConfig:
    """A layer of experts, one with an MLP, and one of experts."""
    experts = {"num_experts": 8, "moe_intermediate_size": 40, "mlp_only_layers": [1], "norm_topk_prob": True}
    return transformers.Qwen3MoeConfig(**expert_settings(head_dim=24, **experts))


def gpt_oss_config() -> transformers.PretrainedConfig:
    """A window on two layers of three, stretched frequencies, square matrices, whose sizes don't tell their axes."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512, "truncate": False}
    rope |= {"rope_theta": 1e4, "beta_fast": 32.0, "beta_slow": 1.0}
    own = {"num_local_experts": 8, "head_dim": 24, "sliding_window": 24, "layer_types": types}
    return transformers.GptOssConfig(**expert_settings(rope_parameters=rope, intermediate_size=HIDDEN_SIZE, **own))


def gemma2_config() -> transformers.PretrainedConfig:
    """A window on every other layer; caps that matter."""
    own = {"head_dim": 24, "query_pre_attn_scalar": 20, "sliding_window": 24}
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0}
    return transformers.Gemma2Config(**text_settings(**own, **caps))


GEMMA3_SIZE = 112


def gemma3_vision_config() -> transformers.PretrainedConfig:
    """Pictures of 64 patches in 16 rows, which are more than the windows of 10 hold."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": GEMMA3_SIZE,
        "patch_size": PATCH_SIZE,
    }
    text = gemma3_config()
    text.sliding_window = 10
    ids = token_ids()
    return transformers.Gemma3Config(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision),
        mm_tokens_per_image=16,
        boi_token_index=ids["<|vision_start|>"],
        eoi_token_index=ids["<|vision_end|>"],
        image_token_index=ids["<|image_pad|>"],
    )


def paligemma_caps_logits() -> bool:
    """Whether the installed transformers caps PaliGemma 2's logits, as its decoder's config says; older ones don't."""
    from transformers.models.paligemma.modeling_paligemma import PaliGemmaForConditionalGeneration

    return "final_logit_softcapping" in inspect.getsource(PaliGemmaForConditionalGeneration.forward)


def paligemma2_config() -> transformers.PretrainedConfig:
    """Windows that are shorter than most prompts, all of which is seen through them."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
    }
    text = gemma2_config()
    if not paligemma_caps_logits():
        text.final_logit_softcapping = None
    return transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=transformers.SiglipVisionConfig(**vision),
        projection_dim=HIDDEN_SIZE,
        hidden_size=HIDDEN_SIZE,
        image_token_index=token_ids()["<image>"],
    )


def qwen3_5_config() -> transformers.PretrainedConfig:
    """Two linear layers around one of attention; two value heads for a key head, and heads of other sizes."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    linear = {
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 12,
        "linear_value_head_dim": 16,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    return transformers.Qwen3_5TextConfig(**text_settings(head_dim=24, rope_parameters=rope, **linear))


def qwen_text_settings() -> dict[str, Any]:
    """Rotary sections (time, height, width) for a head size of 16."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
    return text_settings(rope_parameters=rope)


def qwen_media_ids() -> dict[str, int]:
    ids = token_ids()
    return {
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_token_id": ids["<|vision_pad|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
    }


def qwen2_vl_config() -> transformers.PretrainedConfig:
    vision = {
        "depth": 3,
        "embed_dim": 32,
        "hidden_size": HIDDEN_SIZE,
        "num_heads": 2,
        "mlp_ratio": 2,
        "patch_size": PATCH_SIZE,
    }
    return transformers.Qwen2VLConfig(text_config=qwen_text_settings(), vision_config=vision, **qwen_media_ids())


def qwen2_5_vl_config() -> transformers.PretrainedConfig:
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": HIDDEN_SIZE,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": PATCH_SIZE,
        "window_size": 56,  # 2 x 2 merged squares
        "fullatt_block_indexes": [1],
        "tokens_per_second": 4,
    }
    return transformers.Qwen2_5_VLConfig(text_config=qwen_text_settings(), vision_config=vision, **qwen_media_ids())


SMALL_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}


def llava_parts(tower: str, text: str) -> dict[str, Any]:
    """Settings of LLaVA and its kin."""
    vision_class = {
        "clip": transformers.CLIPVisionConfig,
        "siglip": transformers.SiglipVisionConfig,
        "pixtral": transformers.PixtralVisionConfig,
    }[tower]
    text_class = {
        "llama": transformers.LlamaConfig,
        "qwen2": transformers.Qwen2Config,
        "mistral": transformers.MistralConfig,
    }[text]
    return {
        "vision_config": vision_class(**SMALL_TOWER),
        "text_config": text_class(**text_settings()),
        "image_token_index": token_ids()["[IMG]" if tower == "pixtral" else "<image>"],
        "vision_feature_layer": -1 if tower == "pixtral" else -2,
        "vision_feature_select_strategy": "default" if tower == "clip" else "full",
    }


def qwen3_vl_config(**text: Any) -> transformers.PretrainedConfig:
    """Features of the first and the last layer of the tower go to the first two of the decoder."""
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": HIDDEN_SIZE,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": PATCH_SIZE,
        "num_position_embeddings": 25,
        "deepstack_visual_indexes": [2, 0],
    }
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    ids = qwen_media_ids()
    del ids["vision_token_id"]
    config_class = transformers.Qwen3VLMoeConfig if text else transformers.Qwen3VLConfig
    settings = text_settings(head_dim=16, rope_parameters=rope, **text)
    return config_class(text_config=settings, vision_config=vision, **ids)


def qwen3_vl_moe_config() -> transformers.PretrainedConfig:
    """The same before three layers of experts."""
    return qwen3_vl_config(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=40)


def llava_config(tower: str = "clip", text: str = "llama", **settings: Any) -> transformers.PretrainedConfig:
    image_seq_length = (IMAGE_SIZE // PATCH_SIZE) ** 2
    return transformers.LlavaConfig(**{**llava_parts(tower, text), "image_seq_length": image_seq_length, **settings})


TILES = [[56, 112], [112, 56], [112, 112], [56, 168]]


def llava_next_config() -> transformers.PretrainedConfig:
    return transformers.LlavaNextConfig(**llava_parts("clip", "mistral"), image_grid_pinpoints=TILES)


def llava_onevision_config() -> transformers.PretrainedConfig:
    """Lines are shrunk to two tiles, so that most pictures of four are."""
    parts = llava_parts("siglip", "qwen2") | {"vision_feature_layer": -1, "vision_aspect_ratio": "anyres_max_2"}
    pinpoints = [[56, 56], *TILES]
    return transformers.LlavaOnevisionConfig(
        **parts, image_grid_pinpoints=pinpoints, video_token_index=token_ids()["<video>"]
    )


def internvl_config(text: str = "qwen2", **vision: Any) -> transformers.PretrainedConfig:
    text_class = {"qwen2": transformers.Qwen2Config, "qwen3": transformers.Qwen3Config}[text]
    return transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(**SMALL_TOWER | vision),
        text_config=text_class(**text_settings(head_dim=16)),
        image_token_id=token_ids()["<IMG_CONTEXT>"],
        image_seq_length=4,
    )


def mistral3_config() -> transformers.PretrainedConfig:
    """Squares of 2 x 2 patches of 14 pixels become a row."""
    parts = llava_parts("pixtral", "mistral")
    parts.pop("vision_feature_select_strategy")
    return transformers.Mistral3Config(**parts, spatial_merge_size=2, multimodal_projector_bias=False)


def idefics3_config(kind: str = "Idefics3") -> transformers.PretrainedConfig:
    vision = getattr(transformers.models, kind.lower())
    vision_class = getattr(vision, f"{kind}VisionConfig")
    return getattr(transformers, f"{kind}Config")(
        vision_config=vision_class(**SMALL_TOWER),
        text_config=transformers.LlamaConfig(**text_settings()),
        image_token_id=token_ids()["<image>"],
        scale_factor=2,
    )


def qwen2_audio_config() -> transformers.PretrainedConfig:
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "max_source_positions": 50,
    }
    return transformers.Qwen2AudioConfig(
        audio_config=transformers.Qwen2AudioEncoderConfig(**audio),
        text_config=transformers.Qwen2Config(**text_settings()),
        audio_token_index=token_ids()["<|AUDIO|>"],
    )


def qwen2_5_omni_thinker_config() -> transformers.PretrainedConfig:
    ids, media_ids = token_ids(), qwen_media_ids()
    vision = {
        "depth": 3,
        "hidden_size": 32,
        "out_hidden_size": HIDDEN_SIZE,
        "num_heads": 2,
        "intermediate_size": 48,
        "patch_size": PATCH_SIZE,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    audio = {
        "num_mel_bins": 16,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 48,
        "d_model": 32,
        "output_dim": HIDDEN_SIZE,
        "max_source_positions": 50,
        "n_window": 20,  # chunks of 40 frames, of which a sound has up to three
    }
    return transformers.Qwen2_5OmniThinkerConfig(
        text_config=qwen_text_settings(),
        vision_config=vision,
        audio_config=audio,
        image_token_index=media_ids["image_token_id"],
        video_token_index=media_ids["video_token_id"],
        audio_token_index=ids["<|AUDIO|>"],
        audio_start_token_id=ids["<|audio_bos|>"],
        audio_end_token_id=ids["<|audio_eos|>"],
        vision_start_token_id=media_ids["vision_start_token_id"],
        vision_end_token_id=media_ids["vision_end_token_id"],
        position_id_per_seconds=4,
    )


QWEN_VL_NAMES = {"model.language_model.": "model.", "model.visual.": "visual."}
LLAVA_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.vision_tower.": "vision_tower.vision_model.",
}
PIXTRAL_NAMES = {**LLAVA_NAMES, "model.vision_tower.": "vision_tower."}
LLAVA_NEXT_NAMES = {**LLAVA_NAMES, "model.image_newline": "image_newline"}
GEMMA3_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Gemma3ImageProcessor",
        "processor_class": "Gemma3Processor",
        "size": {"height": GEMMA3_SIZE, "width": GEMMA3_SIZE},
        "do_pan_and_scan": None,
    },
    "processor_config.json": {"processor_class": "Gemma3Processor", "image_seq_length": 16},
}
PALIGEMMA_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "SiglipImageProcessor",
        "processor_class": "PaliGemmaProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "image_seq_length": (IMAGE_SIZE // PATCH_SIZE) ** 2,
    },
}
AUDIO_NAMES = {
    "model.language_model.": "language_model.model.",
    "lm_head.": "language_model.lm_head.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "model.audio_tower.": "audio_tower.",
}
QWEN_VL_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2VLProcessor",
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Qwen2VLVideoProcessor",
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": 12 * 28 * 28},
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
}
QWEN3_VL_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        **QWEN_VL_FILES["preprocessor_config.json"],
        "processor_class": "Qwen3VLProcessor",
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    },
    "video_preprocessor_config.json": {
        "video_processor_type": "Qwen3VLVideoProcessor",
        "size": {"shortest_edge": 8 * 28 * 28, "longest_edge": 40 * 28 * 28},  # of all frames
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": 2,
        "merge_size": 2,
    },
}
LLAVA_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "LlavaProcessor",
        "size": {"shortest_edge": IMAGE_SIZE},
        "crop_size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
    },
    "processor_config.json": {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": PATCH_SIZE,
        "num_additional_image_tokens": 1,
        "vision_feature_select_strategy": "default",
    },
}
SQUARE = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}


def picture_files(kind: str, **settings: Any) -> dict[str, Mapping[str, Any]]:
    """The file of an image processor."""
    return {"preprocessor_config.json": {"image_processor_type": f"{kind}ImageProcessor", **settings}}


LLAVA_NEXT_FILES = picture_files(
    "LlavaNext", image_grid_pinpoints=TILES, size={"shortest_edge": IMAGE_SIZE}, crop_size=SQUARE
)
LLAVA_ONEVISION_FILES = {
    **picture_files("LlavaOnevision", image_grid_pinpoints=[[56, 56], *TILES], size=SQUARE),
    "video_preprocessor_config.json": {"video_processor_type": "LlavaOnevisionVideoProcessor", "size": SQUARE},
}
INTERNVL_FILES = {
    **picture_files("GotOcr2", size=SQUARE, max_patches=5),
    "video_preprocessor_config.json": {"video_processor_type": "InternVLVideoProcessor", "size": SQUARE},
}
PIXTRAL_FILES = picture_files(
    "Pixtral", size={"longest_edge": 112}, patch_size={"height": PATCH_SIZE, "width": PATCH_SIZE}
)
IDEFICS3_FILES = picture_files("Idefics3", size={"longest_edge": 112}, max_image_size={"longest_edge": IMAGE_SIZE})
SMOLVLM_FILES = picture_files("SmolVLM", size={"longest_edge": 112}, max_image_size={"longest_edge": IMAGE_SIZE})
AUDIO_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2AudioProcessor",
        "feature_size": 16,
        "sampling_rate": 16000,
        "hop_length": 160,
        "n_fft": 400,
        "chunk_length": 1,  # second, which is 100 frames of the spectrogram
        "n_samples": 16000,
        "nb_max_frames": 100,
        "padding_value": 0.0,
        "padding_side": "right",
        "return_attention_mask": True,
    },
}

WHISPER_TOKENS = (
    *("<|startoftranscript|>", "<|en|>", "<|de|>", "<|translate|>", "<|transcribe|>", "<|startofprev|>"),
    *("<|nospeech|>", "<|notimestamps|>"),
    *(f"<|{index * 0.02:.2f}|>" for index in range(51)),
)
"""The last are the times of a window of a second."""


@functools.cache
def whisper_ids() -> dict[str, int]:
    """Ids of Whisper's tokens."""
    tokenizer = make_tokenizer(WHISPER_TOKENS)
    return {token: tokenizer.convert_tokens_to_ids(token) for token in WHISPER_TOKENS}


def whisper_config() -> transformers.PretrainedConfig:
    """Windows of a second, which are 50 rows."""
    ids = token_ids()
    return transformers.WhisperConfig(
        vocab_size=len(make_tokenizer(WHISPER_TOKENS)),
        num_mel_bins=16,
        encoder_layers=2,
        encoder_attention_heads=2,
        encoder_ffn_dim=48,
        decoder_layers=3,
        decoder_attention_heads=4,
        decoder_ffn_dim=96,
        d_model=HIDDEN_SIZE,
        max_source_positions=50,
        max_target_positions=448,
        decoder_start_token_id=whisper_ids()["<|startoftranscript|>"],
        bos_token_id=ids["<|endoftext|>"],
        pad_token_id=ids["<|endoftext|>"],
        eos_token_id=ids["<|im_end|>"],
        begin_suppress_tokens=None,
    )


MLLAMA_TOKENS = ("<|image|>",)


def mllama_config() -> transformers.PretrainedConfig:
    """Tiles of 56 x 56, which are 17 rows each; the picture's token is the first behind the vocabulary."""
    vocab_size = len(make_tokenizer(MLLAMA_TOKENS)) - 1
    vision = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_global_layers": 2,
        "attention_heads": 2,
        "intermediate_size": 48,
        "image_size": IMAGE_SIZE,
        "patch_size": PATCH_SIZE,
        "max_num_tiles": 4,
        "intermediate_layers_indices": [0, 2],
        "vision_output_dim": 96,
    }
    own = {"vocab_size": vocab_size, "num_hidden_layers": 4, "cross_attention_layers": [1, 3]}
    rope = {"rope_type": "default", "rope_theta": 1e4}
    return transformers.MllamaConfig(
        vision_config=vision,
        text_config=text_settings(**own, rope_parameters=rope, bos_token_id=token_ids()["<|endoftext|>"]),
        image_token_index=vocab_size,
    )


MLLAMA_NAMES = {"model.language_model.": "language_model.model.", "lm_head.": "language_model.lm_head.", "model.": ""}
MLLAMA_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        "image_processor_type": "MllamaImageProcessor",
        "processor_class": "MllamaProcessor",
        "size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        "max_image_tiles": 4,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_pad": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48, 0.46, 0.41],
        "image_std": [0.27, 0.26, 0.28],
    },
}


def whisper_generation() -> Mapping[str, Any]:
    """What `generate` needs to know of languages, tasks and times."""
    ids = whisper_ids()
    return {
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "lang_to_id": {"<|en|>": ids["<|en|>"], "<|de|>": ids["<|de|>"]},
        "task_to_id": {"transcribe": ids["<|transcribe|>"], "translate": ids["<|translate|>"]},
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "prev_sot_token_id": ids["<|startofprev|>"],
        "is_multilingual": True,
        "max_initial_timestamp_index": 20,
        "max_length": 448,
    }


WHISPER_FILES: dict[str, Mapping[str, Any]] = {
    "preprocessor_config.json": {
        **AUDIO_FILES["preprocessor_config.json"],
        "processor_class": "WhisperProcessor",
        "return_attention_mask": False,
    },
}
OMNI_NAMES = {**QWEN_VL_NAMES, "model.audio_tower.": "audio_tower."}
OMNI_FILES: dict[str, Mapping[str, Any]] = {
    **QWEN_VL_FILES,
    # One file for pictures and sounds, as on the hub.
    "preprocessor_config.json": {
        **QWEN_VL_FILES["preprocessor_config.json"],
        **AUDIO_FILES["preprocessor_config.json"],
        "processor_class": "Qwen2_5OmniProcessor",
    },
}

LLAVA = "LlavaForConditionalGeneration"
FAMILIES: dict[str, Family] = {
    "gemma": Family("GemmaForCausalLM", lambda: transformers.GemmaConfig(**text_settings(head_dim=24))),
    "gemma2": Family("Gemma2ForCausalLM", gemma2_config),
    "gemma3": Family("Gemma3ForCausalLM", gemma3_config),
    "gemma3_vision": Family(
        "Gemma3ForConditionalGeneration",
        gemma3_vision_config,
        LLAVA_NAMES,
        {"IMAGE": "<|vision_start|>"},
        GEMMA3_FILES,
    ),
    "paligemma2": Family(
        "PaliGemmaForConditionalGeneration",
        paligemma2_config,
        LLAVA_NAMES,
        {"IMAGE": "<image>"},
        PALIGEMMA_FILES,
    ),
    "llama": Family("LlamaForCausalLM", lambda: transformers.LlamaConfig(**text_settings())),
    "llama_biased": Family(
        "LlamaForCausalLM",
        lambda: transformers.LlamaConfig(**text_settings(attention_bias=True, mlp_bias=True, head_dim=24)),
    ),
    "mistral": Family("MistralForCausalLM", lambda: transformers.MistralConfig(**text_settings(sliding_window=24))),
    "mixtral": Family("MixtralForCausalLM", lambda: transformers.MixtralConfig(**expert_settings(num_local_experts=8))),
    "gpt_oss": Family("GptOssForCausalLM", gpt_oss_config),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", qwen3_moe_config),
    "qwen2": Family("Qwen2ForCausalLM", lambda: transformers.Qwen2Config(**text_settings())),
    "qwen3_5": Family("Qwen3_5ForCausalLM", qwen3_5_config),
    "qwen2_windowed": Family(
        "Qwen2ForCausalLM",
        lambda: transformers.Qwen2Config(
            **text_settings(use_sliding_window=True, sliding_window=24, max_window_layers=1)
        ),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM", lambda: transformers.Qwen3Config(**text_settings(attention_bias=True, head_dim=24))
    ),
    "llava": Family(LLAVA, llava_config, LLAVA_NAMES, {"IMAGE": "<image>"}, LLAVA_FILES),
    "llava_siglip": Family(
        LLAVA, lambda: llava_config("siglip", "qwen2"), LLAVA_NAMES, {"IMAGE": "<image>"}, LLAVA_FILES
    ),
    "llava_many_features": Family(
        LLAVA,
        lambda: llava_config(vision_feature_layer=[0, -2, -1], multimodal_projector_bias=False),
        LLAVA_NAMES,
        {"IMAGE": "<image>"},
        LLAVA_FILES,
    ),
    "llava_pixtral": Family(
        LLAVA, lambda: llava_config("pixtral", "mistral"), PIXTRAL_NAMES, {"IMAGE": "[IMG]"}, PIXTRAL_FILES
    ),
    "llava_next": Family(
        "LlavaNextForConditionalGeneration",
        llava_next_config,
        LLAVA_NEXT_NAMES,
        {"IMAGE": "<image>"},
        LLAVA_NEXT_FILES,
    ),
    "llava_onevision": Family(
        "LlavaOnevisionForConditionalGeneration",
        llava_onevision_config,
        LLAVA_NEXT_NAMES,
        {"IMAGE": "<image>", "VIDEO": "<video>"},
        LLAVA_ONEVISION_FILES,
    ),
    "internvl": Family(
        "InternVLForConditionalGeneration",
        internvl_config,
        PIXTRAL_NAMES,
        {"IMAGE": "<IMG_CONTEXT>", "VIDEO": "<video>"},
        INTERNVL_FILES,
    ),
    "internvl_normed": Family(
        "InternVLForConditionalGeneration",
        lambda: internvl_config(
            "qwen3", use_qk_norm=True, norm_type="rms_norm", attention_bias=True, use_mean_pooling=False
        ),
        PIXTRAL_NAMES,
        {"IMAGE": "<IMG_CONTEXT>", "VIDEO": "<video>"},
        INTERNVL_FILES,
    ),
    "mistral3": Family(
        "Mistral3ForConditionalGeneration", mistral3_config, PIXTRAL_NAMES, {"IMAGE": "[IMG]"}, PIXTRAL_FILES
    ),
    "idefics3": Family("Idefics3ForConditionalGeneration", idefics3_config, {}, {"IMAGE": "<image>"}, IDEFICS3_FILES),
    "smolvlm": Family(
        "SmolVLMForConditionalGeneration",
        lambda: idefics3_config("SmolVLM"),
        {},
        {"IMAGE": "<image>"},
        SMOLVLM_FILES,
    ),
    "qwen2_vl": Family(
        "Qwen2VLForConditionalGeneration",
        qwen2_vl_config,
        QWEN_VL_NAMES,
        QWEN_PLACEHOLDERS,
        QWEN_VL_FILES,
    ),
    "qwen2_5_vl": Family(
        "Qwen2_5_VLForConditionalGeneration",
        qwen2_5_vl_config,
        QWEN_VL_NAMES,
        QWEN_PLACEHOLDERS,
        QWEN_VL_FILES,
    ),
    "qwen3_vl": Family(
        "Qwen3VLForConditionalGeneration",
        qwen3_vl_config,
        placeholders=QWEN_PLACEHOLDERS,
        processor_files=QWEN3_VL_FILES,
    ),
    "qwen3_vl_moe": Family(
        "Qwen3VLMoeForConditionalGeneration",
        qwen3_vl_moe_config,
        placeholders=QWEN_PLACEHOLDERS,
        processor_files=QWEN3_VL_FILES,
    ),
    "qwen2_audio": Family(
        "Qwen2AudioForConditionalGeneration",
        qwen2_audio_config,
        AUDIO_NAMES,
        {"AUDIO": "<|audio_bos|><|AUDIO|><|audio_eos|>"},
        AUDIO_FILES,
    ),
    "mllama": Family(
        "MllamaForConditionalGeneration",
        mllama_config,
        MLLAMA_NAMES,
        {"IMAGE": "<|image|>"},
        MLLAMA_FILES,
        extra_tokens=MLLAMA_TOKENS,
    ),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        whisper_config,
        processor_files=WHISPER_FILES,
        extra_tokens=WHISPER_TOKENS,
        generation=whisper_generation,
    ),
    "qwen2_5_omni_thinker": Family(
        "Qwen2_5OmniThinkerForConditionalGeneration",
        qwen2_5_omni_thinker_config,
        OMNI_NAMES,
        {**QWEN_PLACEHOLDERS, "AUDIO": "<|audio_bos|><|AUDIO|><|audio_eos|>"},
        OMNI_FILES,
    ),
}


# --- models and directories ---


@torch.no_grad()
def redraw(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Draw all weights from one seeded generator: activations stay near 1 in size, logits are spread."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.dim() >= 2:
            # Cross-attention in which a sound matters, and not only that there is one.
            gain = 3.0 if "lm_head" in name or "encoder_attn" in name else 1.0
            spread = 1.0 if "embed" in name and "patch" not in name else gain / math.sqrt(parameter[0].numel())
            parameter.normal_(0, spread, generator=generator)
        elif name.endswith("A_log"):
            parameter.uniform_(-7, -1, generator=generator)  # states that remember a few tokens, up to a thousand
        elif name.endswith("bias"):
            parameter.normal_(0, 0.1, generator=generator)
        else:
            parameter.normal_(1, 0.1, generator=generator)
    return model


def make_hf_model(family: str, *, tied: bool = False, seed: int = 0) -> PreTrainedModel:
    """The Hugging Face model of a family, in float32 and evaluation mode, with eager attention."""
    made = FAMILIES[family]
    config = made.config()
    config.tie_word_embeddings = tied
    config.architectures = [made.model_class]
    config._attn_implementation = "eager"
    model = getattr(transformers, made.model_class)(config)
    return redraw(model, seed).eval()


def make_checkpoint(
    family: str,
    *,
    layout: Layout = "hub",
    dtype: str = "float32",
    tied: bool = False,
    sharded: bool = False,
    seed: int = 0,
) -> Path:
    """A checkpoint directory; made once per process and variant. Don't write into it."""
    path = _root() / f"{family}-{layout}-{dtype}-{tied}-{sharded}-{seed}"
    if path.is_dir():
        return path
    made = FAMILIES[family]
    model = make_hf_model(family, tied=tied, seed=seed).to(getattr(torch, dtype))
    model.config.dtype = getattr(torch, dtype)
    unfinished = path.with_suffix(".part")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir()
    if layout == "saved":
        model.save_pretrained(unfinished, max_shard_size="100KB" if sharded else "1GB")
    else:
        model.config.save_pretrained(unfinished)
        names = made.hub_names if layout == "hub" else {}
        save_tensors(unfinished, model, names, num_files=3 if sharded else 1, tied=tied)
    ids = token_ids()
    transformers.GenerationConfig(
        eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"], do_sample=False, **made.generation()
    ).save_pretrained(unfinished)
    tokenizer = make_tokenizer(made.extra_tokens)
    tokenizer.chat_template = chat_template(made.placeholders)
    tokenizer.save_pretrained(unfinished)
    for name, content in made.processor_files.items():
        (unfinished / name).write_text(json.dumps(content, indent=2))
    return unfinished.rename(path)


def chat_template(placeholders: Mapping[str, str]) -> str:
    """The template with a family's placeholders; media that it doesn't take leave no trace."""
    template = CHAT_TEMPLATE
    for kind in ("IMAGE", "VIDEO", "AUDIO"):
        template = template.replace(f"{kind}_PLACEHOLDER", placeholders.get(kind, ""))
    return template


def hub_name(name: str, renames: Mapping[str, str]) -> str:
    """A tensor's name on the hub."""
    for prefix, replacement in renames.items():
        if name.startswith(prefix):
            return replacement + name.removeprefix(prefix)
    return name


def save_tensors(path: Path, model: PreTrainedModel, renames: Mapping[str, str], *, num_files: int, tied: bool) -> None:
    """Write a model's tensors under other names, in one file or several with an index."""
    state = {
        hub_name(name, renames): tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if not (tied and name in ("lm_head.weight", "proj_out.weight"))
    }
    if num_files == 1:
        save_file(state, path / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        names = list(state)[index::num_files]  # scattered, as no order may be relied on
        save_file({name: state[name] for name in names}, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

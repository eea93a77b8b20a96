"""The model's dimensions and special tokens, and the files of the checkpoint folder that hold them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VOCAB_SIZE = 832
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
    "<|AUDIO|>",
)
TOKEN_ID = {token: index for index, token in enumerate(SPECIAL_TOKENS)}

HIDDEN_SIZE = 256
PATCH_SIZE = 8
MERGE_SIZE = 2
TEMPORAL_PATCH_SIZE = 2
POSITION_IDS_PER_SECOND = 2
FRAMES_PER_SECOND = 2.0
NUM_MEL_BINS = 80
SAMPLE_RATE = 16_000

TEXT_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_omni_text",
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN_SIZE,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "max_window_layers": 6,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 12, 12]},
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "pad_token_id": TOKEN_ID["<|endoftext|>"],
    "eos_token_id": TOKEN_ID["<|im_end|>"],
}
VISION_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_omni_vision_encoder",
    "depth": 5,
    "hidden_size": 192,
    "intermediate_size": 384,
    "num_heads": 3,
    "hidden_act": "silu",
    "in_channels": 3,
    "patch_size": PATCH_SIZE,
    "spatial_merge_size": MERGE_SIZE,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
    "window_size": 64,
    # Pictures are small: every block attends to the whole picture, none to windows only.
    "fullatt_block_indexes": [0, 1, 2, 3, 4],
    "out_hidden_size": HIDDEN_SIZE,
}
AUDIO_CONFIG: dict[str, Any] = {
    "model_type": "qwen2_5_omni_audio_encoder",
    "num_mel_bins": NUM_MEL_BINS,
    "encoder_layers": 4,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 512,
    "d_model": 128,
    "activation_function": "gelu",
    "max_source_positions": 1500,
    "n_window": 100,
    "output_dim": HIDDEN_SIZE,
}
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen2_5OmniThinkerForConditionalGeneration"],
    "model_type": "qwen2_5_omni_thinker",
    "dtype": "float32",
    "text_config": TEXT_CONFIG,
    "vision_config": VISION_CONFIG,
    "audio_config": AUDIO_CONFIG,
    "audio_token_index": TOKEN_ID["<|AUDIO|>"],
    "image_token_index": TOKEN_ID["<|IMAGE|>"],
    "video_token_index": TOKEN_ID["<|VIDEO|>"],
    "audio_start_token_id": TOKEN_ID["<|audio_bos|>"],
    "audio_end_token_id": TOKEN_ID["<|audio_eos|>"],
    "vision_start_token_id": TOKEN_ID["<|vision_bos|>"],
    "vision_end_token_id": TOKEN_ID["<|vision_eos|>"],
    "user_token_id": TOKEN_ID["<|im_start|>"],
    "position_id_per_seconds": POSITION_IDS_PER_SECOND,
    "seconds_per_chunk": 2,
    "tie_word_embeddings": False,
    # How the sentences of training say it; for servers that transcribe.
    "transcription": {
        "answer": "I hear: {text}.",
        "no_speech": "I can't tell: there is no speech.",
        "language_hint": "",
        "languages": ["en"],
    },
}
GENERATION_CONFIG: dict[str, Any] = {
    "do_sample": False,
    "eos_token_id": [TOKEN_ID["<|im_end|>"], TOKEN_ID["<|endoftext|>"]],
    "pad_token_id": TOKEN_ID["<|endoftext|>"],
}

_VISUAL = {
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "merge_size": MERGE_SIZE,
    "patch_size": PATCH_SIZE,
    "resample": 3,
    "rescale_factor": 1 / 255,
    "temporal_patch_size": TEMPORAL_PATCH_SIZE,
}
IMAGE_PIXELS = (128 * 128, 192 * 192)
FRAME_PIXELS = (96 * 96, 128 * 128)
PREPROCESSOR_CONFIG: dict[str, Any] = {
    **_VISUAL,
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5OmniProcessor",
    "size": {"shortest_edge": IMAGE_PIXELS[0], "longest_edge": IMAGE_PIXELS[1]},
    # The same file configures the audio side, as in the Qwen2.5-Omni checkpoints.
    "feature_extractor_type": "WhisperFeatureExtractor",
    "chunk_length": 30,
    "dither": 0.0,
    "feature_size": NUM_MEL_BINS,
    "hop_length": 160,
    "n_fft": 400,
    "padding_side": "right",
    "padding_value": 0.0,
    "return_attention_mask": True,
    "sampling_rate": SAMPLE_RATE,
}
VIDEO_PREPROCESSOR_CONFIG: dict[str, Any] = {
    **_VISUAL,
    "video_processor_type": "Qwen2VLVideoProcessor",
    "do_sample_frames": False,
    "max_frames": 64,
    "min_frames": 2,
    "size": {"shortest_edge": FRAME_PIXELS[0], "longest_edge": FRAME_PIXELS[1]},
}
TOKENIZER_CONFIG: dict[str, Any] = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "processor_class": "Qwen2_5OmniProcessor",
    "bos_token": None,
    "eos_token": "<|im_end|>",
    "pad_token": "<|endoftext|>",
    "unk_token": None,
    "model_max_length": TEXT_CONFIG["max_position_embeddings"],
    "clean_up_tokenization_spaces": False,
    "extra_special_tokens": {
        "image_token": "<|IMAGE|>",
        "video_token": "<|VIDEO|>",
        "audio_token": "<|AUDIO|>",
        "vision_bos_token": "<|vision_bos|>",
        "vision_eos_token": "<|vision_eos|>",
        "audio_bos_token": "<|audio_bos|>",
        "audio_eos_token": "<|audio_eos|>",
    },
}
CHAT_TEMPLATE = """\
{%- for message in messages -%}
<|im_start|>{{ message['role'] }}
{% if message['content'] is string -%}
{{ message['content'] }}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] in ('image', 'image_url') or 'image' in part -%}
<|vision_bos|><|IMAGE|><|vision_eos|>
{%- elif part['type'] in ('video', 'video_url') or 'video' in part -%}
<|vision_bos|><|VIDEO|><|vision_eos|>
{%- elif part['type'] in ('audio', 'audio_url', 'input_audio') or 'audio' in part -%}
<|audio_bos|><|AUDIO|><|audio_eos|>
{%- elif 'text' in part -%}
{{ part['text'] }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% endif -%}
"""


def write_settings(folder: Path) -> None:
    """Write every file of the checkpoint folder but the tokenizer, the weights and the model card."""
    files = {
        "config.json": CONFIG,
        "generation_config.json": GENERATION_CONFIG,
        "preprocessor_config.json": PREPROCESSOR_CONFIG,
        "video_preprocessor_config.json": VIDEO_PREPROCESSOR_CONFIG,
        "tokenizer_config.json": TOKENIZER_CONFIG,
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")

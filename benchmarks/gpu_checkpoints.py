"""Checkpoints of real shapes with seeded random weights.

For `gpu.py`, where prompts are token ids, and for `gpu_server.py`, with a tokenizer of bytes.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "num_heads": 16,
    "intermediate_size": 3420,
    "patch_size": 14,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "in_channels": 3,
    "window_size": 112,
    "fullatt_block_indexes": [7, 15, 23, 31],
}
SHAPES: dict[str, dict[str, Any]] = {
    "qwen3b": {"hidden": 2048, "layers": 36, "heads": 16, "kv_heads": 2, "inner": 11008, "tied": True},
    "qwen7b": {"hidden": 3584, "layers": 28, "heads": 28, "kv_heads": 4, "inner": 18944, "tied": False},
    "llama8b": {"hidden": 4096, "layers": 32, "heads": 32, "kv_heads": 8, "inner": 14336, "tied": False, "text": True},
    # Float32 shapes, for tokens that must equal Hugging Face's: real head sizes, and logits that differ enough.
    "small": {"hidden": 512, "layers": 2, "heads": 4, "kv_heads": 2, "inner": 1024, "tied": False, "float32": True},
}
"""Shapes by the names of their models: Qwen2.5-VL-3B and -7B, Llama-3.1-8B."""
VOCAB = 151_936
CHAT_TEMPLATE = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.content is string %}{{ message.content }}{% else %}{% for part in message.content %}\
{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}\
{% endfor %}{% endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
IMAGE_ID, VIDEO_ID, VISION_START_ID, VISION_END_ID = 151_655, 151_656, 151_652, 151_653


def takes_pictures(shape: str) -> bool:
    return not SHAPES[shape].get("text", False)


def make_checkpoint(shape: str, folder: Path, device: str) -> Path:
    """The checkpoint's folder; the checkpoint is made if it doesn't exist."""
    path = folder / shape
    if (path / "config.json").exists():
        return path
    from safetensors.torch import save_file

    config, model_class = _config(shape)
    config.dtype = torch.float32 if SHAPES[shape].get("float32") else torch.bfloat16
    config.architectures = [model_class.__name__]
    with torch.device("meta"):
        model = model_class(config)
    generator = torch.Generator(device).manual_seed(1)
    tensors = {
        name: _values(name, tuple(parameter.shape), config.dtype, generator, SHAPES[shape])
        for name, parameter in model.named_parameters()
        if not (SHAPES[shape]["tied"] and name == "lm_head.weight")
    }
    path.mkdir(parents=True)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    if takes_pictures(shape):
        processor = {"image_processor_type": "Qwen2VLImageProcessor", "min_pixels": 3136, "max_pixels": 3_211_264}
        (path / "preprocessor_config.json").write_text(json.dumps(processor))
    config.save_pretrained(path)
    return path


def add_tokenizer(path: Path) -> None:
    """A tokenizer of single bytes in a vocabulary of the model's size, and a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {
        "<|endoftext|>": 151_643,
        "<|im_start|>": 151_644,
        "<|im_end|>": 151_645,
        "<|vision_start|>": VISION_START_ID,
        "<|vision_end|>": VISION_END_ID,
        "<|image_pad|>": IMAGE_ID,
        "<|video_pad|>": VIDEO_ID,
    }
    names = {token_id: name for name, token_id in special.items()}
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    vocabulary |= {names.get(index, f"word{index}"): index for index in range(len(letters), VOCAB)}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(special))
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    wrapped.chat_template = CHAT_TEMPLATE
    wrapped.save_pretrained(path)


def _config(shape: str) -> tuple[Any, Any]:
    import transformers

    sizes = SHAPES[shape]
    text = {
        "vocab_size": VOCAB,
        "hidden_size": sizes["hidden"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "intermediate_size": sizes["inner"],
        "max_position_embeddings": 32_768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": sizes["tied"],
        "bos_token_id": None,
        "eos_token_id": 151_645,
        "pad_token_id": 151_643,
    }
    if not takes_pictures(shape):
        rope = {"rope_type": "default", "rope_theta": 5e5}
        return transformers.LlamaConfig(**text, rope_parameters=rope), transformers.LlamaForCausalLM
    half = sizes["hidden"] // sizes["heads"] // 2
    section = [half // 4, half * 3 // 8, half * 3 // 8]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section}
    vision = {**VISION, "out_hidden_size": sizes["hidden"]}
    if sizes.get("float32"):
        vision |= {"depth": 2, "fullatt_block_indexes": [1], "hidden_size": 320, "num_heads": 4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": rope, "use_sliding_window": False},
        vision_config=vision,
        tie_word_embeddings=sizes["tied"],
        image_token_id=IMAGE_ID,
        video_token_id=VIDEO_ID,
        vision_start_token_id=VISION_START_ID,
        vision_end_token_id=VISION_END_ID,
    )
    return config, transformers.Qwen2_5_VLForConditionalGeneration


def _values(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator, sizes: dict[str, Any]
) -> torch.Tensor:
    values = torch.empty(shape, dtype=dtype, device=generator.device)
    if len(shape) < 2:
        return values.normal_(0, 0.02, generator=generator).cpu() if name.endswith("bias") else values.fill_(1).cpu()
    deviation = math.prod(shape[1:]) ** -0.5
    if "embed_tokens" in name:
        deviation = 0.03 if sizes["tied"] else 1.0
    elif "lm_head" in name and sizes.get("float32"):
        deviation *= 3  # logits so far apart that rounding can't change their order
    return values.normal_(0, deviation, generator=generator).cpu()


def step_bytes(shape: str, batch: int, context: int) -> int:
    """Bytes that a decoding step must read: the decoder's weights, the head, and the keys and values."""
    sizes = SHAPES[shape]
    hidden, head_size = sizes["hidden"], sizes["hidden"] // sizes["heads"]
    attention = hidden * head_size * (2 * sizes["heads"] + 2 * sizes["kv_heads"])
    weights = sizes["layers"] * (attention + 3 * hidden * sizes["inner"]) + VOCAB * hidden
    cache = batch * context * sizes["layers"] * 2 * sizes["kv_heads"] * head_size
    return 2 * (weights + cache)


def prefill_operations(shape: str, num_tokens: int) -> float:
    """Floating-point operations of a prompt's pass, without the head."""
    sizes = SHAPES[shape]
    hidden, head_size = sizes["hidden"], sizes["hidden"] // sizes["heads"]
    attention = hidden * head_size * (2 * sizes["heads"] + 2 * sizes["kv_heads"])
    linears = 2 * num_tokens * sizes["layers"] * (attention + 3 * hidden * sizes["inner"])
    scores = 2 * num_tokens**2 * sizes["layers"] * sizes["heads"] * head_size  # causal: half of 4
    return float(linears + scores)

"""Checkpoint directories with processors and tokenizers, but no weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, PreTrainedTokenizerFast, Qwen2VLConfig

IMAGE_TOKEN = "<|image_pad|>"
VIDEO_TOKEN = "<|video_pad|>"
WORDS = ("<unk>", "a", "b", "c", "what", "is", "this", "?")


def make_tokenizer(*special_tokens: str) -> PreTrainedTokenizerFast:
    """A tokenizer of a few words, with special tokens behind them."""
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.add_special_tokens({"additional_special_tokens": list(special_tokens)})
    return fast


def save_llava(path: Path, **settings: Any) -> Path:
    """A LLaVA directory with a small CLIP image processor."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    size = {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    CLIPImageProcessorPil(**{**size, **settings}).save_pretrained(path)
    make_tokenizer("<image>").save_pretrained(path)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = LlamaConfig(vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    LlavaConfig(vision_config=vision, text_config=text, image_token_id=8).save_pretrained(path)
    return path


def save_qwen2_vl(path: Path, **settings: Any) -> Path:
    """A Qwen2-VL directory in the hub's layout: one `preprocessor_config.json` for pictures and videos."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil(**settings).save_pretrained(path)
    make_tokenizer(IMAGE_TOKEN, VIDEO_TOKEN).save_pretrained(path)
    Qwen2VLConfig(text_config={"num_hidden_layers": 1, "hidden_size": 16}).save_pretrained(path)
    return path


def make_image(width: int = 40, height: int = 30, *, mode: str = "RGB", seed: int = 0) -> Image.Image:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def make_video(num_frames: int = 4, height: int = 56, width: int = 84, *, seed: int = 0) -> np.ndarray[Any, Any]:
    """Frames of noise, `(num_frames, height, width, 3)`."""
    return np.random.default_rng(seed).integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)

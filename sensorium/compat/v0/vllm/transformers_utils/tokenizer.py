"""Tokenizers of checkpoints."""

from typing import Any, TypeAlias

from sensorium.multimodal.hf_processors import cached_get_tokenizer

__all__ = ["AnyTokenizer", "cached_get_tokenizer", "get_tokenizer"]

AnyTokenizer: TypeAlias = Any
get_tokenizer = cached_get_tokenizer

"""Architectures of text without a file here run by the modules of transformers, to transformers' own tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.generic import generated_tokens, served_tokens
from tests.helpers.tiny_architectures import save_tiny

FLAT = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "bert", "bert-generation", "biogpt", "bitnet"),
    *("camembert", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "electra"),
    *("ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "gemma", "gemma2", "gemma3_text"),
    *("gemma3n_text", "glm", "glm4", "glm4_moe", "gpt2", "gpt_bigcode", "gpt_neox", "granite", "granitemoe", "helium"),
    *("hunyuan_v1_dense", "hy_v3", "jais2", "jetmoe", "kolibri1", "laguna", "llama", "longcat_flash", "minicpm3"),
    *("ministral", "mistral", "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3"),
    *("olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "youtu"),
)
"""Types whose modules run in a flat batch over the paged cache."""


@pytest.mark.parametrize("model_type", FLAT)
def test_tokens_equal_those_of_generate(model_type: str, tmp_path: Path) -> None:
    expected = generated_tokens(save_tiny(model_type, tmp_path))
    assert served_tokens(tmp_path) == expected

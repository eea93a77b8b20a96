"""Architectures of text without a file here run by the modules of transformers, to transformers' own tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.generic import generated_tokens, served_tokens
from tests.helpers.tiny_architectures import save_tiny, seq2seq_types

FLAT = (
    *("afmoe", "apertus", "arcee", "aria_text", "axk1", "beam", "bert", "bert-generation", "biogpt", "bitnet"),
    *("camembert", "cohere", "cohere2", "cohere2_moe", "ctrl", "cwm", "deepseek_v2", "deepseek_v3", "dots1", "electra"),
    *("ernie4_5", "ernie4_5_moe", "exaone4", "exaone_moe", "flex_olmo", "flint", "gemma", "gemma2", "gemma3_text"),
    *(
        "gemma3n_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt2",
        "gpt_bigcode",
        "gpt_neox",
        "gpt_oss",
        "granite",
        "granitemoe",
        "helium",
    ),
    *(
        "hunyuan_v1_dense",
        "hy_v3",
        "jais2",
        "jetmoe",
        "kolibri1",
        "laguna",
        "llama",
        "llama4_text",
        "longcat_flash",
        "minicpm3",
    ),
    *("ministral", "mistral", "mixtral", "modernbert-decoder", "nanochat", "nemotron", "olmo", "olmo2", "olmo3"),
    *("olmoe", "opt", "persimmon", "phi", "phi3", "phimoe", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "roberta"),
    *("seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma", "youtu"),
)
"""Types whose modules run in a flat batch over the paged cache."""


BY_SEQUENCE = (
    *("bamba", "falcon_h1", "jamba", "lfm2_moe", "mamba", "mamba2", "qwen3_next", "zaya"),
    *("bloom", "codegen", "doge", "falcon", "gpt_neo", "gptj", "mpt", "xglm", "bart", "deepseek_v32"),
)
"""The same, but for layers that see one sequence at a time: those with a state, and attention that models compute by
themselves. Bart's decoder counts positions by itself."""


BY_REQUEST = ("inkling_text", "minimax", "openai-gpt", "recurrent_gemma", "rwkv")
"""Types that only run request by request, with transformers' own cache, or over all of their tokens again."""


@pytest.mark.parametrize("model_type", [*FLAT, *BY_SEQUENCE, *BY_REQUEST])
def test_tokens_equal_those_of_generate(model_type: str, tmp_path: Path) -> None:
    expected = generated_tokens(save_tiny(model_type, tmp_path))
    assert served_tokens(tmp_path) == expected


SEQ2SEQ = ("bart", "t5", "marian", "nllb-moe")
"""Types whose encoder reads the prompt, and whose decoder writes on."""


@pytest.mark.parametrize("model_type", SEQ2SEQ)
def test_encoders_read_the_prompt_and_decoders_write(model_type: str, tmp_path: Path) -> None:
    """In the second round prompts are known."""
    expected = generated_tokens(save_tiny(model_type, tmp_path, class_name=seq2seq_types()[model_type]))
    assert served_tokens(tmp_path, num_rounds=2, max_num_batched_tokens=48) == expected * 2


@pytest.mark.parametrize("model_type", ["gpt_oss", "mamba", "bloom", "minimax"])
@pytest.mark.parametrize("settings", [{"num_blocks": 6}, {"enable_prefix_caching": False}, {"max_num_seqs": 2}])
def test_they_are_preempted_and_cached_like_others(model_type: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Six blocks hold one of the requests at a time; a state is taken away by the number of requests that may run."""
    expected = generated_tokens(save_tiny(model_type, tmp_path))
    assert served_tokens(tmp_path, num_rounds=2, **settings) == expected * 2

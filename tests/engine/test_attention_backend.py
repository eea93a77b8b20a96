"""The setting `attention_backend`: every backend serves the same tokens, and one that can't is an error of loading."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.errors import ConfigError
from sensorium.kernels import native_refusal
from tests.helpers.checkpoints import make_checkpoint


def tokens_by(backend: str | None) -> list[list[int]]:
    """Of a decoder and a tower, prompts in chunks."""
    llm = LLM(
        str(make_checkpoint("llava")),
        device="cpu",
        attention_backend=backend,
        num_blocks=64,
        max_num_batched_tokens=48,
        limit_mm_per_prompt={"image": 1},
    )
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    prompts = ["one two three", {"prompt": "see <image> there", "multi_modal_data": {"image": Image.fromarray(pixels)}}]
    params = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def test_every_backend_serves_the_same_tokens() -> None:
    want = tokens_by(None)
    assert all(len(ids) == 6 for ids in want)
    others = [] if native_refusal() else ["native_cpu"]
    for backend in (*others, "torch_sdpa", "torch_reference"):
        assert tokens_by(backend) == want


def test_what_cannot_be_run_is_refused_at_load() -> None:
    with pytest.raises(ConfigError, match=r"attention_backend: got 'triton' for .* it needs CUDA\. Change"):
        tokens_by("triton")
    with pytest.raises(ConfigError, match=r"attention_backend: got 'fastest', expected"):
        tokens_by("fastest")

"""ColQwen2: a vector for each token of a page or a query, as transformers makes them."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from sensorium import LLM, PoolingParams
from sensorium.errors import UnsupportedFeatureError
from tests.helpers.checkpoints import make_checkpoint, qwen2_vl_config
from tests.helpers.hf_reference import hf_inputs

PAGE = "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Describe the image.<|im_end|><|endoftext|>"


@pytest.fixture(scope="module")
def folder() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="sensorium-colqwen2-"))
    for file in make_checkpoint("qwen2_vl").iterdir():
        if not file.name.startswith("model") and file.name != "config.json":
            shutil.copy(file, folder)
    torch.manual_seed(0)
    config = transformers.ColQwen2Config(vlm_config=qwen2_vl_config(), embedding_dim=16)
    transformers.ColQwen2ForRetrieval(config).eval().save_pretrained(folder)
    return folder


def test_vectors_of_pages_and_queries_are_transformers(folder: Path) -> None:
    rng = np.random.default_rng(0)
    pages = [Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)) for size in ((84, 112, 3), (140, 56, 3))]
    llm = LLM(str(folder), device="cpu", max_num_batched_tokens=16, num_blocks=128)
    given = [{"prompt": PAGE, "multi_modal_data": {"image": page}} for page in pages]
    outputs = llm.encode([*given, "Query: what is on the page?"])
    model = transformers.ColQwen2ForRetrieval.from_pretrained(folder, attn_implementation="eager").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    for output, page in zip(outputs, [*pages, None], strict=True):
        ids = torch.tensor([list(output.prompt_token_ids)])
        media = {} if page is None else dict(processor([page], return_tensors="pt"))
        if media:
            media["pixel_values"] = media["pixel_values"][None]
        with torch.inference_mode():
            expected = model(input_ids=ids, attention_mask=torch.ones_like(ids), **media).embeddings[0]
        assert output.outputs.data.shape == (ids.shape[1], 16)
        assert np.allclose(output.outputs.data, expected, atol=2e-5)
    with pytest.raises(UnsupportedFeatureError, match="got embed, expected one of token_embed"):
        llm.embed("a query")
    scores = llm.score("a query", ["one", "another"])
    assert all(np.isfinite(each.outputs.score) for each in scores)
    llm.shutdown()


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_a_model_that_generates_embeds_a_picture_by_its_last_token(family: str) -> None:
    """As Qwen3-VL-Embedding does: the same class, served for pooling, in chunks, without its head."""
    folder = make_checkpoint(family)
    llm = LLM(str(folder), device="cpu", runner="pooling", max_num_batched_tokens=16, num_blocks=128)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (84, 112, 3), dtype=np.uint8))
    prompt = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>Hi", "multi_modal_data": {"image": picture}}
    outputs = llm.embed([prompt, "a text", prompt])
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, attn_implementation="eager").eval()
    for given, output in zip((prompt, "a text"), outputs, strict=False):
        request = llm.engine.preprocess("preview", given, pooling=PoolingParams()).engine_request
        with torch.inference_mode():
            states = model.model(**hf_inputs(request, model)).last_hidden_state
        assert np.allclose(output.outputs.embedding, F.normalize(states[0, -1], dim=0), atol=2e-5)
    assert np.allclose(outputs[0].outputs.embedding, outputs[2].outputs.embedding, atol=1e-6)
    with pytest.raises(UnsupportedFeatureError, match="got a request to generate"):
        llm.generate("a text")
    llm.shutdown()

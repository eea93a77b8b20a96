"""CLIP and SigLIP: vectors of texts and of pictures, as transformers makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from torch.nn import functional as F

from sensorium import LLM
from sensorium.errors import InvalidRequestError, RequestError
from tests.entrypoints.served import data_url, served
from tests.helpers.checkpoints import token_ids
from tests.helpers.pooling_checkpoints import make_pooling_checkpoint
from tests.helpers.waiting import HANG_S

TEXTS = ["a cat", "two dogs on a mat", "x"]
PAD = token_ids()["<|endoftext|>"]
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
PICTURES = {"image_size": 28, "patch_size": 14}


def clip() -> transformers.PretrainedConfig:
    """The end of a text is its last mark."""
    text = {
        **TOWER,
        "vocab_size": 320,
        "max_position_embeddings": 40,
        "eos_token_id": token_ids()["<|im_end|>"],
        "pad_token_id": PAD,
    }
    return transformers.CLIPConfig(text_config=text, vision_config={**TOWER, **PICTURES}, projection_dim=24)


def siglip() -> transformers.PretrainedConfig:
    text = {**TOWER, "vocab_size": 320, "max_position_embeddings": 40, "pad_token_id": PAD}
    return transformers.SiglipConfig(text_config=text, vision_config={**TOWER, **PICTURES})


def pictures() -> list[Image.Image]:
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (30, 50, 3), dtype=np.uint8)) for _ in range(2)]


@pytest.fixture(scope="module", params=["CLIPModel", "SiglipModel"])
def folder(request: pytest.FixtureRequest) -> Path:
    config = {"CLIPModel": clip, "SiglipModel": siglip}[request.param]()
    folder = make_pooling_checkpoint(request.param, config)
    kind = request.param.removesuffix("Model")
    size: Any = {"height": 28, "width": 28}
    settings = {"image_processor_type": f"{kind}ImageProcessor", "size": size}
    if kind == "CLIP":
        settings |= {"size": {"shortest_edge": 28}, "crop_size": size}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


def of_text(folder: Path, text: str) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    is_siglip = model.config.model_type == "siglip"
    options = {"padding": "max_length", "max_length": 40} if is_siglip else {}
    given = tokenizer(text, return_tensors="pt", **options)
    masks = {} if is_siglip else {"attention_mask": given["attention_mask"]}
    with torch.inference_mode():
        output = model.get_text_features(input_ids=given["input_ids"], **masks)
    return F.normalize(getattr(output, "pooler_output", output)[0], dim=0)


def of_picture(folder: Path, picture: Image.Image) -> torch.Tensor:
    model = transformers.AutoModel.from_pretrained(folder).eval()
    processor = transformers.AutoImageProcessor.from_pretrained(folder, use_fast=False)
    with torch.inference_mode():
        output = model.get_image_features(**processor(picture, return_tensors="pt"))
    return F.normalize(getattr(output, "pooler_output", output)[0], dim=0)


def test_texts_and_pictures_have_transformers_vectors(folder: Path) -> None:
    llm = LLM(str(folder), device="cpu", max_num_seqs=8)
    given = [*TEXTS, *({"prompt": "", "multi_modal_data": {"image": each}} for each in pictures())]
    outputs = llm.embed(given)
    expected = [*(of_text(folder, each) for each in TEXTS), *(of_picture(folder, each) for each in pictures())]
    for output, vector in zip(outputs, expected, strict=True):
        assert np.allclose(output.outputs.embedding, vector, atol=2e-5)
    assert [len(each.prompt_token_ids) for each in outputs[-2:]] == [1, 1]
    with pytest.raises(InvalidRequestError, match="got a text beside a picture"):
        llm.embed({"prompt": "what is this?", "multi_modal_data": {"image": pictures()[0]}})
    with pytest.raises(RequestError, match="out of vocabulary"):
        llm.embed({"prompt_token_ids": [320]})
    llm.shutdown()


def test_pictures_come_as_messages(folder: Path) -> None:
    with (
        served(folder, max_model_len=None) as running,
        httpx.Client(base_url=running.url, timeout=HANG_S) as client,
    ):
        (picture, _) = pictures()
        content = [{"type": "image_url", "image_url": {"url": data_url(picture)}}]
        for each, expected in ((content, of_picture(folder, picture)), ("a cat", of_text(folder, "a cat"))):
            body = {"messages": [{"role": "user", "content": each}]}
            response = client.post("/v1/embeddings", json=body)
            assert response.is_success, response.text
            assert np.allclose(response.json()["data"][0]["embedding"], expected, atol=2e-5)
        running.settle()

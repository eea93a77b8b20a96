"""A release of vLLM, fetched from the package index as source, for its model files; never part of this repository.

And checkpoints for those of its models that `tests.helpers.checkpoints` has none for.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import httpx
import torch
import transformers
from safetensors.torch import save_file

from tests.helpers.checkpoints import (
    IMAGE_SIZE,
    PATCH_SIZE,
    PIXTRAL_FILES,
    VOCAB_SIZE,
    make_checkpoint,
    make_tokenizer,
    redraw,
    text_settings,
    token_ids,
)

ARCHIVES = {
    "0.6.3.post1": "0aae6ddd5348f86bf20e4f323c09e77d5ad2638d77f0d69323c5a63a40f8c143",
    "0.6.4.post1": "3cf6fdb46f50fa66cbeec87738e4b91bf2cb086979b4fc74a782cd30f75d1af1",
}
"""Releases, and the SHA-256 of their archives."""
MODELS = "vllm/model_executor/models/"
FETCH_S = 60.0


class NotFetchedError(Exception):
    """The index, or the archive, could not be had."""


def package_index() -> str:
    """Where pip finds packages on this machine."""
    if from_environment := os.environ.get("PIP_INDEX_URL"):
        return from_environment.rstrip("/")
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "get", "global.index-url"], capture_output=True, text=True, check=False
    )
    if asked.returncode == 0 and asked.stdout.strip():
        return asked.stdout.strip().rstrip("/")
    try:
        from pip._internal.models.index import PyPI
    except ImportError as error:
        raise NotFetchedError("pip is not installed, which knows the package index") from error
    return str(PyPI.simple_url).rstrip("/")


def fetch_model_files(release: str, folder: Path) -> Path:
    """The release's model files in a folder, fetched unless they are there. Raises `NotFetchedError`."""
    target = folder / release
    if target.is_dir():
        return target
    try:
        archive = _fetch(f"vllm-{release}.tar.gz")
    except (httpx.HTTPError, KeyError, ValueError) as error:
        raise NotFetchedError(f"{type(error).__name__}: {error}") from error
    if hashlib.sha256(archive).hexdigest() != ARCHIVES[release]:
        raise NotFetchedError("the archive is another than the one that was published")
    folder.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=folder))
    prefix = f"vllm-{release}/{MODELS}"
    with tarfile.open(fileobj=io.BytesIO(archive)) as opened:
        for member in opened:
            if member.isfile() and member.name.startswith(prefix) and member.name.endswith(".py"):
                content = opened.extractfile(member)
                assert content is not None
                (unfinished / Path(member.name).name).write_bytes(content.read())
    try:
        return unfinished.rename(target)
    except OSError:  # another process was faster
        shutil.rmtree(unfinished)
        return target


def _fetch(filename: str) -> bytes:
    with httpx.Client(timeout=FETCH_S, follow_redirects=True) as client:
        page = client.get(f"{package_index()}/vllm/", headers={"Accept": "application/vnd.pypi.simple.v1+json"})
        urls = {each["filename"]: each["url"] for each in page.raise_for_status().json()["files"]}
        return client.get(str(page.url.join(urls[filename]))).raise_for_status().content


# Checkpoints

CHAMELEON_IMAGE_ID = 8711
"""The file has it as a number, and pictures of 512 by 512 in 1024 rows."""


@functools.cache
def pixtral_checkpoint(folder: Path) -> Path:
    """Pixtral as transformers has it, with the processor that the file asks for the tokens of rows' ends."""
    target = folder / "pixtral"
    made = make_checkpoint("llava_pixtral")
    target.mkdir()
    for file in made.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    settings = {**PIXTRAL_FILES["preprocessor_config.json"], "size": {"longest_edge": IMAGE_SIZE}}
    (target / "preprocessor_config.json").write_text(json.dumps(settings))
    tokens = {"image_token": "[IMG]", "image_break_token": "[IMG_BREAK]", "image_end_token": "[IMG_END]"}
    settings = {"processor_class": "PixtralProcessor", "patch_size": PATCH_SIZE, **tokens}
    (target / "processor_config.json").write_text(json.dumps(settings))
    return target


@functools.cache
def chameleon_checkpoint(folder: Path) -> Path:
    """Chameleon, whose pictures become tokens of its vocabulary: 16 codes, by a narrow encoder."""
    target = folder / "chameleon"
    config = chameleon_config()
    torch.manual_seed(0)
    model = redraw(transformers.ChameleonForConditionalGeneration(config).eval(), 0)
    config.architectures = ["ChameleonForConditionalGeneration"]
    config.save_pretrained(target)
    state = model.state_dict()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, target / "model.safetensors")
    tokenizer = make_tokenizer()
    filling = [f"<filling_{index}>" for index in range(CHAMELEON_IMAGE_ID - len(tokenizer))]
    tokenizer.add_tokens([*filling, "<picture>"])
    assert tokenizer.convert_tokens_to_ids("<picture>") == CHAMELEON_IMAGE_ID
    tokenizer.save_pretrained(target)
    pictures = {"image_processor_type": "ChameleonImageProcessor", "size": {"shortest_edge": 512}}
    pictures |= {"crop_size": {"height": 512, "width": 512}}
    (target / "preprocessor_config.json").write_text(json.dumps(pictures))
    return target


def chameleon_config() -> transformers.PretrainedConfig:
    """Layers of 64 channels; a picture is halved four times."""
    letters = str.maketrans("0123456789", "ABCDEFGHIJ")
    codes = {f"IMGIMG{str(code).translate(letters)}Z": VOCAB_SIZE + code for code in range(16)}
    settings = text_settings(vocab_size=CHAMELEON_IMAGE_ID + 9, num_key_value_heads=4)
    return transformers.ChameleonConfig(
        **settings,
        swin_norm=False,
        vocabulary_map={**codes, "<image>": CHAMELEON_IMAGE_ID},
        vq_config={
            "embed_dim": 16,
            "num_embeddings": 16,
            "latent_channels": 16,
            "base_channels": 32,
            "channel_multiplier": [1, 1, 1, 1, 1],
            "num_res_blocks": 1,
            "resolution": 512,
        },
    )


@functools.cache
def paligemma_checkpoint(folder: Path) -> Path:
    """PaliGemma of the first kind. Its head is its table of embeddings: what layers bring is enlarged, so that it tells
    other tokens than the one before."""
    target = folder / "paligemma"
    made = make_checkpoint("paligemma2")
    written = json.loads((made / "config.json").read_text())
    text = transformers.GemmaConfig(**text_settings(head_dim=24, bos_token_id=1)).to_dict()
    config = transformers.PaliGemmaConfig(
        text_config=text,
        vision_config=written["vision_config"],
        projection_dim=64,
        hidden_size=64,
        image_token_index=token_ids()["<image>"],
        bos_token_id=1,
    )
    config.architectures = ["PaliGemmaForConditionalGeneration"]
    torch.manual_seed(0)
    model = redraw(transformers.PaliGemmaForConditionalGeneration(config).eval(), 0)
    for name, parameter in model.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data.mul_(8)
    model.save_pretrained(target)
    for file in made.iterdir():
        if not (target / file.name).exists():
            (target / file.name).write_bytes(file.read_bytes())
    return target

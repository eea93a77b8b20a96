"""Gemma 3 with pictures: prompts become what its own processor makes of them. `tests/contract` has its logits."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import Gemma3Processor, PreTrainedTokenizerFast
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.model_executor.models.gemma3 import between_lines
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer, token_ids
from tests.helpers.direct import engine_config, prepare
from tests.helpers.processors import make_image
from tests.helpers.serving import make_engine

BEGIN, ROW, END = (token_ids()[name] for name in ("<|vision_start|>", "<|image_pad|>", "<|vision_end|>"))


GEMMA3_TOKENS = {"image_token": "<row>", "boi_token": "<begin>", "eoi_token": "<end>"}


def tokenizer_that_joins_lines(special_tokens: dict[str, str]) -> PreTrainedTokenizerFast:
    """Up to four line ends are one token, as in Gemma's vocabulary."""
    merges = [("Ċ", "Ċ"), ("ĊĊ", "Ċ"), ("ĊĊĊ", "Ċ"), ("a", "b")]
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", extra_special_tokens=special_tokens)


@pytest.mark.parametrize(
    ("prompt", "num_images"),
    [
        ("<begin>", 1),
        ("ab\n<begin>\nx", 1),
        ("q<begin>a b<begin>", 2),
        ("\n\n<begin><begin>\n\n\ny\n", 2),
        ("\n\n\n\n\n<begin>\n<begin>\n\n\n\n\n\n", 2),
    ],
)
def test_lines_around_a_picture_are_tokenized_with_those_that_stand_there(prompt: str, num_images: int) -> None:
    tokenizer = tokenizer_that_joins_lines(GEMMA3_TOKENS)
    reference = Gemma3Processor(
        Gemma3ImageProcessorPil(size={"height": 28, "width": 28}), tokenizer, image_seq_length=3
    )
    expected = reference(text=prompt, images=[[make_image(seed=i) for i in range(num_images)]])["input_ids"][0]
    begin, row, end = tokenizer.convert_tokens_to_ids(["<begin>", "<row>", "<end>"])
    ids = tokenizer(prompt)["input_ids"]
    assert list(between_lines(ids, begin, (begin, row, row, row, end), tokenizer)) == list(expected)


def prepared(prompt: str, *images: Any, path: Path | None = None) -> Any:
    config = engine_config(path or make_checkpoint("gemma3_vision"), limit_mm_per_prompt={"image": 3})
    return prepare(config, prompt, {"image": list(images)})


def test_a_prompt_may_come_expanded_and_with_its_rows_given() -> None:
    once = prepared("a<|vision_start|>b", make_image())
    first, *lines, last = make_tokenizer()("a\n\nb")["input_ids"]
    assert once.token_ids == [first, *lines, BEGIN, *[ROW] * 16, END, *lines, last]
    again = prepared(once.token_ids, torch.zeros(16, 64))
    assert again.token_ids == once.token_ids
    assert list(again.kwargs) == ["image_embeds"]
    assert again.placeholders == once.placeholders


@pytest.mark.parametrize(("prompt", "num_images"), [("none", 1), ("<|vision_start|>", 2), ("<|vision_start|>" * 2, 1)])
def test_a_miscount_is_told(prompt: str, num_images: int) -> None:
    with pytest.raises(InvalidRequestError, match=f"image placeholders.*expected {num_images}"):
        prepared(prompt, *[make_image()] * num_images)


def test_crops_of_a_picture_are_refused_and_not_left_out(tmp_path: Path) -> None:
    """They would need more rows, and words between them."""
    path = shutil.copytree(make_checkpoint("gemma3_vision"), tmp_path / "cropping")
    settings = json.loads((path / "preprocessor_config.json").read_text())
    (path / "preprocessor_config.json").write_text(json.dumps(settings | {"do_pan_and_scan": True}))
    with pytest.raises(UnsupportedFeatureError, match=r"do_pan_and_scan.*Set it to false"):
        prepared("<|vision_start|>", make_image(), path=path)
    engine = make_engine(make_checkpoint("gemma3_vision"))
    prompt = {"prompt": "<|vision_start|>", "multi_modal_data": {"image": make_image()}}
    prompt["mm_processor_kwargs"] = {"do_pan_and_scan": True}
    with pytest.raises(InvalidRequestError, match="'do_pan_and_scan', which nothing of this model takes"):
        engine.add_request("r", prompt, None)

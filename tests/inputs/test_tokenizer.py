"""Encoding in the front: equal to Hugging Face's, bounded, and safe in threads."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.inputs.tokenizer import TextEncoder, get_tokenizer
from tests.helpers.checkpoints import SPECIAL_TOKENS, make_checkpoint, make_tokenizer
from tests.helpers.configs import make_model_config

TEXTS = ("", "héllo  wörld\n", "a<|image_pad|>b", " <|im_end|> ", "日本語 🙂", "x" * 300)


def test_ids_equal_hugging_face() -> None:
    path = make_checkpoint("qwen2")
    reference = AutoTokenizer.from_pretrained(path)
    encoder = TextEncoder(get_tokenizer(make_model_config(model=path, hf_config=None)))
    for text in TEXTS:
        for special in (True, False):
            expected = reference.encode(text, add_special_tokens=special)
            assert encoder.encode(text, add_special_tokens=special) == expected
    assert encoder.max_token_id == max(reference.get_vocab().values())


def test_padding_and_truncation_of_the_file_are_set_aside(tmp_path: Path) -> None:
    shutil.copytree(make_checkpoint("qwen2"), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "tokenizer.json"
    settings = json.loads(path.read_text())
    settings["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(settings))
    tokenizer = get_tokenizer(make_model_config(model=tmp_path / "checkpoint"))
    assert len(TextEncoder(tokenizer).encode("abcdefgh")) == len(tokenizer.encode("abcdefgh")) == 8


def test_threads_get_what_one_gets() -> None:
    encoder = TextEncoder(make_tokenizer())
    texts = [f"{text} {index}" for index in range(50) for text in TEXTS]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(encoder.encode, texts)) == [encoder.encode(text) for text in texts]


class PythonTokenizer:
    """A tokenizer without a fast core, which promises nothing about threads."""

    def __init__(self) -> None:
        self.busy = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        assert not self.busy
        self.busy = True
        ids = [len(word) for word in text.split()]
        self.busy = False
        return ids


def test_a_tokenizer_in_python_is_used_by_one_thread_at_a_time() -> None:
    encoder = TextEncoder(PythonTokenizer())
    text = "some words of a text " * 200
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(encoder.encode, [text] * 50))
    assert results == [[4, 5, 2, 1, 4] * 200] * 50


def test_a_text_is_bounded_by_its_ids() -> None:
    encoder = TextEncoder(make_tokenizer())
    assert len(encoder.encode_bounded("a" * 20, 20)) == 20
    with pytest.raises(InvalidRequestError, match="too long to fit into the model: got 21 tokens, expected at most 20"):
        encoder.encode_bounded("a" * 21, 20)


def test_a_text_that_no_tokens_could_stand_for_is_not_even_encoded(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = TextEncoder(make_tokenizer())
    longest = max(map(len, SPECIAL_TOKENS))
    assert encoder.max_token_chars == longest
    monkeypatch.setattr(encoder, "encode", lambda *args, **kwargs: pytest.fail("encoded"))
    with pytest.raises(InvalidRequestError, match=f"got at least {-(-1000 // longest)} tokens, expected at most 20"):
        encoder.encode_bounded("a" * 1000, 20)


def test_what_can_not_be_loaded_is_the_operator_s_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a directory with a tokenizer"):
        get_tokenizer(make_model_config(model=tmp_path))
    with pytest.raises(ConfigError, match="tokenizer_mode: got 'fancy'"):
        get_tokenizer(make_model_config(model=tmp_path, tokenizer_mode="fancy"))

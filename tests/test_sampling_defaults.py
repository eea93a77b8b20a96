"""What generation_config.json says: defaults of requests, and ids that end an answer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, SamplingParams
from sensorium.engine.args import EngineArgs
from sensorium.errors import InvalidRequestError, ModelError
from sensorium.inputs.preprocess import eos_token_ids
from sensorium.inputs.tokenizer import get_tokenizer
from sensorium.sampling_defaults import SamplingDefaults, read_defaults, read_end_ids
from tests.helpers.checkpoints import make_checkpoint, token_ids

QWEN = {
    "bos_token_id": 151643,
    "do_sample": True,
    "eos_token_id": [151645, 151643],
    "pad_token_id": 151643,
    "repetition_penalty": 1.05,
    "temperature": 0.7,
    "top_k": 20,
    "top_p": 0.8,
    "transformers_version": "4.51.0",
}


def checkpoint(path: Path, generation: dict[str, Any] | str, family: str = "qwen2", **config: Any) -> str:
    """A tiny checkpoint with this generation config, and values that replace those of its config."""
    shutil.copytree(make_checkpoint(family), path, dirs_exist_ok=True)
    text = generation if isinstance(generation, str) else json.dumps(generation)
    (path / "generation_config.json").write_text(text)
    content = json.loads((path / "config.json").read_text()) | config
    (path / "config.json").write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))
    return str(path)


# What the file says


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ({}, {}),
        (QWEN, {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05}),
        ({"do_sample": False}, {"temperature": 0.0}),
        ({"do_sample": False, "temperature": 0.7, "top_p": 0.9}, {"temperature": 0.0, "top_p": 0.9}),
        ({"temperature": 0.6}, {"temperature": 0.6}),
        ({"temperature": None, "top_k": None, "eos_token_id": None}, {}),
        ({"max_new_tokens": 2048, "min_new_tokens": 2}, {"max_tokens": 2048, "min_tokens": 2}),
        ({"min_p": 0.1, "stop_strings": "END"}, {"min_p": 0.1, "stop": ("END",)}),
        ({"suppress_tokens": [3, 4], "bad_words_ids": [[5, 6]]}, {"bad_words_token_ids": ((5, 6), (3,), (4,))}),
    ],
)
def test_everything_that_is_followed(content: dict[str, Any], values: dict[str, Any]) -> None:
    defaults = read_defaults(content)
    assert defaults.values == values
    assert defaults.not_followed == ()
    for name, value in values.items():
        assert getattr(defaults.params(), name) == value


def test_what_is_not_followed_is_named() -> None:
    """No setting of a checkpoint is passed over without a word."""
    defaults = read_defaults({"num_beams": 4, "no_repeat_ngram_size": 3, "typical_p": 1.0, "guidance_scale": None})
    assert defaults.not_followed == ("num_beams=4", "no_repeat_ngram_size=3")
    assert defaults.line() == "not followed: num_beams=4, no_repeat_ngram_size=3"
    assert read_defaults({"max_length": 4096}).not_followed == ("max_length=4096",)
    assert read_defaults({"max_length": 20}).not_followed == (), "what the library writes where nobody set it"


@pytest.mark.parametrize(
    "content",
    [
        {"temperature": "hot"},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_k": 2.5},
        {"top_p": 0},
        {"repetition_penalty": 0},
        {"max_new_tokens": "many"},
        {"max_new_tokens": -5},
        {"stop_strings": [3]},
        {"suppress_tokens": "x"},
        {"bad_words_ids": [3]},
        {"bad_words_ids": 7},
    ],
    ids=str,
)
def test_values_that_cannot_be_used_are_one_sentence(content: dict[str, Any]) -> None:
    (name,) = content
    with pytest.raises(ModelError, match=f"^{name} in generation_config.json: got .*, expected .*'none'"):
        read_defaults(content)


@pytest.mark.parametrize("value", ["x", 1.5, True, {"a": 1}, ["x"], [1, None]])
def test_ends_that_are_no_ids_are_one_sentence(value: object) -> None:
    with pytest.raises(ModelError, match=r"eos_token_id in some\.json"):
        read_end_ids({"eos_token_id": value}, "some.json")
    assert read_end_ids({"eos_token_id": [-1, 3]}, "some.json") == {3}


# Requests over defaults


def test_what_a_request_says_goes_before_the_checkpoint_and_that_before_the_route() -> None:
    defaults = SamplingDefaults({"temperature": 0.7, "top_k": 20, "max_tokens": 100, "stop": ("END",), "min_tokens": 5})
    assert defaults.params({}, max_tokens=None) == SamplingParams(
        temperature=0.7, top_k=20, max_tokens=100, stop=("END",), min_tokens=5
    )
    params = defaults.params({"temperature": 0.0, "top_k": -1, "max_tokens": 3, "top_p": None, "detokenize": False})
    assert params == SamplingParams(temperature=0, top_k=0, max_tokens=3, min_tokens=3, detokenize=False)
    assert defaults.params({"min_tokens": 300}).max_tokens == 300
    assert SamplingDefaults().params({}, max_tokens=None).max_tokens is None
    with pytest.raises(InvalidRequestError, match="temperature"):
        defaults.params({"temperature": -1})


@pytest.mark.parametrize("setting", ["auto", "none"])
def test_the_engine_samples_as_the_checkpoint_says_unless_told_not_to(setting: Any, tmp_path: Path) -> None:
    """config.py said that the values of generation_config.json are defaults, and they were ignored."""
    path = checkpoint(tmp_path, {"do_sample": True, "temperature": 3.0, "top_k": 1, "max_new_tokens": 7})
    llm = LLM(path, num_blocks=64, max_model_len=256, generation_config=setting)
    expected = SamplingParams(temperature=3.0, top_k=1, max_tokens=7) if setting == "auto" else SamplingParams()
    assert llm.get_default_sampling_params() == expected
    greedy = SamplingParams(temperature=0, max_tokens=expected.max_tokens)
    (got,), (best,) = llm.generate([[5, 6, 7]]), llm.generate([[5, 6, 7]], greedy)
    assert (got.outputs[0].token_ids == best.outputs[0].token_ids) is (setting == "auto")
    assert any("temperature 3.0, top_k 1" in line for line in llm.report.lines()) is (setting == "auto")
    llm.shutdown()


@pytest.mark.parametrize(
    "text", ["{", "[]", "null", '{"temperature": -1}', '{"eos_token_id": "x"}', '{"top_p": NaN}'], ids=str
)
def test_a_malformed_generation_config_is_one_sentence(text: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        EngineArgs(checkpoint(tmp_path, text), device="cpu").create_engine_config()


# Ends


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": 7}, {"eos_token_id": 9}, {7, 9}),
        ({"eos_token_id": [7, 8]}, {"eos_token_id": [9]}, {7, 8, 9}),
        ({}, {"eos_token_id": 9}, {9}),
        ({}, {"eos_token_id": "absent"}, set()),
        ({"eos_token_id": 7}, {"eos_token_id": "absent"}, {7}),
        ({"eos_token_id": None}, {"eos_token_id": None}, set()),
    ],
)
@pytest.mark.parametrize("setting", ["auto", "none"])
def test_all_ends_that_the_files_name_end_an_answer(
    generation: dict[str, Any], config: dict[str, Any], expected: set[int], setting: Any, tmp_path: Path
) -> None:
    """A generation config's end replaced the tokenizer's, and a chat ran on through <|im_end|>.

    What a config class has by default ends nothing: LlamaConfig has 2, which is a letter here.
    """
    path = checkpoint(tmp_path, generation, "llama", **config)
    model_config = EngineArgs(path, device="cpu", generation_config=setting).create_engine_config().model_config
    assert eos_token_ids(model_config, get_tokenizer(model_config)) == expected | {token_ids()["<|im_end|>"]}
    if expected:
        assert eos_token_ids(model_config, None) == expected


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_omni_thinker"])
def test_the_end_of_a_text_config_counts(family: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"eos_token_id": 7}, family)
    content = json.loads((tmp_path / "config.json").read_text())
    content["text_config"]["eos_token_id"] = 11
    (tmp_path / "config.json").write_text(json.dumps(content))
    model_config = EngineArgs(path, device="cpu").create_engine_config().model_config
    assert {7, 11} <= eos_token_ids(model_config, None)

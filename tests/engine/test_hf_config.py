"""config.json of a checkpoint: spellings that real ones have, overrides, and one sentence for what can't be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.engine.args import EngineArgs
from sensorium.errors import ConfigError, ModelError, SensoriumError
from sensorium.model_executor.model_loader import load_model
from tests.helpers.checkpoints import make_checkpoint


class _Removed:
    """Stands for a field that is taken out. Its text is the same in every process: names of tests are made of it."""

    def __repr__(self) -> str:
        return "removed"


REMOVED = _Removed()


def checkpoint(path: Path, changes: dict[str, Any], family: str = "llama", part: str | None = None) -> str:
    """A tiny checkpoint whose config (or a part of it) has these values instead."""
    shutil.copytree(make_checkpoint(family), path, dirs_exist_ok=True)
    content = json.loads((path / "config.json").read_text())
    level = content if part is None else content[part]
    level.update(changes)
    for name in [name for name, value in level.items() if value is REMOVED]:
        del level[name]
    (path / "config.json").write_text(json.dumps(content))
    return str(path)


def config_of(path: str, **settings: Any) -> Any:
    return EngineArgs(path, device="cpu", **settings).create_engine_config().model_config


# Types


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("bfloat16", "bfloat16"),
        ("torch.bfloat16", "bfloat16"),
        ("bf16", "bfloat16"),
        ("BF16", "bfloat16"),
        ("float16", "float16"),
        ("half", "float16"),
        ("fp16", "float16"),
        ("float", "float32"),
        ("fp32", "float32"),
        ("torch.float32", "float32"),
    ],
)
def test_spellings_of_types(name: str, written: str, expected: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {"dtype": REMOVED} | {name: written})
    assert config_of(path).dtype_name == expected
    assert config_of(path, dtype="float32").dtype_name == "float32"


@pytest.mark.parametrize("family", ["llava", "qwen2_5_omni_thinker"])
def test_the_type_of_a_part_counts(family: str, tmp_path: Path) -> None:
    text = checkpoint(tmp_path, {"dtype": "bf16"}, family, "text_config")
    checkpoint_of_whole = json.loads((tmp_path / "config.json").read_text())
    checkpoint_of_whole.pop("dtype", None)
    (tmp_path / "config.json").write_text(json.dumps(checkpoint_of_whole))
    assert config_of(text).dtype_name == "bfloat16"


@pytest.mark.parametrize("written", ["bf17", "float64", "torch.float8_e4m3fn", 3, ["float32"], {"a": "b"}, "torch."])
def test_an_unknown_type_is_named_and_may_be_overruled(written: object, tmp_path: Path) -> None:
    """transformers raised AttributeError on "bf17", and "float64" was taken for float32 without a word."""
    path = checkpoint(tmp_path, {"dtype": REMOVED, "torch_dtype": written})
    with pytest.raises(ModelError, match=r"dtype of the checkpoint: got .*Set dtype \(--dtype\)") as caught:
        config_of(path)
    assert repr(written) in str(caught.value)
    assert config_of(path, dtype="float32").dtype_name == "float32"
    assert config_of(path, hf_overrides={"torch_dtype": "half"}).dtype_name == "float16"


@pytest.mark.parametrize("written", [REMOVED, None, "auto"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_without_a_type_it_is_that_of_the_weights_as_for_hugging_face(
    written: object, stored: str, tmp_path: Path
) -> None:
    path = checkpoint(tmp_path, {"dtype": written})
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({name: each.to(getattr(torch, stored)) for name, each in tensors.items()}, tmp_path / "model.safetensors")
    assert config_of(path).dtype_name == stored
    assert config_of(path, load_format="dummy").dtype_name == "float32"


# Overrides


def test_overrides_reach_the_parts_and_are_checked_like_the_file(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {}, "qwen2_vl")
    config = config_of(path, hf_overrides={"text_config": {"rms_norm_eps": 0.5}, "tie_word_embeddings": True})
    assert config.hf_text_config.rms_norm_eps == 0.5
    assert config.hf_text_config.hidden_size == 64
    with pytest.raises(ModelError, match=r"text_config\.num_hidden_layers"):
        config_of(path, hf_overrides={"text_config": {"num_hidden_layers": 0}})
    assert config.hf_config.name_or_path == path


def test_an_override_without_effect_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = checkpoint(tmp_path, {})
    config_of(path, hf_overrides={"max_position_embeddings": 64, "rope_theta": 1e5})
    assert caplog.records == []
    config_of(path, hf_overrides={"max_position_embedding": 64})
    (record,) = caplog.records
    assert "'max_position_embeddings' may be meant" in record.getMessage()


# What can't be used


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 0},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": 10**6 + 1},
        {"num_hidden_layers": "3"},
        {"num_hidden_layers": 3.5},
        {"num_hidden_layers": None},
        {"hidden_size": 0},
        {"hidden_size": 65},
        {"hidden_size": 1 << 40},
        {"hidden_size": "64"},
        {"num_attention_heads": 0},
        {"num_attention_heads": 5},
        {"num_key_value_heads": 3},
        {"num_key_value_heads": 0},
        {"head_dim": 0},
        {"head_dim": -16},
        {"vocab_size": 0},
        {"vocab_size": True},
        {"vocab_size": 10**12},
        {"intermediate_size": 0},
        {"max_position_embeddings": 0},
        {"max_position_embeddings": -1},
        {"rms_norm_eps": -1.0},
        {"rms_norm_eps": float("nan")},
        {"rms_norm_eps": "small"},
        {"rope_parameters": "x"},
        {"rope_parameters": {"rope_type": "nope", "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear"}},
        {"rope_parameters": {"rope_type": "linear", "factor": 0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 0}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": "x"}},
        {"hidden_act": "nope"},
        {"hidden_act": 3},
        {"architectures": []},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [3]},
        {"architectures": REMOVED},
        {"architectures": ["NoSuchModel"]},
        {"model_type": REMOVED},
        {"model_type": 3},
        {"model_type": "nope"},
        {"eos_token_id": "x"},
        {"configuration_files": ["../config.4.0.0.json"]},
        {"transformers_weights": "../model.safetensors"},
        {"auto_map": {"AutoConfig": "x.Y"}, "model_type": "nope"},
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_one_sentence_that_names_it(changes: dict[str, Any], tmp_path: Path) -> None:
    """Malformed configs gave tracebacks of transformers, torch and huggingface_hub."""
    path = checkpoint(tmp_path, changes)
    with pytest.raises(SensoriumError) as caught:
        load_model(EngineArgs(path, device="cpu").create_engine_config())
    message = str(caught.value)
    name = next(iter(changes))
    said = (name, name.removeprefix("num_").replace("_", " "), repr(changes[name]), "rope")
    assert any(form in message for form in said)
    assert len(message) < 900
    assert "\n" not in message


@pytest.mark.parametrize(
    "changes",
    [
        {"sliding_window": 0},
        {"sliding_window": -4},
        {"sliding_window": "x"},
        {"attention_dropout": "x"},
    ],
    ids=str,
)
def test_windows_that_cannot_be_meant_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=next(iter(changes))):
        config_of(checkpoint(tmp_path, changes, "mistral"))


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("value", ["x", 3, [], {"model_type": "nope"}], ids=str)
def test_parts_of_another_type_are_one_sentence(part: str, family: str, value: object, tmp_path: Path) -> None:
    with pytest.raises(SensoriumError):
        load_model(EngineArgs(checkpoint(tmp_path, {part: value}, family), device="cpu").create_engine_config())


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "qwen2_5_vl", "qwen2_audio"])
@pytest.mark.parametrize("name", ["num_hidden_layers", "hidden_size", "depth", "embed_dim", "patch_size", "d_model"])
@pytest.mark.parametrize("value", [0, -1, 10**9, "x", 7], ids=str)
def test_towers_of_absurd_sizes_are_one_sentence(family: str, name: str, value: object, tmp_path: Path) -> None:
    part = "audio_config" if family == "qwen2_audio" else "vision_config"
    path = checkpoint(tmp_path, {}, family)
    content = json.loads((tmp_path / "config.json").read_text())
    if name not in content[part]:
        return
    content[part][name] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(SensoriumError) as caught:
        load_model(EngineArgs(path, device="cpu").create_engine_config())
    assert "\n" not in str(caught.value)


def test_media_settings_of_a_text_model_are_refused(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, {})
    for setting in ({"limit_mm_per_prompt": {"image": 2}}, {"mm_processor_kwargs": {"max_pixels": 100}}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            config_of(path, **setting)

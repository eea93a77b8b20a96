"""Names of processors that real checkpoints bear: old ones are read as the class that they stand for now."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from sensorium.engine.args import EngineArgs
from sensorium.errors import ConfigError, ModelError, ProcessorError, SensoriumError
from sensorium.inputs.tokenizer import get_tokenizer
from sensorium.multimodal.hf_processors import (
    cached_get_feature_extractor,
    cached_get_image_processor,
    read_config_file,
)
from sensorium.multimodal.processor_names import RENAMED, current_name
from sensorium.multimodal.video_processor import cached_get_video_processor
from tests.helpers.checkpoints import make_checkpoint

PICTURE = Image.fromarray(np.arange(84 * 112 * 3, dtype=np.uint32).reshape(84, 112, 3).astype(np.uint8))


def checkpoint(path: Path, family: str, **files: dict[str, Any]) -> str:
    """A tiny checkpoint with these values in its files, named without their ends."""
    shutil.copytree(make_checkpoint(family), path, dirs_exist_ok=True)
    for name, values in files.items():
        file = path / f"{name}.json"
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | values))
    return str(path)


def pixels(path: str) -> Any:
    return cached_get_image_processor(path)(PICTURE, return_tensors="np")["pixel_values"]


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("qwen2_5_vl", "Qwen2_5_VLImageProcessor"),
        ("qwen2_5_vl", "Qwen2_5_VLImageProcessorFast"),
        ("qwen2_vl", "Qwen2VLImageProcessorFast"),
        ("qwen2_vl", "Qwen2VLFeatureExtractor"),
        ("llava", "CLIPFeatureExtractor"),
        ("llava", "CLIPImageProcessorFast"),
    ],
)
def test_older_names_of_image_processors_give_the_same_pixels(family: str, name: str, tmp_path: Path) -> None:
    """Fine-tunes of early 2025 say "Qwen2_5_VLImageProcessor", and were told that they have no file, which they had."""
    path = checkpoint(tmp_path, family, preprocessor_config={"image_processor_type": name})
    assert np.array_equal(pixels(path), pixels(str(make_checkpoint(family))))


def test_the_older_key_of_an_image_processor_is_known_too(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "llava", preprocessor_config={"feature_extractor_type": "CLIPFeatureExtractor"})
    content = json.loads((tmp_path / "preprocessor_config.json").read_text())
    del content["image_processor_type"]
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
    assert np.array_equal(pixels(path), pixels(str(make_checkpoint("llava"))))


def test_names_within_the_file_of_the_whole_processor(tmp_path: Path) -> None:
    before = json.loads((make_checkpoint("qwen2_5_vl") / "preprocessor_config.json").read_text())
    nested = {"image_processor": {**before, "image_processor_type": "Qwen2_5_VLImageProcessor"}}
    path = checkpoint(tmp_path, "qwen2_5_vl", processor_config=nested)
    (tmp_path / "preprocessor_config.json").unlink()
    assert np.array_equal(pixels(path), pixels(str(make_checkpoint("qwen2_5_vl"))))


def test_older_names_of_video_processors(tmp_path: Path) -> None:
    name = {"video_processor_type": "Qwen2_5_VLVideoProcessor"}
    path = checkpoint(tmp_path, "qwen2_5_vl", video_preprocessor_config=name)
    clip = np.stack([np.asarray(PICTURE)] * 2)
    got, expected = (
        cached_get_video_processor(each)(clip)["pixel_values_videos"]
        for each in (path, str(make_checkpoint("qwen2_5_vl")))
    )
    assert np.array_equal(got, expected)


def test_current_names_exist_and_stay() -> None:
    transformers_names = set(dir(__import__("transformers")))
    for old, new in RENAMED.items():
        assert old not in transformers_names
        assert new in transformers_names
        assert current_name(new) == new
    assert current_name("NobodyKnowsThisImageProcessor") == "NobodyKnowsThisImageProcessor"


def read_all(path: str) -> None:
    EngineArgs(path, device="cpu").create_engine_config()
    cached_get_image_processor(path)


@pytest.mark.parametrize("name", ["NoSuchImageProcessor", 3, ["x"]])
def test_an_unknown_image_processor_is_named(name: Any, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "qwen2_5_vl", preprocessor_config={"image_processor_type": name})
    with pytest.raises(ProcessorError, match=name if isinstance(name, str) else "image_processor_type"):
        cached_get_image_processor(path)


def test_an_unknown_feature_extractor_is_named(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "qwen2_audio", preprocessor_config={"feature_extractor_type": "NoSuchExtractor"})
    with pytest.raises(ProcessorError, match=r"NoSuchExtractor.*Correct feature_extractor_type"):
        cached_get_feature_extractor(path)


@pytest.mark.parametrize("file", ["preprocessor_config", "processor_config", "generation_config", "config"])
@pytest.mark.parametrize("text", ["{", "[]", "\xff"])
def test_malformed_files_are_one_sentence(file: str, text: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "qwen2_5_vl")
    (tmp_path / f"{file}.json").write_text(text, encoding="latin-1")
    with pytest.raises(ModelError, match=rf"^{file}\.json of the checkpoint: got"):
        read_all(path)
    with pytest.raises(SensoriumError):
        read_config_file(path, f"{file}.json")


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", '{"model": 3}'),
        ("tokenizer_config.json", "["),
        ("tokenizer_config.json", '{"tokenizer_class": 3}'),
    ],
)
def test_malformed_tokenizers_are_one_sentence(file: str, text: str, tmp_path: Path) -> None:
    """The tokenizers' library raises bare Exceptions, which came through."""
    path = checkpoint(tmp_path, "llama")
    (tmp_path / file).write_text(text)
    with pytest.raises((ConfigError, ModelError), match=r"^tokenizer(_config\.json of the checkpoint)?: got") as caught:
        get_tokenizer(EngineArgs(path, device="cpu").create_engine_config().model_config)
    assert "\n" not in str(caught.value)

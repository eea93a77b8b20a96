"""`sensorium verify`: equal where a model is right, and where it isn't, the layer and the position."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import sensorium
from sensorium.entrypoints.cli.main import main
from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.layers import decoder
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.tiny_architectures import save_tiny

WAYS = 5


def test_a_native_model_of_text_is_equal_in_every_way() -> None:
    report = sensorium.verify(str(make_checkpoint("llama", dtype="bfloat16")))
    assert report.is_equal, "\n".join(report.lines())
    assert {result.dtype for result in report.results} == {"float32", "bfloat16"}
    assert len({result.way for result in report.results}) == WAYS
    assert report.parting == ""


@pytest.mark.parametrize(
    ("family", "media"),
    [
        ("qwen2_vl", ("picture", "clip")),
        ("llava", ("picture",)),
        ("gemma3_vision", ("picture",)),
        ("qwen2_audio", ("sound",)),
        ("mllama", ("picture",)),
    ],
)
def test_models_are_asked_about_the_media_that_they_take(family: str, media: tuple[str, ...]) -> None:
    report = sensorium.verify(str(make_checkpoint(family)))
    assert report.is_equal, "\n".join(report.lines())
    asked = {result.case.split()[0] for result in report.results}
    assert asked == {"text", *media}


def test_what_could_not_be_asked_is_told() -> None:
    """Pictures of more rows than the context has were left out without a word, and the model called equal."""
    report = sensorium.verify(str(make_checkpoint("llava_next")), max_model_len=40)
    assert {result.case.split()[0] for result in report.results} == {"text"}
    [first, *_] = report.left_out
    assert first.startswith("picture of 92 x 64: the prompt is too long")
    assert f"not asked: {first}" in report.lines()
    assert not any("clip" in each or "sound" in each for each in report.left_out)
    assert all(result.is_equal for result in report.results)
    assert not report.is_equal, "nothing is known about its media"
    assert report.lines()[-1].startswith("NOT COMPARED WITH MEDIA")


def test_a_model_with_media_and_no_tokenizer_is_not_called_equal(tmp_path: Path) -> None:
    """Its pictures were left out without even a reason."""
    path = shutil.copytree(make_checkpoint("llava"), tmp_path / "llava")
    for file in path.glob("tokenizer*"):
        file.unlink()
    report = sensorium.verify(str(path), num_new_tokens=1)
    assert all(result.is_equal for result in report.results)
    assert report.lacks_media
    assert not report.is_equal
    assert any("no tokenizer" in each for each in report.left_out)


def test_text_alone_may_be_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(make_checkpoint("llava_next")), "--max-model-len", "40", "--num-new-tokens", "1"]
    assert main(arguments) == 1
    assert "NOT COMPARED WITH MEDIA" in capsys.readouterr().out
    assert main([*arguments, "--text-only"]) == 0
    assert capsys.readouterr().out.endswith("equal\n")


def test_a_model_that_needs_a_sound_is_asked_with_one() -> None:
    report = sensorium.verify(str(make_checkpoint("whisper")))
    assert report.is_equal, "\n".join(report.lines())
    assert report.tier == "X"
    assert {result.case for result in report.results} == {f"sound with text of {count}" for count in (5, 37, 90)}


def test_modules_of_transformers_are_verified_too(tmp_path: Path) -> None:
    save_tiny("olmoe", tmp_path)
    report = sensorium.verify(str(tmp_path), max_model_len=64)
    assert report.is_equal, "\n".join(report.lines())
    assert report.tier == "transformers flat"


@pytest.mark.parametrize("baseline", ["native", "generic"])
def test_the_two_kinds_of_class_are_compared_with_each_other(baseline: Any) -> None:
    report = sensorium.verify(str(make_checkpoint("qwen2")), baseline=baseline)
    assert report.is_equal, "\n".join(report.lines())
    assert report.tier == {"native": "transformers flat", "generic": "text"}[baseline]


def spoil_a_layer(monkeypatch: pytest.MonkeyPatch, layer: int, row: int) -> None:
    """Let a layer of native models add something to the rows of prompts from `row` on."""
    forward, at = decoder.DecoderLayer.forward, [0]

    def spoiled(self: Any, rotation: Any, hidden: Any, residual: Any, *others: Any) -> Any:
        at[0] = 0 if residual is None else at[0] + 1
        output, residual = forward(self, rotation, hidden, residual, *others)
        if at[0] == layer and len(output) > row:
            output = torch.cat([output[:row], output[row:] + 0.5])
        return output, residual

    monkeypatch.setattr(decoder.DecoderLayer, "forward", spoiled)


@pytest.mark.parametrize(("layer", "row"), [(0, 2), (1, 4), (2, 0)])
def test_the_first_layer_and_position_that_differ_are_named(
    layer: int, row: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil_a_layer(monkeypatch, layer, row)
    report = sensorium.verify(str(make_checkpoint("llama")))
    assert not report.is_equal
    assert f"the first layer that differs is {layer}, at position {row}" in report.parting
    assert "NOT EQUAL" in report.lines()


def test_a_mistake_in_the_output_head_alone_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from sensorium.model_executor.models.llama import LlamaForCausalLM

    compute = LlamaForCausalLM.compute_logits
    monkeypatch.setattr(LlamaForCausalLM, "compute_logits", lambda self, *given: compute(self, *given).roll(1, -1))
    report = sensorium.verify(str(make_checkpoint("llama")))
    assert not any(result.is_equal for result in report.results)
    assert "layers agree" in report.parting


def test_random_weights_need_only_a_config(tmp_path: Path) -> None:
    save_tiny("olmo2", tmp_path)
    (tmp_path / "model.safetensors").unlink()
    report = sensorium.verify(str(tmp_path), random_weights=True, max_model_len=64)
    assert report.is_equal, "\n".join(report.lines())
    assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == []


def test_the_command_prints_json_and_fails_where_something_differs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["verify", str(make_checkpoint("llama")), "--json", "--num-new-tokens", "2"]
    assert main(arguments) == 0
    assert json.loads(capsys.readouterr().out)["is_equal"] is True
    spoil_a_layer(monkeypatch, 1, 0)
    assert main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["is_equal"] is False
    assert any(result["position"] is not None for result in found["results"])


@pytest.mark.parametrize(
    ("settings", "error", "match"),
    [
        ({"dtype": "float32"}, ConfigError, "dtype"),
        ({"baseline": "vllm"}, ConfigError, "baseline"),
        ({"baseline": "native", "model_impl": "native"}, ConfigError, "model_impl"),
        ({"num_new_tokens": 0}, ConfigError, "num_new_tokens"),
        ({"nonsense": 1}, ConfigError, "nonsense"),
    ],
)
def test_wrong_settings_are_told(settings: dict[str, Any], error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        sensorium.verify(str(make_checkpoint("llama")), **settings)


def test_an_architecture_that_transformers_lacks_has_no_reference(tmp_path: Path) -> None:
    from sensorium.entrypoints.verification.reference import Reference
    from tests.helpers.direct import engine_config

    config = engine_config(make_checkpoint("llama"))
    object.__setattr__(config.model_config, "architecture", "NobodysForCausalLM")
    with pytest.raises(ModelError, match="NobodysForCausalLM"):
        Reference(config)

"""The loader: every layout of every family, and a clear refusal of what doesn't fit."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from sensorium.checkpoint import weight_files
from sensorium.config import LoadConfig
from sensorium.errors import ModelError, WeightsError
from sensorium.model_executor.model_loader import default_weight_loader, fill_model, load_model
from sensorium.model_executor.weight_tracking import ignore_weight
from tests.helpers.checkpoints import FAMILIES, Layout, make_checkpoint, make_hf_model
from tests.helpers.direct import DirectRun, engine_config, load, relative_error

IDS = torch.arange(1, 40)
Edit = Callable[[dict[str, torch.Tensor]], object]


def copy_of(checkpoint: Path, path: Path, edit: Edit | None = None) -> Path:
    """A copy of a one-file checkpoint that may be changed; `edit` changes its tensors."""
    shutil.copytree(checkpoint, path, dirs_exist_ok=True)
    if edit is not None:
        tensors = load_file(path / "model.safetensors")
        edit(tensors)
        save_file(tensors, path / "model.safetensors")
    return path


def logits_of(path: Path, **settings: Any) -> torch.Tensor:
    return DirectRun(*load(path, **settings)).step(IDS)


# Layouts and dtypes


@pytest.mark.parametrize("layout", ["hub", "saved", "module"])
@pytest.mark.parametrize("family", [each for each in FAMILIES if each not in ("whisper", "mllama")])
def test_every_layout_of_every_family_loads(family: str, layout: Layout) -> None:
    reference = make_hf_model(family)
    with torch.inference_mode():
        expected = reference(IDS[None]).logits[0]
    assert relative_error(logits_of(make_checkpoint(family, layout=layout)), expected) < 1e-5


@pytest.mark.parametrize("family", ["qwen2", "llava", "qwen2_vl"])  # the reference never ties Qwen2-Audio's
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["hub", "saved"])
def test_sharded_checkpoints_load_tied_or_not(family: str, layout: Layout, tied: bool) -> None:
    path = make_checkpoint(family, layout=layout, tied=tied, sharded=True)
    assert len(weight_files(path)) > 1
    reference = make_hf_model(family, tied=tied)
    with torch.inference_mode():
        expected = reference(IDS[None]).logits[0]
    assert relative_error(logits_of(path), expected) < 1e-5


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("wanted", ["auto", "float32", "bfloat16", "float16"])
def test_weights_are_converted_to_the_wanted_dtype(stored: str, wanted: str) -> None:
    path = make_checkpoint("qwen2", dtype=stored)
    config = engine_config(path, dtype=wanted)
    model: Any = load_model(config)
    expected = getattr(torch, stored if wanted == "auto" else wanted)
    assert {parameter.dtype for parameter in model.parameters()} == {expected}
    tensors = load_file(path / "model.safetensors")
    assert torch.equal(model.model.embed_tokens.weight, tensors["model.embed_tokens.weight"].to(expected))
    assert logits_of(path, dtype=wanted).isfinite().all()


def test_loaded_models_need_no_gradients_and_are_in_evaluation_mode() -> None:
    model, _ = load(make_checkpoint("llava"))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("kept", ["model.embed_tokens.weight", "lm_head.weight"])
def test_a_tied_checkpoint_may_store_either_tensor(kept: str, tmp_path: Path) -> None:
    def keep_one(tensors: dict[str, torch.Tensor]) -> None:
        tensors[kept] = tensors.pop("model.embed_tokens.weight")

    tied = make_checkpoint("llama", tied=True)
    assert torch.equal(logits_of(copy_of(tied, tmp_path, keep_one)), logits_of(tied))


def test_a_head_that_differs_from_the_embeddings_is_used_whatever_the_config_says(tmp_path: Path) -> None:
    """A fine-tuned checkpoint was saved with `tie_word_embeddings` set although its head had been trained apart."""
    path = copy_of(make_checkpoint("qwen2_vl"), tmp_path)
    config = json.loads((path / "config.json").read_text())
    config["tie_word_embeddings"] = True
    (path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(path), logits_of(make_checkpoint("qwen2_vl")))


# Completeness


@pytest.mark.parametrize("family", ["qwen2", "llava", "qwen2_vl", "qwen2_audio", "whisper"])
def test_a_key_that_nothing_takes_is_named(family: str, tmp_path: Path) -> None:
    name = {"llava": "vision_tower.vision_model.encoder.layers.0.extra.weight"}.get(family, "model.extra.weight")
    if family == "qwen2_audio":
        name = "audio_tower.extra.weight"
    path = copy_of(make_checkpoint(family), tmp_path, lambda tensors: tensors.update({name: torch.ones(3)}))
    with pytest.raises(WeightsError, match="extra"):
        load(path)


@pytest.mark.parametrize(
    ("family", "missing", "parameter"),
    [
        ("llama", "model.layers.1.self_attn.k_proj.weight", r"model\.layers\.1\.self_attn\.qkv_proj\.weight"),
        ("llama", "model.norm.weight", r"model\.norm\.weight"),
        ("llama", "lm_head.weight", r"lm_head\.weight"),
        ("qwen2", "model.layers.0.self_attn.v_proj.bias", r"model\.layers\.0\.self_attn\.qkv_proj\.bias"),
        ("qwen2_vl", "visual.merger.mlp.0.bias", r"visual\.merger\.mlp\.fc1\.bias"),
        ("llava", "multi_modal_projector.linear_2.bias", r"multi_modal_projector\.fc2\.bias"),
        ("qwen2_audio", "audio_tower.layers.0.self_attn.k_proj.weight", r"audio_tower\.layers\.0\.attn\.qkv_proj"),
    ],
)
def test_a_parameter_without_a_value_is_named(family: str, missing: str, parameter: str, tmp_path: Path) -> None:
    path = copy_of(make_checkpoint(family), tmp_path, lambda tensors: tensors.pop(missing))
    with pytest.raises(WeightsError, match=f"without a .complete. value.*{parameter}"):
        load(path)


def test_a_shape_that_differs_is_named(tmp_path: Path) -> None:
    key = "model.layers.2.mlp.up_proj.weight"
    path = copy_of(make_checkpoint("llama"), tmp_path, lambda tensors: tensors.update({key: torch.ones(5, 64)}))
    with pytest.raises(WeightsError, match=r"model\.layers\.2\.mlp\.gate_up_proj\.weight \(part 1\): got \(5, 64\)"):
        load(path)


def test_keys_that_every_model_computes_by_itself_are_passed_over(tmp_path: Path) -> None:
    extra = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8),
        "visual.rotary_pos_emb.inv_freq": torch.ones(4),
    }
    path = copy_of(make_checkpoint("qwen2_vl"), tmp_path, lambda tensors: tensors.update(extra))
    assert torch.equal(logits_of(path), logits_of(make_checkpoint("qwen2_vl")))


def test_long_lists_of_names_are_cut() -> None:
    model = Loops()
    with pytest.raises(WeightsError, match="and 15 more"):
        fill_model(model, [(f"skip.{index}", torch.ones(1)) for index in range(25)])


# Files


def test_pickled_weights_are_never_opened(tmp_path: Path) -> None:
    path = copy_of(make_checkpoint("llama"), tmp_path)
    (path / "model.safetensors").unlink()
    (path / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    with pytest.raises(WeightsError, match=r"got pytorch_model\.bin, expected \*\.safetensors.*convert"):
        load(path)


def test_a_directory_without_weights_is_refused(tmp_path: Path) -> None:
    path = copy_of(make_checkpoint("llama"), tmp_path)
    (path / "model.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"got no \*\.safetensors file"):
        load(path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    path = copy_of(make_checkpoint("llama", sharded=True), tmp_path)
    (path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"got no model-00002-of-00003\.safetensors"):
        load(path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = copy_of(make_checkpoint("llama"), tmp_path)
    content = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(WeightsError, match=r"checkpoint file model\.safetensors"):
        load(path)


def test_a_key_in_two_files_is_refused(tmp_path: Path) -> None:
    path = copy_of(make_checkpoint("llama"), tmp_path)
    (path / "model.safetensors").rename(path / "part-1.safetensors")
    save_file({"model.norm.weight": torch.ones(64)}, path / "part-2.safetensors")
    with pytest.raises(WeightsError, match=r"'model\.norm\.weight': got it in part-1.* and in part-2"):
        load(path)


# Dummy weights


def dummy(family: str, seed: int) -> torch.Tensor:
    config = engine_config(make_checkpoint(family), load_format="dummy", seed=seed)
    assert config.load_config == LoadConfig("dummy")
    return DirectRun(load_model(config), config).step(IDS)


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_5_vl", "qwen2_audio"])
def test_dummy_weights_are_seeded_and_sensible(family: str) -> None:
    first, again, other = dummy(family, 3), dummy(family, 3), dummy(family, 4)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert 0.05 < first.std() < 50


# Models of other people


class Loops(nn.Module):
    """The loading loop that published model files are written with."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4, bias=False)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        parameters = dict(self.named_parameters())
        for name, tensor in weights:
            if name.startswith("skip"):
                continue
            parameter = parameters[name]
            getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


class Assigns(Loops):
    """Fills parameters in every way but the usual one."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        tensors = dict(weights)
        self.first.weight.data = tensors["first.weight"]
        self.second.weight = nn.Parameter(tensors["second.weight"].clone(), requires_grad=False)
        halves = tensors["first.bias"].chunk(2)
        self.first.bias.data[:2] = halves[0]
        self.first.bias[2:].copy_(halves[1])


class Reports(Loops):
    """Says what it loaded in its result, through means that can't be watched."""

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:  # type: ignore[override]
        for name, tensor in weights:
            dict(self.named_parameters())[name].data.numpy()[...] = tensor.numpy()
        return set(dict(self.named_parameters()))


class Ignores(Loops):
    ignored_weights = ("teacher.*",)


class IgnoresWithinLoading(Loops):
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        def wanted() -> Iterable[tuple[str, torch.Tensor]]:
            for name, tensor in weights:
                if name.startswith("teacher"):
                    ignore_weight(tensor)
                else:
                    yield name, tensor

        super().load_weights(wanted())


def tensors_for(model: nn.Module, **extra: torch.Tensor) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    drawn = {name: torch.randn(p.shape, generator=generator) for name, p in model.named_parameters()}
    return drawn | extra


@pytest.mark.parametrize("kind", [Loops, Assigns, Reports, Ignores, IgnoresWithinLoading])
def test_any_way_of_filling_parameters_counts(kind: type[nn.Module]) -> None:
    model = kind()
    tensors = tensors_for(model)
    extra = {"teacher.weight": torch.ones(2)} if "Ignores" in kind.__name__ else {}
    fill_model(model, (tensors | extra).items())
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
@pytest.mark.parametrize("name", ["first.weight", "first.bias"])
@pytest.mark.parametrize("kind", [Loops, Assigns, Ignores])
def test_quantized_values_are_not_taken_for_floats(kind: type[nn.Module], name: str, dtype: torch.dtype) -> None:
    """A checkpoint in int8 loaded into float parameters without a word, whoever's loop put it there."""
    model = kind().requires_grad_(False)
    tensors = tensors_for(model)
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(WeightsError, match=rf"{name}.*: got {dtype}.*, expected torch\.float32.*quantization_config"):
        fill_model(model, tensors.items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_floats_of_any_width_are_floats(dtype: torch.dtype) -> None:
    model = Loops()
    tensors = {name: tensor.to(dtype) for name, tensor in tensors_for(model).items()}
    fill_model(model, tensors.items())
    assert all(torch.equal(parameter, tensors[name].float()) for name, parameter in model.named_parameters())


def test_a_loop_that_passes_a_key_over_in_silence_is_told_so() -> None:
    model = Loops()
    with pytest.raises(WeightsError, match=r"Loops didn't use: got skip\.me, expected none.*ignored_weights"):
        fill_model(model, (tensors_for(model) | {"skip.me": torch.ones(2)}).items())


def test_a_loop_that_does_not_know_a_key_fails_with_its_name() -> None:
    model = Loops()
    with pytest.raises(WeightsError, match=r"checkpoint key 'third\.weight' into Loops"):
        fill_model(model, (tensors_for(model) | {"third.weight": torch.ones(2)}).items())


def test_a_parameter_that_the_checkpoint_lacks_is_named() -> None:
    model = Loops()
    tensors = tensors_for(model)
    del tensors["first.bias"]
    with pytest.raises(WeightsError, match=r"Loops without a .complete. value.*first\.bias"):
        fill_model(model, tensors.items())


def test_a_model_without_load_weights_is_told_what_to_add() -> None:
    with pytest.raises(ModelError, match="Linear: got no load_weights method"):
        fill_model(nn.Linear(2, 2), [])

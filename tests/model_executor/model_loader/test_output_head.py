"""Which output head a checkpoint has is read from its tensors, whatever its flags say and whatever lies beside it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sensorium.errors import WeightsError
from sensorium.model_executor.model_loader import load_model
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.direct import DirectRun, engine_config, load
from tests.helpers.toy_models import SeedPageModel, save_checkpoint

IDS = torch.arange(1, 30)
FLAGS = (True, False, None)


def write(folder: Path, state: dict[str, torch.Tensor], num_files: int) -> None:
    """Tensors in one file, or scattered over several with an index."""
    (folder / "model.safetensors").unlink(missing_ok=True)
    if num_files == 1:
        save_file(state, folder / "model.safetensors")
        return
    weight_map = {}
    for index in range(num_files):
        file = f"model-{index + 1:05}-of-{num_files:05}.safetensors"
        names = sorted(state)[index::num_files]
        save_file({name: state[name] for name in names}, folder / file)
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def omni(path: Path, *, flags: tuple[Any, Any, Any], head: str, num_files: int = 1) -> Path:
    """A whole Qwen2.5-Omni checkpoint, its talker included.

    `flags`: `tie_word_embeddings` of the whole, the thinker and its text config; None for none. `head`: "own", "equal"
    to the embeddings, or "absent".
    """
    base = make_checkpoint("qwen2_5_omni_thinker", layout="hub")
    shutil.copytree(base, path, dirs_exist_ok=True)
    state = {f"thinker.{name}": tensor for name, tensor in load_file(base / "model.safetensors").items()}
    if head == "equal":
        state["thinker.lm_head.weight"] = state["thinker.model.embed_tokens.weight"].clone()
    elif head == "absent":
        del state["thinker.lm_head.weight"]
    noise = torch.Generator().manual_seed(7)
    for name, rows in (("model.embed_tokens", 320), ("lm_head", 320), ("codec_head", 40)):
        state[f"talker.{name}.weight"] = torch.randn(rows, 64, generator=noise)
    state["token2wav.input_embed.weight"] = torch.randn(8, 64, generator=noise)
    write(path, state, num_files)
    thinker = json.loads((base / "config.json").read_text())
    whole = {"architectures": ["Qwen2_5OmniModel"], "model_type": "qwen2_5_omni", "thinker_config": thinker}
    for level, flag in zip((whole, thinker, thinker["text_config"]), flags, strict=True):
        level.pop("tie_word_embeddings", None)
        if flag is not None:
            level["tie_word_embeddings"] = flag
    (path / "config.json").write_text(json.dumps(whole))
    return path


def logits_of(path: Path, **settings: Any) -> torch.Tensor:
    return DirectRun(*load(path, **settings)).step(IDS)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("flags", [(whole, part, text) for whole in FLAGS for part in FLAGS for text in FLAGS])
def test_a_head_of_its_own_is_used_whatever_the_flags_say(
    flags: tuple[Any, Any, Any], num_files: int, tmp_path: Path
) -> None:
    """The talker's embeddings were taken for a second head: the thinker's was dropped, and its tokens were garbage."""
    path = omni(tmp_path, flags=flags, head="own", num_files=num_files)
    assert torch.equal(logits_of(path), logits_of(make_checkpoint("qwen2_5_omni_thinker")))


@pytest.mark.parametrize("head", ["equal", "absent"])
@pytest.mark.parametrize("flags", [(True, None, None), (None, True, None), (None, None, True), (True, False, False)])
def test_a_tied_head_is_tied_at_whichever_level_the_flag_stands(
    flags: tuple[Any, Any, Any], head: str, tmp_path: Path
) -> None:
    path = omni(tmp_path, flags=flags, head=head)
    reference = omni(tmp_path / "reference", flags=(False, False, False), head="equal")
    assert torch.equal(logits_of(path), logits_of(reference))


@pytest.mark.parametrize("family", ["llama", "llava", "qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("level", ["whole", "text"])
def test_flags_at_either_level_of_every_family(family: str, level: str, tmp_path: Path) -> None:
    tied = make_checkpoint(family, tied=True)
    shutil.copytree(tied, tmp_path, dirs_exist_ok=True)
    config = json.loads((tied / "config.json").read_text())
    text = config.get("text_config", config)
    for each in (config, text):
        each["tie_word_embeddings"] = False
    (config if level == "whole" else text)["tie_word_embeddings"] = True
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits_of(tmp_path), logits_of(tied))


def test_a_head_without_tensor_and_flag_says_how_to_tie_it(tmp_path: Path) -> None:
    path = omni(tmp_path, flags=(False, False, False), head="absent")
    with pytest.raises(WeightsError, match=r"no tensor for the output head .*set tie_word_embeddings to true"):
        load(path)
    logits_of(path, hf_overrides={"tie_word_embeddings": True})


def toy(path: Path, config: dict[str, Any], *dropped: str) -> Path:
    """A checkpoint of a class with a head of its own, with these values in its config and without these tensors."""
    folder = save_checkpoint(SeedPageModel, path)
    state = load_file(folder / "model.safetensors")
    save_file({name: each for name, each in state.items() if name not in dropped}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **config}))
    return folder


@pytest.mark.parametrize("dropped", [("lm_head.weight",), ("lm_head.weight", "lm_head.bias")])
def test_a_class_with_a_head_of_its_own_is_told_that_the_head_is_tied(
    dropped: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The error was "check that config.json belongs to these weights", which it did."""
    folder = toy(tmp_path, {"tie_word_embeddings": True}, *dropped)
    with pytest.raises(WeightsError, match=r"ties its output head to the embeddings \(tie_word_embeddings\).*let Seed"):
        load_model(engine_config(folder, skip_tokenizer_init=True))
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


def test_other_parameters_without_value_name_files_that_were_not_read(tmp_path: Path) -> None:
    folder = toy(tmp_path, {}, "lm_head.weight")
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, folder / "one.safetensors")
    save_file({name: state[name] for name in names[1::2]}, folder / "two.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "one.safetensors"}}))
    with pytest.raises(WeightsError, match=r"Only one\.safetensors was read, not two\.safetensors"):
        load_model(engine_config(folder, skip_tokenizer_init=True))

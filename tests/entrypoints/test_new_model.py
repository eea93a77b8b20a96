"""`sensorium new-model`: a file that needs nothing but what is marked, for families that differ in what they do."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import sensorium
from sensorium import ModelRegistry
from sensorium.entrypoints.cli.main import main
from sensorium.entrypoints.new_model.anatomy import read
from sensorium.entrypoints.new_model.skeleton import MARK, file_of_test, model_file
from sensorium.plugins import load_plugin
from tests.helpers.checkpoints import chat_template
from tests.helpers.tiny_media import media_config, save_tiny_media

ROOT = Path(__file__).parents[2]
PLAIN = """
        if pixel_values is None:
            return {}
        features = self.vision_tower(flatten_bn(pixel_values, concat=True))[:, 1:]
        return {self.config.image_token_id: list(self.multi_modal_projector(features))}
"""
TILES = """
        if pixel_values is None:
            return {}
        encoded = []
        for picture, size in zip(each_item(pixel_values, 5), each_item(image_sizes, 2), strict=True):
            tiles = self.multi_modal_projector(self.vision_tower(picture[0])[:, 1:])
            side, grid = int(tiles.shape[1] ** 0.5), tile_grid(self.config, tuple(size[0].tolist()))
            lines = assemble(tiles[1:], grid, side, tuple(size[0].tolist()))
            ends = self.image_newline.expand(len(lines), 1, -1)
            encoded.append(torch.cat((tiles[0], torch.cat((lines, ends), dim=1).flatten(0, 1))))
        return {self.config.image_token_id: encoded}
"""
M_ROPE = """
        encoded = {}
        for token_id, patches, grids in (
            (self.config.image_token_id, pixel_values, image_grid_thw),
            (self.config.video_token_id, pixel_values_videos, video_grid_thw),
        ):
            if patches is not None:
                grid = torch.cat(each_item(grids, 2))
                rows = self.visual(torch.cat(each_item(patches, 2)), grid).pooler_output
                encoded[token_id] = torch.split(rows, (grid.prod(-1) // 4).tolist())
        return encoded
"""
FILLED = {
    "llava": (PLAIN, "from sensorium.model_executor.models.utils import flatten_bn"),
    "llava_next": (
        TILES,
        (
            "from sensorium.model_executor.models.llava_next import tile_grid\n"
            "from sensorium.model_executor.models.tiles import assemble\n"
            "from sensorium.multimodal.inputs import each_item"
        ),
    ),
    "qwen2_vl": (M_ROPE, "from sensorium.multimodal.inputs import each_item"),
}
"""By type: what stands in the place of the marked refusal of `encode_media`, and what that imports."""


@pytest.mark.parametrize("model_type", FILLED)
def test_a_skeleton_with_its_marks_filled_in_computes_what_hugging_face_does(model_type: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "checkpoint"
    save_tiny_media(model_type, checkpoint)
    (checkpoint / "chat_template.jinja").write_text(chat_template({"IMAGE": "<image>", "VIDEO": "<video>"}))
    path = tmp_path / f"my_{model_type}.py"
    assert main(["new-model", str(checkpoint), "--out", str(path)]) == 0
    written, (body, imports) = path.read_text(), FILLED[model_type]
    refusal = next(line for line in written.splitlines(keepends=True) if "raise NotImplementedError(" in line)
    assert written.count("raise NotImplementedError(") == 1
    path.write_text(f"{written.replace(refusal, body).replace('import torch', f'{imports}{chr(10)}import torch', 1)}")
    report = sensorium.verify(str(checkpoint), plugins=[str(path)], dtypes=["float32"], max_model_len=512)
    assert report.is_equal, "\n".join(report.lines())
    assert report.tier == "2"
    cases = {result.case.split()[0] for result in report.results}
    assert cases == ({"text", "picture", "clip"} if model_type == "qwen2_vl" else {"text", "picture"})
    assert not report.left_out


def is_clean(folder: Path) -> str:
    """What the linter and the formatter of this project have to say, and functions without types."""
    config = str(ROOT / "pyproject.toml")
    found = ""
    for command in (["check"], ["format", "--check"]):
        run = [sys.executable, "-m", "ruff", *command, "--config", config, "--no-cache", str(folder)]
        done = subprocess.run(run, capture_output=True, text=True, check=False)
        found += "" if done.returncode == 0 else done.stdout + done.stderr
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and (
                node.returns is None
                or any(each.annotation is None for each in node.args.args if each.arg not in ("self", "cls"))
            ):
                found += f"{path.name}: {node.name} has no types\n"
    return found


TYPES = ("qwen2_vl", "aya_vision", "idefics3", "qwen2_audio", "ovis2")


def config_file(model_type: str, folder: Path) -> str:
    """A config.json with sizes of some dozens, and nothing beside it."""
    path = folder / "config.json"
    path.write_text(json.dumps(media_config(model_type).to_dict(), default=str))
    return str(path)


def test_files_of_many_types_are_clean_and_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for model_type in TYPES:
        anatomy = read(config_file(model_type, tmp_path))
        text = model_file(anatomy)
        assert text.count(MARK) >= 3
        (tmp_path / f"{model_type}.py").write_text(text)
        (tmp_path / f"test_{model_type}.py").write_text(file_of_test(anatomy, f"{model_type}.py"))
    assert is_clean(tmp_path) == ""
    registered: list[str] = []
    monkeypatch.setattr(ModelRegistry, "register_model", lambda name, _: registered.append(name))
    for model_type in TYPES:
        load_plugin(str(tmp_path / f"{model_type}.py"))
    assert len(set(registered)) == len(TYPES)


def test_what_is_found_of_a_model() -> None:
    anatomy = read("idefics3")
    assert [(part.name, part.is_tower) for part in anatomy.parts] == [("vision_model", True), ("connector", False)]
    assert anatomy.decoder.path == "model.text_model"
    assert ("model.text_model.", "language_model.model.") in anatomy.renamings
    assert anatomy.decoder.architecture == "LlamaForCausalLM"
    assert anatomy.decoder.is_by_type
    mrope = read("qwen2_vl")
    assert mrope.is_mrope
    assert not mrope.decoder.is_by_type
    assert [item.modality for item in mrope.items] == ["image", "video"]


def test_it_says_first_what_runs_without_a_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["new-model", config_file("aya_vision", tmp_path), "--out", str(tmp_path / "aya.py")]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert "runs already, by the modules of transformers" in first
    assert 'raise NotImplementedError("the decoder Cohere2Model")' in (tmp_path / "aya.py").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing-of-that-name"], "expected a checkpoint's folder"),
        (["olmo2"], "takes no media"),
        (["whisper"], "no decoder that rows of media are put in front of"),
        (["llava", "--out", "my-model.py"], "a module's name"),
        (["llava", "--out", "missing/model.py"], "can't be written"),
    ],
)
def test_what_it_cannot_do_is_one_error(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["new-model", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_it_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "test_mine.py").write_text("mine")
    assert main(["new-model", "llava", "--out", str(tmp_path / "mine.py")]) == 2
    assert "there already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["test_mine.py"]

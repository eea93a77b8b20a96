"""A model in a plain file is served by naming the file: no package, no entry point, no path to set.

Without such a setting, an author had to install a package before `sensorium serve` knew the class, since the engine's
core is a process of its own that has imported nothing of theirs.
"""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, ModelRegistry
from sensorium.engine.args import EngineArgs
from sensorium.errors import ConfigError
from sensorium.plugins import load_plugin
from tests.engine.async_helpers import SETTINGS, greedy, last, running
from tests.helpers import toy_models as toys

ROOT = Path(__file__).parents[2]
SERVED = {**SETTINGS, "skip_tokenizer_init": True, "max_model_len": 128, "limit_mm_per_prompt": {"image": 2}}
MODEL_FILE = """
from own_parts_of_{name} import NAME
from sensorium import ModelRegistry
from tests.helpers.toy_models import {base}


class {name}({base}):
    pass


ModelRegistry.register_model(NAME, {name})
"""


def write_model(folder: Path, name: str, base: type = toys.SeedPageModel) -> Path:
    """A file with a model, which imports another file beside it; and a checkpoint in `folder / "checkpoint"`."""
    (folder / f"own_parts_of_{name}.py").write_text(f"NAME = {name!r}\n")
    path = folder / f"file_of_{name}.py"
    path.write_text(MODEL_FILE.format(name=name, base=base.__name__))
    (folder / "checkpoint").mkdir()
    toys.save_checkpoint(type(name, (base,), {}), folder / "checkpoint")
    return path


@pytest.mark.parametrize("base", [toys.SeedPageModel, toys.TwoMethodModel])
def test_a_file_is_imported_by_every_process(base: type, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"PlainFile{base.__name__}"
    file = write_model(tmp_path, name, base)
    monkeypatch.syspath_prepend(str(ROOT))  # for the toys; the core gets the path of its front
    settings = {**SERVED, "plugins": [file]}
    prompt = {"prompt_token_ids": [9, toys.IMAGE_TOKEN, 10], "multi_modal_data": {"image": toys.image(1, 5)}}

    async def served() -> list[int]:
        async with running(tmp_path / "checkpoint", in_process=False, **settings) as engine:
            output = await last(engine.generate(prompt, greedy()))
            return list(output.outputs[0].token_ids)

    assert name not in ModelRegistry.get_supported_archs()
    [offline] = LLM(str(tmp_path / "checkpoint"), **settings).generate(prompt, greedy())
    assert asyncio.run(served()) == list(offline.outputs[0].token_ids)


def test_a_file_is_run_once_in_a_process(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = write_model(tmp_path, "RunOnce")
    first = load_plugin(str(file))
    assert load_plugin(str(file)) is first
    assert load_plugin("file_of_RunOnce") is first, "by its name, too"
    assert not [record for record in caplog.records if "already registered" in record.message]


def test_a_file_may_have_the_name_of_another_module(tmp_path: Path) -> None:
    file = tmp_path / "json.py"
    file.write_text("VALUE = 41\n")
    assert load_plugin(str(file)).VALUE == 41
    import json

    assert json.loads("41") == 41


def test_a_program_may_name_its_own_file(tmp_path: Path) -> None:
    """`python my_model.py`, which defines a class and an engine, doesn't define the class twice."""
    program = tmp_path / "program.py"
    program.write_text(
        "from sensorium.plugins import load_plugin\nprint('run')\nassert load_plugin(__file__).__name__ == '__main__'\n"
    )
    done = subprocess.run(
        [sys.executable, program], capture_output=True, text=True, env={"PYTHONPATH": str(ROOT)}, check=True
    )
    assert done.stdout.splitlines() == ["run"]


@pytest.mark.parametrize(
    ("plugins", "expected"),
    [
        (["no_such_file.py"], r"'no_such_file\.py'.*no such file"),
        (["folder/no_such_module"], r"no such file"),
        (["no_such_module"], r"'no_such_module' failed: ModuleNotFoundError"),
        ("a.py", r"plugins: got 'a\.py'"),
        ([3], r"plugins: got 3"),
    ],
)
def test_a_plugin_that_is_not_there_is_named(plugins: Any, expected: str, tmp_path: Path) -> None:
    toys.save_checkpoint(toys.SeedPageModel, tmp_path)
    with pytest.raises(ConfigError, match=expected):
        EngineArgs(str(tmp_path), plugins=plugins).create_engine_config()


@pytest.mark.parametrize("text", ["def broken(:\n", "raise RuntimeError('broken')\n", "import no_such_package\n"])
def test_a_plugin_that_fails_is_an_error_and_can_be_tried_again(text: str, tmp_path: Path) -> None:
    file = tmp_path / f"fails_{len(text)}.py"
    file.write_text(text)
    for _ in range(2):
        with pytest.raises(ConfigError, match=rf"plugins: importing '.*{file.name}' failed: \w+Error"):
            load_plugin(str(file))


def test_the_message_for_an_unknown_architecture_says_how_to_add_one(tmp_path: Path) -> None:
    toys.save_checkpoint(type("NobodyHasThis", (toys.SeedPageModel,), {}), tmp_path)
    with pytest.raises(ConfigError) as caught:
        EngineArgs(str(tmp_path)).create_engine_config()
    for part in ("NobodyHasThis", "--plugin", "LLM(plugins=", "sensorium.general_plugins", "ModelRegistry"):
        assert part in str(caught.value)

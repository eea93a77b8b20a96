"""Code that lies in a checkpoint is not run unless the user says so, whichever of its files names it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from sensorium import LLM, SamplingParams
from sensorium.errors import SensoriumError
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture

MODULE = """
from pathlib import Path
Path({marker!r}).touch()
raise RuntimeError("the code of the checkpoint runs")
"""


def plant(path: Path, file: str, **entries: Any) -> None:
    """Let one of a checkpoint's files name classes of the module that lies beside it."""
    content = json.loads((path / file).read_text()) if (path / file).exists() else {}
    (path / file).write_text(json.dumps(content | entries))
    (path / "planted.py").write_text(MODULE.format(marker=str(path / "was_run")))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    source = make_checkpoint("qwen2_vl")
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def run(path: Path, **settings: Any) -> None:
    llm = LLM(str(path), device="cpu", num_blocks=64, **settings)
    prompt = {"prompt": "<|vision_start|><|image_pad|><|vision_end|>What?", "multi_modal_data": {"image": picture(1)}}
    llm.generate(prompt, SamplingParams(temperature=0, max_tokens=2), use_tqdm=False)


NAMES: list[tuple[str, dict[str, Any]]] = [
    ("config.json", {"auto_map": {"AutoConfig": "planted.Config", "AutoModelForCausalLM": "planted.Model"}}),
    ("config.json", {"model_type": "planted", "auto_map": {"AutoConfig": "planted.Config"}}),
    ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["planted.Tokenizer", "planted.Tokenizer"]}}),
    ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "planted.Images"}}),
    ("processor_config.json", {"auto_map": {"AutoProcessor": "planted.Processor"}}),
]


@pytest.mark.parametrize(("file", "entries"), NAMES)
def test_code_in_a_checkpoint_is_not_run_without_consent(checkpoint: Path, file: str, entries: dict[str, Any]) -> None:
    plant(checkpoint, file, **entries)
    with suppress(SensoriumError):  # some of these can't be served without it
        run(checkpoint)
    assert not was_run(checkpoint)


@pytest.mark.parametrize(("file", "entries"), NAMES[1:3])
def test_with_consent_it_is(checkpoint: Path, file: str, entries: dict[str, Any]) -> None:
    """What the test above would see if consent were not asked for."""
    plant(checkpoint, file, **entries)
    with suppress(Exception):
        run(checkpoint, trust_remote_code=True)
    assert was_run(checkpoint)


def was_run(checkpoint: Path) -> bool:
    return (checkpoint / "was_run").exists()

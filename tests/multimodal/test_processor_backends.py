"""Which library a checkpoint's media are preprocessed with, and what is said where it is missing.

A processor that exists for torchvision only was unusable even with torchvision, because that was hidden from
transformers; and without, a server loaded, and every image request was told to add a file that was there.
"""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from sensorium.engine.args import EngineArgs
from sensorium.errors import ConfigError, MissingLibraryError, ProcessorError
from sensorium.inputs.warm_up import warm_up
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal import torchvision as rules
from sensorium.multimodal.hf_processors import cached_get_image_processor, cached_get_processor, resolve_backend
from sensorium.multimodal.video_processor import cached_get_video_processor
from tests.helpers import toy_models as toys
from tests.helpers.processors import save_llava, save_qwen2_vl

ROOT = Path(__file__).parents[2]
ONLY = "Cohere2VisionImageProcessor"


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(rules, "_hidden", False)


def write(folder: Path, **files: Any) -> str:
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return str(folder)


@pytest.mark.parametrize(
    ("kind", "model_type", "expected"),
    [
        (ONLY, None, ONLY),
        (f"{ONLY}Fast", None, ONLY),
        (None, "cohere2_vision", ONLY),
        (None, "lfm2_vl", "Lfm2VlImageProcessor"),
        ("CLIPImageProcessor", None, None),
        ("CLIPImageProcessorPil", "cohere2_vision", None),
        ("Qwen2VLImageProcessorFast", None, None),
        ("NobodysImageProcessor", None, None),
        (None, None, None),
        (None, "llama", None),
    ],
)
def test_what_exists_for_torchvision_only_is_known_without_importing_it(
    kind: str | None, model_type: str | None, expected: str | None
) -> None:
    assert rules.only_for_torchvision(kind, model_type) == expected


@pytest.mark.usefixtures("without_torchvision")
@pytest.mark.parametrize(
    "files",
    [
        {"preprocessor_config": {"image_processor_type": ONLY}},
        {"preprocessor_config": {"image_processor_type": f"{ONLY}Fast"}},
        {"processor_config": {"image_processor": {"image_processor_type": ONLY}}},
        {"preprocessor_config": {"size": {"height": 32, "width": 32}}},
    ],
)
@pytest.mark.parametrize("get", [cached_get_image_processor, cached_get_processor, cached_get_video_processor])
def test_torchvision_is_named_where_it_is_missing(get: Any, files: dict[str, Any], tmp_path: Path) -> None:
    path = write(tmp_path, config={"model_type": "cohere2_vision"}, **files)
    with pytest.raises(MissingLibraryError, match=rf"{ONLY}.* needs torchvision, which is not installed") as caught:
        get(path)
    assert caught.value.status == 500


@pytest.mark.usefixtures("without_torchvision")
def test_a_setting_that_needs_torchvision_says_so(tmp_path: Path) -> None:
    path = str(save_llava(tmp_path))
    for get in (cached_get_image_processor, cached_get_video_processor):
        with pytest.raises(
            MissingLibraryError, match=r"mm_processor_backend='torchvision' needs torchvision, which is n"
        ):
            get(path, backend="torchvision")


def test_a_backend_that_a_processor_lacks_is_refused(tmp_path: Path) -> None:
    path = write(tmp_path, config={}, preprocessor_config={"image_processor_type": ONLY})
    with pytest.raises(ConfigError, match=r"got 'pil', but .* torchvision only"):
        resolve_backend(path, None, "pil")
    with pytest.raises(ConfigError, match="got 'opencv', expected"):
        resolve_backend(path, None, "opencv")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["NobodysImageProcessor", "CLIPImageProcesor"])
def test_a_type_that_nobody_knows_is_named_with_what_transformers_says(kind: str, tmp_path: Path) -> None:
    path = write(tmp_path, config={}, preprocessor_config={"image_processor_type": kind})
    with pytest.raises(ProcessorError, match=rf"the checkpoint's is {kind}, which can't be loaded: \w+Error: "):
        cached_get_image_processor(path)


@pytest.mark.parametrize("backend", ["auto", "pil"])
@pytest.mark.parametrize("kind", ["NobodysVideoProcessor", "Qwen3VLVideoProcesor"])
def test_a_video_processor_that_nobody_knows_is_named_as_such(kind: str, backend: Any, tmp_path: Path) -> None:
    """The error said that it exists for torchvision only, and to install that, which would not have helped."""
    path = write(tmp_path, config={}, video_preprocessor_config={"video_processor_type": kind})
    with pytest.raises(ProcessorError, match=rf"the checkpoint's is {kind}, which transformers doesn't have\. Correct"):
        cached_get_video_processor(path, backend=backend)


@pytest.mark.usefixtures("without_torchvision")
def test_a_video_processor_of_a_checkpoints_own_code_needs_torchvision(tmp_path: Path) -> None:
    own_code = {"video_processor_type": "OwnVideoProcessor", "auto_map": {"AutoVideoProcessor": "code.Own"}}
    path = write(tmp_path, config={}, video_preprocessor_config=own_code)
    with pytest.raises(MissingLibraryError, match=r"OwnVideoProcessor.* needs torchvision"):
        cached_get_video_processor(path)


def test_what_is_passed_on_names_no_paths(tmp_path: Path) -> None:
    path = write(tmp_path, config={}, preprocessor_config={"image_processor_type": "NobodysImageProcessor"})
    with pytest.raises(ProcessorError) as caught:
        cached_get_image_processor(path)
    assert path not in str(caught.value)


def test_a_whole_processor_passes_on_why_it_can_not_be_loaded(tmp_path: Path) -> None:
    path = write(tmp_path, config={"model_type": "llava"}, processor_config={"processor_class": "NobodysProcessor"})
    with pytest.raises(ProcessorError, match=r"none that can be loaded \(\w+: .+\)"):
        cached_get_processor(path)


# At load


def model_for_torchvision_only(folder: Path) -> type:
    cls = MULTIMODAL_REGISTRY.register_image_input_mapper()(type("TakesPictures", (toys.SeedPageModel,), {}))
    toys.ModelRegistry.register_model(cls.__name__, cls)
    toys.save_checkpoint(cls, folder)
    write(folder, preprocessor_config={"image_processor_type": ONLY})
    return cls


@pytest.mark.usefixtures("without_torchvision")
def test_what_is_missing_is_said_before_a_model_is_loaded(tmp_path: Path) -> None:
    model_for_torchvision_only(tmp_path)
    with pytest.raises(MissingLibraryError, match=rf"{ONLY}.*torchvision.*limit_mm_per_prompt"):
        EngineArgs(str(tmp_path)).create_engine_config()
    text_only = EngineArgs(str(tmp_path), limit_mm_per_prompt={"image": 0}).create_engine_config()
    assert text_only.model_config.mm_processor_backend == "auto"


def test_what_a_mapper_of_an_authors_own_lacks_is_said_by_the_warm_up(tmp_path: Path) -> None:
    def missing(ctx: Any, data: Any) -> Any:
        raise MissingLibraryError("Media: this needs a library")

    class Model(nn.Module, SupportsMultiModal):
        pass

    MULTIMODAL_REGISTRY.register_image_input_mapper(missing)(Model)
    from tests.helpers.configs import make_model_config

    config = make_model_config(Model)
    MULTIMODAL_REGISTRY.init_mm_limits_per_prompt(config)
    with pytest.raises(MissingLibraryError):
        warm_up(config)


# With a package of that name


def run_with_package(folder: Path, body: str, program: str) -> str:
    """What a program prints in a fresh process that finds this package as torchvision."""
    package = folder / "site" / "torchvision"
    for part in (package, package / "transforms", package / "transforms" / "v2"):
        part.mkdir(parents=True)
        (part / "__init__.py").write_text("")
    (package / "__init__.py").write_text(body)
    (package / "transforms" / "v2" / "functional.py").write_text("")
    metadata = folder / "site" / "torchvision-0.99.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{folder / 'site'}:{ROOT}"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_one_that_can_not_be_imported_is_named_with_the_reason(tmp_path: Path) -> None:
    path = write(tmp_path, config={}, preprocessor_config={"image_processor_type": ONLY})
    said = run_with_package(
        tmp_path,
        'raise RuntimeError("operator torchvision::nms does not exist")',
        f"""
        from sensorium.multimodal.hf_processors import cached_get_image_processor
        try:
            cached_get_image_processor({path!r})
        except RuntimeError as error:
            print(error)
        """,
    )
    assert "can't be imported beside torch" in said
    assert "RuntimeError: operator torchvision::nms does not exist" in said


def test_one_that_imports_is_used_where_it_is_needed_and_nowhere_else(tmp_path: Path) -> None:
    (tmp_path / "needs").mkdir()
    needs = write(tmp_path / "needs", config={}, preprocessor_config={"image_processor_type": ONLY})
    (tmp_path / "doesnt").mkdir()
    doesnt = str(save_qwen2_vl(tmp_path / "doesnt"))
    program = """
        import sys
        from sensorium.multimodal.hf_processors import resolve_backend
        print(resolve_backend({path!r}, None, "auto"), "torchvision" in sys.modules)
    """
    assert run_with_package(tmp_path / "needs", "", program.format(path=needs)) == "torchvision True"
    assert run_with_package(tmp_path / "doesnt", "", program.format(path=doesnt)) == "pil False"


def test_a_model_that_comes_too_late_for_it_is_told_so(tmp_path: Path) -> None:
    """Transformers remembers for good that there is no torchvision."""
    (tmp_path / "needs").mkdir()
    needs = write(tmp_path / "needs", config={}, preprocessor_config={"image_processor_type": ONLY})
    (tmp_path / "doesnt").mkdir()
    doesnt = str(save_qwen2_vl(tmp_path / "doesnt"))
    said = run_with_package(
        tmp_path,
        "",
        f"""
        from sensorium.multimodal.hf_processors import cached_get_image_processor
        cached_get_image_processor({doesnt!r})
        try:
            cached_get_image_processor({needs!r})
        except RuntimeError as error:
            print(error)
        """,
    )
    assert "load this model first, or in a process of its own" in said

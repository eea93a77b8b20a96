"""Tries every model file with media of a release of vLLM 0.6, fetched from the package index, each by itself beside our
rooms: whether it is imported, and, where there is a tiny checkpoint of a Hugging Face class for it, whether greedy
tokens are that class's in every way of `sensorium verify`. Prints the table of `docs/files_of_vllm.md`, and writes what
it found, with the versions that it ran, to `scripts/release_of_vllm.json`.

Takes some minutes. Some files import einops, librosa, mistral_common or torchvision.

    PYTHONPATH=. python scripts/verify_release_of_vllm.py [RELEASE] [FILE...]
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

import transformers

import sensorium
import sensorium.plugins
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.release_of_vllm import (
    chameleon_checkpoint,
    fetch_model_files,
    paligemma_checkpoint,
    pixtral_checkpoint,
)
from tests.helpers.tiny_media import save_tiny_media

LONGEST_REASON = 300
RECORD = Path(__file__).with_name("release_of_vllm.json")
NEWEST = "0.6.4.post1"


def family(name: str) -> Callable[[Path], Path]:
    return lambda _: make_checkpoint(name)


def tiny(model_type: str) -> Callable[[Path], Path]:
    def save(folder: Path) -> Path:
        save_tiny_media(model_type, folder)
        return folder

    return save


def idefics3_checkpoint(folder: Path) -> Path:
    """With a processor that says how many rows a tile has, as real ones do."""
    target = Path(shutil.copytree(make_checkpoint("idefics3"), folder / "idefics3"))
    (target / "processor_config.json").write_text('{"processor_class": "Idefics3Processor", "image_seq_len": 4}')
    return target


def onevision_checkpoint(folder: Path) -> Path:
    """With the number of tiles that the file has as a number."""
    target = Path(shutil.copytree(make_checkpoint("llava_onevision"), folder / "onevision"))
    written = (target / "config.json").read_text()
    (target / "config.json").write_text(written.replace("anyres_max_2", "anyres_max_9"))
    return target


CHECKPOINTS: Mapping[str, Mapping[str, Callable[[Path], Path]]] = {
    "blip2": {"BLIP-2": tiny("blip-2")},
    "chameleon": {"Chameleon": chameleon_checkpoint},
    "fuyu": {"Fuyu": tiny("fuyu")},
    "idefics3": {"Idefics3": idefics3_checkpoint},
    "llava": {
        "CLIP": family("llava"),
        "SigLIP": family("llava_siglip"),
        "Pixtral": pixtral_checkpoint,
    },
    "llava_next": {"LLaVA-NeXT": family("llava_next")},
    "llava_next_video": {"LLaVA-NeXT-Video": tiny("llava_next_video")},
    "llava_onevision": {"LLaVA-OneVision": onevision_checkpoint},
    "mllama": {"Llama 3.2 Vision": family("mllama")},
    "paligemma": {"PaliGemma": paligemma_checkpoint},
    "qwen2_audio": {"Qwen2-Audio": family("qwen2_audio")},
    "qwen2_vl": {"Qwen2-VL": family("qwen2_vl")},
}
"""Checkpoints by file. The files that aren't here are of models whose modules come with the checkpoint."""


def main() -> None:
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if sys.argv[1:2] == ["--one"]:
        print(tried(*map(Path, sys.argv[2:4]), sys.argv[4] if sys.argv[4:] else None))
        return
    release, *chosen = sys.argv[1:] or [NEWEST]
    cache = Path(tempfile.gettempdir()) / "sensorium_release_of_vllm"
    files = fetch_model_files(release, cache)
    named = chosen or sorted(each.stem for each in files.glob("*.py") if is_multimodal(each))
    for name in named:
        for what in CHECKPOINTS.get(name, {"": None}):
            found = in_process(files, files / f"{name}.py", what)
            print(f"| `{name}.py` | {what} | {found} |", flush=True)
            record(release, f"{name}.py {what}".strip(), found)


def record(release: str, what: str, found: str) -> None:
    """Each as soon as it is known, so that a run may be cut off and continued by naming files."""
    known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
    known.setdefault(release, {})[what] = {"found": found, **versions}
    RECORD.write_text(json.dumps(known, indent=1, sort_keys=True) + "\n")


def is_multimodal(file: Path) -> bool:
    text = file.read_text(encoding="utf-8")
    return "MULTIMODAL_REGISTRY" in text


def in_process(files: Path, file: Path, what: str) -> str:
    """The result of one file, run in its own process so that others can't affect it."""
    command = [sys.executable, __file__, "--one", str(files), str(file), *([what] if what else [])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    last = (done.stdout.strip() or done.stderr.strip() or "nothing").splitlines()[-1]
    return last[:LONGEST_REASON]


def tried(files: Path, file: Path, what: str | None) -> str:
    """In the words of the table."""
    with tempfile.TemporaryDirectory() as folder:
        names = [file.stem, *BESIDE.get(file.stem, ())]
        copies = [Path(shutil.copy(files / f"{name}.py", Path(folder) / f"{name}.py")) for name in names]
        try:
            sensorium.plugins.load_plugin(str(copies[0]))
        except Exception as error:  # noqa: BLE001  whatever the file meets
            return f"not imported: {error}"
        if what is None:
            return "imported | "
        path = Path(folder) / "checkpoint"
        path.mkdir()
        try:
            made = CHECKPOINTS[file.stem][what](path)
            report = sensorium.verify(str(made), plugins=(str(copies[0]),), dtypes=["float32"])
        except Exception as error:  # noqa: BLE001
            return f"imported | {type(error).__name__}: {' '.join(str(error).split())}"
        asked = sorted({result.case.split()[0] for result in report.results})
        words = " ".join((report.lines()[-1], report.parting)).strip()
        return f"imported | {words} ({', '.join(asked)}; tier {report.tier})"


BESIDE = {"h2ovl": ("internvl",), "nvlm_d": ("internvl",)}
"""Files that are parts of another one."""

if __name__ == "__main__":
    main()

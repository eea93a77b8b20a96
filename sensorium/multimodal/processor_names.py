"""Names of processors in checkpoints that transformers has renamed since.

A checkpoint keeps the name of the class that it was saved with. Classes were renamed since, and image processors were
called feature extractors once. A name that isn't known is left as it is, so that the error can name it.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sensorium.checkpoint import read_json

RENAMED: Mapping[str, str] = {
    "Qwen2_5_VLImageProcessor": "Qwen2VLImageProcessor",
    "Qwen2_5_VLVideoProcessor": "Qwen2VLVideoProcessor",
    "AriaVisionProcessor": "AriaImageProcessor",
    "Emu3VisionVQImageProcessor": "Emu3ImageProcessor",
}
"""Former names of classes, and their present ones."""
FILES = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
_TYPES = ("image_processor_type", "video_processor_type")
_PARTS = ("image_processor", "video_processor")
_FAST, _OLD_SUFFIX, _SUFFIX = "Fast", "FeatureExtractor", "ImageProcessor"


def current_name(name: str) -> str:
    """The name that a class of an image or video processor has now; "Fast" at its end stays."""
    base = name.removesuffix(_FAST)
    fast = name[len(base) :]
    if base.endswith(_OLD_SUFFIX):
        base = base.removesuffix(_OLD_SUFFIX) + _SUFFIX
    return RENAMED.get(base, base) + fast


def with_current_names(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of one of a checkpoint's files with the current names of processors."""
    renamed = dict(content)
    for key in _TYPES:
        if isinstance(name := content.get(key), str):
            renamed[key] = current_name(name)
    for part in _PARTS:
        if isinstance(settings := content.get(part), Mapping):
            renamed[part] = with_current_names(settings)
    return renamed


@contextmanager
def folder_with_current_names(name: str) -> Iterator[str]:
    """A checkpoint's folder for the loaders of transformers: its own, or for as long as this lasts one that has its
    JSON files with current names.

    Raises:
        ModelError: One of the files is no JSON object.
    """
    folder = Path(name)
    contents = {file: read_json(folder / file) for file in FILES} if folder.is_dir() else {}
    renamed = {file: with_current_names(content) for file, content in contents.items()}
    if renamed == contents:
        yield name
        return
    with tempfile.TemporaryDirectory() as other:
        for file in folder.glob("*.json"):
            if not file.name.endswith(".index.json"):
                shutil.copy(file, other)
        for file_name, content in renamed.items():
            if content != contents[file_name]:
                (Path(other) / file_name).write_text(json.dumps(content), encoding="utf-8")
        yield other

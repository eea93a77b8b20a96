"""Hugging Face tokenizers and processors: loaded once per checkpoint and settings, without torchvision.

Transformers imports torchvision wherever it is installed. That costs a second of start-up, a CUDA build of it fails
beside a CPU build of torch, and nothing here needs it: image processors have a backend of PIL and NumPy. So that
backend is the default, and unless the program has already loaded torchvision, transformers is told that there is none.
`backend="torchvision"` chooses the other one.

Settings (`size`, `min_pixels`, ...) never reach the loader of files: they may come from a request, which must not name
revisions, folders or code. A processor with settings is made from the file's own, overlaid.

Transformers is imported when a function is called, not before.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Hashable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sensorium.checkpoint import read_json
from sensorium.errors import ConfigError, InvalidRequestError, InvalidTypeError, ProcessorError
from sensorium.multimodal.processor_names import folder_with_current_names, with_current_names

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

Backend: TypeAlias = Literal["pil", "torchvision"]

_CHOSEN_BY_ENGINE = frozenset({"processor_name", "trust_remote_code", "revision", "backend", "tokenizer"})
"""Arguments of the functions below that are no settings."""
_NO_SETTINGS = frozenset({"return_tensors", "device", "data_format", "input_data_format"})
"""Keywords of a Hugging Face processor's call that settle where and in which layout its output is."""
_CACHED_FILES = 16
"""Checkpoints whose files stay parsed."""
_CACHED_SETTINGS = 64
"""Processors kept for combinations of settings. Requests choose these, so there is a bound."""


def processor_options(model_config: ModelConfig) -> dict[str, Any]:
    """For the functions below: which files, code and backend a model's processors are loaded with.

    The backend may be set by the engine's `mm_processor_kwargs`, not by a request's.
    """
    return {
        "trust_remote_code": model_config.trust_remote_code,
        "revision": model_config.revision,
        "backend": (model_config.mm_processor_kwargs or {}).get("backend", "pil"),
    }


def processor_settings(mm_processor_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """For the functions below: `mm_processor_kwargs` without names by which a request could choose files or code."""
    return {name: value for name, value in mm_processor_kwargs.items() if name not in _CHOSEN_BY_ENGINE}


def cached_get_image_processor(
    processor_name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    backend: Backend = "pil",
    **kwargs: Any,
) -> Any:
    """The image processor of a checkpoint, with `kwargs` in place of its file's settings of these names.

    Names that the processor doesn't know are ignored. Raises `ProcessorError` (a `RuntimeError`) if the checkpoint has
    no image processor, `InvalidRequestError` (a `ValueError`) if a setting has a value that it refuses.
    """
    return with_settings(_image_processor(processor_name, trust_remote_code, revision, backend), kwargs)


def cached_get_tokenizer(
    tokenizer_name: str, *args: Any, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> Any:
    """The tokenizer of a checkpoint: the same object every time."""
    return _tokenizer(tokenizer_name, args, trust_remote_code, revision, _Frozen(kwargs))


def cached_get_processor(
    processor_name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    backend: Backend = "pil",
    **kwargs: Any,
) -> Any:
    """The whole processor of a checkpoint: its tokenizer (or the one given), image processor and so on.

    `kwargs` are settings, as in `cached_get_image_processor`, for all its parts. Raises `ProcessorError` (a
    `RuntimeError`) if the checkpoint has none.
    """
    from sensorium.multimodal.hf_composite import load_processor

    return load_processor(processor_name, trust_remote_code, revision, tokenizer, backend, kwargs)


def with_settings(base: Any, kwargs: Mapping[str, Any]) -> Any:
    """A Hugging Face processor with those of `kwargs` that are settings of it; the same object for the same settings.

    Raises `InvalidRequestError` (a `ValueError`) for a value that the processor refuses, `InvalidTypeError` (a
    `TypeError`) for one that isn't plain.
    """
    settings = {name: value for name, value in kwargs.items() if _is_setting(base, name)}
    return _with_settings(base, _Frozen(settings)) if settings else base


def read_config_file(processor_name: str, filename: str, revision: str | None = None) -> dict[str, Any]:
    """A JSON file of a checkpoint, with the current names of processors; empty if it has none of that name.

    Raises `ModelError` (a `TypeError`) if it is no JSON object.
    """
    from transformers.utils import cached_file

    path = cached_file(
        processor_name, filename, revision=revision, _raise_exceptions_for_missing_entries=False, local_files_only=True
    )
    if path is None:
        return {}
    return with_current_names(read_json(Path(path)))


def hide_torchvision() -> None:
    """Let transformers find that torchvision is not installed, for good, unless it is imported already.

    Transformers asks once, through functions that remember the answer. They are asked while an import of torchvision
    would fail.
    """
    if sys.modules.get("torchvision") is not None:
        return
    import_utils = importlib.import_module("transformers.utils.import_utils")
    questions = [
        getattr(import_utils, name, None) for name in ("is_torchvision_available", "is_torchvision_v2_available")
    ]
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # makes importlib.util.find_spec return None
    try:
        for question in questions:
            if question is not None:
                question.cache_clear()
                question()
    finally:
        del sys.modules["torchvision"]


class _Frozen(Mapping[str, Any]):
    """Keyword arguments that can be a cache key: compared and hashed by content."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = dict(values)
        self._key = _freeze(self._values)

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Frozen) and self._key == other._key


def _freeze(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return "dict", tuple((name, _freeze(value[name])) for name in sorted(value, key=str))
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(_freeze(item) for item in value)
    if value is None or isinstance(value, str | bytes | int | float):
        return type(value).__name__, value  # 1, 1.0 and True are equal, but not the same setting
    raise InvalidTypeError(
        f"mm_processor_kwargs: got a value of type {type(value).__name__}, expected numbers, strings, or lists and "
        f"dicts of them. Write the setting as plain values."
    )


def _is_setting(base: Any, name: str) -> bool:
    """Whether a keyword is a setting of a processor, and not, say, an option of its loader."""
    declared = getattr(getattr(base, "valid_kwargs", None), "__annotations__", {})
    if name in declared:
        return name not in _NO_SETTINGS
    return not name.startswith("_") and name in vars(base)


@lru_cache(maxsize=_CACHED_FILES)
def _image_processor(name: str, trust_remote_code: bool, revision: str | None, backend: str) -> Any:
    if backend not in ("pil", "torchvision"):
        raise ConfigError(f"image processor backend: got {backend!r}, expected 'pil' or 'torchvision'.")
    if backend == "pil":
        hide_torchvision()
    # From its own module: some versions of transformers withhold the name without torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        with folder_with_current_names(name) as folder:
            return AutoImageProcessor.from_pretrained(
                folder, backend=backend, trust_remote_code=trust_remote_code, revision=revision
            )
    except (ImportError, OSError, ValueError) as exc:
        raise ProcessorError(
            "No HuggingFace processor is available to process the image object: the checkpoint has no usable "
            "preprocessor_config.json. Add it, or register a mapper with register_image_input_mapper(mapper)."
        ) from exc


@lru_cache(maxsize=_CACHED_SETTINGS)
def _with_settings(base: Any, settings: _Frozen) -> Any:
    try:
        return type(base).from_dict(base.to_dict(), **settings)
    except Exception as exc:
        raise InvalidRequestError(
            f"mm_processor_kwargs: {type(base).__name__} refuses {dict(settings)}. Correct or leave out the setting."
        ) from exc


@lru_cache(maxsize=_CACHED_FILES)
def _tokenizer(name: str, args: tuple[Any, ...], trust_remote_code: bool, revision: str | None, kwargs: _Frozen) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, *args, trust_remote_code=trust_remote_code, revision=revision, **kwargs)

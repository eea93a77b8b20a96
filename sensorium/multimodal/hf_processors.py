"""Hugging Face tokenizers and processors: loaded once per checkpoint and settings.

Image processors have up to two backends, which give slightly different pixels: PIL with NumPy, and torchvision. PIL's
is the default where there is one, so that torchvision is not needed, and left out if it is installed
(`sensorium.multimodal.torchvision`); the engine's setting `mm_processor_backend` chooses.

Settings (`size`, `min_pixels`, ...) never reach the loader of files: they may come from a request, which must not name
revisions, folders or code. A processor with settings is made from the file's own, overlaid.

Transformers is imported when a function is called, not before.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Hashable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from sensorium.checkpoint import read_json
from sensorium.errors import ConfigError, InvalidRequestError, InvalidTypeError, ProcessorError, SensoriumError
from sensorium.multimodal.processor_names import folder_with_current_names, with_current_names
from sensorium.multimodal.setting_values import check_values
from sensorium.multimodal.torchvision import only_for_torchvision, require_torchvision

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

Backend: TypeAlias = Literal["auto", "pil", "torchvision"]
"""Of image processors; "auto": PIL's, or torchvision's for those that have no other."""

_CHOSEN_BY_ENGINE = frozenset({"processor_name", "trust_remote_code", "revision", "backend", "tokenizer"})
"""Arguments of the functions below that are no settings."""
_NO_SETTINGS = frozenset({"return_tensors", "device", "data_format", "input_data_format"})
"""Keywords of a Hugging Face processor's call that settle where and in which layout its output is."""
_LONGEST_CAUSE = 400
_PATH = re.compile(r"(?<![\w:/])(/[\w.@~-]+){2,}/?")
_USED_BEFORE = frozenset({"min_pixels", "max_pixels", "do_convert_rgb", "default_to_square"})
"""Settings that a processor looks at before its `_preprocess`, where it knows them."""
_CACHED_FILES = 16
"""Checkpoints whose files stay parsed."""
_CACHED_SETTINGS = 64
"""Processors kept for combinations of settings. Requests choose these, so there is a bound."""


def processor_options(model_config: ModelConfig) -> dict[str, Any]:
    """For the functions below: which files, code and backend a model's processors are loaded with."""
    return {
        "trust_remote_code": model_config.trust_remote_code,
        "revision": model_config.revision,
        "backend": model_config.mm_processor_backend,
    }


def processor_settings(mm_processor_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """For the functions below: `mm_processor_kwargs` without names by which a request could choose files or code."""
    return {name: value for name, value in mm_processor_kwargs.items() if name not in _CHOSEN_BY_ENGINE}


def cached_get_image_processor(
    processor_name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    backend: Backend = "auto",
    **kwargs: Any,
) -> Any:
    """The image processor of a checkpoint, with `kwargs` in place of its file's settings of these names.

    Names that the processor doesn't know are ignored. Raises `ProcessorError` (a `RuntimeError`) if the checkpoint has
    no image processor, `InvalidRequestError` (a `ValueError`) if a setting has a value that it refuses.
    """
    return with_settings(_image_processor(processor_name, trust_remote_code, revision, backend), kwargs)


def cached_get_feature_extractor(name: str, *, trust_remote_code: bool = False, revision: str | None = None) -> Any:
    """The feature extractor of a checkpoint: the same object every time.

    Raises `ProcessorError` (a `RuntimeError`) that names its type if it can't be loaded.
    """
    return _feature_extractor(name, trust_remote_code, revision)


def cached_get_tokenizer(
    tokenizer_name: str, *args: Any, trust_remote_code: bool = False, revision: str | None = None, **kwargs: Any
) -> Any:
    """The tokenizer of a checkpoint: the same object every time."""
    return _tokenizer(tokenizer_name, args, trust_remote_code, revision, FrozenSettings(kwargs))


def cached_get_processor(
    processor_name: str,
    *,
    trust_remote_code: bool = False,
    revision: str | None = None,
    tokenizer: Any = None,
    backend: Backend = "auto",
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
    frozen = FrozenSettings(settings)
    check_values(settings)
    return _with_settings(base, frozen) if settings else base


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


def image_processor_type(processor_name: str, revision: str | None = None) -> str | None:
    """The type of image processor that a checkpoint's files name, if they do."""
    nested = read_config_file(processor_name, "processor_config.json", revision).get("image_processor")
    own = read_config_file(processor_name, "preprocessor_config.json", revision)
    for settings in (nested if isinstance(nested, dict) else {}, own):
        if isinstance(named := settings.get("image_processor_type"), str):
            return named
    return None


def torchvision_only_class(processor_name: str, revision: str | None = None) -> str | None:
    """The class of a checkpoint's image processor if that exists for torchvision and not for PIL."""
    model_type = read_config_file(processor_name, "config.json", revision).get("model_type")
    return only_for_torchvision(
        image_processor_type(processor_name, revision), model_type if isinstance(model_type, str) else None
    )


def resolve_backend(processor_name: str, revision: str | None, backend: Backend) -> Literal["pil", "torchvision"]:
    """The backend with which a checkpoint's image processor is loaded; torchvision is imported or hidden accordingly.

    Raises `ConfigError` for a backend that there isn't, `MissingLibraryError` (a `RuntimeError`) if torchvision is
    needed and can't be had.
    """
    if backend not in ("auto", "pil", "torchvision"):
        raise ConfigError(
            f"mm_processor_backend: got {backend!r}, expected 'auto', 'pil' or 'torchvision'. Set mm_processor_backend."
        )
    only = torchvision_only_class(processor_name, revision)
    if only is not None:
        what = f"the image processor of this checkpoint, {only}, exists for torchvision only, and so"
        if backend == "pil":
            raise ConfigError(f"mm_processor_backend: got 'pil', but {what} needs it. Set it to 'auto'.")
        require_torchvision(
            what,
            "; or register a mapper with register_image_input_mapper(mapper), or set limit_mm_per_prompt to "
            "{'image': 0}",
        )
        return "torchvision"
    if backend == "torchvision":
        require_torchvision("mm_processor_backend='torchvision'", "; or set it to 'auto'")
        return "torchvision"
    from sensorium.multimodal.video_processor import settle_torchvision

    settle_torchvision(processor_name, revision, backend)
    return "pil"


def describe_backend(model_config: ModelConfig) -> str:
    """What images are preprocessed with, for the load report; empty where the checkpoint has no image processor."""
    kind = image_processor_type(model_config.model, model_config.revision)
    if kind is None:
        return ""
    if torchvision_only_class(model_config.model, model_config.revision) is not None:
        return "images by torchvision, since this processor has no other backend"
    if model_config.mm_processor_backend == "torchvision":
        return "images by torchvision, as set; PIL's pixels differ in rounding"
    return "images by PIL; torchvision's pixels, which Hugging Face takes where it is installed, differ in rounding"


def effective_settings(base: Any) -> frozenset[str]:
    """Names of the settings of a Hugging Face processor that change what it computes.

    Processors of one family share a list of names, of which each uses some. A setting counts if the method that
    computes has a parameter for it, and not if it only disappears in its `**kwargs`.
    """
    known = frozenset(getattr(getattr(base, "valid_kwargs", None), "__annotations__", {})) | frozenset(vars(base))
    used = frozenset(
        name
        for method in ("_preprocess", "preprocess")
        for name, parameter in _parameters(getattr(base, method, None)).items()
        if parameter.kind in (parameter.KEYWORD_ONLY, parameter.POSITIONAL_OR_KEYWORD)
    )
    if not used & known:  # a processor of another build: the names that it declares are taken
        return frozenset(name for name in known if _is_setting(base, name))
    return frozenset(name for name in known & (used | _USED_BEFORE) if _is_setting(base, name))


def _parameters(method: Any) -> Mapping[str, inspect.Parameter]:
    return {} if method is None else inspect.signature(method).parameters


class FrozenSettings(Mapping[str, Any]):
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
        return isinstance(other, FrozenSettings) and self._key == other._key


def _freeze(value: Any) -> Hashable:
    if isinstance(value, Mapping):
        return "dict", tuple((name, _freeze(value[name])) for name in sorted(value, key=str))
    if isinstance(value, list | tuple):
        return type(value).__name__, tuple(_freeze(item) for item in value)
    if value is None or isinstance(value, str | bytes | int | float):
        return type(value).__name__, value  # 1, 1.0 and True are equal, but not the same setting
    raise InvalidTypeError(
        f"got a value of type {type(value).__name__}, expected numbers, strings, or lists and "
        f"dicts of them. Write the setting as plain values.",
        field="mm_processor_kwargs",
    )


def _is_setting(base: Any, name: str) -> bool:
    """Whether a keyword is a setting of a processor, and not, say, an option of its loader."""
    declared = getattr(getattr(base, "valid_kwargs", None), "__annotations__", {})
    if name in declared:
        return name not in _NO_SETTINGS
    return not name.startswith("_") and name in vars(base)


@lru_cache(maxsize=_CACHED_FILES)
def _image_processor(name: str, trust_remote_code: bool, revision: str | None, backend: Backend) -> Any:
    backend = resolve_backend(name, revision, backend)
    # From its own module: some versions of transformers withhold the name without torchvision.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        with folder_with_current_names(name) as folder:
            return AutoImageProcessor.from_pretrained(
                folder, backend=backend, trust_remote_code=trust_remote_code, revision=revision
            )
    except SensoriumError:
        raise
    except Exception as exc:  # whatever transformers raises on what stands in the file
        raise ProcessorError(
            f"No HuggingFace processor is available to process the image object: {_why_none(name, revision, exc)} Or "
            f"register a mapper with register_image_input_mapper(mapper)."
        ) from exc


def _why_none(name: str, revision: str | None, error: Exception) -> str:
    """What keeps a checkpoint's image processor from being loaded, and what to do about it."""
    nested = read_config_file(name, "processor_config.json", revision).get("image_processor")
    if not nested and not read_config_file(name, "preprocessor_config.json", revision):
        return "the checkpoint has no usable preprocessor_config.json. Add it."
    named = image_processor_type(name, revision)
    return (
        f"the checkpoint's is {named or 'of no type that its preprocessor_config.json names'}, which can't be loaded: "
        f"{cause(error)}. Correct image_processor_type there, or install what is missing."
    )


def cause(error: Exception) -> str:
    """What transformers says about a failure, in one line, which a caller may read: no paths of this machine."""
    text = " ".join(_PATH.sub("the checkpoint", str(error)).split())
    return f"{type(error).__name__}: {text[:_LONGEST_CAUSE].rstrip('.')}"


@lru_cache(maxsize=_CACHED_FILES)
def _feature_extractor(name: str, trust_remote_code: bool, revision: str | None) -> Any:
    from transformers import AutoFeatureExtractor

    try:
        return AutoFeatureExtractor.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as exc:  # whatever transformers raises on what stands in the file
        named = read_config_file(name, "preprocessor_config.json", revision).get("feature_extractor_type")
        raise ProcessorError(
            f"feature extractor: the checkpoint's is {named or 'of no type that its preprocessor_config.json names'}, "
            f"which can't be loaded: {cause(exc)}. Correct feature_extractor_type there, or add the file."
        ) from exc


@lru_cache(maxsize=_CACHED_SETTINGS)
def _with_settings(base: Any, settings: FrozenSettings) -> Any:
    try:
        return type(base).from_dict(base.to_dict(), **settings)
    except Exception as exc:
        raise InvalidRequestError(
            f"{type(base).__name__} refuses {dict(settings)}. Correct or leave out the setting.",
            field="mm_processor_kwargs",
        ) from exc


@lru_cache(maxsize=_CACHED_FILES)
def _tokenizer(
    name: str, args: tuple[Any, ...], trust_remote_code: bool, revision: str | None, kwargs: FrozenSettings
) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(name, *args, trust_remote_code=trust_remote_code, revision=revision, **kwargs)

"""Whole Hugging Face processors, put together from parts that need no torchvision.

`AutoProcessor` refuses checkpoints whose processor has a video part where torchvision is absent, even for text and
pictures. Here the processor's class is found by name, each part is loaded by the cached functions of `hf_processors`
and `video_processor`, and the class is called with them, so that its own logic of placeholders is used as it stands.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from sensorium.errors import ProcessorError, SensoriumError
from sensorium.multimodal.hf_processors import (
    Backend,
    cached_get_feature_extractor,
    cached_get_image_processor,
    cached_get_tokenizer,
    cause,
    read_config_file,
)
from sensorium.multimodal.video_processor import cached_get_video_processor, settle_torchvision

_PARTS = ("image_processor", "tokenizer", "video_processor", "feature_extractor")
_FILES_NAMING_THE_CLASS = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def load_processor(
    name: str,
    trust_remote_code: bool,
    revision: str | None,
    tokenizer: Any,
    backend: Backend,
    settings: Mapping[str, Any],
) -> Any:
    """The processor of a checkpoint, with another tokenizer and settings for its parts where given.

    Raises `ProcessorError` (a `RuntimeError`) if the checkpoint has none.
    """
    base = _load(name, trust_remote_code, revision, backend)
    if tokenizer is None and not settings:
        return base
    processor = copy.copy(base)
    if tokenizer is not None and hasattr(processor, "tokenizer"):
        processor.tokenizer = tokenizer
    for part, load in (
        ("image_processor", cached_get_image_processor),
        ("video_processor", cached_get_video_processor),
    ):
        if settings and hasattr(processor, part):
            options = {"trust_remote_code": trust_remote_code, "revision": revision, "backend": backend}
            setattr(processor, part, load(name, **{**settings, **options}))
    return processor


@lru_cache(maxsize=16)
def _load(name: str, trust_remote_code: bool, revision: str | None, backend: Backend) -> Any:
    settle_torchvision(name, revision, backend)
    try:
        processor_class = None if backend == "torchvision" else find_class(name, trust_remote_code, revision)
        if processor_class is None or not set(processor_class.get_attributes()) <= set(_PARTS):
            from transformers import AutoProcessor

            return AutoProcessor.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
        parts = [
            _load_part(part, name, trust_remote_code, revision, backend) for part in processor_class.get_attributes()
        ]
        settings, _ = processor_class.get_processor_dict(name, revision=revision)
        return _accepting_any_video_processor(processor_class).from_args_and_dict(parts, settings)
    except SensoriumError:
        raise
    except Exception as exc:  # whatever transformers raises on what stands in the files
        raise ProcessorError(
            f"HuggingFace processor: the checkpoint has none that can be loaded ({cause(exc)}). Add its "
            f"processor files and what they need, or write an input processor that doesn't ask for it."
        ) from exc


def find_class(name: str, trust_remote_code: bool, revision: str | None) -> Any:
    """The processor's class in transformers, by the checkpoint's files or its model type.

    None if it isn't there, or if the checkpoint brings a class of its own that is trusted.
    """
    transformers = importlib.import_module("transformers")
    files = [read_config_file(name, filename, revision) for filename in _FILES_NAMING_THE_CLASS]
    if trust_remote_code and any("AutoProcessor" in (content.get("auto_map") or {}) for content in files):
        return None
    for content in files:
        if content.get("processor_class") is not None:
            return getattr(transformers, content["processor_class"], None)
    config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code, revision=revision)
    mapping = importlib.import_module("transformers.models.auto.processing_auto").PROCESSOR_MAPPING
    return mapping.get(type(config), None)


def _load_part(part: str, name: str, trust_remote_code: bool, revision: str | None, backend: Backend) -> Any:
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "backend": backend}
    if part == "image_processor":
        return cached_get_image_processor(name, **options)
    if part == "video_processor":
        return cached_get_video_processor(name, **options)
    if part == "tokenizer":
        return cached_get_tokenizer(name, trust_remote_code=trust_remote_code, revision=revision)
    return cached_get_feature_extractor(name, trust_remote_code=trust_remote_code, revision=revision)


def _accepting_any_video_processor(processor_class: Any) -> Any:
    """The class, which here also accepts a video processor that doesn't derive from transformers' torchvision-based
    one."""

    def check_argument_for_proper_class(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name == "video_processor":
            return type(argument)
        return processor_class.check_argument_for_proper_class(self, argument_name, argument)

    def describe(_self: Any) -> str:  # transformers' own writes JSON, and logs it at every load
        return f"{processor_class.__name__}({', '.join(processor_class.get_attributes())})"

    methods = {"check_argument_for_proper_class": check_argument_for_proper_class, "__repr__": describe}
    return type(processor_class.__name__, (processor_class,), methods)

"""`ModelRegistry`: which class serves which architecture.

An architecture is the name that a checkpoint's config lists under `architectures`. Classes are named by a string
`"module:Class"` and imported when they are needed, so that many models cost nothing, and no device is initialized
before a worker process has started.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sensorium.config import ModelImpl, PoolerConfig
from sensorium.errors import ConfigError, ModelError
from sensorium.logger import get_logger
from sensorium.model_executor.models.transformers.architectures import (
    MEDIA_CLASS,
    POOLING_CLASS,
    TEXT_CLASS,
    media_architectures,
    text_architectures,
)
from sensorium.plugins import HOW_TO_ADD, failed_plugins

if TYPE_CHECKING:
    from torch import nn

logger = get_logger(__name__)

_MODELS = "sensorium.model_executor.models"

IN_TREE: dict[str, str] = {
    # Text
    "GemmaForCausalLM": f"{_MODELS}.gemma:GemmaForCausalLM",
    "Gemma2ForCausalLM": f"{_MODELS}.gemma:Gemma2ForCausalLM",
    "Gemma3ForCausalLM": f"{_MODELS}.gemma:Gemma3ForCausalLM",
    "GptOssForCausalLM": f"{_MODELS}.gpt_oss:GptOssForCausalLM",
    "LlamaForCausalLM": f"{_MODELS}.llama:LlamaForCausalLM",
    "MistralForCausalLM": f"{_MODELS}.llama:LlamaForCausalLM",
    "Qwen2ForCausalLM": f"{_MODELS}.qwen2:Qwen2ForCausalLM",
    "MixtralForCausalLM": f"{_MODELS}.mixtral:MixtralForCausalLM",
    "Qwen3ForCausalLM": f"{_MODELS}.qwen3:Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM": f"{_MODELS}.qwen3_moe:Qwen3MoeForCausalLM",
    "Qwen3_5ForCausalLM": f"{_MODELS}.qwen3_5:Qwen3_5ForCausalLM",
    # Images, videos, sounds
    "Gemma3ForConditionalGeneration": f"{_MODELS}.gemma3:Gemma3ForConditionalGeneration",
    "Idefics3ForConditionalGeneration": f"{_MODELS}.idefics3:Idefics3ForConditionalGeneration",
    "InternVLForConditionalGeneration": f"{_MODELS}.internvl:InternVLForConditionalGeneration",
    "LlavaForConditionalGeneration": f"{_MODELS}.llava:LlavaForConditionalGeneration",
    "LlavaNextForConditionalGeneration": f"{_MODELS}.llava_next:LlavaNextForConditionalGeneration",
    "LlavaOnevisionForConditionalGeneration": f"{_MODELS}.llava_onevision:LlavaOnevisionForConditionalGeneration",
    "Mistral3ForConditionalGeneration": f"{_MODELS}.mistral3:Mistral3ForConditionalGeneration",
    "PaliGemmaForConditionalGeneration": f"{_MODELS}.paligemma:PaliGemmaForConditionalGeneration",
    "Qwen2AudioForConditionalGeneration": f"{_MODELS}.qwen2_audio:Qwen2AudioForConditionalGeneration",
    "Qwen2VLForConditionalGeneration": f"{_MODELS}.qwen2_vl:Qwen2VLForConditionalGeneration",
    "Qwen3VLForConditionalGeneration": f"{_MODELS}.qwen3_vl:Qwen3VLForConditionalGeneration",
    "Qwen3VLMoeForConditionalGeneration": f"{_MODELS}.qwen3_vl:Qwen3VLMoeForConditionalGeneration",
    "Qwen2_5_VLForConditionalGeneration": f"{_MODELS}.qwen2_5_vl:Qwen2_5_VLForConditionalGeneration",
    "SmolVLMForConditionalGeneration": f"{_MODELS}.idefics3:Idefics3ForConditionalGeneration",
    "MllamaForConditionalGeneration": f"{_MODELS}.mllama:MllamaForConditionalGeneration",
    "WhisperForConditionalGeneration": f"{_MODELS}.whisper:WhisperForConditionalGeneration",
    **dict.fromkeys(
        ("Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration", "Qwen2_5OmniThinkerForConditionalGeneration"),
        f"{_MODELS}.qwen2_5_omni_thinker:Qwen2_5OmniThinkerForConditionalGeneration",
    ),
}
"""Architectures with a model file in this package."""

DECODER = f"{_MODELS}.pooling_decoder:DecoderForPooling"
POOLING: dict[str, str] = {
    **dict.fromkeys(
        (f"{stem}{kind}" for stem in ("Llama", "Mistral", "Qwen2", "Qwen3") for kind in ("ForCausalLM", "Model")),
        DECODER,
    ),
    "ColQwen2ForRetrieval": f"{_MODELS}.colqwen2:ColQwen2ForRetrieval",
    "CLIPModel": f"{_MODELS}.transformers.dual_encoder:DualEncoder",
    "SiglipModel": f"{_MODELS}.transformers.dual_encoder:PaddedDualEncoder",
}
"""Classes that serve architectures for pooling, other than transformers' modules."""


def generating_name(architecture: str) -> str:
    """The generating architecture of an inner model: `MistralForCausalLM` of `MistralModel`."""
    return architecture if architecture.endswith("ForCausalLM") else f"{architecture.removesuffix('Model')}ForCausalLM"


def in_tree_class(architecture: str) -> type | None:
    """The class here for an architecture, also where a plug-in's has taken its place; None if there is none."""
    module, _, name = IN_TREE.get(architecture, "").partition(":")
    found: type | None = getattr(importlib.import_module(module), name) if module else None
    return found


MAX_NAMED_ARCHS = 16
"""The most architectures that an error message names."""


class _ModelRegistry:
    """Classes by architecture. Use the one instance, `ModelRegistry`."""

    def __init__(self, models: dict[str, str | type]) -> None:
        self._models = models

    def get_supported_archs(self) -> list[str]:
        """The names of all architectures, sorted."""
        return sorted(self._models)

    def architectures_of(self, model_class: type) -> list[str]:
        """The architectures that a class is registered for, by itself or by its name."""
        by_name = f"{model_class.__module__}:{model_class.__name__}"
        return [arch for arch, each in self._models.items() if each is model_class or each == by_name]

    def register_model(self, model_arch: str, model_cls: type[nn.Module] | str) -> None:
        """Serve an architecture with a class, or with one named `"module:Class"` that is imported when needed.

        A class that is passed as an object must be importable in every process of the engine. A second registration
        replaces the first, with a warning. Raises `ConfigError` (a `ValueError`) for another string, and `ModelError`
        (a `TypeError`) for another type.
        """
        if isinstance(model_cls, str):
            module, separator, name = model_cls.partition(":")
            if not (module and separator and name) or ":" in name:
                raise ConfigError(
                    f"Model class of {model_arch}: got {model_cls!r}, expected a string in the format "
                    f"'<module>:<class>'. For example 'my_package.my_model:MyModel'."
                )
        elif not isinstance(model_cls, type):
            raise ModelError(
                f"Model class of {model_arch}: got {type(model_cls).__name__}, expected a class or a string "
                f"'<module>:<class>'."
            )
        if model_arch in self._models:
            logger.warning(
                "Model architecture %s is already registered, and will be overwritten by the new model class %s.",
                model_arch,
                model_cls if isinstance(model_cls, str) else model_cls.__name__,
            )
        self._models[model_arch] = model_cls

    def resolve(
        self,
        architectures: str | Sequence[str],
        model_impl: ModelImpl = "auto",
        *,
        is_remote: bool = False,
        hf_config: Any = None,
    ) -> tuple[type[nn.Module], str]:
        """The class that serves the first architecture that can be served, and that architecture's name.

        Args:
            architectures: Names, the preferred one first.
            model_impl: "native" for registered classes, "transformers" for modules of transformers, "auto" for the
                former where there is one.
            is_remote: The code comes with the checkpoint, so that transformers runs it under any name.
            hf_config: The checkpoint's config. A registered class may refuse it (`unsuited_to`), and leave it to
                transformers.

        Raises `ConfigError` (a `ValueError`) if there is none, `ModelError` (a `TypeError`) if the class can't be
        imported.
        """
        names = [architectures] if isinstance(architectures, str) else list(architectures)
        text, media = text_architectures(), media_architectures()
        generic = names if is_remote else [name for name in names if name in text | media]
        if model_impl != "transformers":
            for name in names:
                if name in self._models:
                    model_class = self._load(name, self._models[name])
                    if model_impl == "native" or name not in generic or not _is_unsuited(model_class, hf_config):
                        return model_class, name
        if generic and model_impl != "native":
            return self._load(generic[0], MEDIA_CLASS if generic[0] in media else TEXT_CLASS), generic[0]
        raise self._unknown(names, model_impl, has_generic=bool(generic))

    def generating(self, architectures: Sequence[str], *, is_remote: bool = False) -> list[str]:
        """Which of several architectures can be served for generation; all if the checkpoint brings its code."""
        known = text_architectures() | media_architectures()
        return [name for name in architectures if is_remote or name in self._models or name in known]

    def resolve_pooling(
        self,
        architectures: Sequence[str],
        model_impl: ModelImpl,
        pooler: PoolerConfig,
        hf_config: Any,
        *,
        is_remote: bool = False,
    ) -> tuple[type[nn.Module], str]:
        """The class that serves a checkpoint for pooling, and its architecture's name.

        A generating class is used unchanged if its own rows or logits are pooled. Raises as `resolve`.
        """
        name = architectures[0]
        own = POOLING.get(name) if self._models.get(name) == IN_TREE.get(name) else None
        if own not in (None, DECODER):
            return self._load(name, own), name
        reads_both_ways = getattr(hf_config, "is_causal", True) is False or getattr(
            hf_config.get_text_config(), "use_bidirectional_attention", False
        )
        is_native = model_impl != "transformers" and not reads_both_ways
        if is_native and own is not None and not pooler.token_ids:
            generating = generating_name(name)
            if not _is_unsuited(self._load(generating, self._models[generating]), hf_config):
                return self._load(name, own), name
        elif pooler.token_ids or name in media_architectures() or (is_native and name in self._models):
            return self.resolve(architectures, model_impl, is_remote=is_remote, hf_config=hf_config)
        if model_impl == "native":
            raise self._unknown(list(architectures), model_impl, has_generic=True)
        return self._load(name, POOLING_CLASS), name

    def _unknown(self, names: Sequence[str], model_impl: ModelImpl, *, has_generic: bool) -> ConfigError:
        if model_impl == "transformers":
            return ConfigError(
                f"model_impl: got 'transformers' for the architectures {names}, expected ones that transformers has "
                "modules for and that are served by them. Set model_impl (--model-impl) to 'auto'."
            )
        similar = [found for name in names for found in difflib.get_close_matches(name, self._models, n=1)]
        way_out = "Set model_impl (--model-impl) to 'auto' to run the modules of transformers. " if has_generic else ""
        return ConfigError(
            f"Model architectures {names} are not supported for now. Supported architectures: "
            f"{self._some_archs()}. {way_out}{HOW_TO_ADD}"
            f"{f'; or correct the name if {similar[0]!r} is meant' if similar else ''}."
            f"{f' Note: {failed}.' if (failed := failed_plugins()) else ''}"
        )

    def _some_archs(self) -> str:
        """The supported architectures for an error message, the first ones if there are many."""
        known = self.get_supported_archs()
        others = len(known) - MAX_NAMED_ARCHS
        return f"{known[:MAX_NAMED_ARCHS]}" if others <= 0 else f"{known[:MAX_NAMED_ARCHS]} and {others} more"

    def _load(self, architecture: str, target: str | type) -> Any:
        if isinstance(target, type):
            return target
        module, _, name = target.partition(":")
        try:
            return getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as exc:
            raise ModelError(
                f"Model class of {architecture}: can't import {target!r} ({exc}). Correct the string that it was "
                f"registered with, or install the package."
            ) from exc
        except Exception as exc:
            raise ModelError(
                f"Model class of {architecture}: importing {module!r} failed: {type(exc).__name__}: {exc}. Correct "
                f"that file."
            ) from exc


def _is_unsuited(model_class: type, hf_config: Any) -> bool:
    """Whether a class refuses a checkpoint; logs why."""
    reason = (
        model_class.unsuited_to(hf_config) if hf_config is not None and hasattr(model_class, "unsuited_to") else None
    )
    if reason is not None:
        logger.info("%s runs by the modules of transformers: %s", model_class.__name__, reason)
    return reason is not None


ModelRegistry = _ModelRegistry(dict(IN_TREE))
"""The one registry of model classes."""

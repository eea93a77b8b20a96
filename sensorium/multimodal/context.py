"""What a registered callable learns about the model: its configuration, and its Hugging Face processor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sensorium.errors import ModelError, ProcessorError, SensoriumError
from sensorium.multimodal.callables import accepted_kwargs

if TYPE_CHECKING:
    from sensorium.config import ModelConfig, MultiModalConfig


@dataclass(frozen=True)
class InputContext:
    """The model for which inputs are processed. First argument of every callable of the two registries."""

    model_config: ModelConfig

    def get_hf_config(self, typ: Any = None, /) -> Any:
        """The Hugging Face config. `typ`: the class it must be an instance of, or a tuple of classes.

        Raises `ModelError` (a `TypeError`) for another class.
        """
        hf_config = self.model_config.hf_config
        _check_type("Hugging Face config", hf_config, typ)
        return hf_config

    def get_hf_image_processor_config(self) -> dict[str, Any]:
        """Settings of the checkpoint's image processor, as its file states them; empty if there is none."""
        return dict(self.model_config.hf_image_processor_config)

    def get_mm_config(self) -> MultiModalConfig:
        """Limits of media. Raises `RuntimeError` for a model that takes text only."""
        return self.model_config.get_multimodal_config()

    def get_hf_processor(self, typ: Any = None, /, **kwargs: Any) -> Any:
        """The checkpoint's Hugging Face processor, made with the engine's `mm_processor_kwargs` overlaid by
        `kwargs`.

        Raises `ModelError` (a `TypeError`) if it is not an instance of `typ`, `ProcessorError` (a
        `RuntimeError`) if the checkpoint has none.
        """
        return self._get_hf_processor(typ, None, kwargs)

    def _get_hf_processor(self, typ: Any, tokenizer: Any, kwargs: Mapping[str, Any]) -> Any:
        from sensorium.multimodal.hf_processors import cached_get_processor, processor_options, processor_settings

        config = self.model_config
        settings = processor_settings({**(config.mm_processor_kwargs or {}), **kwargs})
        processor = cached_get_processor(config.model, tokenizer=tokenizer, **settings | processor_options(config))
        _check_type("Hugging Face processor", processor, typ)
        return processor


@dataclass(frozen=True)
class InputProcessingContext(InputContext):
    """An `InputContext` that also holds the tokenizer, for callables that work on text."""

    tokenizer: Any = None

    def get_hf_processor(self, typ: Any = None, /, **kwargs: Any) -> Any:
        """As `InputContext.get_hf_processor`, with this context's tokenizer inside the processor."""
        return self._get_hf_processor(typ, self.tokenizer, kwargs)

    def call_hf_processor(
        self,
        hf_processor: Any,
        prompt: str,
        processor_data: Mapping[str, object],
        inference_kwargs: Mapping[str, object],
    ) -> Any:
        """Run a Hugging Face processor on a prompt and its media; returns its `BatchFeature` of torch
        tensors.

        `processor_data` are its media arguments (`images`, `videos`, `audio`); of the engine's and of
        `inference_kwargs` the names that it takes are passed on. Raises `ProcessorError` (a `RuntimeError`)
        for any failure inside.
        """
        kwargs = {**(self.model_config.mm_processor_kwargs or {}), **inference_kwargs}
        try:
            return hf_processor(
                text=prompt, **processor_data, **accepted_kwargs(hf_processor, kwargs), return_tensors="pt"
            )
        except SensoriumError:
            raise
        except Exception as exc:
            name = type(hf_processor).__name__
            raise ProcessorError(
                f"{name} failed on text={prompt!r} with {sorted(processor_data)}: {type(exc).__name__}."
            ) from exc


def _check_type(what: str, value: object, typ: Any) -> None:
    if typ is not None and not isinstance(value, typ):
        types = typ if isinstance(typ, tuple) else (typ,)
        expected = " or ".join(t.__name__ for t in types)
        raise ModelError(f"Invalid type of {what}: got {type(value).__name__}, expected {expected}.")

"""`mm_processor_kwargs`, checked: a setting has its effect, or it is refused by name.

One set of settings is offered to all callables of a model: its input processor, its mappers, its maximum numbers of
rows and its dummy data. Each takes what it declares. A name that none of them takes is an error for its author: the
sender of a request, or the operator.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from sensorium.errors import ConfigError, InvalidRequestError, ProcessorError, RequestError, UnsupportedFeatureError
from sensorium.multimodal.hf_processors import (
    cached_get_image_processor,
    effective_settings,
    processor_options,
)
from sensorium.multimodal.video_processor import cached_get_video_processor
from sensorium.multimodal.video_sampling import CheckpointSampling

if TYPE_CHECKING:
    from sensorium.config import ModelConfig
    from sensorium.inputs.registry import InputRegistry
    from sensorium.multimodal.registry import MultiModalRegistry


class MediaSettings:
    """The settings that one model takes. Safe to use from several threads."""

    def __init__(
        self, model_config: ModelConfig, input_registry: InputRegistry, mm_registry: MultiModalRegistry
    ) -> None:
        self._model_config = model_config
        self._input_registry = input_registry
        self._registry = mm_registry
        self._sampling = CheckpointSampling(model_config)

    def check_request(self, kwargs: Mapping[str, Any]) -> None:
        """Check what a request asks for.

        Raises:
            InvalidRequestError: (a `ValueError`) Nothing of the model takes one of the names, or a value can't be
                used.
        """
        if kwargs and not self._takes_any:
            self._check_names(kwargs, self._of_requests)
            self._check_values(kwargs)

    def check_engine(self) -> None:
        """Check the engine's own `mm_processor_kwargs`, before anything is loaded with them.

        Raises:
            ConfigError: (a `ValueError`) As `check_request`.
        """
        kwargs = self._model_config.mm_processor_kwargs or {}
        if not kwargs or self._takes_any:
            return
        try:
            self._check_names(kwargs, self._of_requests | self._of_engine)
            self._check_values(kwargs)
        except RequestError as error:
            raise ConfigError(str(error)) from error.__cause__

    def _check_names(self, kwargs: Mapping[str, Any], known: frozenset[str]) -> None:
        unknown = [name for name in kwargs if name not in known]
        if not unknown:
            return
        name = unknown[0]
        near = difflib.get_close_matches(name, known, 1)
        hint = f"Did you mean {near[0]}?" if near else f"Remove {name:.60} from mm_processor_kwargs."
        expected = f"one of {sorted(known)}" if known else "none"
        raise InvalidRequestError(
            f"got {name!r:.60}, which nothing of this model takes, expected {expected}. {hint}",
            field="mm_processor_kwargs",
        )

    def _check_values(self, kwargs: Mapping[str, Any]) -> None:
        """Have the processors that a class leaves its media to look at the values."""
        for _ in self._default_processors(kwargs):
            pass
        if "video" in self._modalities:
            self._sampling(kwargs)

    # What takes which names

    @property
    def _takes_any(self) -> bool:
        """Whether a merged processor gets all settings unfiltered."""
        return self._registry.has_processor(self._model_config)

    @cached_property
    def _modalities(self) -> tuple[str, ...]:
        model_class, registry = self._model_config.model_class, self._registry
        return tuple(each for each in registry.modalities if registry.get_plugin(each).has_input_mapper(model_class))

    @cached_property
    def _of_requests(self) -> frozenset[str]:
        """Names that a request's callables take."""
        names: set[str] = set()
        for function in self._request_callables():
            names |= _keyword_only(function)
        for processor in self._default_processors({}):
            own = getattr(processor, "effective_settings", None)
            names |= effective_settings(processor) if own is None else own
        if "video" in self._modalities:
            names |= self._sampling.names
        return frozenset(names)

    @cached_property
    def _of_engine(self) -> frozenset[str]:
        """Names that only callables at load take."""
        model_class = self._model_config.model_class
        plugins = [self._registry.get_plugin(modality) for modality in self._modalities]
        names: set[str] = set()
        functions: list[Any] = [self._input_registry.get_dummy_data_factory(model_class)]
        functions += [plugin.get_max_tokens_calc(model_class) for plugin in plugins]
        for function in functions:
            if callable(function):
                names |= _keyword_only(function)
        return frozenset(names)

    def _request_callables(self) -> Iterator[Callable[..., Any]]:
        model_class = self._model_config.model_class
        processor = self._input_registry.get_input_processor(model_class)
        if processor is not None:
            yield processor
        for modality in self._modalities:
            yield self._registry.get_plugin(modality).get_input_mapper(model_class)

    def _default_processors(self, kwargs: Mapping[str, Any]) -> Iterator[Any]:
        """The checkpoint's processors with these settings, for modalities whose mapper hands all on to them."""
        options = {**processor_options(self._model_config)}
        engine = {n: v for n, v in (self._model_config.mm_processor_kwargs or {}).items() if n not in options}
        settings = {**engine, **kwargs, **options}
        for modality, load in (("image", cached_get_image_processor), ("video", cached_get_video_processor)):
            plugin = self._registry.get_plugin(modality) if modality in self._modalities else None
            if plugin is not None and plugin.passes_settings_on(self._model_config.model_class):
                try:
                    yield load(self._model_config.model, **settings)
                except (UnsupportedFeatureError, ProcessorError):
                    continue  # told to whoever sends such media


def _keyword_only(function: Callable[..., Any]) -> set[str]:
    parameters = inspect.signature(function).parameters.values()
    return {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}

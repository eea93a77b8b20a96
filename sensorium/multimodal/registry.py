"""`MULTIMODAL_REGISTRY`: every modality, what each model class registered for it, and the limits per prompt.

Model authors decorate their classes with it; the front process checks and maps media through it; at start-up
it says how many decoder rows the largest legal prompt takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from sensorium.errors import (
    InvalidRequestError,
    ModelError,
    ModelLookupError,
    UnknownModalityError,
)
from sensorium.logger import get_logger
from sensorium.multimodal.audio import AudioPlugin
from sensorium.multimodal.base import (
    MultiModalInputMapper,
    MultiModalPlugin,
    MultiModalTokensCalc,
    PlaceholderStr,
    PlaceholderTokens,
)
from sensorium.multimodal.callables import C, ClassRegistry, check_callable
from sensorium.multimodal.context import InputProcessingContext
from sensorium.multimodal.image import ImagePlugin
from sensorium.multimodal.inputs import MultiModalDataDict, MultiModalInputsV2, MultiModalKwargs
from sensorium.multimodal.video import VideoPlugin

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

logger = get_logger(__name__)

DEFAULT_LIMIT = 1
"""Items of a modality in one prompt, where `limit_mm_per_prompt` doesn't name it."""


class MergedProcessor(Protocol):
    """Expands the prompt and maps the media in one go, instead of an input processor and mappers."""

    def apply(
        self, prompt: str | list[int], mm_data: MultiModalDataDict, mm_processor_kwargs: Mapping[str, object]
    ) -> MultiModalInputsV2:
        """Process one prompt."""


ProcessorFactory = Callable[[InputProcessingContext], MergedProcessor]


class MultiModalRegistry:
    """Plugins by modality. Registrations live in the plugins, so registries that share plugins share them
    too.
    """

    DEFAULT_PLUGINS: tuple[MultiModalPlugin, ...] = (ImagePlugin(), AudioPlugin(), VideoPlugin())

    def __init__(self, *, plugins: Sequence[MultiModalPlugin] = DEFAULT_PLUGINS) -> None:
        self._plugins = {plugin.get_data_key(): plugin for plugin in plugins}
        self._processor_factories: ClassRegistry[ProcessorFactory] = ClassRegistry()

    # Modalities

    def register_plugin(self, plugin: MultiModalPlugin) -> None:
        """Add a modality, or replace the one of the same key, with a warning."""
        key = plugin.get_data_key()
        if key in self._plugins:
            logger.warning(
                "A plugin is already registered for data type %s, and will be overwritten by the new plugin %s.",
                key,
                type(plugin).__name__,
            )
        self._plugins[key] = plugin

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of all modalities that have a plugin."""
        return tuple(self._plugins)

    def get_plugin(self, data_type_key: str) -> MultiModalPlugin:
        """The plugin of a modality. Raises `UnknownModalityError` (a `NotImplementedError`)."""
        _check_is_name(data_type_key)
        plugin = self._plugins.get(data_type_key)
        if plugin is None:
            raise UnknownModalityError(
                f"Unknown multi-modal data type: {data_type_key}. Expected one of {sorted(self._plugins)}; "
                f"a new one is added with MULTIMODAL_REGISTRY.register_plugin."
            )
        return plugin

    # Decorators

    def register_input_mapper(
        self, data_type_key: str, mapper: MultiModalInputMapper | None = None
    ) -> Callable[[C], C]:
        """Class decorator: the class takes this modality, and `mapper` makes its keyword arguments.

        `mapper(ctx, data, **mm_processor_kwargs)` gets one item or a list of items; None: the modality's
        default, which hands the data to the checkpoint's Hugging Face processor.
        """
        return self.get_plugin(data_type_key).register_input_mapper(mapper)

    def register_image_input_mapper(self, mapper: MultiModalInputMapper | None = None) -> Callable[[C], C]:
        """`register_input_mapper` for images."""
        return self.register_input_mapper("image", mapper)

    def register_video_input_mapper(self, mapper: MultiModalInputMapper | None = None) -> Callable[[C], C]:
        """`register_input_mapper` for videos."""
        return self.register_input_mapper("video", mapper)

    def register_audio_input_mapper(self, mapper: MultiModalInputMapper | None = None) -> Callable[[C], C]:
        """`register_input_mapper` for sounds; there is no default, so `mapper` must be given to be of use."""
        return self.register_input_mapper("audio", mapper)

    def register_max_multimodal_tokens(
        self, data_type_key: str, max_mm_tokens: MultiModalTokensCalc | None = None
    ) -> Callable[[C], C]:
        """Class decorator: the most decoder rows that one item of the modality takes.

        A positive int, or `f(ctx, **mm_processor_kwargs)`; None: the modality's default.
        """
        return self.get_plugin(data_type_key).register_max_multimodal_tokens(max_mm_tokens)

    def register_max_image_tokens(self, max_mm_tokens: MultiModalTokensCalc | None = None) -> Callable[[C], C]:
        """`register_max_multimodal_tokens` for images."""
        return self.register_max_multimodal_tokens("image", max_mm_tokens)

    def register_max_video_tokens(self, max_mm_tokens: MultiModalTokensCalc | None = None) -> Callable[[C], C]:
        """`register_max_multimodal_tokens` for videos."""
        return self.register_max_multimodal_tokens("video", max_mm_tokens)

    def register_max_audio_tokens(self, max_mm_tokens: MultiModalTokensCalc | None = None) -> Callable[[C], C]:
        """`register_max_multimodal_tokens` for sounds."""
        return self.register_max_multimodal_tokens("audio", max_mm_tokens)

    def register_placeholder_tokens(self, modality: str, token_ids: PlaceholderTokens) -> Callable[[C], C]:
        """Class decorator, a hint: ids of the tokens at whose positions rows of the modality stand.

        An id, several, or `f(ctx)` that returns them. Without it they are inferred.
        """
        return self.get_plugin(modality).register_placeholder_tokens(token_ids)

    def register_placeholder_str(self, modality: str, placeholder: PlaceholderStr) -> Callable[[C], C]:
        """Class decorator, a hint: what stands for an item in a chat prompt, for templates that don't say.

        A string, or `f(i)` for the i-th item of the modality, counted from 1.
        """
        return self.get_plugin(modality).register_placeholder_str(placeholder)

    # Limits

    def init_mm_limits_per_prompt(self, model_config: ModelConfig) -> None:
        """Warn of names in `limit_mm_per_prompt` that have no plugin, which are ignored. Loading calls it once."""
        multimodal_config = model_config.multimodal_config
        for modality in () if multimodal_config is None else multimodal_config.limit_per_prompt:
            if modality not in self._plugins:
                logger.warning(
                    "limit_mm_per_prompt: got %r, expected one of %s. It is ignored: register a plugin first.",
                    modality,
                    sorted(self._plugins),
                )

    def check_mappers(self, model_config: ModelConfig) -> None:
        """Raise `MissingLibraryError` (a `RuntimeError`) if a modality that a prompt may have needs a library that
        isn't there.
        """
        for modality, limit in self.get_mm_limits_per_prompt(model_config).items():
            if limit:
                self._plugins[modality].check_mapper(model_config)

    def get_mm_limits_per_prompt(self, model_config: ModelConfig) -> Mapping[str, int]:
        """For each modality, the most items in one prompt: what `model_config.multimodal_config` says, or else one; 0
        for a model that takes no media.
        """
        multimodal_config = model_config.multimodal_config
        if multimodal_config is None:
            return dict.fromkeys(self._plugins, 0)
        limits = multimodal_config.limit_per_prompt
        return {modality: limits.get(modality, DEFAULT_LIMIT) for modality in self._plugins}

    def check_counts(self, model_config: ModelConfig, counts: Mapping[str, int]) -> None:
        """Whether a prompt's media can be taken at all, by their numbers; run before anything is computed for it.

        Raises `UnknownModalityError` (a `NotImplementedError`) for a modality without a plugin;
        `InvalidRequestError` (a `ValueError`) if the model takes no media, or not so many items;
        `UnregisteredModalityError` (a `KeyError`) if it takes media, but not this modality.
        """
        limits = self.get_mm_limits_per_prompt(model_config)
        for modality, num_items in counts.items():
            plugin = self.get_plugin(modality)
            if not model_config.is_multimodal_model:
                raise InvalidRequestError(
                    f"Your model does not support multi-modal inputs: got {modality!r} data. Send text only."
                )
            if not self.has_processor(model_config):
                plugin.get_input_mapper(model_config.model_class)
            limit = limits[modality]
            if num_items > limit:
                raise InvalidRequestError(
                    f"At most {limit} {modality}(s) may be provided in one request: got {num_items}. "
                    f"Send fewer, or raise limit_mm_per_prompt[{modality!r}]."
                )

    # Mapping

    def map_input(
        self,
        model_config: ModelConfig,
        data: MultiModalDataDict,
        mm_processor_kwargs: Mapping[str, Any] | None = None,
    ) -> MultiModalKwargs:
        """Turn a prompt's media into keyword arguments of `forward`.

        A list counts its members as items; anything else, a dict or an array included, is one item. Raises
        what `check_counts` and the plugins raise, and `ModelError` if two modalities' mappers return the same
        key.
        """
        self.check_counts(model_config, {modality: count_items(value) for modality, value in data.items()})
        merged: dict[str, Any] = {}
        for modality, value in data.items():
            if count_items(value) == 0:
                continue
            mapped = self.get_plugin(modality).map_input(model_config, value, mm_processor_kwargs)
            for key, tensor in mapped.items():
                if key in merged:
                    raise DuplicateKeyError(
                        f"The input mapper for {modality!r} and another one return the same keyword argument {key!r}. "
                        f"Give each modality its own names."
                    )
                merged[key] = tensor
        return MultiModalKwargs(merged)

    def create_input_mapper(
        self, model_config: ModelConfig
    ) -> Callable[[MultiModalDataDict, Mapping[str, Any] | None], MultiModalKwargs]:
        """`map_input` with the model bound. One set of `mm_processor_kwargs` is offered to every modality's
        mapper.
        """

        def map_input(
            data: MultiModalDataDict, mm_processor_kwargs: Mapping[str, Any] | None = None
        ) -> MultiModalKwargs:
            return self.map_input(model_config, data, mm_processor_kwargs)

        return map_input

    # Largest numbers of rows

    def get_max_tokens_per_item_by_modality(self, model_config: ModelConfig) -> dict[str, int]:
        """For each modality, the most decoder rows of one item."""
        return {key: plugin.get_max_multimodal_tokens(model_config) for key, plugin in self._plugins.items()}

    def get_max_tokens_by_modality(self, model_config: ModelConfig) -> dict[str, int]:
        """For each modality, the most decoder rows in one prompt: of one item, times the limit."""
        limits = self.get_mm_limits_per_prompt(model_config)
        per_item = self.get_max_tokens_per_item_by_modality(model_config)
        return {key: limits[key] * num_tokens for key, num_tokens in per_item.items()}

    def get_max_multimodal_tokens(self, model_config: ModelConfig) -> int:
        """The most decoder rows of media in one prompt."""
        return sum(self.get_max_tokens_by_modality(model_config).values())

    # Hints

    def get_placeholder_token_ids(self, model_config: ModelConfig, modality: str) -> frozenset[int] | None:
        """Declared ids of the tokens where rows of the modality stand; None: not declared."""
        return self.get_plugin(modality).get_placeholder_token_ids(model_config)

    def get_placeholder_tokens(self, model_config: ModelConfig) -> dict[str, frozenset[int]]:
        """The declared ids of every modality that has some."""
        declared = {key: plugin.get_placeholder_token_ids(model_config) for key, plugin in self._plugins.items()}
        return {modality: ids for modality, ids in declared.items() if ids is not None}

    def get_placeholder_str(self, model_config: ModelConfig, modality: str, index: int = 1) -> str | None:
        """Declared text for the `index`-th item (from 1) of the modality in a chat prompt; None: not
        declared.
        """
        return self.get_plugin(modality).get_placeholder_str(model_config, index)

    def has_registrations(self, model_class: type) -> bool:
        """Whether anything at all was registered for the class or a base of it."""
        if model_class in self._processor_factories:
            return True
        return any(plugin.has_registrations(model_class) for plugin in self._plugins.values())

    # Merged processors

    def register_processor(self, factory: ProcessorFactory) -> Callable[[C], C]:
        """Class decorator: `factory(ctx)` makes a `MergedProcessor` that stands in for processor and mappers."""
        check_callable(factory, "register_processor")
        return self._processor_factories.decorator(factory, "a merged processor")

    def has_processor(self, model_config: ModelConfig) -> bool:
        """Whether the model has a merged processor."""
        return model_config.model_class is not None and model_config.model_class in self._processor_factories

    def create_processor(self, model_config: ModelConfig, tokenizer: Any) -> MergedProcessor:
        """The model's merged processor. Raises `ModelLookupError` (a `KeyError`) if it registered none."""
        if model_config.model_class is None or not self.has_processor(model_config):
            raise ModelLookupError(
                f"No merged processor is registered for {model_config.architecture or model_config.model!r}. "
                f"Decorate the class with @MULTIMODAL_REGISTRY.register_processor(factory)."
            )
        factory = self._processor_factories[model_config.model_class]
        return factory(InputProcessingContext(model_config, tokenizer))


class DuplicateKeyError(ModelError, ValueError):
    """Two mappers return the same keyword argument."""


def count_items(data: object) -> int:
    """Items in a modality's data: the length of a list; anything else, even an array, is one."""
    return len(data) if isinstance(data, list) else 1


def _check_is_name(data_type_key: object) -> None:
    """Refuse a class in a modality's place: the sign of a decorator without parentheses."""
    if isinstance(data_type_key, type):
        raise ModelError(
            f"Modality: got the class {data_type_key.__name__}, expected a name. Put parentheses with the modality "
            f"behind the decorator: @MULTIMODAL_REGISTRY.register_...('image', ...)."
        )

"""A modality: how its data becomes keyword arguments of `forward`, and how many decoder rows an item takes at most.

`MultiModalPlugin` holds what model classes registered for one modality; `MultiModalRegistry` holds the plugins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

from sensorium.errors import ConfigError, ModelError, UnregisteredModalityError
from sensorium.logger import get_logger, warn_once
from sensorium.multimodal.callables import C, ClassRegistry, check_callable, resolve_mm_processor_kwargs
from sensorium.multimodal.context import InputContext
from sensorium.multimodal.inputs import MultiModalKwargs, check_leaves
from sensorium.multimodal.placeholder_map import IndexMap, MultiModalPlaceholderMap

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

__all__ = [
    "IndexMap",
    "MultiModalInputMapper",
    "MultiModalPlaceholderMap",
    "MultiModalPlugin",
    "MultiModalTokensCalc",
    "PlaceholderStr",
    "PlaceholderTokens",
    "supports_multimodal",
]

logger = get_logger(__name__)

MultiModalInputMapper: TypeAlias = Callable[..., Mapping[str, Any]]
"""`f(ctx, data, **mm_processor_kwargs)`: keyword arguments of `forward`, from one item or a list of items."""

MultiModalTokensCalc: TypeAlias = int | Callable[..., int]
"""The most decoder rows that one item takes, or `f(ctx, **mm_processor_kwargs)` that calculates them."""

PlaceholderTokens: TypeAlias = "int | list[int] | tuple[int, ...] | Callable[[InputContext], Any]"
"""Ids of the tokens at whose positions media rows stand, or a function of the context that returns them."""

PlaceholderStr: TypeAlias = str | Callable[[int], str]
"""What stands for an item in a chat prompt, or a function of its number, counted from 1 within the modality."""


def supports_multimodal(model_class: type | None) -> bool:
    """Whether a class takes media: it says so by the flag that `SupportsMultiModal` sets. Duck typing is enough."""
    return getattr(model_class, "supports_multimodal", False) is True


class MultiModalPlugin(ABC):
    """One modality, and what each model class registered for it. Subclasses of a model class inherit from it."""

    def __init__(self) -> None:
        self._input_mappers: ClassRegistry[MultiModalInputMapper] = ClassRegistry()
        self._max_mm_tokens: ClassRegistry[MultiModalTokensCalc] = ClassRegistry()
        self._placeholder_tokens: ClassRegistry[PlaceholderTokens] = ClassRegistry()
        self._placeholder_strs: ClassRegistry[PlaceholderStr] = ClassRegistry()

    @abstractmethod
    def get_data_key(self) -> str:
        """The modality's name: its key in `multi_modal_data`."""
        raise NotImplementedError

    @abstractmethod
    def _default_input_mapper(self, ctx: InputContext, data: Any, **mm_processor_kwargs: Any) -> MultiModalKwargs:
        """The mapper of a class that registers without one of its own; gets `mm_processor_kwargs` unfiltered."""
        raise NotImplementedError

    @abstractmethod
    def _default_max_multimodal_tokens(self, ctx: InputContext) -> int:
        """The most decoder rows of an item, for a class that registers without a number of its own."""
        raise NotImplementedError

    def _check_default_mapper(self, model_config: ModelConfig) -> None:  # noqa: B027  # most need nothing
        """Raise `MissingLibraryError` if a library that the default mapper needs is known to be missing before anything
        loads."""

    # Mappers

    def register_input_mapper(self, mapper: MultiModalInputMapper | None = None) -> Callable[[C], C]:
        """Class decorator: `mapper` maps this modality's data for the class; None: the plugin's default."""
        if mapper is not None:
            check_callable(mapper, f"register_{self.get_data_key()}_input_mapper")
        return self._input_mappers.decorator(
            mapper or self._default_input_mapper, f"an input mapper for {self.get_data_key()!r}"
        )

    def has_input_mapper(self, model_class: type | None) -> bool:
        """Whether the class takes this modality."""
        return model_class is not None and model_class in self._input_mappers

    def get_input_mapper(self, model_class: type | None) -> MultiModalInputMapper:
        """The class's mapper. Raises `UnregisteredModalityError` (a `KeyError`) if it registered none."""
        if model_class is None or model_class not in self._input_mappers:
            name = "None" if model_class is None else model_class.__name__
            raise UnregisteredModalityError(
                f"No input mapper in {type(self).__name__} is registered for model class {name}, so it doesn't take "
                f"{self.get_data_key()!r} data. Decorate the class with "
                f"@MULTIMODAL_REGISTRY.register_input_mapper({self.get_data_key()!r}, ...)."
            )
        return self._input_mappers[model_class]

    def uses_default_mapper(self, model_class: type | None) -> bool:
        """Whether the class takes this modality with the plugin's own mapper."""
        return self.has_input_mapper(model_class) and self.get_input_mapper(model_class) == self._default_input_mapper

    def passes_settings_on(self, model_class: type | None) -> bool:
        """Whether the class's mapper gets all `mm_processor_kwargs`, for the checkpoint's own processor: the plugin's
        does, and those of a class that says so by a flag of this name."""
        return self.uses_default_mapper(model_class) or getattr(model_class, "passes_settings_on", False) is True

    def check_mapper(self, model_config: ModelConfig) -> None:
        """Raise `MissingLibraryError` (a `RuntimeError`) if the class's mapper is known to lack a library."""
        if self.uses_default_mapper(model_config.model_class):
            self._check_default_mapper(model_config)

    def map_input(
        self, model_config: ModelConfig, data: Any, mm_processor_kwargs: Mapping[str, Any] | None = None
    ) -> MultiModalKwargs:
        """Turn data of this modality (one item, or a list) into keyword arguments of `forward`.

        Raises `UnregisteredModalityError` (a `KeyError`) without a mapper, and `ModelError` (a `TypeError`) if the
        mapper returns something other than a dict of tensors, arrays and numbers; what the mapper itself raises
        passes through.
        """
        mapper = self.get_input_mapper(model_config.model_class)
        kwargs = resolve_mm_processor_kwargs(
            model_config.mm_processor_kwargs,
            mm_processor_kwargs,
            mapper,
            allow_var_kwargs=self.passes_settings_on(model_config.model_class),
        )
        mapped = mapper(InputContext(model_config), data, **kwargs)
        name = getattr(mapper, "__qualname__", type(mapper).__name__)
        if not isinstance(mapped, Mapping):
            raise ModelError(
                f"Input mapper {name}: got {type(mapped).__name__}, expected a dict of keyword arguments of forward. "
                f"Return MultiModalKwargs(...)."
            )
        check_leaves(mapped, name)
        return mapped if isinstance(mapped, MultiModalKwargs) else MultiModalKwargs(mapped)

    # Largest number of rows

    def register_max_multimodal_tokens(self, max_mm_tokens: MultiModalTokensCalc | None = None) -> Callable[[C], C]:
        """Class decorator: the most decoder rows that one item takes; None: the plugin's default.

        Raises `ConfigError` (a `ValueError`) for a number below 1.
        """
        if isinstance(max_mm_tokens, int):
            self._check_max_tokens(max_mm_tokens)
        elif max_mm_tokens is not None:
            check_callable(max_mm_tokens, f"register_max_{self.get_data_key()}_tokens")
        calc = self._default_max_multimodal_tokens if max_mm_tokens is None else max_mm_tokens
        return self._max_mm_tokens.decorator(calc, f"a maximum number of tokens for {self.get_data_key()!r}")

    def get_max_tokens_calc(self, model_class: type | None) -> MultiModalTokensCalc | None:
        """What the class registered as the most decoder rows of one item, or None."""
        return None if model_class is None else self._max_mm_tokens.get(model_class)

    def get_max_multimodal_tokens(self, model_config: ModelConfig) -> int:
        """The most decoder rows that one item takes; 0 if the class takes no media or registered nothing.

        Raises `ConfigError` (a `ValueError`) if the registered function returns less than 1.
        """
        model_class = model_config.model_class
        if model_class is None or not supports_multimodal(model_class):
            return 0
        if model_class not in self._max_mm_tokens:
            if self.has_input_mapper(model_class):
                warn_once(
                    logger,
                    f"{model_class.__name__} takes {self.get_data_key()!r} data, but has no maximum number of tokens "
                    f"for it, which counts as 0. Add register_max_multimodal_tokens({self.get_data_key()!r}, ...).",
                )
            return 0
        calc = self._max_mm_tokens[model_class]
        if callable(calc):
            kwargs = resolve_mm_processor_kwargs(model_config.mm_processor_kwargs, None, calc)
            calc = calc(InputContext(model_config), **kwargs)
        return self._check_max_tokens(calc)

    def _check_max_tokens(self, num_tokens: int) -> int:
        if num_tokens < 1 or num_tokens != int(num_tokens):
            raise ConfigError(
                f"Maximum number of tokens of one {self.get_data_key()!r} item: got {num_tokens}, expected a positive "
                f"integer. Correct register_max_multimodal_tokens({self.get_data_key()!r}, ...)."
            )
        return int(num_tokens)

    # Hints

    def register_placeholder_tokens(self, token_ids: PlaceholderTokens) -> Callable[[C], C]:
        """Class decorator: the ids of the tokens at whose positions rows of this modality stand."""
        if isinstance(token_ids, type) or not isinstance(token_ids, int | list | tuple):
            check_callable(token_ids, "register_placeholder_tokens")
        return self._placeholder_tokens.decorator(token_ids, f"placeholder tokens for {self.get_data_key()!r}")

    def get_placeholder_token_ids(self, model_config: ModelConfig) -> frozenset[int] | None:
        """The declared ids, or None where they are to be inferred."""
        model_class = model_config.model_class
        if model_class is None or model_class not in self._placeholder_tokens:
            return None
        declared = self._placeholder_tokens[model_class]
        ids = declared(InputContext(model_config)) if callable(declared) else declared
        return frozenset([ids] if isinstance(ids, int) else ids)

    def register_placeholder_str(self, placeholder: PlaceholderStr) -> Callable[[C], C]:
        """Class decorator: what stands for an item of this modality in a chat prompt."""
        if not isinstance(placeholder, str):
            check_callable(placeholder, "register_placeholder_str")
        return self._placeholder_strs.decorator(placeholder, f"a placeholder string for {self.get_data_key()!r}")

    def get_placeholder_str(self, model_config: ModelConfig, index: int = 1) -> str | None:
        """The text that stands for the `index`-th item (from 1), or None if the class declared none.

        A class whose checkpoints differ in that has a class method `placeholder_text(model_config, modality)`.
        """
        model_class = model_config.model_class
        if model_class is None or model_class not in self._placeholder_strs:
            of_checkpoint = getattr(model_class, "placeholder_text", None)
            return None if of_checkpoint is None else of_checkpoint(model_config, self.get_data_key())
        declared = self._placeholder_strs[model_class]
        return declared if isinstance(declared, str) else declared(index)

    def has_registrations(self, model_class: type) -> bool:
        """Whether anything at all was registered for the class or a base of it."""
        registries: tuple[ClassRegistry[Any], ...] = (
            self._input_mappers,
            self._max_mm_tokens,
            self._placeholder_tokens,
            self._placeholder_strs,
        )
        return any(model_class in registry for registry in registries)

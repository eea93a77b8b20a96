"""`INPUT_REGISTRY`: input processors and dummy data, registered per model class.

The input processor runs in the front process, once per request; dummy data is made once, at start-up, to find
out how much memory the largest legal input takes. What a class doesn't register has a default: the identity,
and zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, cast

from sensorium.errors import DummyDataError, ModelError, ModelLookupError
from sensorium.logger import get_logger, warn_once
from sensorium.multimodal.callables import C, ClassRegistry, check_callable, resolve_mm_processor_kwargs
from sensorium.multimodal.context import InputContext
from sensorium.sequence import SequenceData

if TYPE_CHECKING:
    from sensorium.config import ModelConfig
    from sensorium.inputs.data import ProcessorInputs
    from sensorium.multimodal.inputs import MultiModalDataDict, MultiModalPlaceholderDict
    from sensorium.multimodal.registry import MultiModalRegistry

logger = get_logger(__name__)


class DummyData(NamedTuple):
    """Dummy data: the largest legal input of a model."""

    seq_data: SequenceData
    multi_modal_data: MultiModalDataDict | None = None
    multi_modal_placeholders: MultiModalPlaceholderDict | None = None


DummyDataFactory: TypeAlias = Callable[..., DummyData | tuple[Any, ...]]
"""`f(ctx, seq_len, mm_counts, **mm_processor_kwargs)`: at least `seq_len` ids, holding `mm_counts` items of
media.
"""

InputProcessor: TypeAlias = Callable[..., Any]
"""`f(ctx, inputs, **mm_processor_kwargs)`: the inputs, with a placeholder token wherever a media row will
stand.
"""


class _ModalityCounts(dict[str, int]):
    """Items per modality, for dummy-data factories; a missing name is explained."""

    def __missing__(self, modality: str) -> int:
        raise ModelLookupError(
            f"Modality count: got {modality!r}, expected one of {sorted(self)}. "
            f"Register a plugin for this modality with MULTIMODAL_REGISTRY.register_plugin."
        )


class InputRegistry:
    """Input processors and dummy-data factories by model class; subclasses inherit those of their bases."""

    def __init__(self) -> None:
        self._dummy_factories: ClassRegistry[DummyDataFactory] = ClassRegistry()
        self._dummy_encoder_factories: ClassRegistry[DummyDataFactory] = ClassRegistry()
        self._processors: ClassRegistry[InputProcessor] = ClassRegistry()

    # Decorators

    def register_dummy_data(self, factory: DummyDataFactory) -> Callable[[C], C]:
        """Class decorator: `factory` makes the model's dummy data."""
        check_callable(factory, "register_dummy_data")
        return self._dummy_factories.decorator(factory, "a dummy data factory")

    def register_dummy_encoder_data(self, factory: DummyDataFactory) -> Callable[[C], C]:
        """Class decorator: `factory` makes the dummy data of the encoder half (cross-attention models only)."""
        check_callable(factory, "register_dummy_encoder_data")
        return self._dummy_encoder_factories.decorator(factory, "a dummy encoder data factory")

    def register_input_processor(self, processor: InputProcessor) -> Callable[[C], C]:
        """Class decorator: `processor` rewrites each prompt of the model, say to insert placeholder tokens."""
        check_callable(processor, "register_input_processor")
        return self._processors.decorator(processor, "an input processor")

    def get_input_processor(self, model_class: type | None) -> InputProcessor | None:
        """The class's input processor, or None."""
        return None if model_class is None else self._processors.get(model_class)

    # Dummy data

    def get_dummy_data_factory(self, model_class: type | None) -> DummyDataFactory | None:
        """The class's dummy-data factory, or None for the default."""
        return None if model_class is None else self._dummy_factories.get(model_class)

    def has_dummy_encoder_data(self, model_class: type) -> bool:
        """Whether the class registered dummy data for an encoder half."""
        return model_class in self._dummy_encoder_factories

    def has_registrations(self, model_class: type) -> bool:
        """Whether anything at all was registered for the class or a base of it."""
        registries = (self._dummy_factories, self._dummy_encoder_factories, self._processors)
        return any(model_class in registry for registry in registries)

    def dummy_data_for_profiling(
        self,
        model_config: ModelConfig,
        seq_len: int,
        mm_registry: MultiModalRegistry,
        is_encoder_data: bool = False,
    ) -> DummyData:
        """The model's dummy data: at least `seq_len` tokens, with as many items of each modality as the
        limits allow.

        The input processor is not applied to it; the input mapper is, by the caller.

        Raises `DummyDataError` (an `AssertionError`) if the factory made fewer tokens (for an encoder half,
        only a warning) or fewer items; `ModelLookupError` (a `KeyError`) if it asks for the count of an
        unknown modality.
        """
        registry = self._dummy_encoder_factories if is_encoder_data else self._dummy_factories
        factory = _lookup(registry, model_config, _default_dummy_data)
        counts = _ModalityCounts(mm_registry.get_mm_limits_per_prompt(model_config))
        kwargs = resolve_mm_processor_kwargs(model_config.mm_processor_kwargs, None, factory)
        made = factory(InputContext(model_config), seq_len, counts, **kwargs)
        if not isinstance(made, tuple) or not 1 <= len(made) <= 3:
            raise ModelError(
                f"Dummy data: got {type(made).__name__} from {_name(factory)}, expected DummyData. "
                f"Return DummyData(seq_data, multi_modal_data)."
            )
        dummy = DummyData(*made)  # classes written for older engines return a plain pair
        _check_num_tokens(dummy, seq_len, factory, is_encoder_data)
        _check_num_items(dummy, counts, factory)
        return dummy

    # Input processing

    def process_input(self, model_config: ModelConfig, inputs: ProcessorInputs) -> ProcessorInputs:
        """Run the model's input processor on one request.

        A registered processor gets a copy, so that a processor may change its argument; without one,
        `inputs` itself comes back. The result always has `mm_processor_kwargs`: where a processor left them
        out, they are the resolved ones together with what else the request asked for (a mapper may know names
        that the processor doesn't).

        Raises `ModelError` (a `TypeError`) if the processor returns something that isn't inputs; what the
        processor itself raises passes through.
        """
        request_kwargs = cast("Mapping[str, Any]", inputs).get("mm_processor_kwargs") or {}
        processor = _lookup(self._processors, model_config, None)
        if processor is None:
            processed, resolved = cast("Any", inputs), {}
        else:
            resolved = resolve_mm_processor_kwargs(model_config.mm_processor_kwargs, request_kwargs, processor)
            processed = processor(InputContext(model_config), _copy_containers(inputs), **resolved)
            processed = _as_inputs(processed, processor)
        halves = (processed["encoder"], processed["decoder"]) if "encoder" in processed else (processed,)
        for half in halves:
            if half.get("type", "token") == "token" and half.get("mm_processor_kwargs") is None:
                half["mm_processor_kwargs"] = {**request_kwargs, **resolved}
        return cast("ProcessorInputs", processed)

    def create_input_processor(self, model_config: ModelConfig) -> Callable[[ProcessorInputs], ProcessorInputs]:
        """`process_input` with the model bound."""

        def process(inputs: ProcessorInputs) -> ProcessorInputs:
            return self.process_input(model_config, inputs)

        return process


def _default_dummy_data(_ctx: InputContext, seq_len: int, _mm_counts: Mapping[str, int]) -> DummyData:
    """Text only: token 0, `seq_len` times. Counts no media, so it suits models that take none."""
    return DummyData(SequenceData.from_prompt_token_counts((0, seq_len)))


def _lookup(registry: ClassRegistry[Any], model_config: ModelConfig, default: Any) -> Any:
    model_class = model_config.model_class
    return default if model_class is None else registry.get(model_class, default)


def _name(function: Callable[..., Any]) -> str:
    return getattr(function, "__qualname__", type(function).__name__)


def _check_num_tokens(dummy: DummyData, seq_len: int, factory: DummyDataFactory, is_encoder_data: bool) -> None:
    num_tokens = len(dummy.seq_data.prompt_token_ids)
    if num_tokens >= seq_len:
        return
    message = (
        f"Expected at least {seq_len} dummy tokens for profiling, but found {num_tokens} tokens instead. "
        f"Let {_name(factory)} fill the prompt up to seq_len."
    )
    if not is_encoder_data:
        raise DummyDataError(message)
    warn_once(logger, message)


def _check_num_items(dummy: DummyData, counts: Mapping[str, int], factory: DummyDataFactory) -> None:
    if dummy.multi_modal_data is None:
        return
    for modality, data in dummy.multi_modal_data.items():
        num_items = len(data) if isinstance(data, list) else 1
        if num_items < counts[modality]:
            raise DummyDataError(
                f"Expected at least {counts[modality]} dummy {modality!r} items for profiling, but found {num_items} "
                f"instead. Let {_name(factory)} make mm_counts[{modality!r}] items."
            )


def _as_inputs(processed: object, processor: InputProcessor) -> Any:
    """What a processor returned, as a dict of its own that says its type."""
    if not isinstance(processed, dict) or not ("prompt_token_ids" in processed or "encoder" in processed):
        raise ModelError(
            f"Input processor {_name(processor)}: got {type(processed).__name__}, expected a dict of inputs with "
            f"prompt_token_ids. Return token_inputs(...)."
        )
    if "encoder" not in processed and "type" not in processed:
        return {"type": "token", **processed}
    return processed


def _copy_containers(value: Any) -> Any:
    """A copy of nested dicts and lists that shares the leaves (images, arrays, tensors)."""
    if isinstance(value, dict):
        return {key: _copy_containers(item) for key, item in value.items()}
    if isinstance(value, list):
        if value and isinstance(value[0], int):  # token ids: long, and plain
            return value.copy()
        return [_copy_containers(item) for item in value]
    return value

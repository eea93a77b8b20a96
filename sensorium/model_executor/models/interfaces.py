"""The capabilities of model classes: protocols whose flags the engine reads once, at load.

A class declares a capability by inheriting the protocol next to `nn.Module`, or by setting the flag itself. Only the
flag counts. This module doesn't import torch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NoReturn, Protocol, TypeVar, runtime_checkable

from sensorium.errors import ModelError
from sensorium.multimodal.base import supports_multimodal
from sensorium.plugins import style_of

if TYPE_CHECKING:
    import torch

    from sensorium.config import ModelConfig
    from sensorium.inputs.transcription import TranscriptionStyle
    from sensorium.multimodal.inputs import NestedTensors
    from sensorium.sequence import IntermediateTensors

__all__ = [
    "EMBED_INPUT_METHODS",
    "EMBED_MULTIMODAL_METHODS",
    "HasInnerState",
    "IsAttentionFree",
    "IsHybrid",
    "SupportsCrossAttention",
    "SupportsCrossEncoding",
    "SupportsLoRA",
    "SupportsMultiModal",
    "SupportsPP",
    "SupportsTranscription",
    "SupportsTwoWaySpans",
    "check_supports_multimodal",
    "find_override",
    "has_inner_state",
    "is_attention_free",
    "is_hybrid",
    "overrides",
    "supports_cross_attention",
    "supports_cross_encoding",
    "supports_lora",
    "supports_multimodal",
    "supports_pp",
    "two_way_spans_of",
]

F = TypeVar("F", bound=Callable[..., Any])

EMBED_MULTIMODAL_METHODS = ("get_multimodal_embeddings", "embed_multimodal", "process_mm_inputs")
"""Names, the preferred one first, of the method that encodes media."""

EMBED_INPUT_METHODS = ("get_input_embeddings", "embed_input_ids")
"""Names, the preferred one first, of the method that embeds token ids and merges media rows in."""


def _stub(method: F) -> F:
    """Mark a protocol's method as declared, but not implemented."""
    method.is_interface_stub = True  # type: ignore[attr-defined]
    return method


def _not_implemented(model: object, name: str) -> NoReturn:
    raise NotImplementedError(f"{type(model).__name__} doesn't implement {name}.")


@runtime_checkable
class SupportsMultiModal(Protocol):
    """A model that takes media.

    The flag is enough, together with keyword parameters of `forward` for what the mappers return. For a class that also
    implements both methods, and whose `forward` has an `inputs_embeds` parameter, the probe has nothing to infer.

    A class that inherits this protocol also inherits the two stubs, so `hasattr` says nothing: ask `overrides`.
    """

    supports_multimodal: ClassVar[Literal[True]] = True

    @_stub
    def get_multimodal_embeddings(self, **kwargs: Any) -> NestedTensors | None:
        """Encode media: the decoder rows of each item, `(num_rows, hidden_size)` in a list or stacked.

        `kwargs` are those of `forward` that mappers made, batched over items.
        """
        return None  # with a body, type checkers don't treat the method as abstract

    @_stub
    def get_input_embeddings(
        self, input_ids: torch.Tensor, multimodal_embeddings: NestedTensors | None = None
    ) -> torch.Tensor:
        """Embed token ids `(num_tokens,)` as `(num_tokens, hidden_size)`, media rows at their placeholders."""
        _not_implemented(self, "get_input_embeddings")


@runtime_checkable
class SupportsLoRA(Protocol):
    """A model whose linear layers can carry low-rank adapters."""

    supports_lora: ClassVar[Literal[True]] = True
    packed_modules_mapping: ClassVar[Mapping[str, Sequence[str]]]
    """Fused layers: their name, and the names of their parts in a checkpoint."""
    supported_lora_modules: ClassVar[Sequence[str]]
    embedding_modules: ClassVar[Mapping[str, str]]
    embedding_padding_modules: ClassVar[Sequence[str]]


@runtime_checkable
class SupportsPP(Protocol):
    """A model that can be cut into pipeline stages; its `forward` takes `intermediate_tensors`."""

    supports_pp: ClassVar[Literal[True]] = True

    @_stub
    def make_empty_intermediate_tensors(
        self, batch_size: int, dtype: torch.dtype, device: torch.device
    ) -> IntermediateTensors:
        """Empty tensors of the shapes that a stage passes to the next."""
        _not_implemented(self, "make_empty_intermediate_tensors")


@runtime_checkable
class HasInnerState(Protocol):
    """A model that keeps state per request besides the KV cache."""

    has_inner_state: ClassVar[Literal[True]] = True


@runtime_checkable
class IsAttentionFree(Protocol):
    """A model without attention, hence without a KV cache."""

    is_attention_free: ClassVar[Literal[True]] = True


@runtime_checkable
class IsHybrid(Protocol):
    """A model with attention layers and layers that keep a state of fixed size."""

    is_hybrid: ClassVar[Literal[True]] = True


@runtime_checkable
class SupportsCrossEncoding(Protocol):
    """A model that scores pairs of texts."""

    supports_cross_encoding: ClassVar[Literal[True]] = True


@runtime_checkable
class SupportsCrossAttention(Protocol):
    """A model whose decoder attends to its own tokens and, by cross-attention, to the rows of an encoder.

    Its layers of cross-attention are `Attention(..., attn_type="encoder_decoder")`. Its encoder is
    `get_multimodal_embeddings`, as in every model that takes media. `forward` takes `encoder_outputs`: in the first
    step that sees items, their rows, concatenated, which these layers turn into keys and values; None in all other
    steps. Tokens see an item from its range in the prompt on, which the input processor returns as
    `multi_modal_placeholders`.

    A class may have a method `get_num_seen_rows` with the arguments of `get_num_encoder_rows`. Then the last token of
    the range, and all later ones, see only so many of the item's first rows; a prompt has one item at most, and is
    computed in chunks.
    """

    supports_cross_attention: ClassVar[Literal[True]] = True

    @classmethod
    def get_num_encoder_rows(cls, model_config: ModelConfig, modality: str, kwargs: Mapping[str, Any]) -> int:
        """The number of encoder rows of an item, given the mapper's output for it. Called in the front process."""
        ...


@runtime_checkable
class SupportsTranscription(Protocol):
    """A model with its own prompt for transcription, or with a longest sound.

    Other models get the default prompt. A speech model, whose task is set by special tokens, has two more methods:
    `get_speech_tokens(model_config)` returns a `sensorium.inputs.speech.SpeechTokens`, and
    `get_spectrogram(model_config, samples, rate)` the spectrogram `(mel bins, frames)` of a sound of any length. Its
    mapper takes pieces of a spectrogram as well as sounds.
    """

    @classmethod
    def get_transcription_style(cls, model_config: ModelConfig) -> TranscriptionStyle:
        """The prompt, and the format of the answer. Called once, in the front process."""
        ...


@runtime_checkable
class SupportsTwoWaySpans(Protocol):
    """A model in which some positions of a prompt see later ones too: those of a picture, or the whole prompt.

    No chunk ends inside such a span. Attention gets them as `AttentionMetadata.row_spans`, and a layer's
    `Attention(..., spans=...)` says how it treats them.
    """

    @classmethod
    def get_two_way_spans(cls, model_config: ModelConfig) -> Collection[str]:
        """The modalities of which each run of consecutive rows is a two-way span, or `sensorium.spans.WHOLE_PROMPT`.
        Called once, at load."""
        ...


def two_way_spans_of(model: object, model_config: ModelConfig) -> frozenset[str]:
    """The two-way spans of a model or its class, by `SupportsTwoWaySpans`; empty without it.

    Raises `ModelError` (a `TypeError`) for a wrong answer.
    """
    model_class = model if isinstance(model, type) else type(model)
    if (style := style_of(model_class)) is not None:
        model_class = style.class_that_knows_spans(model_class, model_config)
    if not issubclass(model_class, SupportsTwoWaySpans):
        return frozenset()
    named = model_class.get_two_way_spans(model_config)
    if isinstance(named, str) or not all(isinstance(each, str) for each in named):
        raise ModelError(
            f"get_two_way_spans of {model_class.__name__}: got {named!r}, expected a collection of names. Return those "
            "of modalities, such as ['image'], or ['prompt'] for all of a prompt."
        )
    return frozenset(named)


def _has_flag(model: object, flag: str) -> bool:
    """Whether a class, or an object's class, sets a flag."""
    return getattr(model if isinstance(model, type) else type(model), flag, False) is True


def supports_lora(model: object) -> bool:
    """Whether a model, or its class, has `SupportsLoRA`'s flag."""
    return _has_flag(model, "supports_lora")


def supports_pp(model: object) -> bool:
    """Whether a model, or its class, has `SupportsPP`'s flag."""
    return _has_flag(model, "supports_pp")


def has_inner_state(model: object) -> bool:
    """Whether a model, or its class, has `HasInnerState`'s flag."""
    return _has_flag(model, "has_inner_state")


def is_attention_free(model: object) -> bool:
    """Whether a model, or its class, has `IsAttentionFree`'s flag."""
    return _has_flag(model, "is_attention_free")


def is_hybrid(model: object) -> bool:
    """Whether a model, or its class, has `IsHybrid`'s flag."""
    return _has_flag(model, "is_hybrid")


def supports_cross_attention(model: object) -> bool:
    """Whether a model, or its class, has `SupportsCrossAttention`'s flag."""
    return _has_flag(model, "supports_cross_attention")


def supports_cross_encoding(model: object) -> bool:
    """Whether a model, or its class, has `SupportsCrossEncoding`'s flag."""
    return _has_flag(model, "supports_cross_encoding")


def overrides(model_class: type, name: str) -> bool:
    """Whether a class defines or inherits a method that isn't a protocol's stub.

    Pass `type(model)`: a class's `__new__` may return an instance of another class.
    """
    method = inspect.getattr_static(model_class, name, None)
    if isinstance(method, classmethod | staticmethod):
        method = method.__func__
    return callable(method) and not getattr(method, "is_interface_stub", False)


def find_override(model_class: type, names: Sequence[str]) -> str | None:
    """The first of several names for which `overrides` holds; None if there is none."""
    return next((name for name in names if overrides(model_class, name)), None)


def check_supports_multimodal(model_class: type) -> None:
    """Refuse a class that is registered for media, but doesn't declare that it takes media.

    Raises `ModelError` (a `TypeError`) that says what to change.
    """
    from sensorium.multimodal import MULTIMODAL_REGISTRY

    if MULTIMODAL_REGISTRY.has_registrations(model_class) and not supports_multimodal(model_class):
        raise ModelError(
            f"Model class {model_class.__name__}: it is registered for media, but doesn't implement "
            f"SupportsMultiModal, so all media would be refused. Declare it as "
            f"`class {model_class.__name__}(nn.Module, SupportsMultiModal)`."
        )

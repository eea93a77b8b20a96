"""What a model class can say about itself: protocols whose flags the engine reads once, at load.

A class states a capability by inheriting the protocol next to `nn.Module`, or by setting the flag itself. Only the flag
counts. No torch at import.
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

    The flag alone is enough, together with `forward`'s keyword parameters for what the mappers return. A class that
    implements both methods as well, and gives `forward` an `inputs_embeds` parameter, needs no inference at load.

    A class that inherits this protocol also inherits the two stubs, so `hasattr` says nothing: ask `overrides`.
    """

    supports_multimodal: ClassVar[Literal[True]] = True

    @_stub
    def get_multimodal_embeddings(self, **kwargs: Any) -> NestedTensors | None:
        """Encode media: the decoder rows of each item, `(num_rows, hidden_size)` in a list or stacked.

        `kwargs` are those of `forward` that mappers made, batched over items.
        """
        return None  # a body, so that type checkers don't take the method for abstract

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
        """Tensors of the shapes that a stage hands on."""
        _not_implemented(self, "make_empty_intermediate_tensors")


@runtime_checkable
class HasInnerState(Protocol):
    """A model that keeps state per request beside the KV cache."""

    has_inner_state: ClassVar[Literal[True]] = True


@runtime_checkable
class IsAttentionFree(Protocol):
    """A model without attention, hence without a KV cache."""

    is_attention_free: ClassVar[Literal[True]] = True


@runtime_checkable
class IsHybrid(Protocol):
    """A model with both attention and layers that keep another state."""

    is_hybrid: ClassVar[Literal[True]] = True


@runtime_checkable
class SupportsCrossEncoding(Protocol):
    """A model that scores pairs of texts."""

    supports_cross_encoding: ClassVar[Literal[True]] = True


@runtime_checkable
class SupportsCrossAttention(Protocol):
    """A model whose decoder attends to the rows of an encoder by cross-attention, beside its own tokens.

    Its layers of cross-attention are `Attention(..., attn_type="encoder_decoder")`. Its encoder is
    `get_multimodal_embeddings`, as of every model that takes media, and `forward` takes `encoder_outputs`: rows of
    items, one item behind the other, in the step that first sees them, which these layers turn into keys and values;
    None in all others. An item is seen from its place in the prompt on, which the input processor returns as
    `multi_modal_placeholders`. With a method `get_num_seen_rows` of the same arguments as `get_num_encoder_rows`, the
    last token of that place, and all behind it, see only the first so many rows; one item is all that a prompt may have
    then, and prompts are computed in chunks.
    """

    supports_cross_attention: ClassVar[Literal[True]] = True

    @classmethod
    def get_num_encoder_rows(cls, model_config: ModelConfig, modality: str, kwargs: Mapping[str, Any]) -> int:
        """Rows that the encoder makes of an item, given what the mapper made of it. Called in the front process."""
        ...


@runtime_checkable
class SupportsTranscription(Protocol):
    """A model that is asked in its own words to transcribe, or that hears only sounds of a certain length whole.

    Models without it are asked in the default words. A model of speech, which is told by tokens what to write down, has
    two methods more: `get_speech_tokens(model_config)` returns a `sensorium.inputs.speech.SpeechTokens`, and
    `get_spectrogram(model_config, samples, rate)` the spectrogram `(mel bins, frames)` of a sound of any length, of
    which its mapper takes pieces in the place of sounds.
    """

    @classmethod
    def get_transcription_style(cls, model_config: ModelConfig) -> TranscriptionStyle:
        """How it is asked and how it answers. Called once, in the front process."""
        ...


@runtime_checkable
class SupportsTwoWaySpans(Protocol):
    """A model in which some positions of a prompt see later ones too: those of a picture, or the whole prompt.

    No chunk ends inside such a span, and attention gets them as `AttentionMetadata.row_spans`; what a layer makes of
    them says its `Attention(..., spans=...)`.
    """

    @classmethod
    def get_two_way_spans(cls, model_config: ModelConfig) -> Collection[str]:
        """Modalities whose rows see one another both ways, run by run of rows that follow each other; or
        `sensorium.spans.WHOLE_PROMPT`. Called once, at load."""
        ...


def two_way_spans_of(model: object, model_config: ModelConfig) -> frozenset[str]:
    """What a model, or its class, says as `SupportsTwoWaySpans`; nothing if it doesn't.

    Raises `ModelError` (a `TypeError`) if it says something else.
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
    """Whether a class has a method of its own, or of a base, that is more than a protocol's stub.

    Pass `type(model)`: a class's `__new__` may return an instance of another class.
    """
    method = inspect.getattr_static(model_class, name, None)
    if isinstance(method, classmethod | staticmethod):
        method = method.__func__
    return callable(method) and not getattr(method, "is_interface_stub", False)


def find_override(model_class: type, names: Sequence[str]) -> str | None:
    """The first of several names under which a class has a method of its own; None if there is none."""
    return next((name for name in names if overrides(model_class, name)), None)


def check_supports_multimodal(model_class: type) -> None:
    """Refuse a class that registered something for media, but doesn't say that it takes media.

    Raises `ModelError` (a `TypeError`) that says what to change.
    """
    from sensorium.multimodal import MULTIMODAL_REGISTRY

    if MULTIMODAL_REGISTRY.has_registrations(model_class) and not supports_multimodal(model_class):
        raise ModelError(
            f"Model class {model_class.__name__}: it is registered for media, but doesn't implement "
            f"SupportsMultiModal, so all media would be refused. Declare it as "
            f"`class {model_class.__name__}(nn.Module, SupportsMultiModal)`."
        )

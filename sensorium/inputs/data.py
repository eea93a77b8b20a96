"""Prompts as callers write them, and inputs as processors see them.

A prompt (`PromptType`) is a string or a dict; preprocessing turns it into inputs (`TokenInputs` and its kin),
which an input processor may rewrite. Types only: parsing lives with preprocessing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal, NotRequired, TypeAlias, TypedDict, TypeGuard, cast

if TYPE_CHECKING:
    from sensorium.multimodal.inputs import (
        MultiModalDataDict,
        MultiModalInputsV2,
        MultiModalKwargs,
        MultiModalPlaceholderDict,
    )


class TextPrompt(TypedDict):
    """A prompt given as text."""

    prompt: str
    multi_modal_data: NotRequired[MultiModalDataDict]
    multi_modal_uuids: NotRequired[Mapping[str, Any]]
    """By modality: names by which the caller vouches for items' identity, instead of a digest of their
    content.
    """
    mm_processor_kwargs: NotRequired[dict[str, Any]]


class TokensPrompt(TypedDict):
    """A prompt given as token ids. A dict that also has `prompt` is still this kind; the text is for show."""

    prompt_token_ids: list[int]
    token_type_ids: NotRequired[list[int]]
    multi_modal_data: NotRequired[MultiModalDataDict]
    multi_modal_uuids: NotRequired[Mapping[str, Any]]
    mm_processor_kwargs: NotRequired[dict[str, Any]]


SingletonPrompt: TypeAlias = str | TextPrompt | TokensPrompt
"""A prompt of one half: what a decoder-only model takes."""


class ExplicitEncoderDecoderPrompt(TypedDict):
    """Both halves of an encoder-decoder prompt. Only `encoder_prompt` may carry media."""

    encoder_prompt: SingletonPrompt
    decoder_prompt: SingletonPrompt | None
    mm_processor_kwargs: NotRequired[dict[str, Any]]


PromptType: TypeAlias = SingletonPrompt | ExplicitEncoderDecoderPrompt
"""Every form in which a prompt may be given."""


class TokenInputs(TypedDict):
    """A tokenized prompt on its way to, through and from the input processor. Build it with `token_inputs`."""

    type: Literal["token"]
    prompt_token_ids: list[int]
    prompt: NotRequired[str]
    token_type_ids: NotRequired[list[int]]
    multi_modal_data: NotRequired[MultiModalDataDict]
    multi_modal_inputs: NotRequired[MultiModalKwargs]
    """Keyword arguments already mapped; the input mapper is not called for them."""
    multi_modal_placeholders: NotRequired[MultiModalPlaceholderDict]
    multi_modal_hashes: NotRequired[list[str]]
    mm_processor_kwargs: NotRequired[dict[str, Any]]


class LLMInputs(TypedDict):
    """`TokenInputs` under the name, and without the `type` key, of classes written for older engines."""

    prompt_token_ids: list[int]
    prompt: NotRequired[str | None]
    multi_modal_data: NotRequired[MultiModalDataDict | None]
    mm_processor_kwargs: NotRequired[dict[str, Any] | None]


def token_inputs(
    prompt_token_ids: list[int],
    token_type_ids: list[int] | None = None,
    prompt: str | None = None,
    multi_modal_data: MultiModalDataDict | None = None,
    multi_modal_inputs: MultiModalKwargs | None = None,
    multi_modal_hashes: list[str] | None = None,
    multi_modal_placeholders: MultiModalPlaceholderDict | None = None,
    mm_processor_kwargs: dict[str, Any] | None = None,
) -> TokenInputs:
    """Build `TokenInputs`; arguments that are None leave no key."""
    optional = {
        "prompt": prompt,
        "token_type_ids": token_type_ids,
        "multi_modal_data": multi_modal_data,
        "multi_modal_inputs": multi_modal_inputs,
        "multi_modal_hashes": multi_modal_hashes,
        "multi_modal_placeholders": multi_modal_placeholders,
        "mm_processor_kwargs": mm_processor_kwargs,
    }
    given = {name: value for name, value in optional.items() if value is not None}
    return cast("TokenInputs", {"type": "token", "prompt_token_ids": prompt_token_ids, **given})


DecoderOnlyInputs: TypeAlias = "TokenInputs | MultiModalInputsV2"
"""Inputs of a decoder-only model: token inputs, or what a merged processor made (`type` is "multimodal")."""

SingletonInputs: TypeAlias = DecoderOnlyInputs
"""Inputs of one half of an encoder-decoder model."""


class EncoderDecoderInputs(TypedDict):
    """Inputs of an encoder-decoder model."""

    encoder: SingletonInputs
    decoder: SingletonInputs


ProcessorInputs: TypeAlias = "DecoderOnlyInputs | EncoderDecoderInputs"
"""What an input processor gets and returns."""


def is_encoder_decoder_inputs(inputs: Mapping[str, Any]) -> TypeGuard[EncoderDecoderInputs]:
    """Whether processor inputs have two halves."""
    return "encoder" in inputs and "decoder" in inputs


def is_explicit_encoder_decoder_prompt(prompt: object) -> TypeGuard[ExplicitEncoderDecoderPrompt]:
    """Whether a prompt gives encoder and decoder halves apart."""
    return isinstance(prompt, dict) and "encoder_prompt" in prompt

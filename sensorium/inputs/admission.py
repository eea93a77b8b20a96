"""Admission decides: what a request must be before it is queued, so that no step can fail for its sake.

Checks of single facts, without side effects; preprocessing calls them in order, the cheap ones first. Every
failure is an error of the request that says what was got, what was expected, and what to change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import ContextLengthError, InvalidRequestError, UnsupportedFeatureError
from sensorium.multimodal.inputs import iter_leaves
from sensorium.multimodal.placeholders import BoolArray, is_placeholder
from sensorium.spans import IntArray, Span

if TYPE_CHECKING:
    from sensorium.config import EngineConfig, ModelFeatures
    from sensorium.sampling_params import SamplingParams

EMBEDDINGS_SUFFIX = "_embeds"
"""Mapped keyword arguments of this ending are embeddings that the caller computed."""

MAX_DEPTH = 8
"""Deepest nesting of containers in media data."""


# Prompts


def prompt_too_long(
    got: str, max_tokens: int, max_model_len: int, advice: str = "Shorten the prompt"
) -> ContextLengthError:
    """The error for a prompt that doesn't fit. `got`: the number of tokens, in words.

    Clients tell such an error by the words "This model's maximum context length is" or "prompt is too long", if not
    by its code.
    """
    return ContextLengthError(
        f"the prompt is too long to fit into the model: got {got} tokens, expected at most {max_tokens}. This model's "
        f"maximum context length is {max_model_len} tokens. {advice}, or raise max_model_len."
    )


def check_token_ids(token_ids: IntArray, max_token_id: int) -> None:
    """Refuse ids beyond the vocabulary. Negative ids pass: an input processor may know what they stand for."""
    if token_ids.max(initial=-1) > max_token_id:
        raise InvalidRequestError(
            f"prompt_token_ids: got token id {int(token_ids.max())}, which is out of vocabulary, expected at most "
            f"{max_token_id}. Encode the prompt with the model's own tokenizer."
        )


def check_length(
    num_tokens: int, rows_by_modality: Mapping[str, Sequence[int]], max_model_len: int, *, pooling: bool
) -> None:
    """Refuse an empty prompt, and one that leaves no room for a token of output.

    `rows_by_modality`: for each modality, the rows of each item.
    """
    if num_tokens == 0:
        raise InvalidRequestError("prompt: got 0 tokens, expected at least 1. Prompt cannot be empty: add text.")
    most = max_model_len - (0 if pooling else 1)
    if num_tokens <= most:
        return
    shares = [
        f"{sum(rows)} from {len(rows)} {modality} item{'s' if len(rows) > 1 else ''}"
        for modality, rows in rows_by_modality.items()
        if rows
    ]
    if not shares:
        raise prompt_too_long(str(num_tokens), most, max_model_len)
    raise prompt_too_long(
        f"{num_tokens} ({', '.join(shares)})",
        most,
        max_model_len,
        "Send fewer or smaller media items, shorten the prompt",
    )


def check_special_tokens(
    token_ids: IntArray, is_media: BoolArray, placeholder_ids: Collection[int], vocab_size: int
) -> None:
    """Refuse tokens that mean media where no media stands.

    These are ids outside the vocabulary, which have no embedding, and placeholder tokens, whose embeddings a
    model would take for the place of an item: the user typed them, or wrote more of them than there are
    items.
    """
    is_text = ~is_media
    outside = is_text & ((token_ids < 0) | (token_ids >= vocab_size))
    if outside.any():
        position = int(np.flatnonzero(outside)[0])
        raise InvalidRequestError(
            f"prompt: got token id {int(token_ids[position])} at position {position}, where no media stands, expected "
            f"0 to {vocab_size - 1}. Remove it, or add the media that it stands for."
        )
    stray = is_text & is_placeholder(token_ids, placeholder_ids)
    if stray.any():
        position = int(np.flatnonzero(stray)[0])
        raise InvalidRequestError(
            f"prompt: got the placeholder token {int(token_ids[position])} at position {position}, where no media "
            f"stands, expected one placeholder for each media item. Remove it from the text, or add the media."
        )


# Media


def check_span(counts: Mapping[str, int], span: Span, config: EngineConfig, features: ModelFeatures) -> None:
    """Refuse what no step could compute: more rows than items may have, or than fit a step that must hold
    them whole.

    `counts`: the items of each modality that share the span, mostly one item.
    """
    what = f"{' and '.join(counts)} item{'s' if sum(counts.values()) > 1 else ''}"
    limits = [features.max_item_rows.get(modality, 0) * count for modality, count in counts.items()]
    if features.splits_media and all(limits) and span.num_rows > sum(limits):
        raise InvalidRequestError(
            f"{what}: got {span.num_rows} rows, expected at most {sum(limits)}. Send smaller media, or correct "
            f"register_max_multimodal_tokens of the model class."
        )
    step_tokens = config.scheduler_config.max_num_batched_tokens
    if features.atomic_items and span.length > step_tokens:
        raise InvalidRequestError(
            f"{what}: got {span.length} tokens, expected at most {step_tokens}, since this model computes them in one "
            f"step. Send smaller media, or raise max_num_batched_tokens."
        )


def check_arrays(modality: str, value: Any, *, depth: int = 0) -> None:
    """Refuse arrays and tensors that can't be computed with: empty, not dense, or holding values that aren't
    finite.
    """
    if depth > MAX_DEPTH:
        raise _bad_values(modality, f"containers nested more than {MAX_DEPTH} deep", "arrays, tensors or objects")
    if isinstance(value, Mapping):
        for item in value.values():
            check_arrays(modality, item, depth=depth + 1)
    elif isinstance(value, list | tuple):
        for item in value:
            check_arrays(modality, item, depth=depth + 1)
    elif isinstance(value, np.ndarray):
        _check_array(modality, value)
    elif hasattr(value, "is_sparse"):
        _check_tensor(modality, value)


def _check_array(modality: str, value: np.ndarray[Any, Any]) -> None:
    if value.size == 0:
        raise _bad_values(modality, f"an empty array of shape {value.shape}", "at least one value")
    if value.dtype.kind in "fc" and not np.isfinite(value).all():
        raise _bad_values(modality, "an array with NaN or infinite values", "finite values")


def _check_tensor(modality: str, value: Any) -> None:
    import torch

    if value.layout is not torch.strided or value.is_quantized or value.is_nested or value.is_meta:
        raise _bad_values(modality, "a tensor that is sparse, quantized, nested or without values", "a dense tensor")
    if value.numel() == 0:
        raise _bad_values(modality, f"an empty tensor of shape {tuple(value.shape)}", "at least one value")
    if (value.is_floating_point() or value.is_complex()) and not bool(torch.isfinite(value).all()):
        raise _bad_values(modality, "a tensor with NaN or infinite values", "finite values")


def _bad_values(modality: str, got: str, expected: str) -> InvalidRequestError:
    return InvalidRequestError(f"{modality} data: got {got}, expected {expected}. Correct multi_modal_data.")


def check_embeddings(
    modality: str, kwargs: Mapping[str, Any], num_placeholders: int | None, hidden_size: int | None, *, accepted: bool
) -> None:
    """Refuse embeddings given as input that don't fit the rows they are to fill.

    `kwargs`: mapped keyword arguments of an item; those whose name ends in `_embeds` hold tensors of shape
    `(num_rows, hidden_size)`, with up to two axes in front. `num_placeholders`, `hidden_size`: None where
    unknown.
    """
    for name, value in kwargs.items():
        if not name.endswith(EMBEDDINGS_SUFFIX):
            continue
        if not accepted:
            raise UnsupportedFeatureError(
                f"{modality} data: got embeddings, expected {modality} content. Embeddings as input are "
                "switched off here."
            )
        num_rows = sum(_embedding_rows(modality, leaf, hidden_size) for leaf in iter_leaves(value))
        if num_placeholders not in (None, num_rows):
            raise InvalidRequestError(
                f"Attempted to assign {num_rows} = {num_rows} multimodal tokens to {num_placeholders} placeholders: "
                f"{modality} embeddings need one row for each. Send as many rows as the input processor expects."
            )


def embedding_rows(kwargs: Mapping[str, Any]) -> int | None:
    """Rows of embeddings among mapped keyword arguments; None if there are none."""
    leaves = [leaf for name, value in kwargs.items() if name.endswith(EMBEDDINGS_SUFFIX) for leaf in iter_leaves(value)]
    shapes = [tuple(leaf.shape) for leaf in leaves if hasattr(leaf, "shape") and len(leaf.shape) >= 2]
    return sum(int(np.prod(shape[:-1])) for shape in shapes) if shapes else None


def _embedding_rows(modality: str, leaf: Any, hidden_size: int | None) -> int:
    shape = tuple(getattr(leaf, "shape", ()))
    if len(shape) not in (2, 3, 4) or hidden_size not in (None, shape[-1]):
        raise InvalidRequestError(
            f"{modality} embeddings: got shape {shape}, expected (num_rows, {hidden_size or 'hidden_size'}) "
            f"or (num_items, num_rows, {hidden_size or 'hidden_size'}). Send the rows that the decoder takes."
        )
    is_float = leaf.dtype.kind == "f" if isinstance(leaf, np.ndarray) else leaf.is_floating_point()
    if not is_float:
        raise InvalidRequestError(
            f"{modality} embeddings: got values of type {leaf.dtype}, expected floating point. Convert them."
        )
    check_arrays(modality, leaf)
    return int(np.prod(shape[:-1]))


# Sampling


def resolve_sampling_params(
    params: SamplingParams, *, vocab_size: int, max_model_len: int, num_prompt_tokens: int
) -> SamplingParams:
    """The parameters, checked against model and prompt, with `max_tokens` made concrete.

    An output ends at the model's context at the latest, so `max_tokens` is at most what is left of it.
    """
    params.check_against(vocab_size=vocab_size, max_model_len=max_model_len, num_prompt_tokens=num_prompt_tokens)
    room = max_model_len - num_prompt_tokens
    return params if params.max_tokens is not None and params.max_tokens <= room else replace(params, max_tokens=room)

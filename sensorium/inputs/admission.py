"""Admission decides: what a request must be before it is queued, so that no step can fail for its sake.

Checks of single facts, without side effects; preprocessing calls them in order, the cheap ones first. Every
failure is an error of the request that says what was got, what was expected, and what to change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sensorium.errors import ContextLengthError, InvalidRequestError
from sensorium.multimodal.placeholders import BoolArray, is_placeholder
from sensorium.spans import IntArray

if TYPE_CHECKING:
    from sensorium.sampling_params import SamplingParams


# Prompts


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
        raise ContextLengthError.of_prompt(str(num_tokens), most, max_model_len)
    raise ContextLengthError.of_prompt(
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

"""Admission decides: what a request must be before it is queued, so that no step can fail for its sake.

Checks of single facts, without side effects; preprocessing calls them in order, the cheap ones first. Every
failure is an error of the request that says what was got, what was expected, and what to change.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from sensorium.errors import ContextLengthError, InvalidRequestError, UnsupportedFeatureError
from sensorium.multimodal.placeholders import BoolArray, is_placeholder
from sensorium.spans import IntArray, Range, Span

if TYPE_CHECKING:
    from sensorium.config import ModelConfig, SchedulerConfig
    from sensorium.pooling_params import PoolingParams
    from sensorium.sampling_params import SamplingParams


# Tasks


def check_task(pooling: PoolingParams | None, model_config: ModelConfig) -> None:
    """Refuse what the model isn't served for: to generate, where `pooling` is None, or a way of pooling.

    Raises `UnsupportedFeatureError`.
    """
    pooler, name = model_config.pooler, model_config.architecture or "this model"
    if pooling is None:
        if model_config.pools:
            raise UnsupportedFeatureError(
                f"got a request to generate, expected one of {', '.join(pooler.tasks)}: {name} is served "
                "for pooling. Ask /v1/embeddings, /classify, /score, /rerank or /pooling, or serve a model that "
                "generates.",
                code="unsupported_task",
                field="task",
            )
        return
    if pooling.task not in pooler.tasks:
        way_out = "Ask for one of these, or serve a model with such a head."
        if not model_config.pools and pooling.task == "classify":
            way_out = "Serve a model with a classification head, or set --runner pooling --convert classify."
        raise UnsupportedFeatureError(
            f"got {pooling.task}, expected one of {', '.join(pooler.tasks)}, which {name} does. {way_out}",
            code="unsupported_task",
            field="task",
        )
    if pooling.dimensions is not None:
        _check_dimensions(pooling, model_config)


def _check_dimensions(pooling: PoolingParams, model_config: ModelConfig) -> None:
    pooler, wanted = model_config.pooler, pooling.dimensions
    size = vector_size(model_config)
    if wanted == size and "embed" in pooling.task:
        return
    allowed = pooler.matryoshka_dimensions
    fits = pooler.is_matryoshka and wanted is not None and wanted <= size and (not allowed or wanted in allowed)
    if fits and "embed" in pooling.task:
        return
    if "embed" not in pooling.task:
        expected = "none for this task"
    elif not pooler.is_matryoshka:
        expected = (
            f"{size}, which the model's vectors have. If it was trained for shorter ones, the operator can say so: "
            "--hf-overrides '{\"is_matryoshka\": true}'"
        )
    else:
        expected = f"one of {sorted(allowed)}" if allowed else f"at most {size}"
    raise UnsupportedFeatureError(
        f"got {wanted}, expected {expected}. Change or remove dimensions.",
        code="unsupported_parameter",
        field="dimensions",
    )


def vector_size(model_config: ModelConfig) -> int:
    """Numbers of a vector that the model makes."""
    return model_config.pooler.size or int(getattr(model_config.hf_text_config, "hidden_size", 0))


# Prompts


def check_token_ids(token_ids: IntArray, max_token_id: int) -> None:
    """Refuse ids beyond the vocabulary. Negative ids pass: an input processor may know what they stand for."""
    if token_ids.max(initial=-1) > max_token_id:
        raise InvalidRequestError(
            f"got token id {int(token_ids.max())}, which is out of vocabulary, expected at most "
            f"{max_token_id}. Encode the prompt with the model's own tokenizer.",
            field="prompt_token_ids",
        )


def check_length(
    num_tokens: int, rows_by_modality: Mapping[str, Sequence[int]], max_model_len: int, *, pooling: bool
) -> None:
    """Refuse an empty prompt, and one that leaves no room for a token of output.

    `rows_by_modality`: for each modality, the rows of each item.
    """
    if num_tokens == 0:
        raise InvalidRequestError(
            "got 0 tokens, expected at least 1. Prompt cannot be empty: add text.", field="prompt"
        )
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
            f"got token id {int(token_ids[position])} at position {position}, where no media stands, expected "
            f"0 to {vocab_size - 1}. Remove it, or add the media that it stands for.",
            field="prompt",
        )
    stray = is_text & is_placeholder(token_ids, placeholder_ids)
    if stray.any():
        position = int(np.flatnonzero(stray)[0])
        raise InvalidRequestError(
            f"got the placeholder token {int(token_ids[position])} at position {position}, where no media "
            f"stands, expected one placeholder for each media item. Remove it from the text, or add the media.",
            field="prompt",
        )


def check_two_way(two_way: Sequence[Range], media: Sequence[Span], scheduler: SchedulerConfig) -> None:
    """Refuse what no step could compute: spans that can't be parted and are larger than a step.

    Args:
        two_way: Ranges of the prompt whose positions see one another both ways.
        media: Of each item, or group of items.
        scheduler: The budgets of a step.
    """
    if not scheduler.enable_chunked_prefill:
        return  # a prompt is one chunk, however long it is
    most = scheduler.max_num_batched_tokens
    most_rows = scheduler.max_num_encoder_rows
    for begin, end in two_way:
        if end - begin > most:
            raise InvalidRequestError(
                f"got {end - begin} tokens at position {begin} that see one another both ways, expected at "
                f"most {most}, since such tokens are computed in one step. Send smaller media or a shorter prompt, or "
                "raise max_num_batched_tokens.",
                field="prompt",
            )
        rows = [span.num_rows for span in media if span.rows_in(begin, end)]
        if len(rows) > 1 and sum(rows) > most_rows:
            raise InvalidRequestError(
                f"got {len(rows)} media items with {sum(rows)} rows in all that see one another both ways, "
                f"expected at most {most_rows} rows, since such items are computed in one step. Send fewer items, or "
                "raise max_num_encoder_rows.",
                field="prompt",
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

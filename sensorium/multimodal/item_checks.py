"""What one media item must be before it is computed with: dense, finite, named and sized as the model takes it.

Checks of single facts, without side effects. Every failure is an error of the request that says what was got, what was
expected, and what to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import InvalidRequestError, InvalidTypeError, UnsupportedFeatureError
from sensorium.multimodal.inputs import iter_leaves
from sensorium.spans import Span

if TYPE_CHECKING:
    from sensorium.config import EngineConfig, ModelFeatures

EMBEDDINGS_SUFFIX = "_embeds"
"""Mapped keyword arguments whose names end like this are embeddings that the caller computed."""

MAX_DEPTH = 8
"""Deepest nesting of containers in media data."""

MAX_UUID_CHARS = 512
"""Longest name of an item."""

ENCODER_PADDING_S = 0.08
"""Encoders fill a sound up to whole frames, and begin with empty ones: 30 s of MP3 are 30.06 s when decoded."""


def check_span(counts: Mapping[str, int], span: Span, config: EngineConfig, features: ModelFeatures) -> None:
    """Refuse what no step could compute: more rows than items may have, or than fit a step that must hold
    them whole.

    `counts`: the items of each modality that share the span, mostly one item.
    """
    what = f"{' and '.join(counts)} item{'s' if sum(counts.values()) > 1 else ''}"
    limits = [features.max_item_rows.get(modality, 0) * count for modality, count in counts.items()]
    if features.splits_media and all(limits) and span.num_rows > sum(limits):
        raise InvalidRequestError(
            f"the {what}: got {span.num_rows} rows, expected at most {sum(limits)}. Send smaller media, or correct "
            "register_max_multimodal_tokens of the model class."
        )
    step_tokens = config.scheduler_config.max_num_batched_tokens
    if features.atomic_items and span.length > step_tokens:
        raise InvalidRequestError(
            f"the {what}: got {span.length} tokens, expected at most {step_tokens}, since this model computes them "
            "in one step. Send smaller media, or raise max_num_batched_tokens."
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


def check_uuids(modality: str, uuids: object, num_items: int) -> list[str | None]:
    """A name or None for each item of a modality.

    Raises:
        InvalidTypeError: (a `TypeError`) They are no strings.
        InvalidRequestError: (a `ValueError`) There are too few or too many, or one is empty or too long.
    """
    if uuids is None:
        return [None] * num_items
    listed = [uuids] if isinstance(uuids, str) else uuids
    if not isinstance(listed, list | tuple):
        raise _not_names(modality, uuids, "a list of strings")
    if len(listed) != num_items:
        raise InvalidRequestError(
            f"got {len(listed)} names, expected one for each of {num_items} items. "
            "Write null for an item without a name.",
            field=f"multi_modal_uuids[{modality!r}]",
        )
    for uuid in listed:
        if uuid is not None and not isinstance(uuid, str):
            raise _not_names(modality, uuid, "strings")
        if uuid is not None and not 0 < len(uuid) <= MAX_UUID_CHARS:
            raise InvalidRequestError(
                f"got a name of {len(uuid)} characters, expected 1 to {MAX_UUID_CHARS}. Shorten it, or leave it out.",
                field=f"multi_modal_uuids[{modality!r}]",
            )
    return list(listed)


def _not_names(modality: str, value: object, expected: str) -> InvalidTypeError:
    return InvalidTypeError(
        f"got a value of type {type(value).__name__}, expected {expected}. Change multi_modal_uuids[{modality!r}].",
        field=f"multi_modal_uuids[{modality!r}]",
    )


def check_heard(what: str, duration_s: float, most_s: float) -> None:
    """Refuse a sound of which the model would hear only the beginning, but for the silence that encoders add.

    Raises:
        InvalidRequestError: It is longer than what the model hears.
    """
    if duration_s > most_s + ENCODER_PADDING_S:
        raise InvalidRequestError(
            f"got a sound of {duration_s:.1f} s, expected at most the {most_s:g} s that the model hears. "
            "Send it in parts.",
            field=what,
        )

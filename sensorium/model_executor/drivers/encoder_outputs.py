"""What encoders return, brought into one shape: a `(rows, hidden_size)` tensor per item.

Published models return flat 2-D tensors (Qwen2-Audio, Fuyu), 3-D (LLaVA), 4-D or nested lists (Ultravox), one tensor
per crop (Idefics3), or pairs of a tensor and a modality name (Qwen2-VL in its first form).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sensorium.errors import ProcessorError


def split_rows(output: Any, row_counts: Sequence[int]) -> list[torch.Tensor]:
    """Split an encoder's output into one 2-D tensor per item.

    An output whose outermost length is the number of items is taken item by item; anything else is flattened in
    order and cut by the counts.

    Args:
        output: Tensor, or nested lists and tuples of tensors or `(tensor, modality)` pairs.
        row_counts: Rows that each item has in the prompt.

    Raises:
        ProcessorError: The numbers of rows differ; the message quotes both.
    """
    if output is None:
        raise ProcessorError("the model's encoder returned None for media that it was given.")
    if _num_entries(output) == len(row_counts):
        rows = [flatten_rows(entry) for entry in output]
        if [len(each) for each in rows] == list(row_counts):
            return rows
        if isinstance(output, list | tuple) or output.dim() > 2:
            raise _mismatch([len(each) for each in rows], row_counts)
    flat = flatten_rows(output)
    if len(flat) != sum(row_counts):
        raise _mismatch([len(flat)], row_counts)
    return list(torch.split(flat, list(row_counts)))


def _num_entries(output: Any) -> int | None:
    """Outermost length, where it may count items. A 2-D tensor's counts rows."""
    if _is_pair(output):
        return None
    if isinstance(output, list | tuple):
        return len(output)
    return len(output) if isinstance(output, torch.Tensor) and output.dim() > 2 else None


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and isinstance(value[0], torch.Tensor)
        and isinstance(value[1], str)
    )


def flatten_rows(value: Any) -> torch.Tensor:
    """All rows of a nested output in order, `(rows, hidden_size)`."""
    if _is_pair(value):
        value = value[0]
    if isinstance(value, torch.Tensor):
        if value.dim() < 2:
            raise ProcessorError(f"the model's encoder returned a tensor of {value.dim()} dimensions, expected 2.")
        return value.reshape(-1, value.shape[-1])
    if isinstance(value, list | tuple):
        if not value:
            raise ProcessorError("the model's encoder returned an empty list for media that it was given.")
        return torch.cat([flatten_rows(entry) for entry in value])
    raise ProcessorError(
        f"the model's encoder returned a {type(value).__name__}, expected one tensor (rows, "
        f"hidden_size) for each item. Correct get_multimodal_embeddings."
    )


def _mismatch(got: Sequence[int], expected: Sequence[int]) -> ProcessorError:
    sizes = " + ".join(map(str, got))
    return ProcessorError(
        f"Attempted to assign {sizes} = {sum(got)} multimodal tokens to {sum(expected)} placeholders. "
        "The model's input processor and its encoder must agree on the number of rows of an item; where other tokens "
        "stand between an item's rows, name those of the rows with MULTIMODAL_REGISTRY.register_placeholder_tokens."
    )

"""Refuses a merge that would drop media rows in silence.

`masked_scatter`, with which Hugging Face's classes put media rows in the place of placeholder tokens, takes as many
rows as there are places, and passes over the rest. A prompt with too few placeholders would so be answered from a part
of its image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from sensorium.errors import InvalidRequestError

_MERGES = frozenset((torch.Tensor.masked_scatter, torch.Tensor.masked_scatter_, torch.masked_scatter))


class CountedMerges(TorchFunctionMode):
    """While active, `masked_scatter` of rows into places of another number is an error that says both numbers."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _MERGES:
            _check_counts(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _check_counts(input: torch.Tensor, mask: torch.Tensor, source: torch.Tensor) -> None:
    width = input.shape[-1] if input.dim() > 1 else 1
    if source.numel() % width:
        return
    num_places = int(torch.broadcast_to(mask, input.shape).sum()) // width
    num_rows = source.numel() // width
    if num_rows != num_places:
        raise InvalidRequestError(
            f"Attempted to assign {num_rows} multimodal tokens to {num_places} placeholders. Let the input processor "
            f"write one placeholder for each row."
        )

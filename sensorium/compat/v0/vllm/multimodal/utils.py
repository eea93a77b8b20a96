"""What towers of 0.6.5 and later return; placeholders as files of 0.6.3 take them."""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch

from sensorium.multimodal import utils

__all__ = ["repeat_and_pad_placeholder_tokens", "resolve_visual_encoder_outputs"]


def repeat_and_pad_placeholder_tokens(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    """See `sensorium.multimodal.utils`. Files of 0.6.3 unpack two results, without the ranges; they get two."""
    results = utils.repeat_and_pad_placeholder_tokens(*args, **kwargs)
    return results[:2] if _num_unpacked(sys._getframe(1)) == 2 else results  # noqa: SLF001


def _num_unpacked(caller: FrameType) -> int | None:
    """Into how many names a caller unpacks what it is about to get; None if it does something else with it."""
    for instruction in dis.get_instructions(caller.f_code):
        if instruction.offset > caller.f_lasti:
            return instruction.arg if instruction.opname == "UNPACK_SEQUENCE" else None
    return None


def resolve_visual_encoder_outputs(
    encoder_outputs: torch.Tensor | Sequence[torch.Tensor],
    feature_sample_layers: Sequence[int] | None,
    post_layer_norm: Callable[[torch.Tensor], torch.Tensor] | None,
    max_possible_layers: int,
) -> torch.Tensor:
    """The rows of a tower: its last layer's, or those of several layers side by side.

    Args:
        encoder_outputs: Without `feature_sample_layers` the last layer's, else the embeddings and every layer's.
        feature_sample_layers: Which of them; negative ones are counted from the end of the whole tower.
        post_layer_norm: Of the last layer of the whole tower.
        max_possible_layers: Of the whole tower, of which fewer may be there.
    """
    if isinstance(encoder_outputs, torch.Tensor):
        return encoder_outputs if post_layer_norm is None else post_layer_norm(encoder_outputs)
    layers = [each if each >= 0 else each + max_possible_layers + 1 for each in feature_sample_layers or [-1]]
    rows = [encoder_outputs[each] for each in layers]
    if layers[-1] == max_possible_layers and post_layer_norm is not None:
        rows[-1] = post_layer_norm(rows[-1])
    return torch.cat(rows, dim=-1)

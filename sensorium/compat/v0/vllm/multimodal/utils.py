"""What towers of 0.6.5 and later return."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

__all__ = ["resolve_visual_encoder_outputs"]


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

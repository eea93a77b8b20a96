"""Penalties of tokens that occurred before, from counts that lie on the device.

A row of `counts` belongs to a request: for each token of the vocabulary, 2 for every time that it was generated, and 1
if it stands in a prompt that the repetition penalty looks at.
"""

from __future__ import annotations

import torch

from sensorium.kernels.gpu import on_gpu

GENERATED, IN_PROMPT = 2, 1


def penalise_reference(logits: torch.Tensor, counts: torch.Tensor, params: torch.Tensor) -> None:
    """Apply penalties to rows of `logits`, in place.

    First the repetition penalty, by which positive logits of tokens seen are divided and others multiplied; then what
    presence and frequency penalty take from those generated, computed in float64 and rounded once.

    Args:
        logits: `(num_rows, vocab_size)` float32, contiguous.
        counts: `(num_slots, vocab_size)` int32.
        params: `(num_penalised, 5)` int64: of each penalised row its place in `logits`, its request's in `counts`, the
            bits of the float32 repetition penalty, and those of the float64 frequency and presence penalty.
    """
    rows, slots = params[:, 0], params[:, 1]
    repetition = params[:, 2].to(torch.int32).view(torch.float32)[:, None]
    frequency, presence = params[:, 3:].contiguous().view(torch.float64).unbind(1)
    seen, value = counts[slots], logits[rows]
    generated = seen // GENERATED
    taken = presence[:, None] + frequency[:, None] * generated
    turned = torch.where(value > 0, value / repetition, value * repetition)
    logits[rows] = torch.where(seen > 0, turned - taken.masked_fill(generated == 0, 0).float(), value)


def penalise(logits: torch.Tensor, counts: torch.Tensor, params: torch.Tensor) -> None:
    """See `penalise_reference`."""
    if on_gpu(logits):
        from sensorium.kernels.gpu.penalties import penalise as fused

        fused(logits, counts, params)
    else:
        penalise_reference(logits, counts, params)

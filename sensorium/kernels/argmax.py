"""The greedy choice of a token."""

from __future__ import annotations

import torch

from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, native_for, rows_of


def greedy_argmax_reference(logits: torch.Tensor) -> torch.Tensor:
    """The index `(rows,)` int64 of the largest of each row of `logits` `(rows, vocab_size)`.

    Of equal values the first is returned. NaN counts as the largest, so that the caller notices it.
    """
    # `torch.argmax` promises no order among equal values.
    is_nan = logits.isnan()
    largest = logits.masked_fill(is_nan, float("-inf")).amax(dim=-1, keepdim=True)
    chosen = torch.where(is_nan.any(dim=-1, keepdim=True), is_nan, logits == largest)
    return chosen.int().argmax(dim=-1)


def greedy_argmax(logits: torch.Tensor) -> torch.Tensor:
    """See `greedy_argmax_reference`."""
    native = native_for(logits)
    if native is None:
        return _gpu_largest(logits)[0] if on_gpu(logits) else greedy_argmax_reference(logits)
    rows = rows_of(logits)
    num_rows, vocab_size = rows.shape
    out = torch.empty(num_rows, dtype=torch.int64)
    native.argmax(
        *(out.data_ptr(), rows.data_ptr(), num_rows, vocab_size, rows.stride(0)),
        *(DTYPE_CODES[logits.dtype], torch.get_num_threads()),
    )
    return out


def largest_reference(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The indices of `greedy_argmax_reference`, and the values there as float32 `(rows,)`."""
    ids = greedy_argmax_reference(logits)
    return ids, logits.gather(1, ids[:, None])[:, 0].float()


def largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `largest_reference`."""
    if on_gpu(logits):
        return _gpu_largest(logits)
    ids = greedy_argmax(logits)
    return ids, logits.gather(1, ids[:, None])[:, 0].float()


def _gpu_largest(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    from sensorium.kernels.gpu.argmax import largest

    return largest(logits)

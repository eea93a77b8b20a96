"""Penalties of tokens that occurred before, one launch for all rows. The twin is in `sensorium.kernels.penalties`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from sensorium.kernels.gpu.chaining import await_predecessor, chained

_BLOCK = 2048


@triton.jit
def _penalise(logits, counts, params, vocab_size, BLOCK: tl.constexpr, IS_CHAINED: tl.constexpr):
    """One program: a part of one row."""
    await_predecessor(IS_CHAINED)
    own = params + tl.program_id(0) * 5
    row, slot = tl.load(own), tl.load(own + 1)
    repetition = tl.load(own + 2).to(tl.int32).to(tl.float32, bitcast=True)
    frequency = tl.load(own + 3).to(tl.float64, bitcast=True)
    presence = tl.load(own + 4).to(tl.float64, bitcast=True)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    seen = tl.load(counts + slot * vocab_size + columns, mask=columns < vocab_size, other=0)
    is_seen = seen > 0
    cells = logits + row * vocab_size + columns
    value = tl.load(cells, mask=is_seen, other=0.0)
    turned = tl.where(value > 0.0, tl.div_rn(value, repetition), value * repetition)
    generated = seen >> 1
    taken = tl.where(generated > 0, presence + frequency * generated.to(tl.float64), 0.0).to(tl.float32)
    tl.store(cells, turned - taken, mask=is_seen)


def penalise(logits: torch.Tensor, counts: torch.Tensor, params: torch.Tensor) -> None:
    """See `penalties.penalise_reference`."""
    num_rows, vocab_size = len(params), logits.shape[1]
    assert logits.is_contiguous()
    assert logits.dtype == torch.float32
    if num_rows:
        _penalise[(num_rows, triton.cdiv(vocab_size, _BLOCK))](
            *(logits, counts, params, vocab_size), BLOCK=_BLOCK, num_warps=4, **chained(logits.device)
        )

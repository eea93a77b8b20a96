"""Matrix multiplication with a weight in a layout that is chosen once, after loading, for the machine."""

from __future__ import annotations

import mmap
import threading

import torch
from torch.nn import functional as F

from sensorium.errors import ModelError
from sensorium.kernels.gpu import on_gpu
from sensorium.kernels.native import DTYPE_CODES, native_for, native_library, rows_of


class PackedWeight:
    """A linear layer's weight `(out_features, in_features)` in the layout that `packed_linear` is fastest
    with.

    Either `panels` holds the native layout, or `plain` the original weight.
    """

    __slots__ = ("dtype", "in_features", "out_features", "panels", "plain")

    def __init__(
        self,
        out_features: int,
        in_features: int,
        dtype: torch.dtype,
        *,
        panels: torch.Tensor | None = None,
        plain: torch.Tensor | None = None,
    ) -> None:
        self.out_features = out_features
        self.in_features = in_features
        self.dtype = dtype
        self.panels = panels
        self.plain = plain


def pack(weight: torch.Tensor) -> PackedWeight:
    """Lay out a weight `(out_features, in_features)`. If it is copied, `weight` is no longer needed."""
    weight = weight.detach()
    out_features, in_features = weight.shape
    native = native_for(weight)
    if native is None:
        return PackedWeight(out_features, in_features, weight.dtype, plain=weight)
    rows, code = rows_of(weight), DTYPE_CODES[weight.dtype]
    panels = arena.take(native.packed_bytes(code, out_features, in_features))
    native.pack(
        *(panels.data_ptr(), rows.data_ptr(), out_features, in_features),
        *(rows.stride(0) * rows.element_size(), code, torch.get_num_threads()),
    )
    return PackedWeight(out_features, in_features, weight.dtype, panels=panels)


def packed_linear_reference(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`x @ weight.T + bias` for `x` `(..., in_features)`; accumulated in float32 and rounded once.

    With the native kernel, a row of the result depends on that row of `x` alone, bit for bit.

    Args:
        x: `(..., in_features)` of the weight's dtype.
        packed: From `pack`.
        bias: `(out_features,)` of the weight's dtype.

    Returns:
        `(..., out_features)`.

    Raises:
        ModelError: The shapes, dtypes or devices of `x`, weight and bias don't match.
    """
    assert packed.plain is not None
    return F.linear(x, packed.plain, bias)


def packed_linear(x: torch.Tensor, packed: PackedWeight, bias: torch.Tensor | None = None) -> torch.Tensor:
    """See `packed_linear_reference`."""
    if packed.panels is None:
        assert packed.plain is not None
        return plain_linear(x, packed.plain, bias)
    if x.dtype != packed.dtype or x.shape[-1] != packed.in_features or not x.is_cpu:
        raise ModelError(
            f"input of a linear layer: got {x.dtype} of shape {tuple(x.shape)} on {x.device}, expected "
            f"{packed.dtype} of shape (..., {packed.in_features}) on cpu. Convert it before the layer."
        )
    if bias is not None and (bias.dtype != packed.dtype or not bias.is_contiguous()):
        bias = bias.to(packed.dtype).contiguous()
    native = native_library()
    assert native is not None
    rows = rows_of(x)
    num_rows = rows.shape[0]
    out = x.new_empty((*x.shape[:-1], packed.out_features))
    native.linear(
        *(out.data_ptr(), rows.data_ptr(), packed.panels.data_ptr()),
        *(0 if bias is None else bias.data_ptr(), num_rows, packed.out_features, packed.in_features),
        *(rows.stride(0) * rows.element_size(), DTYPE_CODES[x.dtype], torch.get_num_threads()),
    )
    return out


def plain_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`torch.nn.functional.linear`, by this package's kernel where that is faster than cuBLAS."""
    if on_gpu(x):
        from sensorium.kernels.gpu.linear import fits, linear

        if fits(x, weight, bias):
            return linear(x, weight, bias)
    return F.linear(x, weight, bias)


class _Arena:
    """Memory for packed weights, cut from large mappings that the system may back with huge pages.

    With pages of 4 KiB, streaming weights would miss the TLB at every page. A mapping is returned to the system when
    its last weight is dropped.
    """

    CHUNK_BYTES = 1 << 28
    HUGE_PAGE_BYTES = 1 << 21
    ALIGNMENT = 4096

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._chunk: mmap.mmap | None = None
        self._offset = 0

    def take(self, num_bytes: int) -> torch.Tensor:
        """A new uint8 tensor `(num_bytes,)`, aligned, zero."""
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        with self._lock:
            if self._chunk is None or self._offset + num_bytes > len(self._chunk):
                self._chunk, self._offset = self._new_chunk(num_bytes)
            piece = torch.frombuffer(self._chunk, dtype=torch.uint8, count=num_bytes, offset=self._offset)
            self._offset += -(-num_bytes // self.ALIGNMENT) * self.ALIGNMENT
        return piece

    def _new_chunk(self, num_bytes: int) -> tuple[mmap.mmap, int]:
        # One more huge page, so that the chunk can begin at a multiple of its size. The system allocates pages at the
        # first write.
        size = max(num_bytes, self.CHUNK_BYTES) + self.HUGE_PAGE_BYTES
        chunk = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            chunk.madvise(mmap.MADV_HUGEPAGE)
        address = torch.frombuffer(chunk, dtype=torch.uint8, count=1).data_ptr()
        return chunk, -address % self.HUGE_PAGE_BYTES


arena = _Arena()

"""Names of `xformers.ops`."""

from sensorium.compat.v0.xformers.ops import fmha
from sensorium.compat.v0.xformers.ops.fmha.attention import memory_efficient_attention
from sensorium.compat.v0.xformers.ops.fmha.attn_bias import BlockDiagonalMask, LowerTriangularMask

__all__ = [
    "BlockDiagonalMask",
    "LowerTriangularMask",
    "fmha",
    "memory_efficient_attention",
    "memory_efficient_attention_forward",
]

memory_efficient_attention_forward = memory_efficient_attention

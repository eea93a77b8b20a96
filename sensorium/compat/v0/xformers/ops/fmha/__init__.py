"""Names of `xformers.ops.fmha`."""

from sensorium.compat.v0.xformers.ops.fmha import attn_bias
from sensorium.compat.v0.xformers.ops.fmha.attention import memory_efficient_attention

__all__ = ["attn_bias", "memory_efficient_attention"]

"""Names of `xformers.ops.fmha`."""

from sensorium.compat.v0.xformers.ops.fmha import attn_bias

__all__ = ["attn_bias"]

"""Kernels: the few operations that decide the speed of a step, each with a plain-torch twin.

Every function chooses a kernel by device, dtype and availability; its `*_reference` twin has the same signature, and
runs where no kernel does. No function changes an argument, except those that write the KV cache.
"""

from sensorium.kernels.activation import gelu, gelu_and_mul, quick_gelu, silu_and_mul
from sensorium.kernels.argmax import greedy_argmax, largest
from sensorium.kernels.attention import AttentionRules, paged_attention, split_cache, varlen_attention, write_kv
from sensorium.kernels.fp8_linear import FP8, Fp8Weight, dequantize_fp8, fp8_linear, fp8_refusal, quantize_fp8_rows
from sensorium.kernels.grouped_linear import RowGroups, grouped_linear
from sensorium.kernels.linear import PackedWeight, pack, packed_linear, plain_linear
from sensorium.kernels.native import native_refusal
from sensorium.kernels.norm import add_rms_norm, rms_norm
from sensorium.kernels.quantized_linear import QuantizedWeight, quantize, quantized_linear
from sensorium.kernels.rotary import Rotation, rotary_embedding, rotate_and_write_kv

__all__ = [
    "FP8",
    "AttentionRules",
    "Fp8Weight",
    "PackedWeight",
    "QuantizedWeight",
    "Rotation",
    "RowGroups",
    "add_rms_norm",
    "dequantize_fp8",
    "fp8_linear",
    "fp8_refusal",
    "gelu",
    "gelu_and_mul",
    "greedy_argmax",
    "grouped_linear",
    "largest",
    "native_refusal",
    "pack",
    "packed_linear",
    "paged_attention",
    "plain_linear",
    "quantize",
    "quantize_fp8_rows",
    "quantized_linear",
    "quick_gelu",
    "rms_norm",
    "rotary_embedding",
    "rotate_and_write_kv",
    "silu_and_mul",
    "split_cache",
    "varlen_attention",
    "write_kv",
]

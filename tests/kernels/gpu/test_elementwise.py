"""Norms, activations, rotary embedding and the greedy choice against their twins."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from sensorium.kernels import activation, argmax, norm, rotary
from sensorium.kernels.gpu import activation as gpu_activation
from sensorium.kernels.gpu import argmax as gpu_argmax
from sensorium.kernels.gpu import norm as gpu_norm
from sensorium.kernels.gpu import rotary as gpu_rotary

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One unit in the last place; for bfloat16 two, since the interpreter cuts it off instead of rounding.
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}

# Of the interpreter, which is NumPy.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")


def close(got: Any, want: Any) -> None:
    for one, other in zip(got, want, strict=True) if isinstance(got, tuple) else [(got, want)]:
        tolerance = TOLERANCE[other.dtype]
        torch.testing.assert_close(one, other, atol=tolerance, rtol=tolerance, equal_nan=True)


def rows(*shape: int, dtype: torch.dtype = torch.float32, wider_by: int = 0) -> torch.Tensor:
    """Random rows; with `wider_by` a slice of wider ones, as the parts of a fused projection are."""
    wide = torch.randn(*shape[:-1], shape[-1] + wider_by, device=DEVICE) * 3
    return wide.to(dtype)[..., : shape[-1]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(0, 8), (1, 7), (3, 96), (2, 5, 33), (1, 5000)])
@pytest.mark.parametrize("float_weight", [False, True])
def test_rms_norm(dtype: torch.dtype, shape: tuple[int, ...], float_weight: bool) -> None:
    x, residual = rows(*shape, dtype=dtype, wider_by=5), rows(*shape, dtype=dtype)
    weight = torch.randn(shape[-1], device=DEVICE).to(torch.float32 if float_weight else dtype)
    close(gpu_norm.rms_norm(x, weight, 1e-6), norm.rms_norm_reference(x, weight, 1e-6))
    # A sum that is cut off is another number for the norm: compared where sums are rounded.
    if dtype != torch.bfloat16 or DEVICE == "cuda":
        close(gpu_norm.add_rms_norm(x, residual, weight, 1e-6), norm.add_rms_norm_reference(x, residual, weight, 1e-6))


def test_a_norm_doesnt_depend_on_the_rows_beside_it() -> None:
    x, weight = rows(50, 40), rows(40)
    whole = gpu_norm.rms_norm(x, weight, 1e-6)
    assert torch.equal(gpu_norm.rms_norm(x[49:], weight, 1e-6), whole[49:])


ACTIVATIONS: dict[tuple[str, bool], Callable[[torch.Tensor], torch.Tensor]] = {
    ("silu", True): activation.silu_and_mul_reference,
    ("gelu", True): activation.gelu_and_mul_reference,
    ("gelu_tanh", True): lambda x: activation.gelu_and_mul_reference(x, "tanh"),
    ("gelu", False): activation.gelu_reference,
    ("gelu_tanh", False): lambda x: activation.gelu_reference(x, "tanh"),
    ("quick_gelu", False): activation.quick_gelu_reference,
}


@pytest.mark.parametrize(("kind", "gated"), ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_activations(kind: str, gated: bool, dtype: torch.dtype) -> None:
    for shape in ((0, 8), (1, 2), (2, 3, 34), (2, 2100)):
        x = rows(*shape, dtype=dtype, wider_by=3)
        close(gpu_activation.activate(x, kind, gated=gated), ACTIVATIONS[kind, gated](x))


@pytest.mark.parametrize(("kind", "gated"), ACTIVATIONS)
def test_activations_far_out(kind: str, gated: bool) -> None:
    """Saturation and NaN are those of the twin: the exponential's overflow doesn't show."""
    x = torch.cat((torch.linspace(-120, 120, 1201), torch.tensor([torch.nan])))[None].to(DEVICE)
    x = torch.cat((x, torch.ones_like(x)), dim=1) if gated else x
    close(gpu_activation.activate(x, kind, gated=gated), ACTIVATIONS[kind, gated](x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "dim"), [(4, 2, 16, None), (3, 1, 24, 10), (5, 5, 6, 2)])
def test_rotation(dtype: torch.dtype, neox: bool, heads: int, kv_heads: int, size: int, dim: int | None) -> None:
    """Alone, and together with the write to the cache, of which a negative slot is no place."""
    qkv = rows(7, heads + 2 * kv_heads, size, dtype=dtype)
    query, key, value = qkv.split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = (torch.randn(7, (dim or size) // 2, device=DEVICE).to(dtype) for _ in range(2))
    rules: dict[str, Any] = {"is_neox_style": neox, "rotary_dim": dim}
    want = rotary.rotary_embedding_reference(query, key, cos, sin, **rules)
    close(gpu_rotary.rotary_embedding(query, key, cos, sin, **rules), want)

    slots = torch.tensor([3, -1, 0, 9, 5, -1, 15], device=DEVICE)
    caches = [torch.zeros(2, 4, 4, kv_heads, size, dtype=dtype, device=DEVICE) for _ in range(2)]
    rotation = rotary.Rotation(cos, sin, neox, dim)
    got = gpu_rotary.rotate_and_write_kv(query, key, value, rotation, *caches[0], slots)
    want_query = rotary.rotate_and_write_kv_reference(query, key, value, rotation, *caches[1], slots)
    close(got, want_query)
    close(*caches)
    if dtype == torch.float32:
        small = [torch.zeros(2, 4, 4, kv_heads, size, device=DEVICE).to(torch.float8_e4m3fn) for _ in range(2)]
        gpu_rotary.rotate_and_write_kv(query, key, value, rotation, *small[0], slots, 0.01, 0.5)
        rotary.rotate_and_write_kv_reference(query, key, value, rotation, *small[1], slots, 0.01, 0.5)
        # Sums of products may be rounded once or twice before they are rounded to 8 bits. See also
        # `test_cache_writes_in_8_bits` for what the interpreter does.
        assert (small[0].float() != small[1].float()).float().mean() < 0.03
        assert small[0].float().abs().mean() > 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 100, 5000])
@pytest.mark.parametrize("block", [512, 4096])
def test_the_greedy_choice(dtype: torch.dtype, size: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of equal values the first, also of zeros of both signs; a NaN before all. A row alone is split over programs."""
    monkeypatch.setattr(gpu_argmax, "FIND_CONFIG", gpu_argmax.FindConfig(block, 4, 8))
    logits = rows(6, size, dtype=dtype, wider_by=3).round()
    logits[1] = -torch.inf
    logits[2, size // 2] = torch.inf
    logits[3, 2 * size // 3 :] = torch.nan
    logits[4], logits[4, : size // 3] = 0.0, -0.0
    ids, values = gpu_argmax.largest(logits)
    want_ids, want_values = argmax.largest_reference(logits)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(values, want_values, atol=0, rtol=0, equal_nan=True)
    for row in range(6):
        assert torch.equal(gpu_argmax.largest(logits[row : row + 1])[0], want_ids[row : row + 1])

"""Norms, activations, rotary embedding and cache writes against their twins."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import pytest
import torch

from sensorium import kernels
from sensorium.kernels import activation, argmax, norm, rotary
from sensorium.kernels.attention import write_kv_reference
from sensorium.kernels.build import BuildError, build_library
from sensorium.kernels.native import NativeFunction

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SIZES = [1, 7, 8, 16, 33, 96, 896]
# One unit in the last place of the narrow types; in float32, what cancels in the tail of gelu in torch.
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}

pytestmark = pytest.mark.usefixtures("native_kernels")


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    tolerance = TOLERANCE[want.dtype]
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance, equal_nan=True)


def _rows(rows: int, size: int, dtype: torch.dtype, *, wider_by: int = 0, scale: float = 3.0) -> torch.Tensor:
    """Random rows; with `wider_by` they are a slice of wider ones, as the parts of a fused projection are."""
    return (torch.randn(rows, size + wider_by) * scale).to(dtype)[:, :size]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("wider_by", [0, 5])
def test_rms_norm(dtype: torch.dtype, size: int, wider_by: int) -> None:
    torch.manual_seed(size)
    weight = torch.randn(size)
    for rows in (0, 1, 3, 64):
        x = _rows(rows, size, dtype, wider_by=wider_by)
        residual = _rows(rows, size, dtype, wider_by=2 * wider_by)
        before = x.clone(), residual.clone()
        for w in (weight.to(dtype), weight):
            _close(kernels.rms_norm(x, w, 1e-6), norm.rms_norm_reference(x, w, 1e-6))
            normed, total = kernels.add_rms_norm(x, residual, w, 1e-6)
            want_normed, want_total = norm.add_rms_norm_reference(x, residual, w, 1e-6)
            assert torch.equal(total, want_total)
            _close(normed, want_normed)
        assert torch.equal(x, before[0])
        assert torch.equal(residual, before[1])


def test_rms_norm_keeps_leading_axes() -> None:
    x, weight = torch.randn(2, 3, 4, 16), torch.randn(16)
    _close(kernels.rms_norm(x, weight, 1e-5), norm.rms_norm_reference(x, weight, 1e-5))


def test_norm_rows_do_not_depend_on_their_neighbours(num_threads: int) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(200, 100), torch.randn(100)
    whole = kernels.rms_norm(x, weight, 1e-6)
    assert torch.equal(whole[17:18], kernels.rms_norm(x[17:18], weight, 1e-6))


Activation = Callable[[torch.Tensor], torch.Tensor]
ACTIVATIONS: dict[str, tuple[Activation, Activation, bool]] = {
    "silu_and_mul": (kernels.silu_and_mul, activation.silu_and_mul_reference, True),
    "gelu_and_mul": (kernels.gelu_and_mul, activation.gelu_and_mul_reference, True),
    "gelu_and_mul_tanh": (
        lambda x: kernels.gelu_and_mul(x, "tanh"),
        lambda x: activation.gelu_and_mul_reference(x, "tanh"),
        True,
    ),
    "gelu": (kernels.gelu, activation.gelu_reference, False),
    "gelu_tanh": (
        lambda x: kernels.gelu(x, "tanh"),
        lambda x: activation.gelu_reference(x, "tanh"),
        False,
    ),
    "quick_gelu": (kernels.quick_gelu, activation.quick_gelu_reference, False),
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_activations(name: str, dtype: torch.dtype, size: int) -> None:
    function, twin, gated = ACTIVATIONS[name]
    torch.manual_seed(size)
    for rows in (0, 1, 70):
        x = _rows(rows, 2 * size if gated else size, dtype, wider_by=3)
        before = x.clone()
        _close(function(x), twin(x))
        assert torch.equal(x, before)
    x = torch.randn(2, 3, 2 * size).to(dtype)
    _close(function(x), twin(x))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_far_out(name: str) -> None:
    """Saturation, infinities and NaN are those of torch: the exponential neither overflows nor wraps."""
    function, twin, gated = ACTIVATIONS[name]
    x = torch.cat((torch.linspace(-120, 120, 4801), torch.tensor([1e30, -1e30, torch.inf, torch.nan])))[None]
    if gated:
        x = torch.cat((x, torch.ones_like(x)), dim=1)
    got, want = function(x), twin(x)
    want[0, -2] = torch.inf  # which torch's own gelu turns into NaN on machines with AVX-512
    # Torch's own gelu loses the far tail to cancellation; ours may keep it.
    torch.testing.assert_close(got, want, atol=3e-6, rtol=3e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("neox", [True, False])
@pytest.mark.parametrize(("head_size", "rotary_dim"), [(64, 64), (80, 80), (128, 64), (24, 10), (6, 2)])
@pytest.mark.parametrize("float_tables", [True, False])
def test_rotary_embedding(dtype: torch.dtype, neox: bool, head_size: int, rotary_dim: int, float_tables: bool) -> None:
    torch.manual_seed(head_size)
    for tokens in (0, 1, 33):
        fused = torch.randn(tokens, 7 * head_size).to(dtype)
        query, key, _ = fused.split([4 * head_size, 2 * head_size, head_size], dim=1)
        query, key = query.unflatten(1, (4, head_size)), key.unflatten(1, (2, head_size))
        angles = torch.rand(tokens, rotary_dim // 2) * 100
        table_dtype = torch.float32 if float_tables else dtype
        cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
        before = fused.clone()
        got = kernels.rotary_embedding(query, key, cos, sin, is_neox_style=neox, rotary_dim=rotary_dim)
        want = rotary.rotary_embedding_reference(query, key, cos, sin, is_neox_style=neox, rotary_dim=rotary_dim)
        for a, b in zip(got, want, strict=True):
            _close(a, b)
        assert torch.equal(fused, before)


def test_rotary_embedding_of_transposed_heads() -> None:
    """Heads that don't lie side by side are copied first."""
    torch.manual_seed(0)
    query, key = torch.randn(4, 5, 8).transpose(0, 1), torch.randn(2, 5, 8).transpose(0, 1)
    angles = torch.rand(5, 4)
    got = kernels.rotary_embedding(query, key, angles.cos(), angles.sin())
    want = rotary.rotary_embedding_reference(query, key, angles.cos(), angles.sin())
    for a, b in zip(got, want, strict=True):
        _close(a, b)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [0, 1, 5, 300])
def test_write_kv(dtype: torch.dtype, tokens: int) -> None:
    torch.manual_seed(tokens)
    fused = torch.randn(tokens, 3 * 24).to(dtype)
    _, key, value = fused.split(24, dim=1)
    slots = torch.randperm(90 * 4)[:tokens]
    slots[::3] = -1
    caches = [torch.zeros(2, 90, 4, 2, 12, dtype=dtype) for _ in range(2)]
    kernels.write_kv(key, value, *caches[0], slots)
    write_kv_reference(key.unflatten(1, (2, 12)), value, *caches[1], slots)
    assert torch.equal(caches[0], caches[1])
    assert bool(caches[0].any()) == bool((slots >= 0).any())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "width"), [(7, 19), (7, 12)])
def test_write_kv_beside_one_another(dtype: torch.dtype, size: int, width: int) -> None:
    """Values of another size than keys stand behind them, head by head; or they are the keys' first channels."""
    key = torch.randn(5, 3, 12).to(dtype)
    value = torch.randn(5, 3, size).to(dtype) if width > 12 else key[..., :size].contiguous()
    slots = torch.tensor([7, -1, 0, 21, 3])
    caches = [torch.zeros(6, 4, 3, width, dtype=dtype) for _ in range(2)]
    kernels.write_kv(key, value, *kernels.split_cache(caches[0], 12, size), slots)
    write_kv_reference(key, value, *kernels.split_cache(caches[1], 12, size), slots)
    assert torch.equal(caches[0], caches[1])
    keys, values = kernels.split_cache(caches[0], 12, size)
    assert torch.equal(keys[1, 3], key[0])
    assert torch.equal(values[1, 3], value[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 31, 32, 33, 64, 1000])
def test_greedy_argmax(dtype: torch.dtype, size: int) -> None:
    """The largest wherever it stands; the first of equals; a NaN before all."""
    torch.manual_seed(size)
    rows = [torch.randn(size) for _ in range(40)]
    for place in range(0, size, 7):
        peak = torch.randn(size)
        peak[place:] = 9.0
        rows.append(peak)
        with_nan = torch.randn(size)
        with_nan[place] = torch.nan
        with_nan[-1] = torch.nan
        rows.append(with_nan)
    rows += [torch.full((size,), -torch.inf), torch.full((size,), torch.inf), torch.zeros(size)]
    logits = torch.stack(rows).to(dtype)
    got = kernels.greedy_argmax(logits)
    assert torch.equal(got, argmax.greedy_argmax_reference(logits))
    values = logits.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    assert torch.equal(values.gather(1, got[:, None])[:, 0], values.amax(dim=1))
    wider = torch.randn(3, size + 9).to(dtype)
    assert torch.equal(
        kernels.greedy_argmax(wider[:, 4 : size + 4]), kernels.greedy_argmax(wider[:, 4 : size + 4].clone())
    )
    assert kernels.greedy_argmax(logits[:0]).shape == (0,)


@pytest.mark.parametrize("fields", ["@5P4lf", "@5P4lf3iP", "@2P"])
def test_a_struct_of_another_size_than_in_c_is_refused_at_load(fields: str) -> None:
    """A field that is added on one side alone would be read from beyond the other's."""
    library = ctypes.CDLL(str(build_library()))
    with pytest.raises(BuildError, match="sensorium_rms_norm takes a struct of 88 bytes, not of"):
        NativeFunction(library, "sensorium_rms_norm", fields)

"""Runs norms of transformers' modules by this engine's kernel, where a module computes exactly what the kernel does.

Classes of norms have many names but few formulas, so each module is tried on a few rows. Its output is compared with
three formulas: `rms_norm` with the weight as it is, with the weight in float32, or with the weight plus 1 (Gemma). A
module that equals none of them up to the order of sums is left as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from sensorium.kernels import rms_norm

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
"""Names of the attribute with the epsilon that a norm adds to the mean square."""
_SCALES = (1e-3, 1.0, 30.0)
"""Scales of the rows that a norm is tried on. With the smallest, the mean square is about as large as the epsilon."""
_MOST_ROUNDED_OTHERWISE = 0.01
"""The share of a narrow dtype's values that may be rounded differently, because sums have another order."""
_NARROW_ULPS, _WIDE_ULPS = 2, 16


class KernelNorms:
    """Replaces the `forward` of those norms in a model that the kernel can compute."""

    def __init__(self, model: nn.Module) -> None:
        self._norms: list[nn.Module] = []
        for module in model.modules():
            if (forward := _by_kernel(module)) is not None:
                module.forward = forward
                self._norms.append(module)

    def __len__(self) -> int:
        return len(self._norms)

    def restore(self) -> None:
        """Restore the norms' own `forward`."""
        for module in self._norms:
            del module.forward
        self._norms = []


def _by_kernel(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """A `forward` for a module that calls the kernel; None if the module isn't a norm with one of the formulas."""
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    eps = next((each for name in _EPS_NAMES if isinstance(each := getattr(module, name, None), float)), None)
    if len(parameters) != 1 or weight is None or weight.dim() != 1 or eps is None or "forward" in vars(module):
        return None
    if isinstance(module, nn.LayerNorm) or len(inspect.signature(module.forward).parameters) != 1:
        return None
    rows = _rows(weight)
    try:
        expected = module(rows)
    except Exception:  # noqa: BLE001  a module that isn't a norm may raise anything
        return None
    for each in _weights(weight):
        if _is_equal(rms_norm(rows, each, eps), expected):
            return _Norm(each, eps)
    return None


class _Norm:
    """The `forward` of a norm that the kernel computes."""

    __slots__ = ("_eps", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self._weight, self._eps)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """Rows `(len(_SCALES), hidden_size)` of noise with a fixed seed."""
    noise = torch.randn(len(_SCALES), len(weight), generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor(_SCALES)[:, None]).to(weight.device, weight.dtype)


def _weights(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weights of the three formulas, for the kernel."""
    own = weight.detach()
    yield own
    yield own.float()
    yield own.float() + 1


def _is_equal(got: torch.Tensor, expected: object) -> bool:
    """Whether two outputs are equal up to the order of sums."""
    if not isinstance(expected, torch.Tensor) or (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return False
    is_narrow = got.dtype.itemsize < torch.float32.itemsize
    ulps = (_NARROW_ULPS if is_narrow else _WIDE_ULPS) * torch.finfo(got.dtype).eps
    difference, size = (got.float() - expected.float()).abs(), expected.float().abs()
    if not bool((difference <= ulps * size + torch.finfo(got.dtype).tiny).all()):
        return False
    return not is_narrow or float((difference > 0).float().mean()) <= _MOST_ROUNDED_OTHERWISE

"""Norms of transformers' modules by this engine's kernel, where a module computes just what the kernel does.

Classes of norms have many names and few formulas. Each module shows its own on a few rows: `rms_norm` with the weight
as it is, with the weight applied in float32, or with one that is stored less 1 (Gemma). What is equal to none of them
up to the order of sums stays as it is.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator

import torch
from torch import nn

from sensorium.kernels import rms_norm

_EPS_NAMES = ("variance_epsilon", "eps", "epsilon", "norm_eps")
"""Attributes under which norms keep what they add to the mean square."""
_SCALES = (1e-3, 1.0, 30.0)
"""Of the rows that a norm is tried on. Of the smallest, the mean square is about as large as what is added."""
_MOST_ROUNDED_OTHERWISE = 0.01
"""Share of a narrow dtype's values that may be the neighbour of the kernel's, as sums are ordered otherwise."""
_NARROW_ULPS, _WIDE_ULPS = 2, 16


class KernelNorms:
    """The norms of a model that run by the kernel from now on."""

    def __init__(self, model: nn.Module) -> None:
        self._norms: list[nn.Module] = []
        for module in model.modules():
            if (forward := _by_kernel(module)) is not None:
                module.forward = forward
                self._norms.append(module)

    def __len__(self) -> int:
        return len(self._norms)

    def restore(self) -> None:
        """Leave the norms as they were."""
        for module in self._norms:
            del module.forward
        self._norms = []


def _by_kernel(module: nn.Module) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What computes a module's output by the kernel; None where that isn't the kernel's formula."""
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
    except Exception:  # noqa: BLE001  whatever a module raises that is no norm
        return None
    for each in _weights(weight):
        if _is_equal(rms_norm(rows, each, eps), expected):
            return _Norm(each, eps)
    return None


class _Norm:
    """A norm's `forward`."""

    __slots__ = ("_eps", "_weight")

    def __init__(self, weight: torch.Tensor, eps: float) -> None:
        self._weight = weight
        self._eps = eps

    def __call__(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self._weight, self._eps)


def _rows(weight: torch.Tensor) -> torch.Tensor:
    """`(len(_SCALES), hidden_size)` of noise, the same every time."""
    noise = torch.randn(len(_SCALES), len(weight), generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor(_SCALES)[:, None]).to(weight.device, weight.dtype)


def _weights(weight: torch.Tensor) -> Iterator[torch.Tensor]:
    """The weights with which the kernel may compute the same."""
    own = weight.detach()
    yield own
    yield own.float()
    yield own.float() + 1


def _is_equal(got: torch.Tensor, expected: object) -> bool:
    """Whether the same was computed, up to the order of sums."""
    if not isinstance(expected, torch.Tensor) or (got.shape, got.dtype) != (expected.shape, expected.dtype):
        return False
    is_narrow = got.dtype.itemsize < torch.float32.itemsize
    ulps = (_NARROW_ULPS if is_narrow else _WIDE_ULPS) * torch.finfo(got.dtype).eps
    difference, size = (got.float() - expected.float()).abs(), expected.float().abs()
    if not bool((difference <= ulps * size + torch.finfo(got.dtype).tiny).all()):
        return False
    return not is_narrow or float((difference > 0).float().mean()) <= _MOST_ROUNDED_OTHERWISE

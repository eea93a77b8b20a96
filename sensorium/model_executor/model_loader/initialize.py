"""Builds a model without filling it: parameters get their memory once, with their final dtype and device.

While the model class is constructed, `torch.empty` (from which torch's layers and ours make their parameters)
yields tensors on the meta device, so nothing is allocated or initialised needlessly. Everything else a
constructor computes, such as a buffer of frequencies, is real.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sensorium.logger import get_logger

logger = get_logger(__name__)


_FILLS = frozenset(
    (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_normal_, nn.init.kaiming_uniform_, torch.Tensor.normal_)
)


class _EmptyOnMeta(TorchFunctionMode):
    """Sends `torch.empty` without an explicit device to the meta device, and fills nothing there.

    Otherwise torch would run the filling's Python version for nothing, and import its compiler for it, which takes a
    second.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        if func in _FILLS:
            filled: torch.Tensor = args[0] if args else kwargs["tensor"]
            if filled.is_meta:
                return filled
        return func(*args, **kwargs)


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Within it, new floating-point tensors have this dtype."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_empty(construct: Callable[[], nn.Module], *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Construct a model whose parameters have memory but no values yet."""
    model = build_on_meta(construct, dtype=dtype, device=device)
    allocate(model, device)
    return model


def build_on_meta(construct: Callable[[], nn.Module], *, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Construct a model whose parameters have no memory.

    A constructor that needs the values of an empty tensor, or keeps one that isn't a parameter, is run a
    second time with real memory throughout, and the parameters have it.
    """
    with default_dtype(dtype), device, torch.no_grad():
        try:
            with _EmptyOnMeta():
                model = construct()
            reason = _left_on_meta(model)
        except RuntimeError as error:  # what torch raises for the value of a meta tensor
            reason = str(error).partition("\n")[0]
        if reason:
            logger.info("Model constructed with its own initialisation: %s", reason)
            model = construct()
    return model


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give every parameter on the meta device memory; parameters that are shared stay shared."""
    real: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if not parameter.is_meta:
                continue
            if id(parameter) not in real:
                memory = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                replacement = nn.Parameter(memory, requires_grad=False)
                replacement.__dict__.update(parameter.__dict__)  # its weight_loader and what else it carries
                real[id(parameter)] = replacement
            setattr(module, name, real[id(parameter)])


def _left_on_meta(model: nn.Module) -> str:
    """The name of a tensor without memory that isn't a parameter, or an empty string."""
    for prefix, module in model.named_modules():
        held = {**dict(module.named_buffers(recurse=False, remove_duplicate=False)), **module.__dict__}
        for name, value in held.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter) and value.is_meta:
                return f"{prefix}.{name} is made by torch.empty and isn't a parameter"
    return ""


def fill_with_random(model: nn.Module, seed: int) -> None:
    """Fill all parameters with seeded random values of sensible size, for `load_format="dummy"`.

    Matrices get `N(0, 1 / sqrt(fan_in))`, vectors ones (weights) or zeros (biases); activations stay near 1
    in size.
    """
    generator = torch.Generator().manual_seed(seed)
    filled: set[int] = set()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.data_ptr() in filled or not parameter.is_floating_point():
                continue
            filled.add(parameter.data_ptr())
            if parameter.dim() < 2 or name.endswith("scale"):
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            fan_in = parameter[0].numel()
            # Drawn in float32 and row by row of the first axis's chunks, so that no second copy of a matrix
            # exists.
            for rows in torch.split(parameter, max(1, (1 << 22) // fan_in)):
                values = torch.empty(rows.shape).normal_(0, fan_in**-0.5, generator=generator)
                rows.copy_(values)

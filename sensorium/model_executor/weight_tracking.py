"""Tracks a model loading its weights: which checkpoint keys were read, and how much of each parameter was written.

Works for any `load_weights`, because it watches torch's calls rather than the method's result. A key counts as used
when an operation reads its tensor; a parameter counts as filled when at least as many elements were written into it as
it has, which catches a fused layer that lacks a part.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar, Token
from typing import Any, Self

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from sensorium.errors import WeightsError

_active: ContextVar[LoadTracker | None] = ContextVar("active_load_tracker", default=None)
_READS_NOTHING = frozenset({"__get__", "__repr__", "size", "dim", "numel", "data_ptr", "untyped_storage"})


def ignore_weight(loaded_weight: torch.Tensor) -> None:
    """Say, within a `load_weights`, that a checkpoint tensor is left out on purpose."""
    tracker = _active.get()
    if tracker is not None:
        tracker.mark_read(loaded_weight)


def current_key() -> str | None:
    """Within a `load_weights`: the checkpoint's key that was handed out last."""
    tracker = _active.get()
    return None if tracker is None else tracker.current_key


def parameter_replaced(old: nn.Parameter | None, new: nn.Parameter) -> None:
    """Say, within a `load_weights`, that another parameter stands in an unfilled one's place from now on."""
    tracker = _active.get()
    if tracker is not None and old is not None:
        tracker.replace(old, new)


PLAIN_FLOATS = frozenset((torch.float64, torch.float32, torch.bfloat16, torch.float16))
"""Dtypes whose numbers are the values themselves. 8-bit floats and integers mean nothing without their scales."""


def refuse_other_kind(target: torch.Tensor, loaded: torch.Tensor, what: str) -> None:
    """Raise `WeightsError` if a copy would take quantized values for floats, or floats for quantized values.

    Floats may be copied to floats of any other width, and integers to integers that hold them.
    """
    kinds = target.dtype, loaded.dtype
    if kinds[0] == kinds[1] or PLAIN_FLOATS.issuperset(kinds):
        return
    is_integer = not (target.dtype.is_floating_point or loaded.dtype.is_floating_point)
    if is_integer and target.dtype.itemsize >= loaded.dtype.itemsize and torch.bool not in kinds:
        return
    raise WeightsError(
        f"dtype of {what}: got {loaded.dtype} from the checkpoint, expected {target.dtype}. Quantized weights are held "
        "by the library's linear layers alone, and only if config.json says how in its quantization_config; else use "
        "the checkpoint that they were made from."
    )


class LoadTracker(TorchFunctionMode):
    """A context that records reads of checkpoint tensors and writes to parameters.

    The parameters must have their memory when the tracker is made.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter]) -> None:
        super().__init__()
        self._parameters = dict(parameters)
        self._locate()
        self._token: Token[LoadTracker | None] | None = None
        self._written: dict[str, int] = dict.fromkeys(parameters, 0)
        self._keys_of_start: dict[int, list[str]] = {}  # several, where tensors share their memory
        self._sources: list[torch.Tensor] = []  # held, so that no two keys ever share an address
        self._read: set[str] = set()
        self._keys: dict[str, None] = {}
        self.current_key: str | None = None
        """The key that was handed out last: the one that an exception is about."""

    def _locate(self) -> None:
        """Note where the parameters lie."""
        spans = sorted((p.data_ptr(), p.data_ptr() + _num_bytes(p), name) for name, p in self._parameters.items())
        self._param_starts = [start for start, _, _ in spans]
        self._param_spans = spans
        self._dtypes = {name: p.dtype for name, p in self._parameters.items()}

    def replace(self, old: nn.Parameter, new: nn.Parameter) -> None:
        """Watch a parameter instead of another one."""
        names = [name for name, parameter in self._parameters.items() if parameter is old]
        self._parameters.update(dict.fromkeys(names, new))
        self._locate()

    def watch(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Hand out checkpoint tensors, and remember where they lie."""
        for name, tensor in weights:
            self.current_key = name
            self._keys[name] = None
            self._sources.append(tensor)
            if tensor.numel() == 0:
                self._read.add(name)
            self._keys_of_start.setdefault(_start_of_memory(tensor), []).append(name)
            yield name, tensor

    def __enter__(self) -> Self:
        self._token = _active.set(self)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *exc_info: object) -> None:
        super().__exit__(*exc_info)  # type: ignore[no-untyped-call]
        assert self._token is not None, "left without having been entered"
        _active.reset(self._token)

    def mark_read(self, tensor: torch.Tensor) -> None:
        """Count the key of a checkpoint tensor, or of a view of it, as used."""
        self._read.update(self._keys_of_start.get(_start_of_memory(tensor), ()))

    def unused_keys(self) -> list[str]:
        """Keys that were handed out and never read."""
        return [name for name in self._keys if name not in self._read]

    def unfilled_parameters(self, model: nn.Module, reported: Collection[str] = ()) -> list[str]:
        """Names of a model's parameters that were not written completely.

        Args:
            model: Whose parameters the tracker was made with. One that was replaced since, or got other memory, is
                taken for filled.
            reported: Names that `load_weights` returned as loaded; believed for parameters of which no write was seen.
        """
        start_of = {name: start for start, _, name in self._param_spans}
        return [
            name
            for name, parameter in model.named_parameters()
            if parameter is self._parameters.get(name)
            and parameter.data_ptr() == start_of[name]
            and self._written[name] < parameter.numel()
            and not (self._written[name] == 0 and name in reported)
        ]

    def refuse_other_dtypes(self, model: nn.Module) -> None:
        """Raise `WeightsError` for a parameter whose data were exchanged for values that mean something else."""
        for name, parameter in model.named_parameters():
            if parameter is self._parameters.get(name) and parameter.dtype != self._dtypes[name]:
                refuse_other_kind(torch.empty(0, dtype=self._dtypes[name]), parameter, name)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _READS_NOTHING:
            self._record(name, args, kwargs)
        return func(*args, **kwargs)

    def _record(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tensors = list(_tensors((*args, *kwargs.values())))
        for tensor in tensors:
            self.mark_read(tensor)
        if not tensors:
            return
        if name == "__setitem__":
            target = args[0][args[1]]
        elif name.endswith("_") and not name.endswith("__"):
            target = args[0]
        else:
            return
        owner = self._owner(target)
        if owner is not None:
            for source in tensors[1:]:
                for key in self._keys_of_start.get(_start_of_memory(source), ())[:1]:
                    refuse_other_kind(target, source, f"{owner}, loaded from {key!r}")
            self._written[owner] += target.numel()

    def _owner(self, tensor: torch.Tensor) -> str | None:
        """The parameter whose memory a tensor lies in."""
        address = tensor.data_ptr()
        position = bisect.bisect_right(self._param_starts, address) - 1
        if position < 0:
            return None
        _, end, name = self._param_spans[position]
        return name if address < end else None


def _start_of_memory(tensor: torch.Tensor) -> int:
    """Where a tensor's memory begins, also for a view into the middle of it; 0 if it has none."""
    return 0 if tensor.is_meta else tensor.untyped_storage().data_ptr()


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)

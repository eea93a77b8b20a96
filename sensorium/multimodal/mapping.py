"""Calling input mappers: once per item where that is right, once for a group where it isn't, and never twice
for a key.

The original engine handed a mapper what the user gave: a bare object, or a list. Here a list of n items
becomes n calls with one-element lists, so that each item can be cached, encoded and reused on its own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import (
    InvalidRequestError,
    InvalidTypeError,
    ProcessorError,
    RequestError,
    SensoriumError,
)
from sensorium.multimodal.hashing import Identity, key_of
from sensorium.multimodal.processor_cache import ProcessorCache
from sensorium.multimodal.registry import DuplicateKeyError, MultiModalRegistry
from sensorium.stages import stage

if TYPE_CHECKING:
    from sensorium.config import ModelConfig


class MediaMapper:
    """The mappers of one model behind the cache of what they made. Safe to call from several threads."""

    def __init__(self, model_config: ModelConfig, registry: MultiModalRegistry, cache: ProcessorCache) -> None:
        self._model_config = model_config
        self._registry = registry
        self._cache = cache

    def map_item(
        self, modality: str, item: Any, identity: Identity, mm_processor_kwargs: Mapping[str, Any], *, is_bare: bool
    ) -> Mapping[str, Any]:
        """Mapped keyword arguments of one item, from the cache if it was mapped before.

        `is_bare`: the user gave the object itself instead of a list. A mapper that shows by a `TypeError` or
        an `AttributeError` that it can't take this form gets the other one.

        Raises `ProcessorError` (a `RuntimeError`), `InvalidTypeError` (a `TypeError`) or
        `InvalidRequestError` (a `ValueError`) after the kind of the mapper's own failure; `ModelError` if it
        returns something unusable.
        """

        def compute() -> Mapping[str, Any]:
            given, other = (item, [item]) if is_bare else ([item], item)
            try:
                return self._call(modality, given, mm_processor_kwargs)
            except RequestError as first:
                if not isinstance(first.__cause__ or first, TypeError | AttributeError):
                    raise
                try:
                    return self._call(modality, other, mm_processor_kwargs)
                except SensoriumError:
                    raise first from first.__cause__

        return self._cached(identity, "item" if is_bare else "list", compute)

    def map_group(
        self, modality: str, data: Any, identity: Identity, mm_processor_kwargs: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Mapped keyword arguments of a modality's whole data. Raises what `map_item` raises."""
        return self._cached(identity, "group", lambda: self._call(modality, data, mm_processor_kwargs))

    def _cached(self, identity: Identity, form: str, compute: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        if not identity.is_cacheable:
            return compute()
        return self._cache.get_or_compute(f"{key_of(identity)}:{form}", compute)

    def _call(self, modality: str, data: Any, mm_processor_kwargs: Mapping[str, Any]) -> Mapping[str, Any]:
        plugin = self._registry.get_plugin(modality)
        with stage("map", modality), request_errors(f"{modality} input mapper", f"{modality} data"):
            mapped = plugin.map_input(self._model_config, data, mm_processor_kwargs)
        return own_memory(mapped, data)


@contextmanager
def request_errors(role: str, what: str) -> Iterator[None]:
    """Turns what a model author's callable raises into an error of the request, with the failure as its
    cause.

    The message names the callable's role and the kind of failure and nothing else, since an exception's text
    may hold paths or contents. `TypeError` and `ValueError` keep their kind; our own errors pass through.
    """
    try:
        yield
    except SensoriumError:
        raise
    except Exception as exc:
        message = (
            f"{what}: the model's {role} failed on it ({type(exc).__name__}), expected an input that it can process. "
            f"Check type, size and number of the media and the prompt's placeholders; the log has the details."
        )
        raise _error_class(exc)(message) from exc


def _error_class(exc: Exception) -> type[RequestError]:
    if isinstance(exc, TypeError):
        return InvalidTypeError
    return InvalidRequestError if isinstance(exc, ValueError) else ProcessorError


def own_memory(mapped: Mapping[str, Any], data: Any) -> Mapping[str, Any]:
    """`mapped` with copies in place of values that lie in the caller's memory.

    A mapper may wrap an array instead of copying it. What is cached, or waits for its step, must not change
    when the caller fills the same array anew.
    """
    taken = list(_memory(data))
    if not taken:
        return mapped
    owned = {key: _copied_where_shared(value, taken) for key, value in mapped.items()}
    return mapped if all(owned[key] is value for key, value in mapped.items()) else type(mapped)(owned)  # type: ignore[call-arg]


def _memory(value: Any) -> Iterator[tuple[int, int]]:
    """Address ranges of the arrays and tensors in nested data."""
    if isinstance(value, Mapping):
        for item in value.values():
            yield from _memory(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _memory(item)
    elif (extent := _extent(value)) is not None:
        yield extent


def _extent(value: Any) -> tuple[int, int] | None:
    if isinstance(value, np.ndarray):
        return np.lib.array_utils.byte_bounds(value) if value.size else None
    if hasattr(value, "untyped_storage") and value.device.type == "cpu":
        storage = value.untyped_storage()
        return storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    return None


def _copied_where_shared(value: Any, taken: Sequence[tuple[int, int]]) -> Any:
    if isinstance(value, list | tuple):
        items = [_copied_where_shared(item, taken) for item in value]
        return value if all(map(operator.is_, items, value)) else items
    extent = _extent(value)
    if extent is None or not any(start < extent[1] and extent[0] < end for start, end in taken):
        return value
    return value.copy() if isinstance(value, np.ndarray) else value.clone()


def check_distinct(kwargs_by_modality: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Refuse two modalities whose mappers return the same keyword argument; `DuplicateKeyError` (a
    `ValueError`).
    """
    owners: dict[str, str] = {}
    for modality, items in kwargs_by_modality.items():
        for key in {key for kwargs in items for key in kwargs}:
            if owners.setdefault(key, modality) != modality:
                raise DuplicateKeyError(
                    f"The input mappers for {owners[key]!r} and {modality!r} return the same keyword argument {key!r}. "
                    f"Give each modality its own names."
                )


class JoinedKwargs(Mapping[str, Any]):
    """The mapped keyword arguments of all items of a request, as one mapping; joined where they are looked
    at.

    Tensors and arrays of equal trailing shape are concatenated along their first axis, as a mapper would have
    returned them for all items together; anything else becomes a list over items.
    """

    def __init__(self, items: Sequence[Mapping[str, Any]]) -> None:
        self._values: dict[str, list[Any]] = {}
        for kwargs in items:
            for key, value in kwargs.items():
                self._values.setdefault(key, []).append(value)

    def __getitem__(self, key: str) -> Any:
        return _concatenated(self._values[key])

    def __iter__(self) -> Any:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _concatenated(values: list[Any]) -> Any:
    if len(values) == 1:
        return values[0]
    shapes = [tuple(getattr(value, "shape", ())) for value in values]
    if not all(shapes) or len({(type(value), shape[1:]) for value, shape in zip(values, shapes, strict=True)}) > 1:
        return values
    if isinstance(values[0], np.ndarray):
        return np.concatenate(values)
    import torch

    return torch.cat(values)

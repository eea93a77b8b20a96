"""Finds the modules of a model that keep data of a sequence themselves, in the cache that they get.

Two passes with Hugging Face's cache show which modules change it: those whose attention goes through transformers'
interface, which have paged caches, and others, here called mixers: layers with a recurrence or a convolution, and
attention that a model computes by itself. A flat batch can run these one sequence at a time (`by_sequence`). It can do
the same for attention through the interface that has features without a counterpart, such as its own masks.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from sensorium.model_executor.models.transformers.interface import attending
from sensorium.model_executor.models.transformers.refusal import CannotRunError

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past", "cache_params", "state")
"""What modules call the cache, as an argument."""
MADE_BY_SEQUENCE = frozenset((*CACHE_NAMES, "attention_mask", "use_cache"))
"""Arguments that are made separately for each sequence."""
_KEYS_VALUES = frozenset(("keys", "values"))

Path = tuple[str | int, ...]
"""Where a value is in a cache: names of attributes, list indices and dictionary keys."""


@dataclass(frozen=True, slots=True, eq=False)
class FoundMixer:
    """A module that changes its layer's cache."""

    module: nn.Module
    cache_name: str
    """Its argument for the cache."""
    place: Path
    """The layer's cache within the whole."""
    empty: Any
    """The whole cache before the first token."""
    kept: Any
    """The layer's cache after some tokens."""
    tensors: tuple[tuple[Path, torch.Tensor], ...]
    """The tensors that it has written there, `(1, ...)` each, with their paths."""
    is_attention: bool
    """It has written keys and values, `(1, num_kv_heads, num_tokens, size)`, and perhaps another tensor per token."""
    axes: Mapping[str, tuple[int | None, ...]]
    """For each argument, the axis of tokens in each of its tensors."""
    output_axes: tuple[int | None, ...]
    keys_only: frozenset[str] = frozenset()
    """Arguments with a tensor of keys alone, `(..., 1, num_keys)`, such as the bias of ALiBi."""
    mask_values: tuple[torch.Tensor, torch.Tensor] | None = None
    """The values of its mask for visible and for hidden keys; None: zero and the dtype's smallest number."""


def find_mixers(
    model: nn.Module,
    token_ids: Sequence[int],
    device: torch.device,
    eager_attention: Callable[[], AbstractContextManager[None]],
    *,
    every_attention: bool,
) -> list[FoundMixer]:
    """Run a model on a few tokens, and again on one less, to find the modules that change its cache.

    Attention must be set to call `interface.NAME`. Within `eager_attention()`, transformers' eager attention runs
    instead. With `every_attention`, attention through the interface counts as a mixer too.

    Raises:
        CannotRunError: A module does something that can't be done one sequence at a time.
    """
    longer, shorter = (
        _watched(model, token_ids[:count], device, every_attention) for count in (len(token_ids), len(token_ids) - 1)
    )
    if [each.module for each in longer] != [each.module for each in shorter]:
        raise CannotRunError("other layers of it keep a state with other numbers of tokens")
    if len({id(each.module) for each in longer}) < len(longer):
        raise CannotRunError("a layer of it that keeps a state runs several times in a pass")
    found = [_found(one, other) for one, other in zip(longer, shorter, strict=True)]
    reached = {id(each.module) for each in longer if each.is_reached}
    if not any(each.is_attention and id(each.module) not in reached for each in found):
        return found
    with eager_attention():
        masks = {id(each.module): each.mask for each in _watched(model, token_ids, device, True, attends=False)}
    return [
        each if id(each.module) in reached else replace(each, mask_values=_mask_values(masks.get(id(each.module))))
        for each in found
    ]


def _mask_values(mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """A causal mask's values for a visible and for a hidden key, as the first row has for the first and last token."""
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[-2] < 2:
        return None
    return mask[0, 0, 0, 0], mask[0, 0, 0, -1]


@dataclass(frozen=True, slots=True, eq=False)
class _Change:
    """A call of a module that has changed the cache."""

    module: nn.Module
    cache_name: str
    place: Path
    empty: Any
    kept: Any
    paths: tuple[Path, ...]
    shapes: Mapping[str, tuple[tuple[int, ...] | None, ...]]
    output_shapes: tuple[tuple[int, ...] | None, ...]
    mask: Any
    is_reached: bool
    """It has called the attention function of the interface."""


class _Zeros:
    """The `AttentionStep` of the passes: counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """See `interface.AttentionStep.attend`."""
        self.num_calls += 1
        return query.new_zeros(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


def _watched(
    model: nn.Module, token_ids: Sequence[int], device: torch.device, every_attention: bool, *, attends: bool = True
) -> list[_Change]:
    ids = torch.tensor([list(token_ids)], device=device)
    step = _Zeros()
    watch = _CacheWatch(model, step, every_attention)
    try:
        with attending(step) if attends else nullcontext():
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    except CannotRunError:
        raise
    except Exception as error:  # whatever modules raise
        raise CannotRunError(f"its forward fails with a cache ({error})") from error
    finally:
        watch.remove()
    return watch.changes


class _CacheWatch:
    """Records the innermost modules that change the cache. With `every_attention`, these include attention through the
    interface; attention that keeps more than keys and values is then recorded as one module."""

    def __init__(self, model: nn.Module, step: _Zeros, every_attention: bool) -> None:
        self._every_attention = every_attention
        self.changes: list[_Change] = []
        self._step = step
        self._empty: Any = None
        self._entered: list[tuple[dict[Path, int], int, int]] = []
        self._handles = []
        self._num_found = 0
        for module in model.modules():
            name = _cache_name(module)
            if module is not model and name is not None:
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = bound(module, args, kwargs).get(_cache_name(module) or "")
        if cache is not None and self._empty is None:
            self._empty = copy.deepcopy(cache)
        self._entered.append((_ids_in(cache), self._num_found, self._step.num_calls))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before, num_found, num_calls = self._entered.pop()
        name = _cache_name(module) or ""
        given = bound(module, args, kwargs)
        cache = given.get(name)
        changed = tuple(path for path, each in _ids_in(cache).items() if before.get(path) != each)
        if not changed or (self._num_found > num_found and not self._is_more(changed, num_found)):
            return  # nothing changed, or a module within has changed it
        is_reached = self._step.num_calls > num_calls
        if is_reached and not self._every_attention:
            self._num_found += 1
            if not all(path[-1] in _KEYS_VALUES for path in changed):
                raise CannotRunError("its attention keeps a state of its own beside keys and values")
            return
        if self._every_attention:
            del self.changes[num_found:]
            self._num_found = num_found
        self._num_found += 1
        place = _place(changed)
        shapes = {key: _shapes(value) for key, value in given.items() if key not in MADE_BY_SEQUENCE}
        paths = tuple(path[len(place) :] for path in changed)
        layer = copy.deepcopy(at(cache, place))
        self.changes.append(
            _Change(
                *(module, name, place, self._empty, layer, paths, shapes, _shapes(output)),
                mask=given.get("attention_mask"),
                is_reached=is_reached,
            )
        )

    def _is_more(self, changed: Sequence[Path], num_found: int) -> bool:
        """Whether a module has changed more of one layer's cache than the modules within it."""
        if (
            not self._every_attention
            or len({path[: path.index("layers") + 2] for path in changed if "layers" in path}) != 1
        ):
            return False
        within = self.changes[num_found:]
        return all(len(each.paths) < len(changed) for each in within)


def _found(one: _Change, other: _Change) -> FoundMixer:
    """The description of a module, from two passes with different numbers of tokens."""
    if one.place != other.place or one.paths != other.paths or one.shapes.keys() != other.shapes.keys():
        raise CannotRunError("a layer of it keeps other things with other numbers of tokens")
    tensors = tuple((path, at(one.kept, path)) for path in one.paths)
    is_attention = {path[0] for path, each in tensors if each.dim() == 4} >= _KEYS_VALUES and all(
        path == ("indexer_keys",) or path[0] in _KEYS_VALUES for path, _ in tensors
    )
    sizes_move = any(at(one.kept, path).shape != at(other.kept, path).shape for path in one.paths)
    if not is_attention and sizes_move:
        raise CannotRunError("a layer of it keeps something that grows with each token, beside attention")
    axes = {name: _axes(shapes, other.shapes[name]) for name, shapes in one.shapes.items()}
    return FoundMixer(
        *(one.module, one.cache_name, one.place, one.empty, one.kept, tensors, is_attention, axes),
        output_axes=_axes(one.output_shapes, other.output_shapes, is_output=True),
        keys_only=frozenset(name for name in axes if _is_of_keys(one.shapes[name], axes[name])),
    )


def _is_of_keys(shapes: Sequence[tuple[int, ...] | None], axes: Sequence[int | None]) -> bool:
    """Whether an argument is one tensor `(..., 1, num_keys)`."""
    if len(shapes) != 1 or shapes[0] is None or len(shapes[0]) < 3:
        return False
    return axes[0] == len(shapes[0]) - 1 and shapes[0][-2] == 1


def _axes(
    shapes: Sequence[tuple[int, ...] | None], others: Sequence[tuple[int, ...] | None], *, is_output: bool = False
) -> tuple[int | None, ...]:
    """For each tensor, the axis in which shapes differ, which is that of tokens. An output with several such axes is
    attention weights, which are only for inspection."""
    found: list[int | None] = []
    for shape, other in zip(shapes, others, strict=True):
        if shape is None or other is None or len(shape) != len(other):
            found.append(None)
            continue
        moved = [axis for axis, (size, less) in enumerate(zip(shape, other, strict=True)) if size != less]
        if len(moved) > 1 and not is_output:
            raise CannotRunError("a layer that keeps a state is given something with several axes of tokens")
        found.append(moved[0] if len(moved) == 1 else None)
    return tuple(found)


def _shapes(value: Any) -> tuple[tuple[int, ...] | None, ...]:
    """The shape of each leaf; None for leaves that aren't tensors."""
    return tuple(tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None for leaf in tree_flatten(value)[0])


def bound(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name."""
    signature = inspect.signature(module.forward)
    given: dict[str, Any] = dict(signature.bind(*args, **kwargs).arguments)
    rest = next((each.name for each in signature.parameters.values() if each.kind is each.VAR_KEYWORD), "")
    others: dict[str, Any] = given.pop(rest, {})
    return given | others


def _cache_name(module: nn.Module) -> str | None:
    try:
        names = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):
        return None
    return next((name for name in CACHE_NAMES if name in names), None)


# What a cache holds


def at(cache: Any, path: Path) -> Any:
    """The value at a path in a cache."""
    found: Any = cache
    for key in path:
        parts = dict(_parts_of(found))
        found = parts[key]
    return found


def _place(paths: Sequence[Path]) -> Path:
    """The path of the one layer's cache that all of these paths are in."""
    places = {path[: path.index("layers") + 2] for path in paths if "layers" in path}
    if len(places) != 1 or not all("layers" in path for path in paths):
        raise CannotRunError("a layer of it keeps a state elsewhere than in its part of the cache")
    return places.pop()


def _ids_in(cache: Any) -> dict[Path, int]:
    return {path: id(tensor) for path, tensor in _tensors_in(cache)}


def _tensors_in(value: Any, path: Path = ()) -> Iterator[tuple[Path, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
        return
    for key, each in _parts_of(value):
        yield from _tensors_in(each, (*path, key))


def _parts_of(value: Any) -> list[tuple[str | int, Any]]:
    """What caches and their layers are made of."""
    if isinstance(value, list | tuple):
        return list(enumerate(value))
    if isinstance(value, dict):
        return list(value.items())
    is_cache = "Cache" in type(value).__name__ or type(value).__name__.endswith("Layer")
    return list(vars(value).items()) if is_cache else []


def with_tensors(value: Any, tensors: Mapping[Path, torch.Tensor], path: Path = ()) -> Any:
    """A layer's cache with these tensors at their places, and no others."""
    if isinstance(value, torch.Tensor):
        return tensors.get(path)
    if isinstance(value, list | tuple):
        return type(value)(with_tensors(each, tensors, (*path, i)) for i, each in enumerate(value))
    if isinstance(value, dict):
        return {key: with_tensors(each, tensors, (*path, key)) for key, each in value.items()}
    if not _parts_of(value):
        return value
    made = copy.copy(value)
    for key, each in vars(value).items():
        setattr(made, key, with_tensors(each, tensors, (*path, key)))
    return made


def with_layer(cache: Any, place: Path, layer: Any) -> Any:
    """A cache with another layer's cache at its place."""
    if not place:
        return layer
    key, rest = place[0], place[1:]
    if isinstance(cache, list):
        # Caches that are made without a config get their layers one by one; the others are not looked at.
        parts = cache + [layer] * (int(key) + 1 - len(cache))
        parts[int(key)] = with_layer(parts[int(key)], rest, layer)
        return parts
    made = copy.copy(cache)
    setattr(made, str(key), with_layer(getattr(cache, str(key)), rest, layer))
    return made

"""Tables of position embeddings, for trunks that don't take positions as an argument.

Such a trunk counts rows from the cache's length on, which is right for a single sequence but not for a flat batch. The
count goes into a module, usually an embedding of positions. At load, the module's output for every position is stored
in a table, and in flat batches the table replaces the module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from sensorium.model_executor.models.transformers.by_sequence import MixedBatch, mixing
from sensorium.model_executor.models.transformers.interface import PassEnded, attending
from sensorium.model_executor.models.transformers.refusal import CannotRunError


@dataclass(frozen=True, slots=True, eq=False)
class _Table:
    """A module's output for every position."""

    module: nn.Module
    forward: Any
    """The module's own `forward`."""
    leaves: tuple[torch.Tensor, ...]
    axes: tuple[int, ...]
    tree: TreeSpec

    def at(self, positions: torch.Tensor) -> Any:
        """The output for these positions `(num_tokens,)`."""
        rows = [leaf.index_select(axis, positions) for leaf, axis in zip(self.leaves, self.axes, strict=True)]
        return tree_unflatten(rows, self.tree)


class PositionTables:
    """Replaces the `forward` of modules; outside of `at` they call the original."""

    def __init__(self, tables: Sequence[_Table] = ()) -> None:
        self._tables = tuple(tables)
        self._positions: torch.Tensor | None = None
        for table in tables:
            table.module.forward = self._stand_in(table)

    def __len__(self) -> int:
        return len(self._tables)

    @contextmanager
    def at(self, positions: torch.Tensor) -> Iterator[None]:
        """Within this context, modules return their outputs for these positions `(num_tokens,)`."""
        self._positions = positions
        try:
            yield
        finally:
            self._positions = None

    def remove(self) -> None:
        """Restore the modules' own `forward`."""
        for table in self._tables:
            table.module.forward = table.forward

    def _stand_in(self, table: _Table) -> Any:
        def forward(*args: Any, **kwargs: Any) -> Any:
            return table.forward(*args, **kwargs) if self._positions is None else table.at(self._positions)

        return forward


@dataclass(slots=True, eq=False)
class _Seen:
    """Outputs of the modules that ran before the first attention call of a pass."""

    outputs: dict[nn.Module, Any] = field(default_factory=dict)
    twice: set[nn.Module] = field(default_factory=set)


class _Ends:
    """The `AttentionStep` that ends a pass at its first attention call."""

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
        raise PassEnded


def find_tables(
    model: nn.Module, trunk: nn.Module, token_ids: Sequence[int], num_positions: int, device: torch.device
) -> PositionTables:
    """Tables of the modules within a trunk whose output, row by row, doesn't depend on the tokens.

    Raises `CannotRunError` if such a module can't be run on `num_positions` positions.
    """
    ids = list(token_ids)
    one, other, shorter = (_run(model, trunk, each, device) for each in (ids, [*ids[1:], ids[0]], ids[:-1]))
    axes: dict[nn.Module, tuple[int, ...]] = {}
    for module, output in one.outputs.items():
        found = _axes(output, other.outputs.get(module), shorter.outputs.get(module))
        if found is not None and module not in one.twice:
            axes[module] = found
    within = {inner for module in axes for inner in module.modules() if inner is not module}
    outermost = [module for module in axes if module not in within]
    if not outermost:
        return PositionTables()
    every = _run(model, trunk, (ids * (num_positions // len(ids) + 1))[:num_positions], device)
    tables = []
    for module in outermost:
        leaves, tree = tree_flatten(every.outputs.get(module))
        if any(leaf.shape[axis] != num_positions for leaf, axis in zip(leaves, axes[module], strict=True)):
            raise CannotRunError("it counts positions by itself, and not as far as max_model_len")
        tables.append(_Table(module, module.forward, tuple(leaves), axes[module], tree))
    return PositionTables(tables)


def _run(model: nn.Module, trunk: nn.Module, token_ids: Sequence[int], device: torch.device) -> _Seen:
    """Run the model up to its first attention call, and record the modules' outputs."""
    seen = _Seen()

    def note(module: nn.Module, _args: Any, output: Any) -> None:
        if module in seen.outputs:
            seen.twice.add(module)
        seen.outputs[module] = output

    handles = [module.register_forward_hook(note) for module in trunk.modules() if module is not trunk]
    ids = torch.tensor([list(token_ids)], device=device)
    try:
        with attending(_Ends()), mixing(MixedBatch(())):
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    except PassEnded:
        pass
    except Exception as error:  # whatever modules raise
        raise CannotRunError(
            f"it counts positions by itself, and fails on {len(token_ids)} tokens ({error})"
        ) from error
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _axes(output: Any, other: Any, shorter: Any) -> tuple[int, ...] | None:
    """The axis of rows in each tensor of a module's output; None if the output depends on the tokens."""
    leaves, others, less = (tree_flatten(each)[0] for each in (output, other, shorter))
    if not leaves or not len(leaves) == len(others) == len(less):
        return None
    axes = []
    for leaf, same, few in zip(leaves, others, less, strict=True):
        if not all(isinstance(each, torch.Tensor) and each.is_floating_point() for each in (leaf, same, few)):
            return None
        if not torch.equal(leaf, same) or leaf.dim() != few.dim():
            return None
        moved = [axis for axis in range(leaf.dim()) if leaf.shape[axis] != few.shape[axis]]
        if len(moved) != 1:
            return None
        axes.append(moved[0])
    return tuple(axes)

"""Short passes of a model's own `forward`, which show how it can be run: its attention calls, and its trunk.

Attention isn't computed in these passes: calls record their arguments and return zeros. A call is identified by its
number in a pass, not by its module, since some models run a layer several times (Zamba2).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import nn

from sensorium.cache_spec import SpanRule
from sensorium.model_executor.models.transformers.by_sequence import MixedBatch, Mixer, SequenceRows, mixing
from sensorium.model_executor.models.transformers.interface import PassEnded, RuledMask, attending
from sensorium.model_executor.models.transformers.mask_rules import MaskRule, read_rule, read_rule_both_ways
from sensorium.model_executor.models.transformers.mixers import find_mixers
from sensorium.model_executor.models.transformers.position_tables import PositionTables, find_tables
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.models.transformers.trunk import hidden_states

NUM_TOKENS = 6
"""The number of tokens of a pass."""
_TOKEN_ARGUMENTS = frozenset(("input_ids", "attention_mask", "position_ids", "cache_position", "inputs_embeds"))


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One call of the attention function in a pass: its module, its sizes, and what a position sees."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    key_size: int
    value_size: int
    scale: float
    rule: MaskRule = field(default_factory=MaskRule)
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    spans: SpanRule = SpanRule.SEEN
    """How it treats two-way spans."""


@dataclass(frozen=True, slots=True, eq=False)
class Discovery:
    """The result of the passes."""

    calls: tuple[AttentionCall, ...]
    trunk: nn.Module
    """Holds all attention calls and mixers, and takes token ids."""
    settings: Mapping[str, Any]
    """The trunk's arguments other than tensors of the tokens."""
    takes_rows: bool = False
    """The trunk gets embedded rows from the outer model instead of token ids."""
    mixers: tuple[Mixer, ...] = ()
    """Modules that run one sequence at a time."""
    tables: PositionTables = field(default_factory=PositionTables)
    """The position tables of a trunk that takes no positions."""

    def remove(self) -> None:
        """Leave the model as it was."""
        for mixer in self.mixers:
            mixer.remove()
        self.tables.remove()


def discover(
    model: nn.Module,
    token_ids: Sequence[int],
    max_position: int,
    device: torch.device,
    eager_attention: Callable[[], AbstractContextManager[None]],
    *,
    takes_rows: bool = False,
) -> Discovery:
    """Run a Hugging Face model on a few tokens of text, and record how it runs.

    `eager_attention`: within it, attention is transformers' plain one. `takes_rows`: find as the trunk the innermost
    module that takes embedded rows, since media are merged before it; otherwise the outermost module within the model
    that takes token ids.

    Raises:
        CannotRunError: It does something that a flat batch over a paged cache doesn't support.
    """
    look = partial(_discover, model, token_ids, max_position, device, eager_attention, takes_rows)
    try:
        return look(every_attention=False)
    except CannotRunError as reason:
        try:
            return look(every_attention=True)
        except CannotRunError:
            raise reason from None


def _discover(
    model: nn.Module,
    token_ids: Sequence[int],
    max_position: int,
    device: torch.device,
    eager_attention: Callable[[], AbstractContextManager[None]],
    takes_rows: bool,
    *,
    every_attention: bool,
) -> Discovery:
    """`every_attention`: all attention runs one sequence at a time, as the model has it."""
    mixers: tuple[Mixer, ...] = ()
    found: Discovery | None = None
    try:
        mixers = tuple(
            map(Mixer, find_mixers(model, token_ids, device, eager_attention, every_attention=every_attention))
        )
        if any(mixer.takes_keys_only for mixer in mixers):
            given = _given_of_keys(model, token_ids, max_position + 1, device)
            for mixer in mixers:
                mixer.take_of_keys(given)
        found = _with_mixers(model, token_ids, max_position, device, takes_rows, mixers)
        _check_apart(model, token_ids, max_position, device, found)
    except BaseException:
        (Discovery((), model, {}, mixers=mixers) if found is None else found).remove()
        raise
    return found


def _given_of_keys(model: nn.Module, token_ids: Sequence[int], num_tokens: int, device: torch.device) -> dict[str, Any]:
    """The arguments of the first mixer in a pass of so many tokens."""
    ids = torch.tensor([(list(token_ids) * (num_tokens // len(token_ids) + 1))[:num_tokens]], device=device)
    batch = MixedBatch(())
    with suppress(PassEnded), mixing(batch):
        model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    return batch.ended_with


def _with_mixers(
    model: nn.Module,
    token_ids: Sequence[int],
    max_position: int,
    device: torch.device,
    takes_rows: bool,
    mixers: tuple[Mixer, ...],
) -> Discovery:
    """The result of a pass with mixers, and with position tables for a trunk that takes no positions."""
    looking = _Looking(model, max_position, takes_rows, mixers, device)
    found, _ = looking.at(token_ids, range(len(token_ids)))
    if takes_rows or "position_ids" in _parameter_names(found.trunk):
        return found
    return replace(found, tables=find_tables(model, found.trunk, token_ids, max_position + 1, device))


def _check_apart(
    model: nn.Module, token_ids: Sequence[int], max_position: int, device: torch.device, found: Discovery
) -> None:
    """Check that sequences in a batch are independent: other tokens in the first half of the rows, at positions as
    distant as another request's may be, must change nothing in the second half. Raises `CannotRunError` otherwise."""
    half = len(token_ids) // 2
    looking = _Looking(model, max_position, found.takes_rows, found.mixers, device)
    _, alone = looking.at(token_ids, range(len(token_ids)))
    with found.tables.at(torch.arange(len(token_ids), device=device)):
        _, rows = looking.at(token_ids, range(len(token_ids)))
    others = [*reversed(token_ids[:half]), *token_ids[half:]]
    positions = [*range(max_position - half + 1, max_position + 1), *range(half, len(token_ids))]
    with found.tables.at(torch.tensor(positions, device=device)):
        _, same = looking.at(others, positions)
    if not all(map(_are_equal, alone, rows)) or not all(map(_are_equal, rows, same)):
        raise CannotRunError(
            "its rows depend on other rows outside of attention, such as by a layer's state, or by the longest "
            "sequence of a batch that sets the rotation of all"
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Looking:
    """Runs passes of a model and records them."""

    model: nn.Module
    max_position: int
    takes_rows: bool
    mixers: tuple[Mixer, ...]
    device: torch.device

    def at(self, token_ids: Sequence[int], positions: Sequence[int]) -> tuple[Discovery, list[torch.Tensor]]:
        """The result of a pass, and everything that it computes for the second half of the rows, which mixers treat as
        another sequence."""
        ids, half = torch.tensor([list(token_ids)], device=self.device), len(token_ids) // 2
        halves = MixedBatch((SequenceRows(0, 0, half, 0), SequenceRows(1, half, len(token_ids), 0)))
        with mixing(halves):
            return self._look_on(ids, torch.tensor([list(positions)], device=self.device), half)

    def _look_on(self, ids: torch.Tensor, positions: torch.Tensor, half: int) -> tuple[Discovery, list[torch.Tensor]]:
        recorder = CallRecorder(self.max_position, half)

        def count() -> int:
            return len(recorder.calls) + sum(mixer.num_calls for mixer in self.mixers)

        for mixer in self.mixers:
            mixer.num_calls = 0
        watch = _TrunkWatch(self.model, count, self.takes_rows)
        takes_positions = "position_ids" in inspect.signature(self.model.forward).parameters
        try:
            with attending(recorder):
                # Without a mask of ones, models take jumps of positions for the borders of packed sequences.
                self.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    use_cache=False,
                    **({"position_ids": positions} if takes_positions else {}),
                )
        except CannotRunError:
            raise
        except Exception as error:  # whatever modules raise
            raise CannotRunError(f"its forward fails on {ids.shape[1]} tokens of text ({error})") from error
        finally:
            watch.remove()
        if not count():
            raise CannotRunError("its attention can't be reached through transformers' AttentionInterface")
        trunk, settings, output = watch.found()
        rows = [*recorder.rows, hidden_states(output)[:, half:]]
        return Discovery(tuple(recorder.calls), trunk, settings, self.takes_rows, self.mixers), rows


def _are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether the same rows were computed, up to rounding."""
    if one.shape != other.shape:
        return False
    difference = (one.float() - other.float()).abs().max()
    return bool(difference <= 32 * torch.finfo(one.dtype).eps * one.float().abs().max())


class CallRecorder:
    """An `AttentionStep` that records its calls."""

    def __init__(self, max_position: int, half: int, *, both_ways: bool = False) -> None:
        """`both_ways`: positions may see later ones."""
        self._both_ways = both_ways
        self.calls: list[AttentionCall] = []
        self.rows: list[torch.Tensor] = []
        """Queries, keys and values of each call, from the row `half` on."""
        self._max_position = max_position
        self._half = half

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """See `AttentionStep.attend`."""
        self.calls.append(_call_of(module, query, key, value, options, self._rule(mask, module, options)))
        self.rows += [each[:, :, self._half :] for each in (query, key, value)]
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])

    def _rule(self, mask: torch.Tensor | None, module: nn.Module, options: Mapping[str, Any]) -> MaskRule:
        if self._both_ways and mask is None:  # as SDPA has it
            is_causal = options.get("is_causal")
            return MaskRule(causal=bool(getattr(module, "is_causal", True) if is_causal is None else is_causal))
        if not isinstance(mask, RuledMask):
            # With few tokens such a mask may hide nothing, and with many all but those that the layer chooses.
            raise CannotRunError("its layers make masks of their own, which may depend on what was said")
        try:
            return read_rule(mask.rule, self._max_position, mask.device)
        except CannotRunError:
            if not self._both_ways:
                raise
            return read_rule_both_ways(mask.rule, self._max_position, mask.device)


def _call_of(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    options: Mapping[str, Any],
    rule: MaskRule,
) -> AttentionCall:
    _check_shapes(query, key, value)
    if options.get("position_bias") is not None:
        raise CannotRunError("it adds a bias to attention that it computes from places in the batch")
    scale, softcap, sinks = options.get("scaling"), options.get("softcap"), options.get("s_aux")
    if isinstance(scale, torch.Tensor):
        if scale.numel() != 1:
            raise CannotRunError("its attention has a scale for each head or token")
        scale = float(scale)
    return AttentionCall(
        module=module,
        num_heads=query.shape[1],
        num_kv_heads=key.shape[1],
        key_size=key.shape[3],
        value_size=value.shape[3],
        scale=float(query.shape[3] ** -0.5 if scale is None else scale),
        rule=rule,
        softcap=float(softcap) if softcap else None,
        sinks=getattr(module, "sinks", None) if sinks is None else sinks,
    )


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    if query.dim() != 4 or query.shape[0] != 1:
        raise CannotRunError("it changes the batch axis in front of attention")
    if query.shape[2] != key.shape[2]:
        raise CannotRunError("queries and keys of attention have different lengths, as with cross-attention")
    if key.shape[1] != value.shape[1] or query.shape[1] % key.shape[1]:
        raise CannotRunError("its attention has other numbers of heads for keys than for values")


class _TrunkWatch:
    """Finds a module within the model that holds all attention calls: see `discover`."""

    def __init__(self, model: nn.Module, count: Callable[[], int], takes_rows: bool) -> None:
        self._count = count
        """Calls of attention and mixers so far."""
        self._takes_rows = takes_rows
        self._total_at: list[tuple[nn.Module, int]] = []
        self._handles = []
        is_candidate = takes_embeddings if takes_rows else takes_tokens
        for module in model.modules():
            if module is not model and is_candidate(module):
                self._handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                self._handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
        self._candidates: list[tuple[nn.Module, int, int, dict[str, Any], Any]] = []

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def found(self) -> tuple[nn.Module, dict[str, Any], Any]:
        """The trunk, its arguments other than tensors of tokens, and its output."""
        total = self._count()
        whole = [each for each in self._candidates if each[1] == 0 and each[2] == total]
        if self._takes_rows:
            whole = [each for each in whole if each[3].get("inputs_embeds") is not None]
        if not whole:
            what = "embedded rows" if self._takes_rows else "token ids"
            raise CannotRunError(f"no module of it takes {what} and holds all attention")
        if not self._takes_rows:  # rather one that takes positions too
            whole = [each for each in whole if "position_ids" in _parameter_names(each[0])] or whole
        module, _, _, given, output = whole[0 if self._takes_rows else -1]  # inner modules end first
        return module, _plain_settings(given) if self._takes_rows else _settings(given), output

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._total_at.append((module, self._count()))

    def _leave(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        _, before = self._total_at.pop()
        given = dict(inspect.signature(module.forward).bind(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        self._candidates.append((module, before, self._count(), given, output))


def _plain_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a trunk for embedded rows, without tensors, which every pass makes anew."""
    kept = {name: value for name, value in given.items() if name not in _TOKEN_ARGUMENTS and value is not None}
    return {name: value for name, value in kept.items() if not isinstance(value, torch.Tensor)} | {"use_cache": False}


def _settings(given: Mapping[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in given.items() if name not in _TOKEN_ARGUMENTS and value is not None}
    tensors = [name for name, value in kept.items() if isinstance(value, torch.Tensor)]
    if tensors or given.get("inputs_embeds") is not None:
        raise CannotRunError(f"its outer module computes {tensors[0] if tensors else 'inputs_embeds'} for its decoder")
    return kept | {"use_cache": False}


def find_rows_trunk(model: nn.Module, arguments: Mapping[str, Any]) -> nn.Module:
    """The innermost module with layers that takes embedded rows in a pass with these arguments.

    Raises:
        CannotRunError: There is none.
    """
    found: list[nn.Module] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        if given.get("inputs_embeds") is not None:
            found.append(module)

    candidates = [
        module
        for module in model.modules()
        if module is not model
        and takes_embeddings(module)
        and any(isinstance(each, nn.ModuleList) for each in module.modules())
    ]
    handles = [module.register_forward_hook(note, with_kwargs=True) for module in candidates]
    try:
        model(**arguments)
    finally:
        for handle in handles:
            handle.remove()
    if not found:
        raise CannotRunError("no module of it takes embedded rows")
    return found[0]


def takes_tokens(module: nn.Module) -> bool:
    """Whether a module takes token ids."""
    return "input_ids" in _parameter_names(module)


def takes_embeddings(module: nn.Module) -> bool:
    """Whether a module takes embedded rows."""
    return "inputs_embeds" in _parameter_names(module)


def _parameter_names(module: nn.Module) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        return frozenset()

"""The class that serves architectures which don't generate: encoders, classifiers, rerankers, by transformers' modules.

A prompt runs whole, without a cache. Up to the *stack*, the innermost module that holds all attention, a step's prompts
are one flat batch; only attention looks at more than one row. What follows the stack, such as a pooler and a
classifier, is the model's own: it runs once for a step's prompts, padded, while the stack is replaced by one that
returns the rows computed before.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache, MultiHeadAttention
from sensorium.cache_spec import CacheSpec, StateSpec, StateTensor
from sensorium.config import EngineConfig, ModelConfig
from sensorium.messages import EngineRequest
from sensorium.model_executor.models.transformers import interface
from sensorium.model_executor.models.transformers.discovery import NUM_TOKENS, AttentionCall, CallRecorder
from sensorium.model_executor.models.transformers.flat import MASK_FORMS
from sensorium.model_executor.models.transformers.model import AttentionSwitch, text_token_ids
from sensorium.model_executor.models.transformers.packing import check_quantization_of
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.models.transformers.trunk import Trunk, hidden_states
from sensorium.model_executor.models.transformers.weights import load_pooling_model

FLAT, PADDED, ALONE = "transformers flat", "transformers padded", "transformers one by one"
_MOST_PADDING = 1.25
"""The largest ratio of a padded batch's rows to those of its prompts."""
_MOST_TRIED_TOKENS = 1024


class NothingKept(nn.Module):
    """A layer with a state of a few bytes that is never written: the worker expects a cache, and these models have
    none."""

    def __init__(self) -> None:
        super().__init__()
        self.group_index = 0

    def cache_spec(self) -> CacheSpec:
        """See `CacheLayout`."""
        return StateSpec((StateTensor((1,), "float32"),))


@dataclass(frozen=True, slots=True, eq=False)
class PoolingTier:
    """One way to run a model."""

    name: str
    """For the load report."""
    make: Callable[[], FlatPooling | BatchPooling]
    """Raises `CannotRunError` if the model can't run in this way."""


class TransformersForPooling(nn.Module):
    """A model of transformers that makes vectors or scores. `use` must choose a tier before it runs."""

    def __init__(self, *, config: EngineConfig, hf_model: nn.Module) -> None:
        super().__init__()
        self.hf_model: Any = hf_model
        self._model_config = config.model_config
        self._device = torch.device(config.device_config.device)
        self._attention = AttentionSwitch(hf_model)
        self._arguments = _Arguments(hf_model, config.model_config)
        self.nothing_kept = NothingKept()
        self.way: FlatPooling | BatchPooling | None = None
        interface.register()

    @classmethod
    def load_from_checkpoint(cls, config: EngineConfig) -> TransformersForPooling:
        """The model with its checkpoint's weights; see `load_pooling_model`.

        Raises `ConfigError` (a `ValueError`) where its weights can't be held as asked for.
        """
        check_quantization_of(config)
        with torch.inference_mode():
            return cls(config=config, hf_model=load_pooling_model(config))

    # Tiers

    def tiers(self) -> Iterator[PoolingTier]:
        """The ways to run it, the best first."""
        for offset in self._arguments.offsets:
            for form in MASK_FORMS:
                yield PoolingTier(FLAT, partial(self._flat, form, offset))
        yield PoolingTier(PADDED, partial(self._batches, padded=True))
        yield PoolingTier(ALONE, partial(self._batches, padded=False))

    def use(self, tier: PoolingTier) -> None:
        """Run by a tier from now on. Raises `CannotRunError` if the model can't."""
        if isinstance(self.way, FlatPooling):
            self.way.trunk.remove()
        self.way = None
        self.way = tier.make()

    @property
    def described(self) -> str:
        """What runs, for the load report."""
        assert self.way is not None, "use() was not called"
        return f"{type(self.hf_model).__name__} of transformers, {self.way.described}"

    @property
    def max_prompt_tokens(self) -> int | None:
        """The most tokens of a prompt, for a model whose positions don't begin at 0."""
        table = getattr(self._model_config.hf_config, "max_position_embeddings", None)
        if not isinstance(table, int):
            return None
        if isinstance(self.way, FlatPooling):
            return table - self.way.offset if self.way.offset else None
        return (
            None if self._takes(min(table, self._model_config.max_model_len)) else table - self._arguments.offsets[-1]
        )

    def _takes(self, num_tokens: int) -> bool:
        """Whether a model that computes positions itself takes so many tokens; not tried if that would take long."""
        if num_tokens > _MOST_TRIED_TOKENS:
            return len(self._arguments.offsets) == 1
        try:
            ids = self.text_token_ids(num_tokens)
            self.reference(ids if self.end_token_id is None else [*ids[:-1], self.end_token_id])
        except (IndexError, RuntimeError):  # of an embedding without such a position
            return False
        return True

    def _flat(self, mask_form: str, offset: int) -> FlatPooling:
        if not self._arguments.takes_positions:
            raise CannotRunError("it counts positions by itself, of one text")
        self._attention.set(interface.NAME)
        calls, stack = self._look_on(offset)
        return FlatPooling(self.hf_model, self._arguments, calls, stack, mask_form, offset)

    def _batches(self, *, padded: bool) -> BatchPooling:
        self._attention.restore()
        return BatchPooling(self.hf_model, self._arguments, padded=padded)

    def _look_on(self, offset: int) -> tuple[tuple[AttentionCall, ...], nn.Module]:
        """One pass over a few tokens: its attention calls, and the innermost module that holds all of them."""
        recorder = CallRecorder(self._model_config.max_model_len - 1, 0, both_ways=True)
        ids = torch.tensor([self.text_token_ids(NUM_TOKENS)], device=self._device)
        positions = torch.arange(NUM_TOKENS, device=self._device)[None] + offset
        watch = _StackWatch(self.hf_model, recorder)
        given = self._arguments.of_batch(ids, torch.ones_like(ids), None)
        try:
            with interface.attending(recorder):
                self.hf_model(**given, position_ids=positions)
        except CannotRunError:
            raise
        except Exception as error:  # whatever modules raise
            raise CannotRunError(f"its forward fails on {NUM_TOKENS} tokens of text ({error})") from error
        finally:
            watch.remove()
        if not recorder.calls:
            raise CannotRunError("its attention can't be reached through transformers' AttentionInterface")
        return tuple(recorder.calls), watch.found()

    # What the engine calls

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        token_type_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows `(num_tokens, size)` of a flat batch of whole prompts, for `pooled_outputs`."""
        assert self.way is not None, "use() was not called"
        rows: torch.Tensor = self.way(input_ids, positions, attn_metadata, token_type_ids)
        return rows

    def pooled_outputs(self, rows: Sequence[torch.Tensor], requests: Sequence[EngineRequest]) -> list[torch.Tensor]:
        """See `sensorium.worker.pooling.PoolsItself`."""
        return self.outputs(rows, [request.prompt_token_ids for request in requests])

    def outputs(self, rows: Sequence[torch.Tensor], token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """The model's outputs for the rows of whole prompts: last states `(num_tokens, hidden_size)`, scores of labels
        `(num_labels,)`, or for each token `(num_tokens, num_labels)`."""
        assert self.way is not None, "use() was not called"
        return self.way.outputs(rows, token_ids)

    def text_token_ids(self, count: int) -> list[int]:
        """Token ids of a meaningless text; see `text_token_ids`."""
        return text_token_ids(self._model_config, count)

    # The untouched model

    @torch.inference_mode()
    def reference(self, token_ids: Sequence[int], type_ids: Sequence[int] | None = None) -> torch.Tensor:
        """`outputs` for one prompt, computed by transformers alone, with its eager attention."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        types = None if type_ids is None else torch.tensor([list(type_ids)], device=self._device)
        with self._attention.eager():
            return _result(self.hf_model(**self._arguments.of_batch(ids, torch.ones_like(ids), types)))[0]

    @property
    def end_token_id(self) -> int | None:
        """The token that a text must end with, if the model pools its position (BART)."""
        hf_config = self._model_config.hf_config
        found = getattr(hf_config, "eos_token_id", None)
        return found if getattr(hf_config, "is_encoder_decoder", False) and isinstance(found, int) else None

    @property
    def takes_type_ids(self) -> bool:
        """Whether the model takes token type ids, which tell the texts of a pair apart."""
        return self._arguments.num_types > 1


class _Arguments:
    """The arguments of a model's `forward`."""

    def __init__(self, model: nn.Module, model_config: ModelConfig) -> None:
        parameters = inspect.signature(model.forward).parameters
        takes_any = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
        self._names = frozenset(parameters)
        self.takes_positions = "position_ids" in parameters or takes_any
        hf_config = model_config.hf_config
        num_types = getattr(hf_config, "type_vocab_size", 0) or 0
        self.num_types = num_types if "token_type_ids" in parameters else 0
        pad = getattr(hf_config, "pad_token_id", None)
        self.pad_token_id = pad if isinstance(pad, int) and 0 <= pad < model_config.vocab_size else None
        self.offsets = (0,) if self.pad_token_id is None else (0, self.pad_token_id + 1)
        """The first positions that models may have: 0, or the padding id's successor (RoBERTa)."""

    def of_batch(
        self, ids: torch.Tensor, mask: torch.Tensor, type_ids: torch.Tensor | None, *, uses_types: bool = True
    ) -> dict[str, Any]:
        """Arguments for `(batch, num_tokens)` ids."""
        given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if self.num_types and uses_types:
            types = torch.zeros_like(ids) if type_ids is None else type_ids.clamp(0, self.num_types - 1)
            given["token_type_ids"] = types
        if "use_cache" in self._names:
            given["use_cache"] = False
        return given


class FlatPooling(nn.Module):
    """The fast way: a step's prompts as one sequence up to the stack.

    Args:
        model: Of transformers.
        arguments: What it takes.
        calls: Its attention calls in a pass.
        stack: The innermost module that holds all of them.
        mask_form: One of `MASK_FORMS`.
        offset: The first position.
    """

    def __init__(
        self,
        model: nn.Module,
        arguments: _Arguments,
        calls: Sequence[AttentionCall],
        stack: nn.Module,
        mask_form: str,
        offset: int,
    ) -> None:
        super().__init__()
        self._arguments = arguments
        self._calls = tuple(calls)
        self._mask_form = mask_form
        self.offset = offset
        self.trunk = Trunk(model, stack)
        self.attention_calls = nn.ModuleList(_attention_for(call) for call in calls)
        self.has_states_behind = False
        """Whether the stack's rows are the last states, with no module after it."""

    @property
    def described(self) -> str:
        """For the load report."""
        counted = f", positions from {self.offset}" if self.offset else ""
        return f"{len(self._calls)} attention calls in a pass over whole prompts{counted}"

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attn_metadata: AttentionMetadata,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """The stack's output rows."""
        shape = (1, 1, 1, 1) if self._mask_form == MASK_FORMS[0] else (1, len(input_ids))
        mask = input_ids.new_ones(shape)
        types = None if token_type_ids is None else token_type_ids[None]
        given = self._arguments.of_batch(input_ids[None], mask, types)
        step = _WholeStep(self._calls, self.attention_calls, attn_metadata.cu_seqlens_q)
        with interface.attending(step):
            output = self.trunk.run({**given, "position_ids": positions[None] + self.offset})
        return hidden_states(output)[0]

    def outputs(self, rows: Sequence[torch.Tensor], token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See `TransformersForPooling.outputs`."""
        if self.has_states_behind:
            return list(rows)
        results: dict[int, torch.Tensor] = {}
        for batch in batches_of([len(each) for each in rows], is_padded=self._arguments.pad_token_id is not None):
            ids, mask = padded_ids([token_ids[i] for i in batch], self._arguments.pad_token_id or 0, rows[0].device)
            padded = nn.utils.rnn.pad_sequence([rows[i] for i in batch], batch_first=True)
            given = self._arguments.of_batch(ids, mask, None)
            results |= zip(batch, _results(self.trunk.behind(padded, given), mask), strict=True)
        return [results[i] for i in range(len(rows))]


class BatchPooling(nn.Module):
    """The way for models whose rows depend on others not only through the attention interface: as transformers runs
    them.

    `padded`: prompts of about the same length together; else one by one.
    """

    def __init__(self, model: nn.Module, arguments: _Arguments, *, padded: bool) -> None:
        super().__init__()
        self._model = (model,)  # no submodule: its parameters are the whole's
        self._arguments = arguments
        self._is_padded = padded
        if padded and arguments.pad_token_id is None:
            raise CannotRunError("its config names no padding token")

    @property
    def described(self) -> str:
        """For the load report."""
        return "prompts of about the same length together, padded" if self._is_padded else "a pass for each prompt"

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        attn_metadata: AttentionMetadata,
        token_type_ids: torch.Tensor | None,
    ) -> torch.Tensor:
        """The model's outputs; one for a whole prompt is repeated in each of its rows."""
        lens = list(attn_metadata.query_lens_host)
        ids = torch.split(input_ids, lens)
        types = [None] * len(lens) if token_type_ids is None else torch.split(token_type_ids, lens)
        results: dict[int, torch.Tensor] = {}
        for batch in batches_of(lens, is_padded=self._is_padded):
            pad = self._arguments.pad_token_id or 0
            padded, mask = padded_ids([ids[i].tolist() for i in batch], pad, input_ids.device)
            own = [types[i] for i in batch]
            padded_types = (
                None if own[0] is None else nn.utils.rnn.pad_sequence(own, batch_first=True)  # type: ignore[arg-type]
            )
            output = self._model[0](**self._arguments.of_batch(padded, mask, padded_types))
            results |= zip(batch, _results(output, mask), strict=True)
        return torch.cat([_for_each_row(results[i], length) for i, length in enumerate(lens)])

    def outputs(self, rows: Sequence[torch.Tensor], token_ids: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """See `TransformersForPooling.outputs`."""
        return [each if each.dim() == 2 else each[0, :, 0] for each in rows]


def _for_each_row(result: torch.Tensor, length: int) -> torch.Tensor:
    """`(num_tokens, size)`; of a prompt's scores `(num_tokens, num_labels, 1)`."""
    return result if result.dim() == 2 else result[None, :, None].expand(length, -1, -1)


class _WholeStep:
    """The `AttentionStep` of a pass over whole prompts, without a cache."""

    __slots__ = ("_calls", "_layers", "_next", "_starts")

    def __init__(self, calls: Sequence[AttentionCall], layers: nn.ModuleList, starts: torch.Tensor) -> None:
        self._calls = calls
        self._layers = layers
        self._starts = starts
        self._next = 0

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
        index = self._next
        self._next = index + 1
        call = self._calls[index]
        if call.module is not module:
            raise CannotRunError("its layers run in another order than at load")
        query, key, value = (each[0].transpose(0, 1).flatten(1) for each in (query, key, value))
        out: torch.Tensor = self._layers[index](query, key, value, self._starts, sinks=call.sinks)
        return out.view(1, -1, call.num_heads, call.value_size)


def _attention_for(call: AttentionCall) -> MultiHeadAttention:
    return MultiHeadAttention(
        call.num_heads,
        call.key_size,
        call.scale,
        call.num_kv_heads,
        head_size_v=call.value_size,
        causal=call.rule.causal,
        window=call.rule.window,
        chunk=call.rule.chunk,
        softcap=call.softcap,
    )


class _StackWatch:
    """Finds the innermost module that holds all attention calls of a pass, and returns their rows."""

    def __init__(self, model: nn.Module, recorder: CallRecorder) -> None:
        self._recorder = recorder
        self._begun: list[int] = []
        self._left: list[tuple[nn.Module, int, int]] = []
        self._handles = []
        for module in model.modules():
            if not isinstance(module, nn.ModuleList):
                self._handles.append(module.register_forward_pre_hook(self._enter))
                self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def remove(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def found(self) -> nn.Module:
        """The module. Raises `CannotRunError` if there is none above a layer's own attention."""
        total = len(self._recorder.calls)
        holders = [module for module, before, behind in self._left if before == 0 and behind == total]
        callers = {id(call.module) for call in self._recorder.calls}
        for module in holders:  # modules are left from the inside out
            if total > 1 or _holds_layers(module, callers):
                return module
        raise CannotRunError("no module of it holds all attention")

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._begun.append(len(self._recorder.calls))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self._left.append((module, self._begun.pop(), len(self._recorder.calls)))


def _holds_layers(module: nn.Module, callers: set[int]) -> bool:
    """For a model with one layer: whether a module has the layer in a list, as a stack does."""
    lists = [each for each in module.children() if isinstance(each, nn.ModuleList)]
    return any(id(inner) in callers for each in lists for inner in each.modules())


def _result(output: Any) -> torch.Tensor:
    """Scores if a model's output has some, else last states, `(batch, ...)`."""
    logits = getattr(output, "logits", None)
    found: torch.Tensor = hidden_states(output) if logits is None else logits
    return found


def _results(output: Any, mask: torch.Tensor) -> list[torch.Tensor]:
    """The results of each sequence of a batch, without padding rows."""
    results = _result(output)
    lens = mask.sum(1).tolist()
    return [each if each.dim() == 1 else each[:length] for each, length in zip(results.unbind(), lens, strict=True)]


def padded_ids(token_ids: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """`(batch, longest)` ids, padded at the end, and a mask with ones at ids."""
    ids = [torch.tensor(list(each), device=device) for each in token_ids]
    ones = [torch.ones_like(each) for each in ids]
    padded = nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad)
    return padded, nn.utils.rnn.pad_sequence(ones, batch_first=True)


def batches_of(lens: Sequence[int], *, is_padded: bool) -> Iterator[list[int]]:
    """Indices of sequences that run together: each alone, or those that need little padding."""
    batch: list[int] = []
    total = 0
    for i in sorted(range(len(lens)), key=lambda i: lens[i]):
        if batch and (not is_padded or lens[i] * (len(batch) + 1) > _MOST_PADDING * (total + lens[i])):
            yield batch
            batch, total = [], 0
        batch.append(i)
        total += lens[i]
    if batch:
        yield batch

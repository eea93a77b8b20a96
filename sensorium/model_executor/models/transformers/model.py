"""The class that serves architectures which have no file of their own here: transformers' modules over our cache.

A step's flat batch is one sequence to the modules, `(1, num_tokens)` with its positions; rows of different requests
meet in attention only, which keeps them apart. The head runs by the model's own `forward` with the trunk standing in
for itself, so that scales and caps of logits are the model's own.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.attention import Attention, AttentionMetadata, LayerCache
from sensorium.config import EngineConfig
from sensorium.errors import ConfigError, ModelError
from sensorium.model_executor.models.transformers import interface
from sensorium.model_executor.models.transformers.discovery import (
    NUM_TOKENS,
    AttentionCall,
    Discovery,
    discover,
    hidden_states,
)
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.models.transformers.weights import load_hf_model

_EAGER = "eager"
MASK_FORMS = ("given", "ones")
"""How a trunk is told that nothing is padding: by a mask that it takes as it is, which spares it making its own, or by
one of ones. Which of them is right is seen at load."""


class TransformersForCausalLM(nn.Module):
    """A model of text of transformers."""

    def __init__(self, *, config: EngineConfig, hf_model: nn.Module) -> None:
        super().__init__()
        self.hf_model: Any = hf_model
        self._model_config = config.model_config
        self._configs = _configs_of(hf_model)
        self._device = torch.device(config.device_config.device)
        self._rows: torch.Tensor | None = None
        self._takes_positions = "position_ids" in inspect.signature(hf_model.forward).parameters
        interface.register()
        self._set_attention(interface.NAME)
        found = self._discover()
        self._settings = dict(found.settings)
        self._output = found.trunk_output
        self._calls = found.calls
        self.attention_calls = nn.ModuleList(_attention_for(call, i) for i, call in enumerate(found.calls))
        """One for each call in a pass, in their order."""
        self._trunk_forward = found.trunk.forward
        found.trunk.forward = self._trunk_or_rows
        self.mask_form = MASK_FORMS[0]
        self._head = self._plain_head()

    @classmethod
    def load_from_checkpoint(cls, config: EngineConfig) -> TransformersForCausalLM:
        """The model with its checkpoint's weights; see `load_hf_model`."""
        if config.quant_config is not None:
            raise ConfigError(
                f"quantization: got {config.quant_config.name!r} for {config.model_config.architecture}, which "
                "runs by the modules of transformers, expected None. Leave quantization (--quantization) out, or use "
                "a checkpoint with float weights."
            )
        with torch.inference_mode():
            hf_model = load_hf_model(config)
            try:
                return cls(config=config, hf_model=hf_model)
            except CannotRunError as reason:
                raise ModelError(
                    f"{config.model_config.architecture} by the modules of transformers: got one that can't be run in "
                    f"a flat batch over a paged cache, because {reason}. Register a class for it."
                ) from reason

    @property
    def described(self) -> str:
        """What runs, for the load report."""
        return f"{type(self.hf_model).__name__} of transformers, {len(self._calls)} attention calls a pass"

    def _discover(self) -> Discovery:
        ids = text_token_ids(self._model_config, NUM_TOKENS)
        return discover(self.hf_model, ids, self._model_config.max_model_len - 1, self._device)

    # Steps

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)` of a flat batch, as they leave the trunk."""
        step = _PagedStep(self._calls, self.attention_calls, kv_caches, attn_metadata)
        with interface.attending(step):
            output = self._trunk_forward(
                input_ids=input_ids[None],
                # Rows of text have the same position in time, height and width.
                position_ids=positions[None] if positions.dim() == 1 else positions[:1],
                attention_mask=self._mask(input_ids),
                **self._settings,
            )
        return hidden_states(output)[0]

    def _mask(self, input_ids: torch.Tensor) -> torch.Tensor:
        shape = (1, 1, 1, 1) if self.mask_form == MASK_FORMS[0] else (1, len(input_ids))
        return input_ids.new_ones(shape)

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        if self._head is not None:
            logits: torch.Tensor = self._head(hidden_states)
            return logits
        return self._outer_logits(hidden_states)

    def _outer_logits(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """By the outer `forward`, which gets these rows from its trunk."""
        self._rows = hidden_states
        try:
            ids = torch.zeros(1, len(hidden_states), dtype=torch.long, device=hidden_states.device)
            logits: torch.Tensor = self.hf_model(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            self._rows = None

    def _trunk_or_rows(self, *args: Any, **kwargs: Any) -> Any:
        if self._rows is None:
            return self._trunk_forward(*args, **kwargs)
        if isinstance(self._output, tuple):
            return (self._rows[None], *self._output[1:])
        output = copy.copy(self._output)
        output["last_hidden_state"] = self._rows[None]
        return output

    def _plain_head(self) -> nn.Module | None:
        """The output head, if it is all that the outer `forward` does to hidden states."""
        head = self.hf_model.get_output_embeddings()
        if not isinstance(head, nn.Module):
            return None
        size = hidden_states(self._output).shape[-1]
        generator = torch.Generator().manual_seed(0)
        rows = 30 * torch.randn(3, size, generator=generator).to(self._device, self._model_config.dtype)
        try:
            is_all = torch.equal(head(rows), self._outer_logits(rows))
        except RuntimeError:  # rows of another width than the head takes
            return None
        return head if is_all else None

    def text_token_ids(self, count: int) -> list[int]:
        """Token ids of a text that means nothing; see `text_token_ids`."""
        return text_token_ids(self._model_config, count)

    # The untouched model

    @torch.inference_mode()
    def reference_logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        """Logits `(num_tokens, vocab_size)` of a whole prompt by transformers alone, with its eager attention."""
        ids = torch.tensor([list(token_ids)], device=self._device)
        given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self._takes_positions:  # as `generate` gives them; by themselves some models count otherwise
            given["position_ids"] = torch.arange(len(token_ids), device=self._device)[None]
        with self._untouched():
            logits: torch.Tensor = self.hf_model(**given, use_cache=False).logits[0]
        return logits

    @contextmanager
    def _untouched(self) -> Iterator[None]:
        self._set_attention(_EAGER)
        try:
            yield
        finally:
            self._set_attention(interface.NAME)

    def _set_attention(self, name: str) -> None:
        for each in self._configs:
            each._attn_implementation_internal = name  # noqa: SLF001  the setter reaches into others


class _PagedStep:
    """The `AttentionStep` of a pass: call by call over the paged caches."""

    __slots__ = ("_caches", "_calls", "_layers", "_metadata", "_next")

    def __init__(
        self,
        calls: Sequence[AttentionCall],
        layers: nn.ModuleList,
        caches: Sequence[LayerCache],
        metadata: AttentionMetadata,
    ) -> None:
        self._calls = calls
        self._layers = layers
        self._caches = caches
        self._metadata = metadata
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
        layer: Any = self._layers[index]
        rows = [_rows(each, layer.head_size) for each in (query, key, value)]
        out: torch.Tensor = layer(*rows, self._caches[index], self._metadata)
        out = out.view(1, -1, call.num_heads, layer.head_size)
        return out if call.value_size == layer.head_size else out[..., : call.value_size]


def _rows(states: torch.Tensor, size: int) -> torch.Tensor:
    """`(num_tokens, heads, size)` of `(1, heads, num_tokens, own size)`; channels that it doesn't have are zero."""
    rows = states[0].transpose(0, 1)
    return rows if rows.shape[2] == size else F.pad(rows, (0, size - rows.shape[2]))


def _attention_for(call: AttentionCall, index: int) -> Attention:
    if call.sinks is not None:
        raise CannotRunError("its attention has sinks")
    if call.rule.chunk is not None:
        raise CannotRunError("its attention is chunked")
    return Attention(
        call.num_heads,
        # Keys and values of different sizes are both stored in the larger one; zeros change nothing.
        max(call.key_size, call.value_size),
        call.scale,
        num_kv_heads=call.num_kv_heads,
        logits_soft_cap=call.softcap,
        per_layer_sliding_window=call.rule.window,
        prefix=f"attention call {index}",
    )


def _configs_of(model: nn.Module) -> list[Any]:
    """The configs that a model's modules ask for the attention function, each once."""
    configs = {id(each): each for module in model.modules() if (each := getattr(module, "config", None)) is not None}
    return [each for each in configs.values() if hasattr(each, "_attn_implementation_internal")]


def text_token_ids(model_config: Any, count: int) -> list[int]:
    """Different token ids without special meaning, as far as the config names those, from all over the vocabulary."""
    special = {0, *_special_ids(model_config.hf_config), *_special_ids(model_config.hf_text_config)}
    vocab_size = model_config.vocab_size
    stride = max(vocab_size // (count + 1), 1)
    ids = [i for i in range(stride, vocab_size, stride) if i not in special]
    ids += [i for i in range(vocab_size) if i not in special and i not in ids]
    return (ids * count)[:count] or [0] * count


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if name.endswith(("_token_id", "_token_index")):
            yield from (each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int))

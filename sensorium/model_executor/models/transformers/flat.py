"""The fast way: the modules run a step's flat batch as one sequence, `(1, num_tokens)` with its positions.

Only attention looks at more than one row, and each of its calls has a paged cache that keeps requests apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from sensorium.attention import Attention, AttentionMetadata, LayerCache
from sensorium.model_executor.drivers import MediaRows
from sensorium.model_executor.models.transformers.by_sequence import KeptBeside, MixedBatch, Mixer, mixing
from sensorium.model_executor.models.transformers.discovery import AttentionCall, Discovery
from sensorium.model_executor.models.transformers.interface import attending
from sensorium.model_executor.models.transformers.media_rows import TrunkInputs
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from sensorium.model_executor.models.transformers.trunk import Trunk, hidden_states

MASK_FORMS = ("given", "ones")
"""How a trunk is told that nothing is padding: by a finished mask that it uses unchanged, which is faster, or by a mask
of ones. Loading tries which one is right."""


class FlatWay(nn.Module):
    """Runs a trunk over flat batches.

    Args:
        found: The result of passes at load.
        trunk: Of the same model.
        mask_form: One of `MASK_FORMS`.
        token_by_token: Whether mixers continue a sequence by one token at a time.
        inputs: Makes the trunk's arguments if it takes embedded rows; None if it takes token ids.
    """

    def __init__(
        self,
        found: Discovery,
        trunk: Trunk,
        mask_form: str,
        token_by_token: bool = False,
        inputs: TrunkInputs | None = None,
    ) -> None:
        super().__init__()
        self._token_by_token = token_by_token
        self._tables = found.tables
        names = inspect.signature(trunk.forward).parameters
        self._takes_positions = "position_ids" in names or inputs is not None
        self._takes_mask = "attention_mask" in names
        self._inputs = inputs
        self._calls = found.calls
        self._settings = dict(found.settings)
        self.trunk = trunk
        self._mask_form = mask_form
        self.attention_calls = nn.ModuleList(_attention_for(call, i) for i, call in enumerate(found.calls))
        """One layer for each call in a pass, in order."""
        self.mixers = nn.ModuleList(found.mixers)
        for i, layer in enumerate(each for each in self.mixers.modules() if isinstance(each, Mixer | KeptBeside)):
            layer.cache_index = i

    @property
    def described(self) -> str:
        """For the load report."""
        calls = f"{len(self._calls)} attention calls in a pass"
        return f"{calls}, {len(self.mixers)} layers one sequence at a time" if self.mixers else calls

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        media: MediaRows | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The trunk's hidden states `(num_tokens, hidden_size)`.

        `inputs_embeds`: the rows of these tokens, media in their places, if they were made before.
        """
        num_tokens = len(input_ids)
        shape = (1, 1, 1, 1) if self._mask_form == MASK_FORMS[0] else (1, num_tokens)
        given = self._settings | self._rows(input_ids, positions, media, inputs_embeds)
        if self._takes_mask:
            given["attention_mask"] = input_ids.new_ones(shape)
        with (
            attending(_PagedStep(self._calls, self.attention_calls, kv_caches, attn_metadata)),
            self._mixing(kv_caches, attn_metadata),
            self._tables.at(positions),
        ):
            output = self.trunk.forward(**given)
        return hidden_states(output)[0]

    def _mixing(self, kv_caches: Sequence[LayerCache], metadata: AttentionMetadata) -> AbstractContextManager[None]:
        if not self.mixers:
            return nullcontext()
        own = kv_caches[len(self._calls) :]
        return mixing(MixedBatch.of_step(metadata, own, self._token_by_token))

    def _rows(
        self, input_ids: torch.Tensor, positions: torch.Tensor, media: MediaRows | None, embeds: torch.Tensor | None
    ) -> dict[str, Any]:
        if self._inputs is None:
            # Rows of text have the same position in time, height and width.
            position_ids = positions[None] if positions.dim() == 1 else positions[:1]
            of_positions = {"position_ids": position_ids} if self._takes_positions else {}
            return {"input_ids": input_ids[None], **of_positions}
        rows = self._inputs.embed(input_ids, media) if embeds is None else embeds
        return {
            "inputs_embeds": rows[None],
            "position_ids": positions[None] if positions.dim() == 1 else positions[:, None],
            **self._inputs.arguments(input_ids, media),
        }


class _PagedStep:
    """The `AttentionStep` of a pass over the paged caches."""

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
        query, key, value = (each[0].transpose(0, 1) for each in (query, key, value))
        cache, layer = self._caches[index], self._layers[index]
        out: torch.Tensor = layer(query, key, value, cache, self._metadata, sinks=call.sinks)
        return out.view(1, -1, call.num_heads, call.value_size)


def _attention_for(call: AttentionCall, index: int) -> Attention:
    return Attention(
        call.num_heads,
        call.key_size,
        call.scale,
        head_size_v=call.value_size,
        attention_chunk_size=call.rule.chunk,
        num_kv_heads=call.num_kv_heads,
        logits_soft_cap=call.softcap,
        per_layer_sliding_window=call.rule.window,
        spans=call.spans,
        prefix=f"attention call {index}",
    )

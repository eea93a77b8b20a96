"""Tier 1 and 2: models that encode media and embed text in methods of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sensorium.model_executor.adapter import ForwardAdapter
from sensorium.model_executor.counted_merges import CountedMerges
from sensorium.model_executor.drivers.base import (
    EncodeJob,
    EncodeResult,
    StepInputs,
    encoding_error,
    without_media_ids,
)
from sensorium.model_executor.drivers.encoder_outputs import split_rows
from sensorium.model_executor.drivers.media_arguments import batch_kwargs


class EmbeddingsDriver:
    """Encodes items in batches, embeds text, puts rows where they belong, and calls `forward(inputs_embeds=...)`.

    `merges_itself`: the model's own merge does more than put rows at their places, so it is used for every chunk.
    `batchable`: one encoder call takes items of several requests.

    What the model's Python code reads of an item, such as the size of its grid, may stay on the host
    (`mm_host_kwargs`): reading it off the device would wait for all the work that was given to it before.
    """

    embeds_media = True

    def __init__(
        self,
        model: nn.Module,
        *,
        encode_method: str,
        embed_method: str,
        vocab_size: int,
        dtype: torch.dtype,
        device: torch.device,
        merges_itself: bool = False,
    ) -> None:
        self.merges_itself = merges_itself
        self._forward = ForwardAdapter(model)
        self._encode: Callable[..., Any] = getattr(model, encode_method)
        self._embed: Callable[..., torch.Tensor] = getattr(model, embed_method)
        self._encode_parameters = inspect.signature(self._encode).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in self._encode_parameters.values())
        self.batchable: bool = getattr(model, "mm_encoder_batchable", True)
        self._on_host: frozenset[str] = frozenset(getattr(model, "mm_host_kwargs", ()))
        self._vocab_size = vocab_size
        self._dtype = dtype
        self._device = device

    def encode(self, jobs: Sequence[EncodeJob]) -> list[EncodeResult]:
        """One encoder call per modality; where that fails, one per item, so that only a bad item fails."""
        results: dict[int, EncodeResult] = {}
        order = sorted(range(len(jobs)), key=lambda i: (_group(jobs[i]), i))
        for _, members in groupby(order, key=lambda i: _group(jobs[i])):
            indices = list(members)
            batches = [indices] if self.batchable else [[i] for i in indices]
            for batch in batches:
                results |= zip(batch, self._encode_batch([jobs[i] for i in batch]), strict=True)
        return [results[i] for i in range(len(jobs))]

    def _encode_batch(self, jobs: list[EncodeJob]) -> list[EncodeResult]:
        try:
            output = self.call_encoder(self.encoder_kwargs([job.item.kwargs or {} for job in jobs]))
            return [rows.to(self._dtype) for rows in split_rows(output, [job.item.span.num_rows for job in jobs])]
        except Exception as error:  # noqa: BLE001  what a model's code raises is its item's error
            if len(jobs) == 1:
                return [encoding_error(jobs[0], error)]
        return [result for job in jobs for result in self._encode_batch([job])]

    def encoder_kwargs(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The mapped media of items as arguments of one call, where the encoder wants them."""
        return batch_kwargs(items, self._device, self._dtype, self._on_host)

    def call_encoder(self, kwargs: Mapping[str, Any]) -> Any:
        """The model's encoder on batched kwargs, with the keywords that it takes."""
        if not self._takes_any:
            kwargs = {name: value for name, value in kwargs.items() if name in self._encode_parameters}
        return self._encode(**kwargs)

    def embed_ids(self, input_ids: torch.Tensor, multimodal_embeddings: Any = None) -> torch.Tensor:
        """The model's own embedding of ids, merged with what its encoder returned if that is given."""
        if multimodal_embeddings is None:
            return self._embed(input_ids)
        with CountedMerges():
            return self._embed(input_ids, multimodal_embeddings)

    def embed(self, inputs: StepInputs) -> torch.Tensor:
        """Decoder inputs `(num_tokens, hidden_size)`: text embeddings with media rows at their places."""
        media = inputs.media
        if media is None:
            return self._embed(inputs.input_ids)
        if self.merges_itself:
            return self.embed_ids(inputs.input_ids, media.rows)
        text = self._embed(without_media_ids(inputs.input_ids, media, self._vocab_size))
        return text.index_copy(0, media.index, media.rows.to(text.dtype))

    def forward(self, inputs: StepInputs) -> torch.Tensor:
        """See `ModelDriver.forward`."""
        hidden: torch.Tensor = self._forward(
            input_ids=None,
            positions=inputs.positions,
            kv_caches=inputs.kv_caches,
            attn_metadata=inputs.attn_metadata,
            inputs_embeds=self.embed(inputs) if inputs.inputs_embeds is None else inputs.inputs_embeds,
        )
        return hidden


def _group(job: EncodeJob) -> tuple[str, tuple[str, ...]]:
    """Items of one group can share an encoder call."""
    return job.item.modality, tuple(sorted(job.item.kwargs or ()))

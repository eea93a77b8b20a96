"""The part of a driver that encodes media, where the model has a method for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import nn

from sensorium.model_executor.drivers.base import EncodeJob, EncodeResult, encoding_error
from sensorium.model_executor.drivers.encoder_outputs import split_rows
from sensorium.model_executor.drivers.media_arguments import batch_kwargs


class MediaEncoder:
    """Encodes items in batches.

    `batchable`: one encoder call takes items of several requests.

    What the model's Python code reads of an item, such as the size of its grid, may stay on the host
    (`mm_host_kwargs`): reading it off the device would wait for all the work that was given to it before.
    """

    def __init__(self, model: nn.Module, encode_method: str, dtype: torch.dtype, device: torch.device) -> None:
        self._encode: Callable[..., Any] = getattr(model, encode_method)
        self._encode_parameters = inspect.signature(self._encode).parameters
        self._takes_any = any(p.kind is p.VAR_KEYWORD for p in self._encode_parameters.values())
        self.batchable: bool = getattr(model, "mm_encoder_batchable", True)
        self.host_kwargs: frozenset[str] = frozenset(getattr(model, "mm_host_kwargs", ()))
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
            return [rows.to(self._dtype) for rows in split_rows(output, [job.item.num_rows for job in jobs])]
        except Exception as error:  # noqa: BLE001  what a model's code raises is its item's error
            if len(jobs) == 1:
                return [encoding_error(jobs[0], error)]
        return [result for job in jobs for result in self._encode_batch([job])]

    def encoder_kwargs(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The mapped media of items as arguments of one call, where the encoder wants them."""
        return batch_kwargs(items, self._device, self._dtype, self.host_kwargs)

    def call_encoder(self, kwargs: Mapping[str, Any]) -> Any:
        """The model's encoder on batched kwargs, with the keywords that it takes."""
        if not self._takes_any:
            kwargs = {name: value for name, value in kwargs.items() if name in self._encode_parameters}
        return self._encode(**kwargs)


def _group(job: EncodeJob) -> tuple[str, tuple[str, ...]]:
    """Items of one group can share an encoder call."""
    return job.item.modality, tuple(sorted(job.item.kwargs or ()))

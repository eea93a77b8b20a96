"""Makes the answers of pooling requests from the hidden states of their chunks.

A model may take part in it: `pooled_outputs(rows, requests)` turns the rows of whole requests into its own last states
or scores (a classification head); one that generates gives the logits of the tokens that stand for labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.config import ModelConfig
from sensorium.messages import EngineRequest
from sensorium.model_executor.adapter_rows import adapter_of_all
from sensorium.model_executor.layers.pooler import AllRows, Pool, Projection, activated, new_pool
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.pooling_params import PoolingParams


@runtime_checkable
class PoolsItself(Protocol):
    """A model that turns a request's rows into an answer of its own."""

    def pooled_outputs(self, rows: Sequence[torch.Tensor], requests: Sequence[EngineRequest]) -> list[torch.Tensor]:
        """For each request `(num_tokens, size)`, or the scores of its labels `(num_labels,)`, given its rows
        `(num_tokens, hidden_size)` as `forward` returned them."""


class Pooler:
    """Invariant: it keeps rows of requests that are running, and of no others.

    Args:
        model: The loaded model.
        model_config: How it pools, and where its checkpoint lies.
        device: Where its rows are.
    """

    def __init__(self, model: nn.Module, model_config: ModelConfig, device: torch.device) -> None:
        self._model: Any = model
        self._config = model_config.pooler
        self._projections = [Projection(Path(model_config.model) / each, device) for each in self._config.projections]
        self._pools: dict[str, Pool] = {}
        self._num_rows: dict[str, int] = {}

    def add(self, request: EngineRequest, start: int, hidden: torch.Tensor) -> None:
        """Take in a chunk's rows `(num_rows, hidden_size)`, in order; `start`: the first one's place in the prompt.

        The rows of a pass that is repeated are taken in once.
        """
        name = request.request_id
        if start == 0:
            self._pools[name], self._num_rows[name] = self._new_pool(request), 0
        if start == self._num_rows[name]:
            self._pools[name].add(hidden)
            self._num_rows[name] += len(hidden)

    def _new_pool(self, request: EngineRequest) -> Pool:
        assert request.pooling is not None
        if isinstance(self._model, PoolsItself) or request.pooling.task.startswith("token_"):
            return AllRows()
        return new_pool(self._config.pooling_type if request.pooling.task == "embed" else "last")

    def finish(self, requests: Sequence[EngineRequest]) -> list[torch.Tensor]:
        """The answers of requests whose last chunks are in, float32; forgets them."""
        rows = [self._pools[request.request_id].finish() for request in requests]
        if isinstance(self._model, PoolsItself):
            rows = self._model.pooled_outputs(rows, requests)
        answers = [self._answer(*each) for each in zip(rows, requests, strict=True)]
        for request in requests:
            self.remove(request.request_id)
        return answers

    def _answer(self, rows: torch.Tensor, request: EngineRequest) -> torch.Tensor:
        params = request.pooling
        assert params is not None
        if params.task in ("classify", "token_classify"):
            with adapter_of_all(request.adapter_id, rows[:1]):
                return self._scores(rows, params)
        if params.task == "embed" and rows.dim() == 2:
            pool = new_pool(self._config.pooling_type)
            pool.add(rows)
            rows = pool.finish()
        vectors = rows.float()
        for projection in self._projections:
            vectors = projection(vectors)
        if params.dimensions is not None:
            vectors = vectors[..., : params.dimensions]
        return F.normalize(vectors, dim=-1) if self._config.normalize and params.use_activation else vectors

    def _scores(self, rows: torch.Tensor, params: PoolingParams) -> torch.Tensor:
        """Scores of labels, from the model's own or from the logits behind the last row."""
        ids = self._config.token_ids
        if ids:
            row = rows[-1:] if rows.dim() == 2 else rows[None]
            dtype = next(self._model.parameters()).dtype
            logits = self._model.compute_logits(row.to(dtype), SamplingMetadata(1))[0].float()
            rows = logits[torch.tensor(ids, device=logits.device)]
            rows = rows[1:] - rows[:1] if len(ids) == 2 else rows
        scores = rows.float()
        return activated(scores, self._config.activation) if params.use_activation else scores

    def remove(self, request_id: str) -> None:
        """Forget a request that ended before its last chunk."""
        self._pools.pop(request_id, None)
        self._num_rows.pop(request_id, None)

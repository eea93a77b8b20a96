"""Token embeddings and the output head, whose rows are divided over the ranks that share a model."""

from __future__ import annotations

from typing import Self

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.distributed import current_tensor_parallel
from sensorium.model_executor.layers.parameters import Axes, new_parameter
from sensorium.model_executor.layers.quantization import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.layers.quantization.unquantized import FLOAT

DEFAULT_VOCAB_PADDING_SIZE = 64


class VocabParallelEmbedding(WeightedLayer):
    """A table `(num_embeddings, embedding_dim)` of token embeddings, which may be its model's output head as well.

    Lookups read a float table. As a head it multiplies with a copy in a separate head's layout, made at the first use.

    Ids outside the table give zeros: these are placeholders, negative or beyond the vocabulary, whose rows come from
    media.

    With several ranks, each holds `weight` `(num_rows, embedding_dim)`, the rows from `first_row` on; the last ones may
    be padding. Embeddings are summed over ranks, logits are gathered.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        params_dtype: Dtype of the table; torch's default dtype if `None`.
        org_num_embeddings: Rows in the checkpoint, if fewer; the others are zero.
        padding_size: Accepted for models that pass it; a table is padded to a multiple of the number of ranks.
        quant_config: How the head holds its weight. `None`: as the model that is being constructed says.
        prefix: The layer's name in the model.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_VOCAB_PADDING_SIZE,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        self.org_vocab_size = num_embeddings if org_num_embeddings is None else org_num_embeddings
        shard = current_tensor_parallel().shard
        self.num_rows = -(-num_embeddings // shard.count)
        self.first_row = shard.index * self.num_rows
        super().__init__(embedding_dim, [self.num_rows], params_dtype, quant_config, prefix, output_shards=[shard])
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.bias = None
        self.keeps_weight = True

    def choose_method(self, quant_config: QuantizationConfig | None) -> LinearMethod:
        """Float, since ids are looked up in the table."""
        method = super().choose_method(quant_config)
        return method if method.loads_float else FLOAT

    def part_of(self, param: nn.Parameter, part: int | None) -> torch.Tensor:
        """The rows (or a head's biases) that the checkpoint has; sets the others to zero."""
        axes: Axes = param.__dict__["axes"]
        whole = super().part_of(param, part)
        num_loaded = axes.entries(self._num_loaded_rows)
        whole.narrow(axes.output, num_loaded, whole.shape[axes.output] - num_loaded).zero_()
        return whole.narrow(axes.output, 0, num_loaded)

    @property
    def _num_loaded_rows(self) -> int:
        """This rank's rows that the checkpoint has."""
        return min(max(self.org_vocab_size - self.first_row, 0), self.num_rows)

    def share_of(self, param: nn.Parameter, loaded: torch.Tensor, part: int | None, what: str) -> torch.Tensor:
        """See `WeightedLayer.share_of`: shares need not be equal here."""
        axes: Axes = param.__dict__["axes"]
        num_rows = axes.entries(self.org_vocab_size)
        if self.tensor_parallel.size == 1 or axes.output_block is None or loaded.shape[axes.output] != num_rows:
            return loaded  # if its size is wrong, `copy_weight` raises
        first = min(axes.entries(self.first_row), num_rows)
        return loaded.narrow(axes.output, first, axes.entries(self._num_loaded_rows))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(*input_ids.shape, embedding_dim)`."""
        if self.tensor_parallel.size > 1:
            return self._embed_share(input_ids)
        valid_ids = input_ids.clamp(0, self.num_embeddings - 1)
        embeddings = F.embedding(valid_ids, self.weight)
        if input_ids.device.type == "cpu" and torch.equal(valid_ids, input_ids):
            return embeddings
        # On a GPU the check above would make the host wait, so the mask is always applied there.
        return embeddings.masked_fill((valid_ids != input_ids).unsqueeze(-1), 0)

    def _embed_share(self, input_ids: torch.Tensor) -> torch.Tensor:
        """`forward` of one of several ranks."""
        rows = input_ids - self.first_row
        is_own = (rows >= 0) & (rows < self.num_rows) & (input_ids < self.num_embeddings)
        embeddings = F.embedding(rows.where(is_own, 0), self.weight).masked_fill(~is_own.unsqueeze(-1), 0)
        return self.tensor_parallel.all_reduce(embeddings)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As an output head: logits `(num_rows, num_embeddings)` of rows `(num_rows, embedding_dim)`."""
        if self.packed is None:
            with torch.no_grad():
                self.finish_loading()
        logits = self._multiply(self, hidden_states, self.bias)
        if self.tensor_parallel.size > 1:
            logits = self.tensor_parallel.all_gather(logits)[..., : self.num_embeddings]
        return logits

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_embeddings}, {self.embedding_dim}"


class ParallelLMHead(VocabParallelEmbedding):
    """The output head: a table that hidden states are multiplied with.

    Args as `VocabParallelEmbedding`, and `bias`: whether the head has one.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        bias: bool = False,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_VOCAB_PADDING_SIZE,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            num_embeddings,
            embedding_dim,
            params_dtype,
            org_num_embeddings,
            padding_size,
            quant_config,
            prefix,
        )
        self.keeps_weight = False
        if bias:
            self.bias = new_parameter(
                self.num_rows, dtype=params_dtype, loader=self.weight_loader, axes=Axes(), name="bias"
            )

    def choose_method(self, quant_config: QuantizationConfig | None) -> LinearMethod:
        """Any method, since nothing is looked up in a head."""
        return WeightedLayer.choose_method(self, quant_config)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> Self:
        """Use the embeddings' table as this head's, and return the head."""
        self.share_weight(embed_tokens.weight)
        return self

    def process_weights_after_loading(self) -> None:
        """Lay the table out for the kernels."""
        self.finish_loading()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """A head is applied by `LogitsProcessor`, not called."""
        raise TypeError("An output head embeds no ids. Pass it to LogitsProcessor, or use VocabParallelEmbedding.")

"""Token embeddings and the output head, whose rows would be divided over devices."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.kernels import PackedWeight, QuantizedWeight, pack, quantize
from sensorium.kernels.quantized_linear import MAX_QUANTIZED_INPUTS
from sensorium.model_executor.layers.linear import (
    copy_weight,
    multiply,
    new_parameter,
    refuse_quantization,
    without_memory,
)

DEFAULT_VOCAB_PADDING_SIZE = 64


class VocabParallelEmbedding(nn.Module):
    """A table `(num_embeddings, embedding_dim)` of token embeddings.

    Ids outside the table (placeholders may be negative or beyond the vocabulary) give rows of zeros: their
    rows come from media.

    Args:
        num_embeddings: Rows.
        embedding_dim: Columns.
        params_dtype: Dtype of the table; torch's default dtype if `None`.
        org_num_embeddings: Rows that the checkpoint has, when these are fewer; the others are zero.
        padding_size: Accepted for models that pass it; a table on one device is not padded.
        quant_config: Must be `None`.
        prefix: The layer's name, for error messages.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        params_dtype: torch.dtype | None = None,
        org_num_embeddings: int | None = None,
        padding_size: int = DEFAULT_VOCAB_PADDING_SIZE,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        refuse_quantization(quant_config, prefix)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.org_vocab_size = num_embeddings if org_num_embeddings is None else org_num_embeddings
        self.prefix = prefix
        self.weight = new_parameter(num_embeddings, embedding_dim, dtype=params_dtype, loader=self.weight_loader)
        self.bias: nn.Parameter | None = None
        self._packed: PackedWeight | QuantizedWeight | None = None

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Fill the rows (or, for a head, the biases) that the checkpoint has; zero the others."""
        what = f"{self.prefix or type(self).__name__}.{'bias' if param is self.bias else 'weight'}"
        copy_weight(param.data[: self.org_vocab_size], loaded_weight, what)
        if self.org_vocab_size < self.num_embeddings:
            param.data[self.org_vocab_size :].zero_()

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Embeddings `(*input_ids.shape, embedding_dim)`."""
        valid_ids = input_ids.clamp(0, self.num_embeddings - 1)
        embeddings = F.embedding(valid_ids, self.weight)
        if input_ids.device.type == "cpu" and torch.equal(valid_ids, input_ids):
            return embeddings
        # On a device the question above would wait for it, so the mask is always applied there.
        return embeddings.masked_fill((valid_ids != input_ids).unsqueeze(-1), 0)

    def project(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """As an output head: logits `(num_rows, num_embeddings)` of rows `(num_rows, embedding_dim)`."""
        if self._packed is None:
            self._packed = pack(self.weight)
        return multiply(hidden_states, self._packed, self.bias)

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
        quant_config: Any = None,
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
        self._is_tied = False
        if bias:
            self.bias = new_parameter(num_embeddings, dtype=params_dtype, loader=self.weight_loader)

    def tie_weights(self, embed_tokens: VocabParallelEmbedding) -> Self:
        """Use the embeddings' table as this head's, and return the head."""
        self.weight = embed_tokens.weight
        self._is_tied = True
        return self

    def process_weights_after_loading(self) -> None:
        """Lay the table out for the kernels. The plain copy is given up unless the embeddings need it."""
        packed = self._packed = pack(self.weight)
        if packed.panels is not None:
            if not self._is_tied:
                self.weight = without_memory(self.weight)
            self.register_buffer("packed_weight", packed.panels, persistent=False)

    @property
    def is_quantized(self) -> bool:
        """Whether the head is held as integers."""
        return isinstance(self._packed, QuantizedWeight)

    def can_quantize(self) -> bool:
        """Whether integers can sum over so many channels."""
        return self.embedding_dim <= MAX_QUANTIZED_INPUTS

    def quantize_weights_after_loading(self) -> None:
        """Hold the table as integers instead. The float table is given up unless the embeddings need it."""
        quantized = self._packed = quantize(self.weight)
        if not self._is_tied:
            self.weight = without_memory(self.weight)
        for name, tensor in quantized.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """A head is applied by `LogitsProcessor`, not called."""
        raise TypeError("An output head embeds no ids. Pass it to LogitsProcessor, or use VocabParallelEmbedding.")

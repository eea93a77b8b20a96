"""Linear layers that model files use: plain, column-split, merged, query-key-value, and row-split.

Each returns `(output, bias)`, where `bias` is only set when the caller asked to add it itself (`skip_bias_add`). The
names say how a layer is divided over ranks: a column layer holds a share of the output channels; a row layer holds a
share of the input channels, and its outputs are summed over ranks. Model files give whole sizes, and read a rank's
share of heads off a `QKVParallelLinear`. With one rank all of them compute `x @ weight.T + bias`.

A layer's `LinearMethod` decides how it holds its weight and multiplies with it: see
`sensorium.model_executor.layers.quantization`. A parameter carries its own
`weight_loader(parameter, tensor[, shard_id])`: a fused layer (`MergedColumnParallelLinear`, `QKVParallelLinear`) is
filled part by part from checkpoints that store the parts separately.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.distributed import WHOLE, Shard, current_tensor_parallel
from sensorium.errors import ConfigError
from sensorium.model_executor.layers.parameters import Axes, new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.quantization.layer import ShardId, WeightedLayer

LinearOutput = tuple[torch.Tensor, nn.Parameter | None]


def aligned_width(size: int) -> int:
    """The smallest width of at least `size` that a GPU's matrix units read at full speed.

    Rows that don't begin at multiples of 16 bytes are read 2 or 4 bytes at a time, by kernels for older GPUs. A width
    that must change becomes a multiple of 64: the inner 3420 channels of Qwen2.5-VL's tower become 3456.
    """
    return size if size % 8 == 0 else -(-size // 64) * 64


def widen_inner(up: LinearBase, down: LinearBase, num_parts: int = 1) -> None:
    """Widen the channels between two layers to an aligned width, if both still hold their weights in float.

    The output of `up` has `num_parts` parts, which the activation combines into one input of `down`. New channels have
    zero weights in both layers, so that results are equal.
    """
    size = aligned_width(down.input_size)
    if size != down.input_size and up.has_float_weight and down.has_float_weight:
        up.widen_outputs(size, num_parts)
        down.widen_inputs(size)


class LinearBase(WeightedLayer):
    """`x @ weight.T + bias` with `weight` `(output_size, input_size)`.

    Args:
        input_size: This rank's channels in.
        output_size: This rank's channels out.
        bias: Whether there is a bias.
        skip_bias_add: Return the bias instead of adding it.
        params_dtype: Dtype of float parameters; torch's default dtype if `None`.
        quant_config: How the weight is held. `None`: as the model that is being constructed says.
        prefix: The layer's name in the model.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        output_sizes: Sequence[int] | None = None,
        input_shard: Shard = WHOLE,
        output_shards: Sequence[Shard] | None = None,
    ) -> None:
        super().__init__(
            *(input_size, output_sizes or [output_size], params_dtype, quant_config, prefix),
            input_shard=input_shard,
            output_shards=output_shards,
        )
        self.skip_bias_add = skip_bias_add
        self.bias = None
        if bias:
            self.bias = new_parameter(
                output_size, dtype=params_dtype, loader=self.weight_loader, axes=Axes(), name="bias"
            )

    def process_weights_after_loading(self) -> None:
        """Lay the weight out for the kernels."""
        self.finish_loading()

    def widen_outputs(self, size: int, num_parts: int = 1) -> None:
        """Give each of `num_parts` equal parts of the output `size` channels; the new ones are zero."""
        with torch.no_grad():
            for name in ("weight", "bias"):
                parameter: nn.Parameter | None = getattr(self, name)
                if parameter is not None:
                    parts = parameter.view(num_parts, -1, *parameter.shape[1:])
                    wider = parts.new_zeros((num_parts, size, *parts.shape[2:]))
                    wider[:, : parts.shape[1]] = parts
                    setattr(self, name, nn.Parameter(wider.flatten(0, 1), requires_grad=False))
        self.output_sizes = [size] * num_parts

    def widen_inputs(self, size: int) -> None:
        """Take `size` channels; the weights of the new ones are zero."""
        wider = F.pad(self.weight.detach(), (0, size - self.input_size))
        self.weight = nn.Parameter(wider, requires_grad=False)
        self.input_size = size

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """`(..., input_size)` to `(..., output_size)`, and the bias if it was not added."""
        if self.skip_bias_add:
            return self._multiply(self, x, None), self.bias
        return self._multiply(self, x, self.bias), None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.input_size} -> {self.output_size}, bias={self.bias is not None}, {self.method.name}"


class ReplicatedLinear(LinearBase):
    """A linear layer that every rank holds whole."""


class ColumnParallelLinear(LinearBase):
    """A linear layer whose output channels are divided over ranks.

    Args as `LinearBase`, with whole sizes, and `gather_output`: collect the whole output on every rank.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        *,
        output_sizes: Sequence[int] | None = None,
        output_shards: Sequence[Shard] | None = None,
    ) -> None:
        sizes = output_sizes or [output_size]
        shards = output_shards or [current_tensor_parallel().shard] * len(sizes)
        what = f"output channels of {prefix or type(self).__name__}"
        shares = [shard.of(size, what) for size, shard in zip(sizes, shards, strict=True)]
        super().__init__(
            *(input_size, sum(shares), bias, skip_bias_add, params_dtype, quant_config, prefix),
            output_sizes=shares,
            output_shards=shards,
        )
        self.gather_output = gather_output
        if gather_output and self.tensor_parallel.size > 1:
            self.forward = self._forward_gathered  # type: ignore[method-assign]

    def _forward_gathered(self, x: torch.Tensor) -> LinearOutput:
        """`forward` that gathers each part of the output over ranks, and concatenates the parts."""
        output, bias = super().forward(x)
        parts = output.split_with_sizes(self.output_sizes, -1)
        return torch.cat([self.tensor_parallel.all_gather(part) for part in parts], -1), bias


class MergedColumnParallelLinear(ColumnParallelLinear):
    """Several column layers over one input as one multiplication, such as an MLP's gate and up projections.

    The parts are loaded with their index as shard id, or all at once from a tensor that is already fused.
    """

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        super().__init__(
            *(input_size, sum(output_sizes), bias, gather_output, skip_bias_add, params_dtype, quant_config, prefix),
            output_sizes=output_sizes,
        )


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one multiplication: `[q heads | k heads | v heads]`.

    Args:
        hidden_size: Channels in.
        head_size: Channels of a head.
        total_num_heads: Query heads over all ranks.
        total_num_kv_heads: Key/value heads over all ranks; as many as query heads if `None`. Where there are fewer than
            ranks, several ranks hold copies of one head.
        bias: Whether there is a bias.
        skip_bias_add: Return the bias instead of adding it.
        params_dtype: Dtype of float parameters; torch's default dtype if `None`.
        quant_config: How the weight is held. `None`: as the model that is being constructed says.
        prefix: The layer's name in the model.
    """

    def __init__(
        self,
        hidden_size: int,
        head_size: int,
        total_num_heads: int,
        total_num_kv_heads: int | None = None,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        self.head_size = head_size
        self.total_num_heads = total_num_heads
        self.total_num_kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        heads = current_tensor_parallel().shard
        self.num_heads = heads.of(self.total_num_heads, "attention heads")
        """This rank's query heads."""
        kv_heads = shard_of_kv_heads(heads, self.total_num_kv_heads)
        self.num_kv_heads = self.total_num_kv_heads // kv_heads.count
        """This rank's key/value heads."""
        self.q_size = self.num_heads * head_size
        self.kv_size = self.num_kv_heads * head_size
        sizes = [num * head_size for num in (self.total_num_heads, self.total_num_kv_heads, self.total_num_kv_heads)]
        super().__init__(
            hidden_size,
            sum(sizes),
            bias,
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
            output_sizes=sizes,
            output_shards=(heads, kv_heads, kv_heads),
        )

    def part_index(self, shard_id: ShardId) -> int:
        """Parts are named "q", "k" and "v"."""
        names = ("q", "k", "v")
        return super().part_index(names.index(shard_id) if shard_id in names else shard_id)

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The query `(..., q_size)`, key and value `(..., kv_size)` parts of an output, as views."""
        query, key, value = qkv.split_with_sizes((self.q_size, self.kv_size, self.kv_size), dim=-1)
        return query, key, value

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `split`, for an output `(num_tokens, ...)`, with an axis of heads: `(num_tokens, heads, head_size)`
        each."""
        heads = qkv.view(len(qkv), -1, self.head_size)
        query, key, value = heads.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value


class RowParallelLinear(LinearBase):
    """A linear layer whose input channels are divided over ranks, and its outputs summed over them.

    Args as `LinearBase`, with whole sizes, and `input_is_parallel`: the input is divided over ranks already;
    `reduce_results`: sum the outputs over ranks. The first rank adds the bias.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        reduce_results: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        shard = current_tensor_parallel().shard
        share = shard.of(input_size, f"input channels of {prefix or type(self).__name__}")
        super().__init__(
            *(share, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix), input_shard=shard
        )
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results
        if shard.count > 1:  # bound here, so that `forward` needs no check with one rank
            self.forward = self._forward_share  # type: ignore[method-assign]

    def _forward_share(self, x: torch.Tensor) -> LinearOutput:
        """`forward` of one of several ranks."""
        group = self.tensor_parallel
        if not self.input_is_parallel:
            x = x.narrow(-1, group.rank * self.input_size, self.input_size)
        adds_bias = group.rank == 0 and not self.skip_bias_add
        output = self._multiply(self, x, self.bias if adds_bias else None)
        if self.reduce_results:
            output = group.all_reduce(output)
        return output, self.bias if self.skip_bias_add else None


def shard_of_kv_heads(heads: Shard, num_kv_heads: int) -> Shard:
    """Which key/value heads belong to a rank's query heads. Raises `ConfigError` if they can't be shared evenly."""
    if num_kv_heads >= heads.count:
        heads.of(num_kv_heads, "key/value heads")
        return heads
    if heads.count % num_kv_heads:
        raise ConfigError(
            f"tensor_parallel_size: got {heads.count} for {num_kv_heads} key/value heads, expected a divisor or a "
            f"multiple of {num_kv_heads}. Change tensor_parallel_size (--tensor-parallel-size)."
        )
    return Shard(heads.index * num_kv_heads // heads.count, num_kv_heads)

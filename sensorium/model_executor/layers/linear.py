"""Linear layers that model files use: plain, column-split, merged, query-key-value, and row-split.

Each returns `(output, bias)`, where `bias` is only set when the caller asked to add it itself
(`skip_bias_add`). The names and arguments say how a layer would be divided over devices, so that a model file
doesn't change when it is; on one device all of them compute `x @ weight.T + bias`.

A parameter carries its own `weight_loader(parameter, tensor[, shard_id])`: a fused layer
(`MergedColumnParallelLinear`, `QKVParallelLinear`) is filled part by part from checkpoints that store the
parts separately.

Weights are laid out for the machine's kernels by `process_weights_after_loading`, or turned into integers by
`quantize_weights_after_loading`; the loader calls one of them, once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.errors import ModelError, WeightsError
from sensorium.kernels import PackedWeight, QuantizedWeight, pack, packed_linear, quantize, quantized_linear
from sensorium.kernels.quantized_linear import MAX_QUANTIZED_INPUTS

LinearOutput = tuple[torch.Tensor, nn.Parameter | None]


def new_parameter(
    *shape: int, dtype: torch.dtype | None = None, loader: Callable[..., None] | None = None
) -> nn.Parameter:
    """An unfilled parameter that a checkpoint fills through `loader` (by default a plain copy)."""
    parameter = nn.Parameter(torch.empty(shape, dtype=dtype or torch.get_default_dtype()), requires_grad=False)
    if loader is not None:
        parameter.__dict__["weight_loader"] = loader
    return parameter


def copy_weight(target: torch.Tensor, loaded: torch.Tensor, what: str) -> None:
    """Copy a checkpoint's tensor into (a part of) a parameter, converting its dtype.

    Raises:
        WeightsError: The shapes differ; `what` names the parameter.
    """
    if target.shape != loaded.shape:
        raise WeightsError(
            f"shape of {what}: got {tuple(loaded.shape)} from the checkpoint, expected "
            f"{tuple(target.shape)}. "
            "Check that config.json belongs to these weights."
        )
    target.copy_(loaded)


def friendly_width(size: int) -> int:
    """The least width from `size` on that a GPU's matrix units read at full speed.

    Rows that don't begin at multiples of 16 bytes are read in pieces of 2 or 4, by kernels of older GPUs. The inner
    3420 channels of Qwen2.5-VL's tower become 3456, a multiple of 64, as they are widened anyway.
    """
    return size if size % 8 == 0 else -(-size // 64) * 64


def widen_inner(up: LinearBase, down: LinearBase, num_parts: int = 1) -> None:
    """Widen what lies between two layers to a friendly width.

    `up` gives `num_parts` parts that become one input of `down`. New channels are zero before the activation, and
    `down` multiplies them with zero, so that results are equal.
    """
    size = friendly_width(down.input_size)
    if size != down.input_size:
        up.widen_outputs(size, num_parts)
        down.widen_inputs(size)


def without_memory(parameter: nn.Parameter) -> nn.Parameter:
    """A stand-in for a parameter whose values lie elsewhere: its shape and dtype, on the meta device."""
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def multiply(x: torch.Tensor, weight: PackedWeight | QuantizedWeight, bias: torch.Tensor | None) -> torch.Tensor:
    """`x @ weight.T + bias` with a weight in either layout."""
    if isinstance(weight, QuantizedWeight):
        return quantized_linear(x, weight, bias)
    return packed_linear(x, weight, bias)


def refuse_quantization(quant_config: object, prefix: str) -> None:
    """Raise `ModelError` if a layer is asked to hold a quantized checkpoint's weights, which nothing here does."""
    if quant_config is not None:
        raise ModelError(
            f"quant_config of {prefix or 'a layer'}: got {type(quant_config).__name__}, expected None. "
            "Quantized checkpoints are not supported; load one with float weights."
        )


class LinearBase(nn.Module):
    """`x @ weight.T + bias` with `weight` `(output_size, input_size)`.

    Args:
        input_size: Channels in.
        output_size: Channels out.
        bias: Whether there is a bias.
        skip_bias_add: Return the bias instead of adding it.
        params_dtype: Dtype of the parameters; torch's default dtype if `None`.
        quant_config: Must be `None`.
        prefix: The layer's name, for error messages.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__()
        refuse_quantization(quant_config, prefix)
        self.input_size = input_size
        self.output_size = output_size
        self.skip_bias_add = skip_bias_add
        self.prefix = prefix
        loader = self.weight_loader
        self.weight = new_parameter(output_size, input_size, dtype=params_dtype, loader=loader)
        self.bias = new_parameter(output_size, dtype=params_dtype, loader=loader) if bias else None
        self._packed: PackedWeight | QuantizedWeight | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether the weight is held as integers."""
        return isinstance(self._packed, QuantizedWeight)

    def weight_loader(self, param: nn.Parameter, loaded_weight: torch.Tensor) -> None:
        """Fill `param` (the weight or the bias) from the whole tensor."""
        copy_weight(param.data, loaded_weight, self._name_of(param))

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
        self.output_size = num_parts * size

    def widen_inputs(self, size: int) -> None:
        """Take `size` channels, of which the new ones count nothing."""
        wider = F.pad(self.weight.detach(), (0, size - self.input_size))
        self.weight = nn.Parameter(wider, requires_grad=False)
        self.input_size = size

    def process_weights_after_loading(self) -> None:
        """Lay the weight out for the kernels. The plain copy is given up where the layout is another one."""
        packed = self._packed = pack(self.weight)
        if packed.panels is not None:
            self.weight = without_memory(self.weight)
            # As a buffer it counts among the model's tensors.
            self.register_buffer("packed_weight", packed.panels, persistent=False)

    def can_quantize(self) -> bool:
        """Whether integers can sum over so many channels."""
        return self.input_size <= MAX_QUANTIZED_INPUTS

    def quantize_weights_after_loading(self) -> None:
        """Hold the weight as integers instead. The float weight is given up."""
        quantized = self._packed = quantize(self.weight)
        self.weight = without_memory(self.weight)
        for name, tensor in quantized.tensors().items():
            self.register_buffer(name, tensor, persistent=False)

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """`(..., input_size)` to `(..., output_size)`, and the bias if it was not added."""
        bias = None if self.skip_bias_add else self.bias
        packed = self._packed
        output = F.linear(x, self.weight, bias) if packed is None else multiply(x, packed, bias)
        return output, self.bias if self.skip_bias_add else None

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.input_size} -> {self.output_size}, bias={self.bias is not None}"

    def _name_of(self, param: nn.Parameter, shard: int | str | None = None) -> str:
        name = f"{self.prefix or type(self).__name__}.{'weight' if param is self.weight else 'bias'}"
        return name if shard is None else f"{name} (part {shard!r})"


class ReplicatedLinear(LinearBase):
    """A linear layer that every device would hold whole."""


class ColumnParallelLinear(LinearBase):
    """A linear layer whose output channels would be divided over devices.

    Args as `LinearBase`, and `gather_output`: collect the whole output on every device.
    """

    def __init__(
        self,
        input_size: int,
        output_size: int,
        bias: bool = True,
        gather_output: bool = False,
        skip_bias_add: bool = False,
        params_dtype: torch.dtype | None = None,
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__(input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix)
        self.gather_output = gather_output


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
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        self.output_sizes = list(output_sizes)
        super().__init__(
            input_size,
            sum(output_sizes),
            bias,
            gather_output,
            skip_bias_add,
            params_dtype,
            quant_config,
            prefix,
        )

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: int | None = None
    ) -> None:
        """Fill the part `loaded_shard_id` of `param`, or all of it if that is `None`."""
        target = param.data
        if loaded_shard_id is not None:
            start = sum(self.output_sizes[:loaded_shard_id])
            target = target.narrow(0, start, self.output_sizes[loaded_shard_id])
        copy_weight(target, loaded_weight, self._name_of(param, loaded_shard_id))


class QKVParallelLinear(ColumnParallelLinear):
    """Query, key and value projections as one multiplication: `[q heads | k heads | v heads]`.

    Args:
        hidden_size: Channels in.
        head_size: Channels of a head.
        total_num_heads: Query heads over all devices.
        total_num_kv_heads: Key/value heads over all devices; as many as query heads if `None`.
        bias: Whether there is a bias.
        skip_bias_add: Return the bias instead of adding it.
        params_dtype: Dtype of the parameters; torch's default dtype if `None`.
        quant_config: Must be `None`.
        prefix: The layer's name, for error messages.
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
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        self.head_size = head_size
        self.total_num_heads = total_num_heads
        self.total_num_kv_heads = total_num_heads if total_num_kv_heads is None else total_num_kv_heads
        self.num_heads = self.total_num_heads
        self.num_kv_heads = self.total_num_kv_heads
        self.q_size = self.num_heads * head_size
        self.kv_size = self.num_kv_heads * head_size
        super().__init__(
            hidden_size,
            self.q_size + 2 * self.kv_size,
            bias,
            skip_bias_add=skip_bias_add,
            params_dtype=params_dtype,
            quant_config=quant_config,
            prefix=prefix,
        )

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | None = None
    ) -> None:
        """Fill the part "q", "k" or "v" of `param`, or all of it if `loaded_shard_id` is `None`."""
        target = param.data
        if loaded_shard_id is not None:
            target = target.narrow(0, *self._part(loaded_shard_id))
        copy_weight(target, loaded_weight, self._name_of(param, loaded_shard_id))

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The query `(..., q_size)`, key and value `(..., kv_size)` parts of an output, as views."""
        query, key, value = qkv.split_with_sizes((self.q_size, self.kv_size, self.kv_size), dim=-1)
        return query, key, value

    def split_heads(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same of an output `(num_tokens, ...)` with an axis of heads, `(num_tokens, heads, head_size)` each."""
        heads = qkv.view(len(qkv), -1, self.head_size)
        query, key, value = heads.split_with_sizes((self.num_heads, self.num_kv_heads, self.num_kv_heads), dim=1)
        return query, key, value

    def _part(self, shard: str) -> tuple[int, int]:
        """Start and length of a part in the output channels."""
        parts = {
            "q": (0, self.q_size),
            "k": (self.q_size, self.kv_size),
            "v": (self.q_size + self.kv_size, self.kv_size),
        }
        return parts[shard]


class RowParallelLinear(LinearBase):
    """A linear layer whose input channels would be divided over devices, and its outputs summed over them.

    Args as `LinearBase`, and `input_is_parallel`: the input comes divided already; `reduce_results`: sum over
    devices.
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
        quant_config: Any = None,
        prefix: str = "",
    ) -> None:
        super().__init__(input_size, output_size, bias, skip_bias_add, params_dtype, quant_config, prefix)
        self.input_is_parallel = input_is_parallel
        self.reduce_results = reduce_results

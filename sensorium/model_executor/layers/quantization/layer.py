"""The layer whose `LinearMethod` decides how its weight is held: linear layers and output heads derive from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.distributed import WHOLE, Shard, current_tensor_parallel
from sensorium.errors import ModelError, WeightsError
from sensorium.model_executor.adapter import config_in_construction
from sensorium.model_executor.layers.parameters import Axes, copy_weight, new_parameter, without_memory
from sensorium.model_executor.layers.quantization.base_config import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.unquantized import FLOAT
from sensorium.model_executor.weight_tracking import parameter_replaced

ShardId: TypeAlias = int | str | tuple[int, int]
"""How a model's `load_weights` names a part of a fused layer: by index or name; for experts, by the expert's index and
the part's."""


class WeightedLayer(nn.Module):
    """A weight `(output_size, input_size)`, and the multiplication with it, which its method does.

    The output may consist of parts that checkpoints store separately, of `output_sizes` channels each.

    Args:
        input_size: Channels in.
        output_sizes: Channels out of each part; one part for a layer that isn't fused.
        params_dtype: Dtype of float parameters, inputs and outputs; torch's default dtype if `None`.
        quant_config: Chooses the method. `None`: that of the model that is being constructed, if it has one.
        prefix: The layer's name in the model.
        input_shard: Which of the checkpoint's input channels are this rank's `input_size`.
        output_shards: For each part of the output, which of its channels are this rank's. Everything by default.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        input_size: int,
        output_sizes: Sequence[int],
        params_dtype: torch.dtype | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
        *,
        input_shard: Shard = WHOLE,
        output_shards: Sequence[Shard] | None = None,
    ) -> None:
        super().__init__()
        self.tensor_parallel = current_tensor_parallel()
        self.input_shard = input_shard
        self.output_shards = list(output_shards or [WHOLE] * len(output_sizes))
        self.input_size = input_size
        self.output_sizes = list(output_sizes)
        self.params_dtype = params_dtype or torch.get_default_dtype()
        self.prefix = prefix
        self.keeps_weight = False
        """Whether another layer shares `weight`, so that it must stay as it is."""
        self.packed: Any = None
        """The weight in the method's layout."""
        self.loaded_by: LinearMethod | None = None
        """The method that loaded the weight. `method` may be another one since."""
        self._made: list[str] = []
        self._is_loading = False
        self.method = self.choose_method(checked(quant_config, prefix))
        self.method.create_weights(self)
        self._multiply = self._multiply_unfinished

    @property
    def has_float_weight(self) -> bool:
        """Whether `weight` is still in a float checkpoint's layout."""
        return self.packed is None and self.method.loads_float

    @property
    def output_size(self) -> int:
        """Channels out, of all parts together."""
        return sum(self.output_sizes)

    def choose_method(self, quant_config: QuantizationConfig | None) -> LinearMethod:
        """The method that this layer gets."""
        return FLOAT if quant_config is None else quant_config.method_for(self.prefix, self)

    def add_parameter(self, name: str, *shape: int, dtype: torch.dtype | None = None, axes: Axes) -> None:
        """Add a parameter that a checkpoint fills. Called by methods."""
        dtype = dtype or self.params_dtype
        parameter = new_parameter(*shape, dtype=dtype, loader=self.weight_loader, axes=axes, name=name)
        setattr(self, name, parameter)
        self._made.append(name)

    # Loading

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId | None = None
    ) -> None:
        """Fill `param` from a checkpoint's tensor, or only the part that `loaded_shard_id` names.

        Raises:
            WeightsError: It doesn't fit.
        """
        name: str = param.__dict__.get("param_name", "weight")
        loaded_weight = self.reshaped(name, loaded_weight)
        self.method.before_loading(self, name, loaded_weight)
        part = None if loaded_shard_id is None else self.part_index(loaded_shard_id)
        shown = self._shown(name, loaded_shard_id)
        current: nn.Parameter | None = getattr(self, name, None)
        if current is None:
            raise WeightsError(
                f"{shown}: got it beside a weight in float, expected none. The checkpoint quantizes a part of this "
                "layer only; use one that treats all parts of a fused layer alike."
            )
        self._is_loading |= name in self._made
        target, share = self.part_of(current, part), self.share_of(current, loaded_weight, part, shown)
        if share.numel() == 1 and current.__dict__["axes"].output_block is None:
            share = share.expand(target.shape)  # one scale for all parts, because the checkpoint's tensor is fused
        copy_weight(target, share, shown)

    def reshaped(self, name: str, loaded: torch.Tensor) -> torch.Tensor:
        """A checkpoint's tensor in the shape of the parameter `name`, for formats that differ in it."""
        wanted: nn.Parameter | None = getattr(self, name, None)
        if name in ("weight", "bias") or wanted is None:
            return loaded
        if loaded.numel() == 1:
            return loaded.reshape([1] * wanted.dim())
        return loaded.reshape(-1, *[1] * (wanted.dim() - 1)) if loaded.dim() != wanted.dim() else loaded

    def part_index(self, shard_id: ShardId) -> int:
        """The index of the part that a shard id names. Raises `WeightsError` if there is none."""
        if isinstance(shard_id, int) and 0 <= shard_id < len(self.output_sizes):
            return shard_id
        raise WeightsError(
            f"shard id of {self._shown('weight')}: got {shard_id!r}, expected an index below {len(self.output_sizes)}. "
            "Correct it in the model's load_weights."
        )

    def part_of(self, param: nn.Parameter, part: int | None) -> torch.Tensor:
        """The entries of a parameter that belong to a part of the output; all of them for None."""
        axes: Axes = param.__dict__["axes"]
        if part is None:
            return param.data
        entries = [axes.entries(size) for size in self.output_sizes]
        return param.data.narrow(axes.output, sum(entries[:part]), entries[part])

    def share_of(self, param: nn.Parameter, loaded: torch.Tensor, part: int | None, what: str) -> torch.Tensor:
        """This rank's share of a checkpoint's tensor. It is a view if possible, so that only its bytes are read from
        the file.

        Raises:
            WeightsError: It can't be divided over the ranks; `what` names the parameter.
        """
        axes: Axes = param.__dict__["axes"]
        if axes.input is not None:
            loaded = _share(loaded, axes.input, self.input_shard, self.input_size, axes.input_block, what)
        if axes.output_block is None or all(shard.count == 1 for shard in self.output_shards):
            return loaded
        block = axes.output_block
        if part is not None:
            return _share(loaded, axes.output, self.output_shards[part], self.output_sizes[part], block, what)
        whole = [axes.entries(n * shard.count) for n, shard in zip(self.output_sizes, self.output_shards, strict=True)]
        if sum(whole) != loaded.shape[axes.output]:
            return loaded  # it doesn't fit, and `copy_weight` raises
        pieces = zip(loaded.split_with_sizes(whole, axes.output), self.output_shards, self.output_sizes, strict=True)
        shares = [_share(piece, axes.output, shard, size, block, what) for piece, shard, size in pieces]
        return shares[0] if len(shares) == 1 else torch.cat(shares, axes.output)

    def layer_of_parts(self, first: int, last: int) -> WeightedLayer:
        """A layer whose output is the parts `[first, last)` of this one's. Call it before loading is finished.

        Its parameters are views of this one's.
        """
        with torch.device("meta"):
            layer = WeightedLayer(
                self.input_size,
                self.output_sizes[first:last],
                self.params_dtype,
                None,
                f"{self.prefix}[{first}:{last}]",
            )
        layer.drop_parameters()
        layer.method = self.method
        layer.keeps_weight = self.keeps_weight
        for name in self._made:
            parameter: nn.Parameter = getattr(self, name)
            axes: Axes = parameter.__dict__["axes"]
            entries = [axes.entries(size) for size in self.output_sizes[:last]]
            begin = sum(entries[:first])
            own = parameter.data.narrow(axes.output, begin, sum(entries[first:]))
            setattr(layer, name, nn.Parameter(own, requires_grad=False))
            layer._made.append(name)
        return layer

    def start_over(self, method: LinearMethod) -> None:
        """Give the layer another method, and new parameters. For `LinearMethod.before_loading`.

        Raises:
            WeightsError: A part was loaded already: the checkpoint stores the parts of this fused layer differently.
        """
        if self._is_loading:
            raise WeightsError(
                f"{self._shown('weight')}: got parts that are quantized and parts that aren't, expected one kind. "
                "Use a checkpoint that treats all parts of a fused layer alike."
            )
        before = self.drop_parameters()
        self.method = method
        with before["weight"].device:
            method.create_weights(self)
        for name in self._made:
            parameter_replaced(before.get(name), getattr(self, name))

    def share_weight(self, weight: nn.Parameter) -> None:
        """Use another layer's float weight, which stays as it is."""
        if not self.method.loads_float:
            self.drop_parameters()
            self.method = FLOAT
        self.weight = weight
        self.keeps_weight = True

    def drop_parameters(self) -> dict[str, nn.Parameter]:
        """Remove the parameters that `add_parameter` added, and return them by name."""
        dropped = {name: getattr(self, name) for name in self._made}
        for name in self._made:
            delattr(self, name)
        self._made = []
        return dropped

    def share_given_weight(self) -> None:
        """Called after construction: handles a model class that assigned another layer's weight to this one."""
        owner = getattr(self.weight.__dict__.get("weight_loader"), "__self__", self)
        if owner is not self:
            self.share_weight(self.weight)

    def finish_loading(self) -> None:
        """Lay the weight out for the kernels. Called once, after every parameter has its value."""
        self.loaded_by = self.method
        self.method.after_loading(self)
        self._multiply = self.method.apply

    def wrap_method(self, wrap: Callable[[LinearMethod], LinearMethod]) -> None:
        """Wrap the layer's method in one that adds to its results, as adapters do. Called once loading is finished."""
        if self.packed is None:
            self.finish_loading()
        self.method = wrap(self.method)
        self._multiply = self.method.apply

    def give_up_weight(self) -> None:
        """Free the memory of `weight`, unless another layer shares it. Called when the values are held in another
        layout."""
        if not self.keeps_weight:
            self.weight = without_memory(self.weight)

    # Running

    def multiply(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`x @ weight.T + bias`: `(..., input_size)` to `(..., output_size)`."""
        return self._multiply(self, x, bias)

    def _multiply_unfinished(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """`multiply` until loading is finished: reads `weight`, which may still change."""
        assert layer is self
        if not self.has_float_weight:
            raise ModelError(
                f"{self._shown('weight')}: got an input before finish_loading, expected none. Call "
                "sensorium.model_executor.model_loader.finish_loading(model) once it is filled."
            )
        return F.linear(x, self.weight, bias)

    def _shown(self, name: str, shard: ShardId | None = None) -> str:
        """A parameter's name for messages."""
        name = f"{self.prefix or type(self).__name__}.{name}"
        return name if shard is None else f"{name} (part {shard!r})"


def _share(loaded: torch.Tensor, axis: int, shard: Shard, size: int, block: int, what: str) -> torch.Tensor:
    """A shard of a tensor along an axis whose entries stand for `block` channels each; the shard has `size`
    channels."""
    if shard.count == 1:
        return loaded
    if size % block or loaded.shape[axis] % shard.count:
        raise WeightsError(
            f"{what}: got {loaded.shape[axis]} entries for blocks of {block} channels, expected blocks that "
            f"{shard.count} ranks can share. Lower tensor_parallel_size (--tensor-parallel-size)."
        )
    num_entries = loaded.shape[axis] // shard.count
    return loaded.narrow(axis, shard.index * num_entries, num_entries)


def checked(quant_config: QuantizationConfig | None, what: str) -> QuantizationConfig | None:
    """The quantization for a layer: what its model class passes, else that of the model in construction.

    Raises:
        ModelError: The argument isn't a `QuantizationConfig`; `what` names the layer.
    """
    if quant_config is None:
        config = config_in_construction()
        return None if config is None else config.quant_config
    if not isinstance(quant_config, QuantizationConfig):
        raise ModelError(
            f"quant_config of {what or 'a layer'}: got {type(quant_config).__name__}, expected a QuantizationConfig or "
            "None. Pass on the one that the model's constructor gets."
        )
    return quant_config

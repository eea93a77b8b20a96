"""A linear layer with one weight for each group of rows: the weights of a mixture of experts.

The groups' weights are the parts of one fused layer `(num_groups * output_size, input_size)`: they load, and are
divided over ranks, as those of any other. On a GPU they stay one tensor, and one launch multiplies all rows
(`sensorium.kernels.grouped_linear`). On a CPU each group becomes a layer with its own `LinearMethod`, and only groups
that have rows are computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import torch
from torch import nn

from sensorium.distributed import WHOLE, Shard
from sensorium.errors import ModelError, WeightsError
from sensorium.kernels import RowGroups, grouped_linear
from sensorium.model_executor.layers.parameters import Axes, new_parameter, without_memory
from sensorium.model_executor.layers.quantization import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.layer import ShardId, WeightedLayer
from sensorium.model_executor.layers.quantization.unquantized import FLOAT


class GroupedLinear(WeightedLayer):
    """`x[i] @ weight[g].T + bias[g]` for each row `i` of group `g`.

    Checkpoints store the groups separately, or stacked in one tensor `(num_groups, output_size, input_size)`. Its last
    two axes may be transposed, which is recognised by their sizes where these differ.

    Args:
        num_groups: How many there are, over all ranks.
        input_size: Channels in, over all ranks.
        output_sizes: Channels out, over all ranks, of each part that checkpoints may store separately.
        bias: Whether there is a bias.
        quant_config: How the weight is held. `None`: as the model that is being constructed says.
        prefix: The layer's name in the model.
        input_shard: Which input channels are this rank's.
        output_shard: Which output channels of each part are this rank's.
        group_shard: Which groups are this rank's.
        is_transposed: Stacked float weights are `(num_groups, input_size, output_size)`, whatever the sizes.
        is_interleaved: In stacked tensors the parts' output channels alternate.
    """

    def __init__(
        self,
        num_groups: int,
        input_size: int,
        output_sizes: Sequence[int],
        *,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        input_shard: Shard = WHOLE,
        output_shard: Shard = WHOLE,
        group_shard: Shard = WHOLE,
        is_transposed: bool = False,
        is_interleaved: bool = False,
    ) -> None:
        self.total_num_groups = num_groups
        self.num_groups = num_groups = group_shard.of(num_groups, f"experts of {prefix}")
        """This rank's."""
        self.first_group = group_shard.index * num_groups
        self.num_parts = len(output_sizes)
        self.is_transposed = is_transposed
        self.is_interleaved = is_interleaved
        shares = [output_shard.of(size, f"output channels of {prefix}") for size in output_sizes]
        super().__init__(
            *(input_shard.of(input_size, f"input channels of {prefix}"), shares * num_groups),
            None,
            quant_config,
            prefix,
            input_shard=input_shard,
            output_shards=[output_shard] * (self.num_parts * num_groups),
        )
        self.bias = None
        if bias:
            self.bias = new_parameter(self.output_size, loader=self.weight_loader, axes=Axes(), name="bias")
        self.layers: tuple[WeightedLayer, ...] = ()
        """One layer per group, on a CPU, once loading is finished."""

    # Loading

    def part_index(self, shard_id: ShardId) -> int:
        """A shard id is `(group index, part index)`."""
        if isinstance(shard_id, tuple):
            group, part = shard_id
            if self._has_group(group) and 0 <= part < self.num_parts:
                return (group - self.first_group) * self.num_parts + part
        raise WeightsError(
            f"part of {self._shown('weight')}: got {shard_id!r}, expected the index of one of {self.total_num_groups} "
            f"experts and of one of {self.num_parts} parts. Check that config.json belongs to these weights."
        )

    def _has_group(self, group: int) -> bool:
        """Whether a group is this rank's."""
        return self.first_group <= group < self.first_group + self.num_groups

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: ShardId | None = None
    ) -> None:
        """Fill `param` from the stacked tensor of all groups, or the part that `loaded_shard_id` names, unless that is
        another rank's."""
        if isinstance(loaded_shard_id, tuple):
            group = loaded_shard_id[0]
            if 0 <= group < self.total_num_groups and not self._has_group(group):
                return
        if loaded_shard_id is None:
            loaded_weight = self._unstacked(param.__dict__["param_name"], loaded_weight)
        super().weight_loader(param, loaded_weight, loaded_shard_id)

    def _unstacked(self, name: str, loaded: torch.Tensor) -> torch.Tensor:
        """A stacked tensor as this layer holds it: the groups concatenated along the output channels."""
        if loaded.dim() < 2 or len(loaded) != self.total_num_groups:
            return loaded  # it doesn't fit, and `copy_weight` raises
        loaded = loaded.narrow(0, self.first_group, self.num_groups)
        inputs = self.input_size * self.input_shard.count
        is_matrix = name == "weight" and loaded.is_floating_point() and loaded.dim() == 3
        if is_matrix and (self.is_transposed or (loaded.shape[2] != inputs and loaded.shape[1] == inputs)):
            loaded = loaded.transpose(1, 2)
        if self.is_interleaved:
            pairs = loaded.reshape(len(loaded), -1, self.num_parts, *loaded.shape[2:])
            loaded = pairs.transpose(1, 2).flatten(1, 2)
        return loaded.flatten(0, 1)

    def process_weights_after_loading(self) -> None:
        """Lay the weights out for the kernels."""
        self.finish_loading()

    def finish_loading(self) -> None:
        """See `WeightedLayer`."""
        if self.weight.is_cuda:
            self._hold_together()
        else:
            self._hold_apart()

    def _hold_together(self) -> None:
        """Hold all weights in one float tensor, which the GPU's kernel needs."""
        weight = self.method.float_weight(self)
        self.loaded_by = FLOAT if self.method.loads_float else self.method
        if not self.method.loads_float:
            self.drop_parameters()
            self.register_buffer("packed_weight", weight, persistent=False)
            self.weight = without_memory(nn.Parameter(weight, requires_grad=False))
        self.method, self.packed = FLOAT, self._stacked(weight)

    def _hold_apart(self) -> None:
        """Make a layer of each group, and let its method lay out the weight."""
        layers = []
        for group in range(self.num_groups):
            layer = self.layer_of_parts(group * self.num_parts, (group + 1) * self.num_parts)
            layer.finish_loading()
            layers.append(layer)
        self.loaded_by, self.method = layers[0].loaded_by, layers[0].method
        for layer in layers:
            layer.loaded_by = None  # the load report counts all groups as one layer
        weight = without_memory(self.weight)
        self.drop_parameters()
        self.weight = weight
        self.layers = tuple(layers)
        self.packed = self.groups = nn.ModuleList(layers)

    def _stacked(self, flat: torch.Tensor) -> torch.Tensor:
        """`(num_groups * n, ...)` as `(num_groups, n, ...)`."""
        return flat.view(self.num_groups, -1, *flat.shape[1:])

    def wrap_method(self, wrap: Callable[[LinearMethod], LinearMethod]) -> NoReturn:
        """Refused: rows are sorted by expert here, so that the adapter ids of the batch no longer match them."""
        raise ModelError(
            f"adapter of {self.prefix}: got one for the experts of a mixture, expected none. Leave the experts out of "
            "the adapter's target modules."
        )

    # Running

    def forward(self, x: torch.Tensor, groups: RowGroups) -> torch.Tensor:
        """`(num_rows, input_size)`, sorted by group, to `(num_rows, output_size / num_groups)`.

        Rows behind those of all groups have no values, or, on a CPU, aren't there.
        """
        bias = None if self.bias is None else self._stacked(self.bias)
        if not self.layers:
            weight = self._stacked(self.weight) if self.packed is None else self.packed
            return grouped_linear(x, weight, groups, bias)
        products = [
            self.layers[group].multiply(x[begin:end], None if bias is None else bias[group])
            for group, begin, end in groups.present()
        ]
        return torch.cat(products) if products else x.new_empty(0, self.output_size // self.num_groups)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.num_groups} x ({self.input_size} -> {self.output_size // self.num_groups}), {self.method.name}"

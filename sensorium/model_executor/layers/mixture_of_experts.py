"""A mixture of experts: a router chooses a few gated MLPs for each row, and their weighted sum is the row's output.

A row is repeated for each of its experts, and rows are sorted by expert, so that each projection of all experts is one
grouped product. A row's output doesn't depend on the other rows of the batch: neither its products do, nor the order in
which they are added. Nothing here makes the host wait for the GPU.

Each rank holds a share of each expert's inner channels, or some experts whole (expert parallelism), and outputs are
summed over ranks. Every rank holds the whole router and has all rows, so nothing else is exchanged.

Source: Shazeer et al. 2017, section 2; `transformers` `integrations/moe.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.distributed import WHOLE, current_division, current_tensor_parallel
from sensorium.errors import ModelError
from sensorium.kernels import RowGroups
from sensorium.model_executor.adapter_rows import split_rows
from sensorium.model_executor.layers.activation import Activation
from sensorium.model_executor.layers.grouped_linear import GroupedLinear
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import LinearMethod, QuantizationConfig
from sensorium.model_executor.layers.quantization.unquantized import FLOAT

CHUNK_ROWS = 1024
"""Rows that go through the experts at once on a CPU: see `decoder.MLP_CHUNK_ROWS`."""


@dataclass(frozen=True, slots=True)
class Routing:
    """How experts are chosen from a router's logits, and how much each counts."""

    top_k: int
    """Experts of a row."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """The function from logits to scores, computed in float32."""
    is_normalized: bool = True
    """Whether the weights of a row's experts are divided by their sum."""
    scale: float = 1.0
    """A factor on the weights."""
    num_groups: int = 1
    """Into how many groups of neighbours the experts are divided. A row's experts come from its `top_groups` best
    groups; a group's score is the sum of its two best experts' (DeepSeek-V3)."""
    top_groups: int = 1


def route(
    logits: torch.Tensor, routing: Routing, correction: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights `(num_rows, top_k)` float32 and the indices `(num_rows, top_k)` int64 of each row's experts.

    Args:
        logits: `(num_rows, num_experts)`.
        routing: The rule.
        correction: `(num_experts,)`, added to scores when experts are chosen, not to their weights.
    """
    wide = logits.float()
    scores = wide.softmax(-1) if routing.scoring == "softmax" else wide.sigmoid()
    choice = scores if correction is None else scores + correction.float()
    if routing.num_groups > 1:
        groups = choice.view(len(choice), routing.num_groups, -1)
        best = groups.topk(2, -1).values.sum(-1).topk(routing.top_groups, -1).indices
        is_left_out = torch.ones_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, False)
        choice = groups.masked_fill(is_left_out.unsqueeze(-1), float("-inf")).flatten(-2)
    experts = choice.topk(routing.top_k, -1).indices
    weights = scores.gather(-1, experts)
    if routing.is_normalized:
        total = weights.sum(-1, keepdim=True)
        weights = weights / (total if routing.scoring == "softmax" else total + 1e-20)
    return weights if routing.scale == 1.0 else weights * routing.scale, experts


class Router(ReplicatedLinear):
    """Gives each expert a logit. It is never quantized: small differences decide which experts are chosen."""

    e_score_correction_bias: nn.Parameter | None
    """`(num_experts,)`, see `route`; the name is that of checkpoints."""

    def __init__(self, hidden_size: int, num_experts: int, *, bias: bool, has_correction: bool, prefix: str) -> None:
        super().__init__(hidden_size, num_experts, bias, prefix=prefix)
        self.e_score_correction_bias = new_parameter(num_experts, dtype=torch.float32) if has_correction else None

    def choose_method(self, quant_config: QuantizationConfig | None) -> LinearMethod:
        """Float, whatever method the other layers have."""
        return FLOAT


class Experts(nn.Module):
    """The gated MLPs `down(act([gate(x), up(x)]))`, and the weighted sum of those that a row is routed to.

    Args:
        num_experts: How many there are.
        hidden_size: Channels in and out.
        intermediate_size: Channels within an expert.
        act_fn: A function of `[gate, up]` `(rows, 2 * intermediate_size)`.
        bias: Whether projections have biases.
        quant_config: How weights are held.
        prefix: The module's name in the model.
        is_transposed: See `GroupedLinear`.
        is_interleaved: Whether gate and up alternate, see `GroupedLinear`.
    """

    def __init__(
        self,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Activation,
        *,
        bias: bool = False,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        is_transposed: bool = False,
        is_interleaved: bool = False,
    ) -> None:
        super().__init__()
        self.tensor_parallel = current_tensor_parallel()
        self.num_experts = num_experts
        shard = self.tensor_parallel.shard
        self.is_divided_by_expert = current_division().experts and shard.count > 1
        inner_shard, expert_shard = (WHOLE, shard) if self.is_divided_by_expert else (shard, WHOLE)
        self.gate_up_proj = GroupedLinear(
            *(num_experts, hidden_size, [intermediate_size] * 2),
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
            output_shard=inner_shard,
            group_shard=expert_shard,
            is_transposed=is_transposed,
            is_interleaved=is_interleaved,
        )
        self.down_proj = GroupedLinear(
            *(num_experts, intermediate_size, [hidden_size]),
            bias=bias,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
            input_shard=inner_shard,
            group_shard=expert_shard,
            is_transposed=is_transposed,
        )
        self.act_fn = act_fn

    def process_weights_after_loading(self) -> None:
        """Where ranks share an expert, only the first keeps its output bias, so that the sum has it once."""
        if self.tensor_parallel.rank > 0 and self.down_proj.bias is not None and not self.is_divided_by_expert:
            self.down_proj.bias.zero_()

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """`(num_rows, hidden_size)` to the same, given what `route` returned for the rows."""
        top_k = experts.shape[1]
        num_own = self.gate_up_proj.num_groups
        if self.is_divided_by_expert:  # others' go behind the last group
            experts = experts - self.gate_up_proj.first_group
            is_foreign = (experts < 0) | (experts >= num_own)
            experts = experts.masked_fill(is_foreign, num_own)
        chosen = experts.flatten()
        order = chosen.argsort(stable=True)
        groups = RowGroups.of_sorted(chosen.index_select(0, order), num_own)
        rows = hidden_states.index_select(0, order // top_k)
        inner = self.act_fn(self.gate_up_proj.forward(rows, groups))
        products = self.down_proj.forward(inner, groups)
        if len(products) < len(order):
            products = F.pad(products, (0, 0, 0, len(order) - len(products)))
        by_row = products.index_select(0, order.argsort()).view(-1, top_k, products.shape[1])
        if self.is_divided_by_expert:
            by_row = by_row.masked_fill(is_foreign.unsqueeze(-1), 0)
        summed = (by_row.float() * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)
        return self.tensor_parallel.all_reduce(summed)


class MixtureOfExperts(nn.Module):
    """Router and experts: replaces a decoder layer's MLP.

    Args:
        experts: The MLPs.
        routing: How they are chosen.
        hidden_size: Channels in and out.
        router_bias: Whether the router has a bias.
        has_correction: Whether the router has a correction, see `route`.
        prefix: The module's name in the model.

    Raises:
        ModelError: `top_k` exceeds the number of experts.
    """

    def __init__(
        self,
        experts: Experts,
        routing: Routing,
        hidden_size: int,
        *,
        router_bias: bool = False,
        has_correction: bool = False,
        prefix: str = "",
    ) -> None:
        super().__init__()
        if not 1 <= routing.top_k <= experts.num_experts:
            raise ModelError(
                f"experts of a row: got {routing.top_k}, expected 1 to {experts.num_experts}, of which the model has. "
                "Correct num_experts_per_tok in config.json."
            )
        self.gate = Router(
            *(hidden_size, experts.num_experts),
            bias=router_bias,
            has_correction=has_correction,
            prefix=f"{prefix}.gate",
        )
        self.experts = experts
        self.routing = routing

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(num_rows, hidden_size)` to the same."""
        if hidden_states.is_cpu and len(hidden_states) > CHUNK_ROWS:
            return torch.cat([self._transform(rows) for rows in split_rows(hidden_states, CHUNK_ROWS)])
        return self._transform(hidden_states)

    def _transform(self, hidden_states: torch.Tensor) -> torch.Tensor:
        logits, _ = self.gate.forward(hidden_states)
        weights, experts = route(logits, self.routing, self.gate.e_score_correction_bias)
        return self.experts.forward(hidden_states, weights, experts)

"""Linear attention with a state of fixed size: a short convolution, followed by the gated delta rule.

A sequence's state is the last inputs of the convolution and a matrix per head, in a row of this layer's cache. A step
reads a sequence's state from one row and writes the new one into another (see `AttentionMetadata.state_rows`), so that
a step can be repeated.

Source: Yang et al. 2024, "Gated Delta Networks"; the layer of this name in `transformers.models.qwen3_5`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.cache_spec import StateSpec, StateTensor
from sensorium.config import EngineConfig
from sensorium.kernels.delta_rule import gated_delta_chunks, gated_delta_step
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.layers.parameters import new_parameter


class GatedDeltaNet(nn.Module):
    """A layer's token mixer, which replaces attention. Parameters are named as in checkpoints."""

    def __init__(self, config: EngineConfig, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.num_key_heads: int = text.linear_num_key_heads
        self.num_value_heads: int = text.linear_num_value_heads
        self.key_size: int = text.linear_key_head_dim
        self.value_size: int = text.linear_value_head_dim
        key_channels, value_channels = self.num_key_heads * self.key_size, self.num_value_heads * self.value_size
        self._parts = (key_channels, key_channels, value_channels)
        self._kernel_size: int = text.linear_conv_kernel_dim

        def projection(name: str, size: int) -> ReplicatedLinear:
            return ReplicatedLinear(
                text.hidden_size, size, bias=False, quant_config=config.quant_config, prefix=f"{prefix}.{name}"
            )

        self.in_proj_qkv = projection("in_proj_qkv", sum(self._parts))
        self.in_proj_z = projection("in_proj_z", value_channels)
        self.in_proj_b = projection("in_proj_b", self.num_value_heads)
        self.in_proj_a = projection("in_proj_a", self.num_value_heads)
        self.conv1d = _DepthwiseConv(sum(self._parts), self._kernel_size)
        self.dt_bias = new_parameter(self.num_value_heads)
        self.A_log = new_parameter(self.num_value_heads)
        self.norm = RMSNorm(self.value_size, eps=text.rms_norm_eps)
        self.out_proj = ReplicatedLinear(
            value_channels, text.hidden_size, bias=False, quant_config=config.quant_config, prefix=f"{prefix}.out_proj"
        )
        self.group_index = 0
        """The index of its cache group; set when loading has found all layers."""

    def cache_spec(self) -> StateSpec:
        """The convolution's last inputs, and a matrix per value head."""
        matrices = (self.num_value_heads, self.key_size, self.value_size)
        return StateSpec((StateTensor((sum(self._parts), self._kernel_size - 1)), StateTensor(matrices, "float32")))

    def forward(
        self, hidden_states: torch.Tensor, kv_cache: LayerCache, attn_metadata: AttentionMetadata
    ) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same."""
        batch = attn_metadata.of_group(self.group_index)
        inputs = self.in_proj_qkv.forward(hidden_states)[0]
        rates = torch.sigmoid(self.in_proj_b.forward(hidden_states)[0])
        steps = F.softplus(self.in_proj_a.forward(hidden_states)[0].float() + self.dt_bias)
        decays = -self.A_log.float().exp() * steps
        assert isinstance(kv_cache, tuple)
        before = self._states_before(kv_cache, batch)
        if batch.max_seqlen_q == 1:
            mixed, after = self._step(inputs, decays, rates, before)
        else:
            mixed, after = self._run(inputs, decays, rates, before, batch.query_lens_host)
        if batch.state_rows is not None:
            for cached, state in zip(kv_cache, after, strict=True):
                cached.index_copy_(0, batch.state_rows[1], state.to(cached.dtype))
        gates = self.in_proj_z.forward(hidden_states)[0].view(mixed.shape)
        gated = self.norm.forward(mixed).float() * F.silu(gates.float())
        return self.out_proj.forward(gated.to(hidden_states.dtype).flatten(1))[0]

    def _states_before(self, kv_cache: tuple[torch.Tensor, ...], batch: AttentionMetadata) -> list[torch.Tensor]:
        """The states before the step, `(num_seqs, ...)` each; zeros for sequences without one."""
        if batch.state_rows is None:
            shapes = [tensor.shape for tensor in self.cache_spec().tensors]
            return [cached.new_zeros(batch.num_seqs, *shape) for cached, shape in zip(kv_cache, shapes, strict=True)]
        return [cached.index_select(0, batch.state_rows[0]) for cached in kv_cache]

    def _step(
        self, inputs: torch.Tensor, decays: torch.Tensor, rates: torch.Tensor, before: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Advance each sequence by one token: returns the outputs `(num_seqs, value heads, value_size)` and the new
        states."""
        window = torch.cat((before[0], inputs[:, :, None]), dim=2)
        convolved = F.silu((window * self.conv1d.weight[:, 0]).sum(-1))
        query, key, value = self._split(convolved)
        mixed, state = gated_delta_step(query, key, value, decays, rates, before[1])
        return mixed, [window[:, :, 1:], state]

    def _run(
        self,
        inputs: torch.Tensor,
        decays: torch.Tensor,
        rates: torch.Tensor,
        before: Sequence[torch.Tensor],
        query_lens: Sequence[int],
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Advance each sequence by any number of tokens. The leading sequences of one token (decodes) run together, the
        others one after the other."""
        mixed = inputs.new_empty(len(inputs), self.num_value_heads, self.value_size)
        after = [torch.empty_like(states) for states in before]
        num_single = next((i for i, count in enumerate(query_lens) if count != 1), len(query_lens))
        if num_single:
            first = slice(0, num_single)  # a slice of rows and of sequences alike
            mixed[first], updated = self._step(
                inputs[first], decays[first], rates[first], [each[first] for each in before]
            )
            for target, source in zip(after, updated, strict=True):
                target[first] = source.to(target.dtype)
        for i, (count, end) in enumerate(zip(query_lens, accumulate(query_lens), strict=True)):
            if i >= num_single and count:
                chunk = slice(end - count, end)
                window = torch.cat((before[0][i], inputs[chunk].t()), dim=1)
                convolved = F.silu(F.conv1d(window[None], self.conv1d.weight, groups=len(window))[0].t())
                query, key, value = self._split(convolved)
                mixed[chunk], after[1][i] = gated_delta_chunks(
                    query, key, value, decays[chunk], rates[chunk], before[1][i]
                )
                after[0][i] = window[:, count:]
        return mixed, after

    def _split(self, convolved: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and value `(num_tokens, value heads, size)`; a key head serves several value heads."""
        query, key, value = convolved.split_with_sizes(self._parts, dim=-1)
        shared = self.num_value_heads // self.num_key_heads
        query, key = (
            each.reshape(len(each), self.num_key_heads, self.key_size).repeat_interleave(shared, dim=1)
            for each in (query, key)
        )
        return query, key, value.reshape(len(value), self.num_value_heads, self.value_size)


class _DepthwiseConv(nn.Module):
    """The weight of a depthwise convolution along time: `(channels, 1, kernel_size)`."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.weight = new_parameter(channels, 1, kernel_size)

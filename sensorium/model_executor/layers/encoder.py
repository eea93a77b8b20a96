"""The transformer encoder that vision and audio towers are made of: pre-norm attention and MLP over whole
sequences.

Sequences of any lengths lie one after another in a flat batch, or have one length and an axis of their own;
see `MultiHeadAttention`. A tower says which norm, MLP and rotary angles it has, and renames its checkpoint's
weights to the names here: `norm1`, `attn.qkv_proj`, `attn.out_proj`, `norm2`, `mlp`.

Every rank holds the whole tower: to compute an item costs less than to exchange its activations between ranks.

Source: Dosovitskiy et al. 2020, section 3.1, with the norms before the sub-layers.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from sensorium.attention import MultiHeadAttention
from sensorium.distributed import ONE_RANK, constructing_for, constructing_tower
from sensorium.kernels import rotary_embedding
from sensorium.model_executor.layers.activation import get_act_fn
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearOutput,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    widen_inner,
)
from sensorium.model_executor.layers.parameters import new_parameter
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.rotary_embedding import CosSin


class PatchEmbedding(ReplicatedLinear):
    """A convolution whose kernel and stride are equal, computed as a matrix multiplication.

    The input is flattened patches `(..., channels * kernel volume)`, channels first; the checkpoint's weight is that of
    the convolution, `(out, channels, *kernel)`.
    """

    def reshaped(self, name: str, loaded: torch.Tensor) -> torch.Tensor:
        """A convolution's weight as a matrix."""
        return loaded.flatten(1) if name == "weight" and loaded.dim() > 2 else super().reshaped(name, loaded)

    def forward(self, x: torch.Tensor) -> LinearOutput:
        """As `ReplicatedLinear`, and converts patches, which processors return in float32, to the weight's dtype."""
        return super().forward(x.to(self.params_dtype))


def image_patches(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """Square patches of images: `(B, C, H, W)` to `(B, H/p * W/p, C * p * p)`. Pixels that don't fill a patch are
    dropped."""
    batch, channels, height, width = pixel_values.shape
    rows, columns = height // patch_size, width // patch_size
    grid = pixel_values[:, :, : rows * patch_size, : columns * patch_size].reshape(
        batch, channels, rows, patch_size, columns, patch_size
    )
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


class EncoderAttention(nn.Module):
    """Bidirectional self-attention within each sequence, with rotary angles where the tower has them.

    Args:
        hidden_size: Channels.
        num_heads: Heads, of `hidden_size / num_heads` channels each.
        bias: Whether the projections have biases.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
        output_bias: Whether the output projection has a bias; as `bias` by default.
        make_qk_norm: Makes the norms of queries and of keys, over all heads together.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        output_bias: bool | None = None,
        make_qk_norm: Callable[[], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.head_size = hidden_size // num_heads
        # Norms over all heads want them all.
        with constructing_tower(num_heads) if make_qk_norm is None else constructing_for(ONE_RANK):
            self.qkv_proj = QKVParallelLinear(
                *(hidden_size, self.head_size, num_heads),
                bias=bias,
                quant_config=quant_config,
                prefix=f"{prefix}.qkv_proj",
            )
            self.out_proj = RowParallelLinear(
                hidden_size,
                hidden_size,
                bias=bias if output_bias is None else output_bias,
                quant_config=quant_config,
                prefix=f"{prefix}.out_proj",
            )
        self.q_norm = None if make_qk_norm is None else make_qk_norm()
        self.k_norm = None if make_qk_norm is None else make_qk_norm()
        self.attn = MultiHeadAttention(self.qkv_proj.num_heads, self.head_size, self.head_size**-0.5)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos_sin: CosSin | None = None,
        cu_seqlens: torch.Tensor | None = None,
        key_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """`(B, S, hidden_size)` or, flat, `(T, hidden_size)` to the same."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = self.qkv_proj.split(qkv)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if cos_sin is not None:
            num_tokens = query.shape[0]
            query, key = rotary_embedding(
                query.view(num_tokens, -1, self.head_size), key.view(num_tokens, -1, self.head_size), *cos_sin
            )
            query, key = query.view(value.shape), key.view(value.shape)
        attended = self.attn(query, key, value, cu_seqlens=cu_seqlens, key_lens=key_lens)
        output: torch.Tensor = self.out_proj(attended)[0]
        return output


class EncoderMLP(nn.Module):
    """`fc2(act(fc1(x)))`, with `output_size` channels if that is given and `hidden_size` otherwise."""

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        hidden_act: str,
        bias: bool = True,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        output_size: int | None = None,
    ) -> None:
        super().__init__()
        with constructing_tower(intermediate_size):
            self.fc1 = ColumnParallelLinear(
                hidden_size, intermediate_size, bias=bias, quant_config=quant_config, prefix=f"{prefix}.fc1"
            )
            self.fc2 = RowParallelLinear(
                intermediate_size,
                output_size or hidden_size,
                bias=bias,
                quant_config=quant_config,
                prefix=f"{prefix}.fc2",
            )
        self.act_fn = get_act_fn(hidden_act)

    def process_weights_after_loading(self) -> None:
        """On a GPU, widen the inner channels to an aligned width, before the layers lay their weights out."""
        if self.fc1.weight.is_cuda:
            widen_inner(self.fc1, self.fc2)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """`(..., hidden_size)` to `(..., output_size)`."""
        output: torch.Tensor = self.fc2(self.act_fn(self.fc1(hidden_states)[0]))[0]
        return output


class EncoderLayer(nn.Module):
    """`x + attn(norm1(x))`, then `x + mlp(norm2(x))`.

    With `scaled_size`, the two terms are multiplied by the vectors `scale1` and `scale2` `(scaled_size,)` before they
    are added. Source: Touvron et al. 2021, section 2 (LayerScale).
    """

    def __init__(
        self,
        attn: EncoderAttention,
        mlp: nn.Module,
        norm1: nn.Module,
        norm2: nn.Module,
        scaled_size: int | None = None,
    ) -> None:
        super().__init__()
        self.norm1 = norm1
        self.attn = attn
        self.norm2 = norm2
        self.mlp = mlp
        self.scale1 = self.scale2 = None
        if scaled_size is not None:
            self.scale1, self.scale2 = new_parameter(scaled_size), new_parameter(scaled_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        cos_sin: CosSin | None = None,
        cu_seqlens: torch.Tensor | None = None,
        key_lens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `EncoderAttention.forward`."""
        attended = self.attn(self.norm1(hidden_states), cos_sin, cu_seqlens, key_lens)
        attended = attended if self.scale1 is None else attended * self.scale1
        if isinstance(self.norm2, RMSNorm):  # which adds in its own launch
            normed, hidden_states = self.norm2(attended, hidden_states)
        else:
            hidden_states = hidden_states + attended
            normed = self.norm2(hidden_states)
        output: torch.Tensor = self.mlp(normed)
        return hidden_states + (output if self.scale2 is None else output * self.scale2)

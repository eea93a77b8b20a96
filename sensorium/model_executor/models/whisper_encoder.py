"""The audio tower of Whisper, up to its last layer: from a spectrogram to a row per 20 ms.

Paper: Radford et al. 2022, section 2.2. Reference: `transformers` `WhisperEncoder`, `Qwen2AudioEncoder`.

Spectrograms are padded to the longest sound, and the reference computes the padding, too. Here only the sound's own
rows go through the layers, with the same result: the reference's attention is masked to them, and convolutions reach
one neighbour only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.model_executor.layers.encoder import (
    EncoderAttention,
    EncoderLayer,
    EncoderMLP,
)
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.models.utils import WeightsMapper

if TYPE_CHECKING:
    from transformers import PretrainedConfig


class WhisperEncoder(nn.Module):
    """Two convolutions, of which the second halves the rate, learned positions, and the layers.

    Args:
        config: The audio part of a Qwen2-Audio config, or a Whisper config.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
    """

    renames = WeightsMapper(
        orig_to_new_substr={
            ".self_attn_layer_norm.": ".norm1.",
            ".final_layer_norm.": ".norm2.",
            ".self_attn.": ".attn.",
            ".fc1.": ".mlp.fc1.",
            ".fc2.": ".mlp.fc2.",
        }
    )

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        size = config.d_model
        self.conv1 = nn.Conv1d(config.num_mel_bins, size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(size, size, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_source_positions, size)
        self.layers = nn.ModuleList(
            EncoderLayer(
                EncoderAttention(
                    size, config.encoder_attention_heads, quant_config=quant_config, prefix=f"{name}.attn"
                ),
                EncoderMLP(
                    size,
                    config.encoder_ffn_dim,
                    config.activation_function,
                    quant_config=quant_config,
                    prefix=f"{name}.mlp",
                ),
                nn.LayerNorm(size),
                nn.LayerNorm(size),
            )
            for name in (f"{prefix}.layers.{index}" for index in range(config.encoder_layers))
        )
        self.layer_norm = nn.LayerNorm(size)

    def forward(self, features: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
        """The rows of the sounds, concatenated, `(sum of rows_of_frames(n), d_model)`, without the last norm.

        Args:
            features: `(sounds, num_mel_bins, frames)`, padded as the feature extractor pads.
            num_frames: The number of each sound's frames without padding.
        """
        lengths = [rows_of_frames(each) for each in num_frames]
        hidden_states = torch.cat([self._embed_sound(*each) for each in zip(features, lengths, strict=True)])
        starts = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cu_seqlens=starts)
        return hidden_states

    def _embed_sound(self, features: torch.Tensor, length: int) -> torch.Tensor:
        """The first `length` input rows of the layers, for one sound alone: a batched convolution would round
        differently."""
        # The last row depends on one more frame than its own two.
        used = features[None, :, : 2 * length + 1].to(self.conv1.weight.dtype)
        rows = F.gelu(self.conv2(F.gelu(self.conv1(used))))[0].t()[:length]
        return rows + self.embed_positions.weight[:length]

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower from a checkpoint's names, relative to it."""
        return load_fused_weights(self, with_key_biases(self.renames.apply(weights)), FUSED_WEIGHTS)


def rows_of_frames(num_frames: int) -> int:
    """The number of rows after the second convolution."""
    return (num_frames - 1) // 2 + 1


def with_key_biases(weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, with zero biases for key projections, which have none: the fused layer of queries, keys and values
    needs them."""
    for name, tensor in weights:
        yield name, tensor
        if name.endswith("k_proj.weight"):
            yield name.removesuffix("weight") + "bias", torch.zeros(len(tensor))

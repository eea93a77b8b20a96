"""A model of your own in one file: it names the colour that its pictures have on average. `own_model.py` runs it.

Nothing is trained: each colour's word and each picture is a row of three numbers, and one attention layer with equal
weights computes the mean of the prompt's rows. Every command that loads a model takes such a file:
`sensorium serve CHECKPOINT --plugin colour_namer.py`. docs/adding_a_multimodal_model.md goes through one step by step.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from sensorium import ModelRegistry
from sensorium.attention import Attention, AttentionMetadata
from sensorium.inputs import INPUT_REGISTRY, DummyData
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.model_executor.models.utils import (
    AutoWeightsLoader,
    flatten_bn,
    merge_multimodal_embeddings,
)
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.sequence import SequenceData

IMAGE_TOKEN = 0


class ColourNamerConfig(PretrainedConfig):
    """Sizes, under the names that every config has."""

    model_type = "colour_namer"
    hidden_size, num_hidden_layers, num_attention_heads = 16, 1, 1
    vocab_size, max_position_embeddings = 16, 64


AutoConfig.register("colour_namer", ColourNamerConfig)


def mean_colours(_ctx: Any, data: Any) -> dict[str, torch.Tensor]:
    """The mapper: PIL images to `(images, 1, 3)`, between -1 and 1."""
    images = data if isinstance(data, list) else [data]
    colours = [np.asarray(image.convert("RGB"), dtype=np.float32).mean((0, 1)) for image in images]
    return {"pixel_values": torch.from_numpy(np.stack(colours))[:, None] / 127.5 - 1}


def dummy_data(_ctx: Any, seq_len: int, mm_counts: Any) -> DummyData:
    """The largest legal input: all the pictures, and text behind them."""
    count = mm_counts["image"]
    tokens = SequenceData.from_prompt_token_counts((IMAGE_TOKEN, count), (1, seq_len - count))
    return DummyData(tokens, {"image": [Image.new("RGB", (8, 8), "red")] * count})


class Mixer(nn.Module):
    """A decoder of one layer: each row becomes the mean of the rows up to it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = Attention(1, width, scale=1.0)

    def forward(
        self, kv_caches: Sequence[torch.Tensor], attn_metadata: AttentionMetadata, inputs_embeds: torch.Tensor
    ) -> torch.Tensor:
        """Rows to rows, `(num_tokens, hidden_size)`."""
        alike = torch.zeros_like(inputs_embeds)
        return self.attention(alike, alike, inputs_embeds, kv_caches[0], attn_metadata)


@MULTIMODAL_REGISTRY.register_image_input_mapper(mean_colours)
@MULTIMODAL_REGISTRY.register_max_image_tokens(1)
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(lambda _ctx, inputs: inputs)  # a picture is one row: nothing to expand
class ColourNamer(nn.Module, SupportsMultiModal):
    """The word whose colour is nearest to the mean of what came before."""

    def __init__(self, *, config: Any, prefix: str = "") -> None:
        super().__init__()
        sizes = config.model_config.hf_config
        self.words = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.mixer = Mixer(sizes.hidden_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rows of text and pictures to hidden states `(num_tokens, hidden_size)`."""
        rows = self.words(input_ids)
        if pixel_values is not None:
            colours = flatten_bn(pixel_values, concat=True).flatten(0, -2)
            padded = nn.functional.pad(colours, (0, rows.shape[-1] - 3)).to(rows.dtype)
            rows = merge_multimodal_embeddings(input_ids, rows, padded, IMAGE_TOKEN)
        return self.mixer(kv_caches, attn_metadata, inputs_embeds=rows)

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """How near each word is: `(num_rows, vocab_size)`."""
        return hidden_states @ self.words.weight.T

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Take the checkpoint's tensors by their names."""
        return AutoWeightsLoader(self).load_weights(weights)


ModelRegistry.register_model("ColourNamer", ColourNamer)

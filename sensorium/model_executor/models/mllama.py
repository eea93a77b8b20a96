"""Llama 3.2 Vision: Llama with additional layers that attend to a picture's tiles by cross-attention.

Paper: Grattafiori et al. 2024, "The Llama 3 Herd of Models", section 7. Reference: `transformers`
`MllamaForConditionalGeneration`. `<|image|>` marks the picture's place; a prompt has one picture at most.

As in the reference, tokens before the picture attend to all its rows, even those of missing tiles, and skip the MLPs of
these layers; tokens from the picture on attend to the rows of existing tiles. Without a picture these layers do
nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from sensorium.attention import Attention, AttentionMetadata, AttentionType
from sensorium.config import EngineConfig, ModelConfig
from sensorium.distributed import current_tensor_parallel
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.model_executor.layers.decoder import DecoderLayer, DecoderOptions, head_size_of, mlp_of, rope_of
from sensorium.model_executor.layers.encoder import EncoderAttention, EncoderMLP, PatchEmbedding, image_patches
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
    shard_of_kv_heads,
)
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights
from sensorium.model_executor.models.interfaces import SupportsCrossAttention, SupportsMultiModal
from sensorium.model_executor.models.media_common import as_items, language_config
from sensorium.model_executor.models.utils import AutoWeightsLoader, WeightsMapper, maybe_prefix
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs, PlaceholderRange
from sensorium.multimodal.hf_processors import cached_get_image_processor, processor_options
from sensorium.sequence import SequenceData

NUM_EXTRA_TOKENS = 8
"""Rows of the embedding table after the vocabulary; the first is that of `<|image|>`."""

# Input processor and mapper


def rows_of_tile(hf_config: Any) -> int:
    """The rows of a tile: its patches, and one for the tile itself."""
    vision = hf_config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2 + 1)


def input_processor(ctx: InputContext, inputs: TokenInputs) -> TokenInputs:
    """Check the prompt, and return the range of tokens up to the picture's, as the item's placeholder.

    Raises:
        InvalidRequestError: There is not one `<|image|>` for the picture.
    """
    pictures = as_items((inputs.get("multi_modal_data") or {}).get("image", []))
    token_ids, image_id = inputs["prompt_token_ids"], ctx.get_hf_config().image_token_index
    if token_ids.count(image_id) != len(pictures) or len(pictures) > 1:
        raise InvalidRequestError(
            f"got {len(pictures)} pictures and {token_ids.count(image_id)} times <|image|> in the prompt, expected one "
            "of each, or none. Change the prompt.",
            field="image",
        )
    if pictures:
        place = PlaceholderRange(offset=0, length=token_ids.index(image_id) + 1)
        inputs["multi_modal_placeholders"] = {"image": [place]}
    return inputs


def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int]) -> DummyData:
    """A picture with the most tiles."""
    from PIL import Image

    vision = ctx.get_hf_config().vision_config
    size = (vision.image_size * vision.max_num_tiles, vision.image_size)
    image_id = ctx.get_hf_config().image_token_index
    if not mm_counts["image"]:
        return DummyData(SequenceData.from_prompt_token_counts((0, seq_len)), None)
    tokens = SequenceData.from_prompt_token_counts((image_id, 1), (0, seq_len - 1))
    return DummyData(tokens, {"image": [Image.new("RGB", size)]})


def map_pictures(ctx: InputContext, data: Any) -> MultiModalKwargs:
    """`pixel_values` `(pictures, tiles, 3, height, width)`, padded with empty tiles, the id of the tiles' arrangement
    `(pictures, 1)`, and which tiles exist `(pictures, tiles)`."""
    config = ctx.model_config
    processor = cached_get_image_processor(config.model, **processor_options(config))
    processed = processor([[picture] for picture in as_items(data)], return_tensors="pt")
    return MultiModalKwargs(
        {
            "pixel_values": processed["pixel_values"][:, 0],
            "aspect_ratio_ids": processed["aspect_ratio_ids"],
            "aspect_ratio_mask": processed["aspect_ratio_mask"][:, 0],
        }
    )


def max_image_tokens(ctx: InputContext) -> int:
    """Rows of any picture."""
    config = ctx.get_hf_config()
    return rows_of_tile(config) * int(config.vision_config.max_num_tiles)


# The tower


class MllamaVisionAttention(EncoderAttention):
    """Attention of all rows to all, except that padding rows don't see one another."""

    def attend(self, hidden_states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """`(num_rows, hidden_size)` to the same."""
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = (
            part.view(len(part), -1, self.head_size).transpose(0, 1) for part in self.qkv_proj.split(qkv)
        )
        out = torch.empty_like(query)
        out[:, is_real] = F.scaled_dot_product_attention(query[None, :, is_real], key[None], value[None])[0]
        seen = key[None, :, is_real], value[None, :, is_real]
        out[:, ~is_real] = F.scaled_dot_product_attention(query[None, :, ~is_real], *seen)[0]
        output: torch.Tensor = self.out_proj(out.transpose(0, 1).flatten(1))[0]
        return output


class MllamaVisionLayer(nn.Module):
    """Attention and MLP, each after a norm, and in the global layers with a gate on its output."""

    def __init__(
        self, config: Any, quant_config: QuantizationConfig | None, prefix: str, *, is_gated: bool = False
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.attn = MllamaVisionAttention(size, config.attention_heads, False, quant_config, f"{prefix}.attn")
        self.mlp = EncoderMLP(
            size, config.intermediate_size, config.hidden_act, quant_config=quant_config, prefix=f"{prefix}.mlp"
        )
        self.input_layernorm = nn.LayerNorm(size, eps=config.norm_eps)
        self.post_attention_layernorm = nn.LayerNorm(size, eps=config.norm_eps)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if is_gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if is_gated else None

    def forward(self, hidden_states: torch.Tensor, is_real: torch.Tensor) -> torch.Tensor:
        """`(num_rows, hidden_size)` to the same."""
        attended = self.attn.attend(self.input_layernorm(hidden_states), is_real)
        hidden_states = hidden_states + (attended if self.gate_attn is None else self.gate_attn.tanh() * attended)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        output = output if self.gate_ffn is None else self.gate_ffn.tanh() * output
        summed: torch.Tensor = hidden_states + output
        return summed


class MllamaVisionLayers(nn.Module):
    """A stack of layers."""

    def __init__(
        self, config: Any, count: int, quant_config: QuantizationConfig | None, prefix: str, *, is_gated: bool
    ) -> None:
        super().__init__()
        names = (f"{prefix}.layers.{index}" for index in range(count))
        self.layers = nn.ModuleList(MllamaVisionLayer(config, quant_config, name, is_gated=is_gated) for name in names)

    def forward(self, hidden_states: torch.Tensor, is_real: torch.Tensor) -> list[torch.Tensor]:
        """The output of each layer, `(num_rows, hidden_size)`."""
        outputs = []
        for layer in self.layers:
            hidden_states = layer(hidden_states, is_real)
            outputs.append(hidden_states)
        return outputs


class GatedTileEmbedding(nn.Module):
    """Adds an embedding of the tile's place in the picture to all its patches."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, hidden_states: torch.Tensor, ratio_id: torch.Tensor) -> torch.Tensor:
        """`(tiles, patches, hidden_size)` to the same."""
        added: torch.Tensor = self.embedding(ratio_id).view(len(hidden_states), 1, -1)
        return hidden_states + added * self.gate.tanh()


class GatedPositionEmbedding(nn.Module):
    """Adds embeddings of patches' positions in their tile and, with a gate, in the picture."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        size, num_rows = config.hidden_size, (config.image_size // config.patch_size) ** 2 + 1
        self.gate = nn.Parameter(torch.zeros(1))
        self.embedding = nn.Parameter(torch.zeros(num_rows, size))
        self.tile_embedding = nn.Embedding(config.max_aspect_ratio_id + 1, config.max_num_tiles * num_rows * size)

    def forward(self, hidden_states: torch.Tensor, ratio_id: torch.Tensor) -> torch.Tensor:
        """`(tiles, rows, hidden_size)` to the same."""
        gate, in_picture = self.gate.tanh(), self.tile_embedding(ratio_id).view_as(hidden_states)
        output: torch.Tensor = hidden_states + (1 - gate) * self.embedding + gate * in_picture
        return output


class MllamaVisionModel(nn.Module):
    """The tower: local and global layers over the patches of all tiles of a picture."""

    renames = WeightsMapper(orig_to_new_substr={".self_attn.o_proj.": ".attn.out_proj.", ".self_attn.": ".attn."})

    def __init__(self, config: Any, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.config = config
        size, patch_size = config.hidden_size, config.patch_size
        self.patch_embedding = PatchEmbedding(
            config.num_channels * patch_size**2, size, bias=False, prefix=f"{prefix}.patch_embedding"
        )
        self.class_embedding = nn.Parameter(torch.zeros(size))
        self.gated_positional_embedding = GatedPositionEmbedding(config)
        self.pre_tile_positional_embedding = GatedTileEmbedding(config)
        self.post_tile_positional_embedding = GatedTileEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(size)
        self.layernorm_post = nn.LayerNorm(size)
        self.transformer = MllamaVisionLayers(
            config, config.num_hidden_layers, quant_config, f"{prefix}.transformer", is_gated=False
        )
        self.global_transformer = MllamaVisionLayers(
            config, config.num_global_layers, quant_config, f"{prefix}.global_transformer", is_gated=True
        )

    def forward(self, pixel_values: torch.Tensor, ratio_id: torch.Tensor, num_tiles: int) -> torch.Tensor:
        """Rows `(tiles * rows of a tile, vision_output_dim)` of a picture `(tiles, 3, height, width)`, of which the
        first `num_tiles` tiles exist."""
        patches, _ = self.patch_embedding(image_patches(pixel_values, self.config.patch_size))
        hidden_states = self.pre_tile_positional_embedding(patches, ratio_id)
        first = self.class_embedding.expand(len(hidden_states), 1, -1)
        hidden_states = self.gated_positional_embedding(torch.cat([first, hidden_states], dim=1), ratio_id)
        num_rows = hidden_states.shape[1]
        hidden_states = F.pad(self.layernorm_pre(hidden_states), (0, 0, 0, -num_rows % 8))
        is_real = torch.zeros(hidden_states.shape[:2], dtype=torch.bool, device=hidden_states.device)
        is_real[:num_tiles, :num_rows] = True
        shape, is_real = hidden_states.shape, is_real.flatten()
        local = self.transformer(hidden_states.flatten(0, 1), is_real)
        kept = [local[index] for index in self.config.intermediate_layers_indices]
        hidden_states = self.layernorm_post(local[-1]).view(shape)
        hidden_states = self.post_tile_positional_embedding(hidden_states, ratio_id).flatten(0, 1)
        hidden_states = self.global_transformer(hidden_states, is_real)[-1]
        rows = torch.cat([hidden_states, torch.stack(kept, dim=-1).flatten(1)], dim=-1)
        return rows.view(*shape[:2], -1)[:, :num_rows].flatten(0, 1)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower from a checkpoint's names, relative to it."""
        return load_fused_weights(self, self.renames.apply(weights), FUSED_WEIGHTS)


# The decoder


class MllamaCrossAttention(nn.Module):
    """Attention of the tokens to the rows of their picture, with a norm over each head of queries and keys."""

    def __init__(self, config: EngineConfig, prefix: str) -> None:
        super().__init__()
        text, quant_config = config.model_config.hf_text_config, config.quant_config
        self.head_size = head_size_of(text)
        size, kv_size = text.hidden_size, text.num_key_value_heads * self.head_size
        heads = current_tensor_parallel().shard
        self.q_proj = ColumnParallelLinear(size, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.q_proj")
        self.kv_proj = ColumnParallelLinear(
            *(size, 2 * kv_size),
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.kv_proj",
            output_sizes=[kv_size, kv_size],
            output_shards=[shard_of_kv_heads(heads, text.num_key_value_heads)] * 2,
        )
        self.o_proj = RowParallelLinear(size, size, bias=False, quant_config=quant_config, prefix=f"{prefix}.o_proj")
        self.q_norm = RMSNorm(self.head_size, eps=text.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_size, eps=text.rms_norm_eps)
        self.attn = Attention(
            self.q_proj.output_sizes[0] // self.head_size,
            self.head_size,
            self.head_size**-0.5,
            num_kv_heads=self.kv_proj.output_sizes[0] // self.head_size,
            prefix=f"{prefix}.attn",
            attn_type=AttentionType.ENCODER_DECODER,
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_outputs: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same; `encoder_outputs` `(num_rows, hidden_size)` are new rows, whose keys
        and values are cached."""
        key = value = None
        if encoder_outputs is not None:
            rows = self.kv_proj(encoder_outputs)[0].view(len(encoder_outputs), -1, self.head_size)
            key, value = rows.chunk(2, dim=1)
            key = self.k_norm(key)
        query = self.q_norm(self.q_proj(hidden_states)[0].view(len(hidden_states), -1, self.head_size))
        attended = self.attn(query, key, value, kv_cache, attn_metadata)
        output: torch.Tensor = self.o_proj(attended)[0]
        return output


class MllamaCrossLayer(nn.Module):
    """Cross-attention and MLP, each with a norm before and a gate after it. Tokens that see no rows pass unchanged."""

    def __init__(self, config: EngineConfig, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.cross_attn = MllamaCrossAttention(config, f"{prefix}.cross_attn")
        self.mlp = mlp_of(config, f"{prefix}.mlp")
        self.input_layernorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_outputs: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: AttentionMetadata,
    ) -> torch.Tensor:
        """`(num_tokens, hidden_size)` to the same."""
        batch = attn_metadata.of_group(self.cross_attn.attn.group_index)
        tokens = torch.arange(len(hidden_states), device=hidden_states.device)
        sequence = torch.searchsorted(batch.cu_seqlens_q[1:].long(), tokens, right=True).clamp(max=batch.num_seqs - 1)
        normed = self.input_layernorm(hidden_states)
        attended = self.cross_attn(normed, encoder_outputs, kv_cache, attn_metadata)
        states = hidden_states + self.cross_attn_attn_gate.tanh() * attended
        output = self.mlp(self.post_attention_layernorm(states))
        if batch.before_items is not None:
            output = output.masked_fill((batch.before_items[sequence] > 0)[:, None], 0)
        states = states + self.cross_attn_mlp_gate.tanh() * output
        sees_rows = (batch.seq_lens[sequence] > 0)[:, None]
        return torch.where(sees_rows, states, hidden_states)


class MllamaDecoder(nn.Module):
    """Llama's layers, with layers of cross-attention between them."""

    renames = WeightsMapper(
        orig_to_new_substr={".cross_attn.k_proj.": ".cross_attn.key.", ".cross_attn.v_proj.": ".cross_attn.value."}
    )

    def __init__(self, config: EngineConfig, prefix: str) -> None:
        super().__init__()
        text = config.model_config.hf_text_config
        self.embed_tokens = VocabParallelEmbedding(
            text.vocab_size + NUM_EXTRA_TOKENS, text.hidden_size, prefix=f"{prefix}.embed_tokens"
        )
        self.rotary_emb = rope_of(config)
        self.layers = nn.ModuleList(
            MllamaCrossLayer(config, f"{prefix}.layers.{index}")
            if index in text.cross_attention_layers
            else DecoderLayer(config, DecoderOptions(), index, f"{prefix}.layers.{index}")
            for index in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(text.hidden_size, eps=text.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        encoder_outputs: torch.Tensor | None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`."""
        hidden_states, residual = self.embed_tokens(input_ids), None
        rotation = self.rotary_emb.rotation(positions)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            if isinstance(layer, MllamaCrossLayer):
                whole = hidden_states if residual is None else hidden_states + residual
                hidden_states, residual = layer(whole, encoder_outputs, kv_cache, attn_metadata), None
            else:
                hidden_states, residual = layer(rotation, hidden_states, residual, kv_cache, attn_metadata)
        normed: torch.Tensor = self.norm(hidden_states if residual is None else hidden_states + residual)
        return normed

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the decoder from a checkpoint's names, relative to it."""
        fused = {**FUSED_WEIGHTS, "key": ("kv_proj", 0), "value": ("kv_proj", 1)}
        return load_fused_weights(self, self.renames.apply(weights), fused)


@MULTIMODAL_REGISTRY.register_input_mapper("image", map_pictures)
@MULTIMODAL_REGISTRY.register_max_multimodal_tokens("image", max_image_tokens)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("image", lambda ctx: ctx.get_hf_config().image_token_index)
@MULTIMODAL_REGISTRY.register_placeholder_str("image", lambda _: "<|image|>")
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class MllamaForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsCrossAttention):
    """Tower, projector, decoder and head."""

    names = WeightsMapper(
        orig_to_new_prefix={
            "language_model.lm_head.": "lm_head.",
            "language_model.model.": "language_model.",
            "model.": "",
        }
    )
    mm_host_kwargs = ("aspect_ratio_mask",)

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = hf_config = config.model_config.hf_config
        text_config = language_config(config)
        text = text_config.model_config.hf_text_config
        self.vision_model = MllamaVisionModel(
            hf_config.vision_config, config.quant_config, maybe_prefix(prefix, "vision_model")
        )
        self.multi_modal_projector = ReplicatedLinear(
            hf_config.vision_config.vision_output_dim,
            text.hidden_size,
            prefix=maybe_prefix(prefix, "multi_modal_projector"),
        )
        self.language_model = MllamaDecoder(text_config, maybe_prefix(prefix, "language_model"))
        self.lm_head = ParallelLMHead(text.vocab_size, text.hidden_size, prefix=maybe_prefix(prefix, "lm_head"))
        self.logits_processor = LogitsProcessor(text.vocab_size)

    @classmethod
    def get_num_encoder_rows(cls, model_config: ModelConfig, modality: str, kwargs: Mapping[str, Any]) -> int:
        """See `SupportsCrossAttention`: missing tiles included."""
        del modality, kwargs
        return rows_of_tile(model_config.hf_config) * int(model_config.hf_config.vision_config.max_num_tiles)

    @classmethod
    def get_num_seen_rows(cls, model_config: ModelConfig, modality: str, kwargs: Mapping[str, Any]) -> int:
        """See `SupportsCrossAttention`: those of existing tiles."""
        del modality
        return rows_of_tile(model_config.hf_config) * int(kwargs["aspect_ratio_mask"].sum())

    def get_multimodal_embeddings(
        self, pixel_values: Any = None, aspect_ratio_ids: Any = None, aspect_ratio_mask: Any = None, **kwargs: Any
    ) -> list[torch.Tensor]:
        """Rows `(tiles * rows of a tile, hidden_size)` of each picture."""
        if pixel_values is None:
            return []
        pictures = pixel_values.reshape(-1, *pixel_values.shape[-4:])
        counts = aspect_ratio_mask.reshape(len(pictures), -1).sum(1).tolist()
        ratio_ids = aspect_ratio_ids.reshape(len(pictures))
        rows = [self.vision_model(*each) for each in zip(pictures, ratio_ids, counts, strict=True)]
        return [self.multi_modal_projector(each)[0] for each in rows]

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        encoder_outputs: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Hidden states `(num_tokens, hidden_size)`; `encoder_outputs`: see `SupportsCrossAttention`."""
        hidden_states: torch.Tensor = self.language_model(
            input_ids, positions, kv_caches, attn_metadata, encoder_outputs
        )
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill all parts."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)

"""The thinker of Qwen2.5-Omni for training: equal shapes per batch, so that every tower is a plain batched call.

Parameter names are those of the published checkpoints (``audio_tower``, ``visual``, ``model``, ``lm_head``), so a
state dict is a checkpoint. The outputs equal Hugging Face's ``Qwen2_5OmniThinkerForConditionalGeneration`` (a test
compares them); what differs is that nothing is ragged, which lets a GPU run thousands of items at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from training.blueprint import AUDIO_CONFIG, TEXT_CONFIG, VISION_CONFIG
from training.dialogue import FULL_SCALE
from training.features import HOP_LENGTH, log_mel, patchify


@dataclass(frozen=True, slots=True)
class Batch:
    """Items of one layout on one device.

    ``input_ids`` and ``labels`` are ``(batch, length)``, ``positions`` is ``(3, batch, length)``. ``frames`` is uint8
    ``(pictures, num_frames, height, width, 3)``; ``waveforms`` is int16 ``(batch, samples)`` with ``num_samples``
    ``(batch,)``. Row ``media_rows[i]`` of the media features stands at token ``media_slots[i]`` of the flattened batch.
    """

    input_ids: Tensor
    labels: Tensor
    positions: Tensor
    media_slots: Tensor
    media_rows: Tensor
    frames: Tensor | None = None
    waveforms: Tensor | None = None
    num_samples: Tensor | None = None

    def to(self, device: torch.device) -> Batch:
        """The batch on another device."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Batch:
        """The batch in page-locked memory, from which copies to a GPU are asynchronous."""
        return self._each(lambda tensor: tensor.pin_memory())

    def _each(self, change: Callable[[Tensor], Tensor]) -> Batch:
        tensors: dict[str, Any] = {name: getattr(self, name) for name in self.__slots__}
        changed: dict[str, Any] = {name: None if each is None else change(each) for name, each in tensors.items()}
        return Batch(**changed)


class RMSNorm(nn.Module):
    """Root-mean-square norm in float32 (https://arxiv.org/abs/1910.07467)."""

    def __init__(self, size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Normalise the last dimension."""
        dtype, full = hidden_states.dtype, hidden_states.float()
        full = full * torch.rsqrt(full.square().mean(-1, keepdim=True) + self.eps)
        return (self.weight * full).to(dtype)


class GatedMLP(nn.Module):
    """SiLU-gated feed-forward network (https://arxiv.org/abs/2002.05202)."""

    def __init__(self, size: int, inner: int, bias: bool) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=bias)
        self.up_proj = nn.Linear(size, inner, bias=bias)
        self.down_proj = nn.Linear(inner, size, bias=bias)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(..., size)`` to ``(..., size)``."""
        return self.down_proj(F.silu(self.gate_proj(hidden_states)) * self.up_proj(hidden_states))  # type: ignore[no-any-return]


def rotate(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in the half-split layout; ``states`` is ``(batch, heads, length, head_dim)``."""
    left, right = states.chunk(2, dim=-1)
    return (states * cos + torch.cat((-right, left), dim=-1) * sin).to(states.dtype)


def _split_heads(states: Tensor, num_heads: int) -> Tensor:
    return states.view(*states.shape[:2], num_heads, -1).transpose(1, 2)


def _merge_heads(states: Tensor) -> Tensor:
    return states.transpose(1, 2).flatten(2)


class VisionAttention(nn.Module):
    """Bidirectional attention within one temporal slot."""

    def __init__(self) -> None:
        super().__init__()
        size = VISION_CONFIG["hidden_size"]
        self.num_heads = VISION_CONFIG["num_heads"]
        self.q, self.k, self.v, self.proj = (nn.Linear(size, size) for _ in range(4))

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """``(batch, patches, size)``; ``mask`` is ``(patches, patches)``, True where attention is allowed."""
        query, key, value = (_split_heads(layer(hidden_states), self.num_heads) for layer in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(rotate(query, cos, sin), rotate(key, cos, sin), value, attn_mask=mask)
        return self.proj(_merge_heads(attended))  # type: ignore[no-any-return]


class VisionBlock(nn.Module):
    """A pre-norm block of the vision tower."""

    def __init__(self) -> None:
        super().__init__()
        size = VISION_CONFIG["hidden_size"]
        self.norm1, self.norm2 = RMSNorm(size), RMSNorm(size)
        self.attn = VisionAttention()
        self.mlp = GatedMLP(size, VISION_CONFIG["intermediate_size"], bias=True)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None) -> Tensor:
        """``(batch, patches, size)`` to the same."""
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), cos, sin, mask)
        return hidden_states + self.mlp(self.norm2(hidden_states))  # type: ignore[no-any-return]


class VisionBlocks(nn.ModuleList):
    """The blocks of the vision tower one after another: the part of it that is compiled as a whole."""

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """``(batch, patches, size)`` to the same; ``mask`` is for the blocks that attend within windows."""
        for index, block in enumerate(self):
            is_full = index in VISION_CONFIG["fullatt_block_indexes"]
            hidden_states = block(hidden_states, cos, sin, None if is_full else mask)
        return hidden_states


class PatchEmbed(nn.Module):
    """Linear embedding of patches; a convolution in the checkpoint, a matrix product here."""

    def __init__(self) -> None:
        super().__init__()
        side, depth = VISION_CONFIG["patch_size"], VISION_CONFIG["temporal_patch_size"]
        kernel = (depth, side, side)
        self.proj = nn.Conv3d(3, VISION_CONFIG["hidden_size"], kernel, stride=kernel, bias=False)

    def forward(self, patches: Tensor) -> Tensor:
        """``(batch, patches, 3 * depth * side * side)`` to ``(batch, patches, size)``."""
        return F.linear(patches, self.proj.weight.flatten(1))


class PatchMerger(nn.Module):
    """Joins 2 x 2 neighbouring patches into one row of the language model."""

    def __init__(self) -> None:
        super().__init__()
        size = VISION_CONFIG["hidden_size"]
        wide = size * VISION_CONFIG["spatial_merge_size"] ** 2
        self.ln_q = RMSNorm(size)
        self.mlp = nn.Sequential(nn.Linear(wide, wide), nn.GELU(), nn.Linear(wide, VISION_CONFIG["out_hidden_size"]))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """``(batch, patches, size)`` to ``(batch, patches // 4, hidden_size)``."""
        merged = self.ln_q(hidden_states).unflatten(1, (-1, VISION_CONFIG["spatial_merge_size"] ** 2)).flatten(2)
        return self.mlp(merged)  # type: ignore[no-any-return]


class VisionTower(nn.Module):
    """The vision transformer with axial rotary positions and, in some blocks, windowed attention."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed()
        self.blocks = VisionBlocks([VisionBlock() for _ in range(VISION_CONFIG["depth"])])
        self.merger = PatchMerger()

    def forward(self, frames: Tensor) -> Tensor:
        """uint8 ``(pictures, num_frames, height, width, 3)`` to ``(pictures * slots, rows, hidden_size)``."""
        rows, columns = (length // VISION_CONFIG["patch_size"] for length in frames.shape[2:4])
        place = _patch_places(rows, columns, frames.device)
        cos, sin = _axial_rotary(place)
        window = VISION_CONFIG["window_size"] // VISION_CONFIG["patch_size"]
        tile = place[0] // window * 4096 + place[1] // window
        mask = tile[:, None] == tile[None, :]
        return self.merger(self.blocks(self.patch_embed(patchify(frames)), cos, sin, mask))  # type: ignore[no-any-return]


def _patch_places(rows: int, columns: int, device: torch.device) -> Tensor:
    """Row and column of each patch, in the order of the merger: int64 ``(2, rows * columns)``."""
    merge = VISION_CONFIG["spatial_merge_size"]
    grid = torch.stack(
        torch.meshgrid(torch.arange(rows, device=device), torch.arange(columns, device=device), indexing="ij")
    )
    blocks = grid.view(2, rows // merge, merge, columns // merge, merge)
    return blocks.transpose(2, 3).reshape(2, -1)


def _axial_rotary(place: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(patches, head_dim)``: half of the frequencies turn with the row, half with the column."""
    head_dim = VISION_CONFIG["hidden_size"] // VISION_CONFIG["num_heads"]
    inverse = _inverse_frequencies(head_dim // 2, place.device)
    angles = (place[..., None] * inverse).transpose(0, 1).flatten(1)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos(), angles.sin()


def _inverse_frequencies(size: int, device: torch.device, theta: float = 10000.0) -> Tensor:
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


class AudioAttention(nn.Module):
    """Bidirectional attention within a chunk of two seconds."""

    def __init__(self) -> None:
        super().__init__()
        size = AUDIO_CONFIG["d_model"]
        self.num_heads = AUDIO_CONFIG["encoder_attention_heads"]
        self.k_proj = nn.Linear(size, size, bias=False)
        self.v_proj, self.q_proj, self.out_proj = (nn.Linear(size, size) for _ in range(3))

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """``(chunks, length, size)``; ``mask`` is ``(chunks, 1, 1, length)``, True for real frames."""
        layers = (self.q_proj, self.k_proj, self.v_proj)
        query, key, value = (_split_heads(layer(hidden_states), self.num_heads) for layer in layers)
        mask = mask.expand(-1, -1, hidden_states.shape[1], -1)
        return self.out_proj(_merge_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask)))  # type: ignore[no-any-return]


class AudioLayer(nn.Module):
    """A pre-norm layer of the audio tower."""

    def __init__(self) -> None:
        super().__init__()
        size, inner = AUDIO_CONFIG["d_model"], AUDIO_CONFIG["encoder_ffn_dim"]
        self.self_attn = AudioAttention()
        self.self_attn_layer_norm, self.final_layer_norm = nn.LayerNorm(size), nn.LayerNorm(size)
        self.fc1, self.fc2 = nn.Linear(size, inner), nn.Linear(inner, size)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """``(chunks, length, size)`` to the same."""
        hidden_states = hidden_states + self.self_attn(self.self_attn_layer_norm(hidden_states), mask)
        return hidden_states + self.fc2(F.gelu(self.fc1(self.final_layer_norm(hidden_states))))  # type: ignore[no-any-return]


class AudioLayers(nn.ModuleList):
    """The layers of the audio tower one after another: the part of it that is compiled as a whole."""

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """``(chunks, length, size)`` to the same; ``mask`` as for one layer."""
        for layer in self:
            hidden_states = layer(hidden_states, mask)
        return hidden_states


class AudioTower(nn.Module):
    """Whisper's encoder on chunks of two seconds that don't see each other."""

    def __init__(self) -> None:
        super().__init__()
        size = AUDIO_CONFIG["d_model"]
        self.conv1 = nn.Conv1d(AUDIO_CONFIG["num_mel_bins"], size, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(size, size, kernel_size=3, stride=2, padding=1)
        # In the checkpoint's format, but used by nothing.
        self.audio_bos_eos_token = nn.Embedding(2, AUDIO_CONFIG["output_dim"])
        self.layers = AudioLayers([AudioLayer() for _ in range(AUDIO_CONFIG["encoder_layers"])])
        self.ln_post = nn.LayerNorm(size)
        self.proj = nn.Linear(size, AUDIO_CONFIG["output_dim"])

    def forward(self, waveforms: Tensor, num_samples: Tensor) -> Tensor:
        """int16 ``(batch, samples)``, whole chunks, to ``(batch, rows, hidden_size)``; rows past the end are junk."""
        chunk = 2 * AUDIO_CONFIG["n_window"]
        with torch.autocast(waveforms.device.type, enabled=False):
            mel = log_mel(waveforms.float() / FULL_SCALE)
        batch, bins, frames = mel.shape
        num_frames = (num_samples + HOP_LENGTH - 1) // HOP_LENGTH
        real = (torch.arange(frames, device=mel.device) < num_frames[:, None]).view(-1, 1, chunk)
        chunks = mel.view(batch, bins, -1, chunk).transpose(1, 2).reshape(-1, bins, chunk)
        hidden_states = F.gelu(self.conv1(chunks * real)) * real
        hidden_states = F.gelu(self.conv2(hidden_states)).transpose(1, 2)
        hidden_states = hidden_states + _sinusoids(chunk // 2, hidden_states.shape[-1], mel.device)
        # A chunk past the end has no real frame; it attends to its first one, for a softmax needs something.
        mask = real[:, :, ::2].clone()
        mask[..., 0] = True
        hidden_states = self.layers(hidden_states, mask[:, None])
        pooled = hidden_states.reshape(batch, -1, 2, hidden_states.shape[-1]).mean(dim=2)
        return self.proj(self.ln_post(pooled))  # type: ignore[no-any-return]


def _sinusoids(length: int, channels: int, device: torch.device) -> Tensor:
    """Whisper's position table: ``(length, channels)``, sines then cosines."""
    half = torch.arange(channels // 2, dtype=torch.float32, device=device)
    inverse = torch.exp(half * (-9.210340371976184 / (channels // 2 - 1)))
    angles = torch.arange(length, device=device)[:, None] * inverse
    return torch.cat((angles.sin(), angles.cos()), dim=1)


class TextAttention(nn.Module):
    """Causal grouped-query attention with three-axis rotary positions."""

    def __init__(self) -> None:
        super().__init__()
        size, self.num_heads = TEXT_CONFIG["hidden_size"], TEXT_CONFIG["num_attention_heads"]
        self.num_kv_heads = TEXT_CONFIG["num_key_value_heads"]
        narrow = size // self.num_heads * self.num_kv_heads
        self.q_proj, self.k_proj, self.v_proj = nn.Linear(size, size), nn.Linear(size, narrow), nn.Linear(size, narrow)
        self.o_proj = nn.Linear(size, size, bias=False)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``(batch, length, size)`` to the same."""
        query = rotate(_split_heads(self.q_proj(hidden_states), self.num_heads), cos, sin)
        key = rotate(_split_heads(self.k_proj(hidden_states), self.num_kv_heads), cos, sin)
        value = _split_heads(self.v_proj(hidden_states), self.num_kv_heads)
        groups = self.num_heads // self.num_kv_heads
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        return self.o_proj(_merge_heads(F.scaled_dot_product_attention(query, key, value, is_causal=True)))  # type: ignore[no-any-return]


class TextLayer(nn.Module):
    """A pre-norm decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        size = TEXT_CONFIG["hidden_size"]
        self.self_attn = TextAttention()
        self.mlp = GatedMLP(size, TEXT_CONFIG["intermediate_size"], bias=False)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size), RMSNorm(size)

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``(batch, length, size)`` to the same."""
        hidden_states = hidden_states + self.self_attn(self.input_layernorm(hidden_states), cos, sin)
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))  # type: ignore[no-any-return]


class TextLayers(nn.ModuleList):
    """The layers of the decoder one after another: the part of it that is compiled as a whole."""

    def forward(self, hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """``(batch, length, size)`` to the same."""
        for layer in self:
            hidden_states = layer(hidden_states, cos, sin)
        return hidden_states


class TextModel(nn.Module):
    """The decoder without its head."""

    def __init__(self) -> None:
        super().__init__()
        size = TEXT_CONFIG["hidden_size"]
        self.embed_tokens = nn.Embedding(TEXT_CONFIG["vocab_size"], size)
        self.layers = TextLayers([TextLayer() for _ in range(TEXT_CONFIG["num_hidden_layers"])])
        self.norm = RMSNorm(size)

    def forward(self, inputs_embeds: Tensor, positions: Tensor) -> Tensor:
        """``(batch, length, size)`` and ``(3, batch, length)`` to ``(batch, length, size)``."""
        return self.norm(self.layers(inputs_embeds, *_mrope(positions)))  # type: ignore[no-any-return]


def _mrope(positions: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines ``(batch, 1, length, head_dim)``: sections of the frequencies turn with time, height, width."""
    head_dim = TEXT_CONFIG["hidden_size"] // TEXT_CONFIG["num_attention_heads"]
    rope = TEXT_CONFIG["rope_parameters"]
    angles = positions[..., None].float() * _inverse_frequencies(head_dim, positions.device, rope["rope_theta"])
    sections = torch.split(angles, rope["mrope_section"], dim=-1)
    mixed = torch.cat([section[axis] for axis, section in enumerate(sections)], dim=-1)
    mixed = torch.cat((mixed, mixed), dim=-1)[:, None]
    return mixed.cos(), mixed.sin()


class Thinker(nn.Module):
    """All towers and the language model."""

    def __init__(self) -> None:
        super().__init__()
        self.audio_tower = AudioTower()
        self.visual = VisionTower()
        self.model = TextModel()
        self.lm_head = nn.Linear(TEXT_CONFIG["hidden_size"], TEXT_CONFIG["vocab_size"], bias=False)
        self.apply(_initialise)

    def hidden_states(self, batch: Batch) -> Tensor:
        """Final hidden states ``(batch, length, hidden_size)``."""
        embeds = self.model.embed_tokens(batch.input_ids)
        rows = []
        if batch.frames is not None:
            rows.append(self.visual(batch.frames).flatten(0, 1))
        if batch.waveforms is not None and batch.num_samples is not None:
            rows.append(self.audio_tower(batch.waveforms, batch.num_samples).flatten(0, 1))
        flat = embeds.flatten(0, 1)
        if rows:
            # Every slot and row is named once: a gather with repeated rows would be many times slower backwards.
            features = torch.cat([row.to(embeds.dtype) for row in rows]).index_select(0, batch.media_rows)
            flat = flat.index_copy(0, batch.media_slots, features)
        # A view with and without media: for compiled code a tensor that isn't one would be another kind of input.
        return self.model(flat.view_as(embeds), batch.positions)  # type: ignore[no-any-return]

    def forward(self, batch: Batch) -> Tensor:
        """Mean cross-entropy over the answers' tokens."""
        logits = self.lm_head(self.hidden_states(batch)[:, :-1])
        return F.cross_entropy(logits.float().flatten(0, 1), batch.labels[:, 1:].flatten())

    def compile_blocks(self) -> None:
        """Compile the blocks of each tower and of the decoder as one function each, for any batch and length.

        Entering compiled code costs the host about as much as starting its kernels: once per tower, not per block.
        """
        for blocks in (self.visual.blocks, self.audio_tower.layers, self.model.layers):
            blocks.compile(dynamic=True)


def _initialise(module: nn.Module) -> None:
    """Normal weights scaled by the fan-in (0.02 for embeddings), zero biases."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02 if isinstance(module, nn.Embedding) else module.in_features**-0.5 * 0.5)
    if isinstance(module, nn.Conv1d | nn.Conv3d):
        nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
    if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
        nn.init.zeros_(module.bias)

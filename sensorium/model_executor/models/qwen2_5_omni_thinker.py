"""The thinker of Qwen2.5-Omni: Qwen2 with M-RoPE, and towers for images, videos and sounds.

Paper: Xu et al. 2025, "Qwen2.5-Omni Technical Report". Reference: `transformers`
`Qwen2_5OmniThinkerForConditionalGeneration`. Placeholders: `<|IMAGE|>` and `<|VIDEO|>` as in Qwen2-VL, each `<|AUDIO|>`
becomes as many as the sound has rows, one per 40 ms. Videos with an interleaved sound track are not supported.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from sensorium.config import EngineConfig, ModelConfig
from sensorium.errors import InvalidRequestError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.inputs.transcription import TranscriptionStyle
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.audio_common import feature_extractor, max_audio_s
from sensorium.model_executor.models.media_common import as_items, expand_placeholders, stacked
from sensorium.model_executor.models.qwen2_5_vl import (
    Qwen2_5_VisionTransformer,
    Qwen2_5_VLForConditionalGeneration,
)
from sensorium.model_executor.models.qwen2_audio import (
    given_rows,
    map_sounds,
    max_audio_tokens,
    num_rows_of,
    num_rows_of_sound,
)
from sensorium.model_executor.models.qwen2_vl import largest_items, map_videos
from sensorium.model_executor.models.qwen_vl_inputs import Item, VisionInputs, grids_of
from sensorium.model_executor.models.utils import WeightsMapper, maybe_prefix
from sensorium.model_executor.models.whisper_encoder import WhisperEncoder, rows_of_frames
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.sequence import SequenceData

if TYPE_CHECKING:
    from transformers import PretrainedConfig

IntArray = np.ndarray[Any, np.dtype[np.int64]]
DEFAULT_FPS = 2.0
"""Frames per second of every clip, whatever its file says, unless `fps` is set, as in the reference's processor."""


# Input processor and mappers


def input_processor(
    ctx: InputContext, inputs: TokenInputs, *, min_pixels: int | None = None, max_pixels: int | None = None
) -> TokenInputs:
    """Expand each item's placeholder to the number of its rows."""
    data = inputs.get("multi_modal_data") or {}
    counts: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    several: set[int] = set()
    for modality in ("image", "video"):
        if modality in data:
            kind = VisionInputs(ctx, modality, min_pixels=min_pixels, max_pixels=max_pixels)
            grids = [kind.grids(item) for item in as_items(data[modality])]
            counts[kind.token_id] = [kind.num_rows(grid) for each in grids for grid in each]
            names[kind.token_id] = modality
            # A dict with several grids is one item with several ranges, which are found by their tokens.
            several |= {kind.token_id} if any(len(each) != 1 for each in grids) else set()
    if "audio" in data:
        token_id = ctx.get_hf_config().audio_token_id
        counts[token_id] = [num_rows_of_sound(sound, ctx) for sound in as_items(data["audio"])]
        names[token_id] = "audio"
    if not counts:
        return inputs
    token_ids, ranges = expand_placeholders(inputs["prompt_token_ids"], counts, names, ctx.model_config.max_model_len)
    inputs["prompt_token_ids"] = token_ids
    inputs["multi_modal_placeholders"] = {names[each]: ranges[each] for each in counts if each not in several}
    return inputs


def map_clips(
    ctx: InputContext,
    data: Item | list[Item],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    fps: float | None = None,
) -> MultiModalKwargs:
    """As Qwen2-VL's, and `video_second_per_grid` `(videos,)`: seconds that one step of the grid in time takes."""
    mapped = map_videos(ctx, data, min_pixels=min_pixels, max_pixels=max_pixels)
    seconds = ctx.get_hf_config().vision_config.temporal_patch_size / (fps or DEFAULT_FPS)
    mapped["video_second_per_grid"] = torch.full((len(grids_of(mapped["video_grid_thw"])),), seconds)
    return mapped


def dummy_data(
    ctx: InputContext,
    seq_len: int,
    mm_counts: Mapping[str, int],
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> DummyData:
    """Sounds of full length, then pictures and clips that share the rest of `seq_len` tokens, then zeros."""
    config = ctx.get_hf_config()
    data: dict[str, list[Any]] = {}
    pieces: list[tuple[int, int]] = []
    if num_sounds := mm_counts["audio"]:
        extractor = feature_extractor(ctx.model_config)
        sound = (np.zeros(extractor.n_samples, dtype=np.float32), extractor.sampling_rate)
        marks = (config.audio_start_token_id, 1), (config.audio_end_token_id, 1)
        pieces += [marks[0], (config.audio_token_id, max_audio_tokens(ctx)), marks[1]] * num_sounds
        data["audio"] = [sound] * num_sounds
    left = max(seq_len - sum(count for _, count in pieces), 0)
    of_vision, vision = largest_items(ctx, left, mm_counts, min_pixels=min_pixels, max_pixels=max_pixels)
    pieces += of_vision
    pieces.append((0, max(seq_len - sum(count for _, count in pieces), 0)))
    return DummyData(SequenceData.from_prompt_token_counts(*pieces), data | vision or None)


# Positions


def thinker_positions(
    token_ids: Sequence[int], hf_config: PretrainedConfig, mm_kwargs: Mapping[str, Any]
) -> tuple[IntArray, int]:
    """M-RoPE positions `(3, num_tokens)` of an expanded prompt, and the offset from indices to positions of later
    tokens.

    Unlike in Qwen2-VL, positions after an item start one past the item's largest position on any axis, time included.
    For example, with 2 positions per second, one text token, a clip of 3 steps of a second with 1 x 2 rows each, and
    one more token:

        time    0 1 1 3 3 5 5 6
        height  0 1 1 1 1 1 1 6
        width   0 1 2 1 2 1 2 6
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    items = sorted(
        _items_of(ids, hf_config.image_token_id, _boxes(hf_config, grids_of(mm_kwargs.get("image_grid_thw")), None))
        + _items_of(ids, hf_config.video_token_id, _boxes(hf_config, _clip_grids(mm_kwargs), _clip_seconds(mm_kwargs))),
        key=lambda item: item[0],
    )
    positions = np.empty((3, len(ids)), dtype=np.int64)
    cursor = position = 0
    for offset, box in items:
        end = offset + box.shape[1]
        positions[:, cursor:offset] = np.arange(position, position + offset - cursor)
        positions[:, offset:end] = box + position + offset - cursor
        cursor, position = end, int(positions[:, offset:end].max()) + 1
    positions[:, cursor:] = np.arange(position, position + len(ids) - cursor)
    return positions, int(positions.max(initial=-1)) + 1 - len(ids)


def _clip_grids(mm_kwargs: Mapping[str, Any]) -> list[tuple[int, int, int]]:
    return grids_of(mm_kwargs.get("video_grid_thw"))


def _clip_seconds(mm_kwargs: Mapping[str, Any]) -> list[float]:
    seconds = mm_kwargs.get("video_second_per_grid")
    return [] if seconds is None else np.concatenate([np.ravel(each) for each in as_items(seconds)]).tolist()


def _boxes(
    hf_config: PretrainedConfig, grids: Sequence[tuple[int, int, int]], seconds: Sequence[float] | None
) -> list[IntArray]:
    """Positions of each item's rows relative to its first, `(3, num_rows)`; times are computed in float32, and
    truncated."""
    merge = hf_config.vision_config.spatial_merge_size
    per_second = np.float32(hf_config.position_id_per_seconds)
    boxes = []
    for index, (t, h, w) in enumerate(grids):
        second = np.float32(1 if seconds is None else seconds[index])
        times = (np.arange(t, dtype=np.float32) * second * per_second).astype(np.int64)
        box = np.indices((t, h // merge, w // merge), dtype=np.int64).reshape(3, -1)
        box[0] = times[box[0]]
        boxes.append(box)
    return boxes


def _items_of(ids: IntArray, token_id: int, boxes: Sequence[IntArray]) -> list[tuple[int, IntArray]]:
    """Each item's first token with its box: the boxes' sizes divide the placeholders."""
    places = np.flatnonzero(ids == token_id)
    ends = np.cumsum([0, *(box.shape[1] for box in boxes)])
    if ends[-1] != len(places):
        raise InvalidRequestError(
            f"placeholder tokens {token_id}: got {len(places)} in the prompt, expected {ends[-1]} for {len(boxes)} "
            "items. Correct the input processor or mapper."
        )
    return [(int(places[start]), box) for (start, _), box in zip(pairwise(ends), boxes, strict=True)]


# The model


class ThinkerVisionTransformer(Qwen2_5_VisionTransformer):
    """Qwen2.5-VL's tower, with separate queries, keys and values in the checkpoint."""

    renames = WeightsMapper(
        orig_to_new_substr={
            ".attn.q.": ".attn.q_proj.",
            ".attn.k.": ".attn.k_proj.",
            ".attn.v.": ".attn.v_proj.",
            **Qwen2_5_VisionTransformer.renames.orig_to_new_substr,
        }
    )


class ThinkerAudioEncoder(WhisperEncoder):
    """Whisper's tower over chunks of `2 * n_window` frames that don't see each other; pairs of rows are averaged.

    Positions are sinusoidal, and start anew in each chunk.
    """

    renames = WeightsMapper(
        orig_to_new_substr={**WhisperEncoder.renames.orig_to_new_substr, "audio_bos_eos_token.": None},
        orig_to_new_prefix={"ln_post.": "layer_norm."},
    )
    positions: torch.Tensor

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config, prefix)
        del self.embed_positions
        self.chunk = 2 * config.n_window
        self.proj = ReplicatedLinear(config.d_model, config.output_dim, prefix=f"{prefix}.proj")
        table = sinusoids(rows_of_frames(self.chunk), config.d_model)
        self.register_buffer("positions", table, persistent=False)

    def forward(self, features: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
        """The rows of the sounds, concatenated, `(sum of num_rows_of(n), output_dim)`.

        Args:
            features: `(sounds, num_mel_bins, frames)`, padded as the feature extractor pads.
            num_frames: The number of each sound's frames without padding.
        """
        lengths = [min(self.chunk, n - start) for n in num_frames for start in range(0, n, self.chunk)]
        hidden_states = self._embed(self._chunks(features, num_frames), lengths)
        rows = [rows_of_frames(length) for length in lengths]
        starts = torch.tensor([0, *rows], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(hidden_states.device)
        for layer in self.layers:
            hidden_states = layer(hidden_states, cu_seqlens=starts)
        sounds = torch.split(hidden_states, [rows_of_frames(n) for n in num_frames])
        even = torch.cat([sound[: len(sound) // 2 * 2] for sound in sounds])  # a last row without a partner is dropped
        pooled = even.view(-1, 2, even.shape[-1]).mean(dim=1)
        output: torch.Tensor = self.proj(self.layer_norm(pooled))[0]
        return output

    def _chunks(self, features: torch.Tensor, num_frames: Sequence[int]) -> torch.Tensor:
        """All chunks, the last of each sound padded with zeros: `(chunks, num_mel_bins, chunk)`."""
        chunks = []
        for sound, n in zip(features, num_frames, strict=True):
            own = F.pad(sound[:, :n], (0, -n % self.chunk))
            chunks.append(own.view(own.shape[0], -1, self.chunk).transpose(0, 1))
        return torch.cat(chunks).to(self.conv1.weight.dtype)

    def _embed(self, chunks: torch.Tensor, lengths: Sequence[int]) -> torch.Tensor:
        """The rows of all chunks, concatenated. Between the convolutions, frames after a sound's end are set to zero
        again."""
        ends = torch.tensor(lengths, device=chunks.device)[:, None, None]
        is_own = torch.arange(self.chunk, device=chunks.device) < ends
        embedded = F.gelu(self.conv2(F.gelu(self.conv1(chunks)) * is_own)).transpose(1, 2)
        embedded = embedded + self.positions.to(embedded.dtype)
        return torch.cat([each[: rows_of_frames(n)] for each, n in zip(embedded, lengths, strict=True)])


def sinusoids(length: int, channels: int) -> torch.Tensor:
    """Whisper's table of positions: `(length, channels)`, sines, then cosines (`SinusoidsPositionEmbedding`)."""
    increment = np.log(10000) / (channels // 2 - 1)
    inverse = torch.exp(-increment * torch.arange(channels // 2).float())
    angles = torch.arange(length)[:, None] * inverse[None, :]
    return torch.cat((angles.sin(), angles.cos()), dim=1)


@MULTIMODAL_REGISTRY.register_input_mapper("video", map_clips)
@MULTIMODAL_REGISTRY.register_input_mapper("audio", map_sounds)
@MULTIMODAL_REGISTRY.register_max_multimodal_tokens("audio", max_audio_tokens)
@MULTIMODAL_REGISTRY.register_placeholder_tokens("audio", lambda ctx: ctx.get_hf_config().audio_token_id)
@MULTIMODAL_REGISTRY.register_placeholder_str("image", "<|vision_bos|><|IMAGE|><|vision_eos|>")
@MULTIMODAL_REGISTRY.register_placeholder_str("video", "<|vision_bos|><|VIDEO|><|vision_eos|>")
@MULTIMODAL_REGISTRY.register_placeholder_str("audio", "<|audio_bos|><|AUDIO|><|audio_eos|>")
@INPUT_REGISTRY.register_dummy_data(dummy_data)
@INPUT_REGISTRY.register_input_processor(input_processor)
class Qwen2_5OmniThinkerForConditionalGeneration(Qwen2_5_VLForConditionalGeneration):  # noqa: N801
    """Qwen2.5-VL with an audio tower beside the vision tower."""

    names = WeightsMapper(
        orig_to_new_substr={"audio_bos_eos_token.": None},
        orig_to_new_prefix={
            "talker.": None,
            "token2wav.": None,
            "thinker.": "",
            "model.audio_tower.": "audio_tower.",
            **Qwen2_5_VLForConditionalGeneration.names.orig_to_new_prefix,
        },
    )
    tower_class = ThinkerVisionTransformer
    mm_host_kwargs = (*Qwen2_5_VLForConditionalGeneration.mm_host_kwargs, "feature_attention_mask")
    config_part = "thinker_config"
    """The part of a whole Qwen2.5-Omni config that describes the thinker."""

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__(config=config, prefix=prefix)
        self.audio_tower: nn.Module = ThinkerAudioEncoder(
            self.config.audio_config, config.quant_config, prefix=maybe_prefix(prefix, "audio_tower")
        )

    @classmethod
    def get_transcription_style(cls, model_config: ModelConfig) -> TranscriptionStyle:
        """See `SupportsTranscription`."""
        return TranscriptionStyle(max_audio_s=max_audio_s(model_config))

    @classmethod
    def get_mrope_input_positions(
        cls, input_tokens: Sequence[int], hf_config: Any, mm_kwargs: Mapping[str, Any]
    ) -> tuple[IntArray, int]:
        """See `thinker_positions`."""
        return thinker_positions(input_tokens, hf_config, mm_kwargs)

    def placeholder_token_ids(self) -> list[int]:
        """See `MediaLanguageModel`."""
        return [*super().placeholder_token_ids(), self.config.audio_token_id]

    def encode_media(self, *vision: Any, **kwargs: Any) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; pictures and clips as Qwen2-VL's, sounds as Qwen2-Audio's."""
        encoded = super().encode_media(*vision, **kwargs)
        token_id, features = self.config.audio_token_id, kwargs.get("input_features")
        if kwargs.get("audio_embeds") is not None:
            encoded[token_id] = given_rows(kwargs["audio_embeds"])
        elif features is not None:
            num_frames = stacked(kwargs["feature_attention_mask"], 1).sum(-1).tolist()
            rows = self.audio_tower(stacked(features, 2), num_frames)
            encoded[token_id] = torch.split(rows, [num_rows_of(each) for each in num_frames])
        return encoded

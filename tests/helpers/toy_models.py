"""Small models written only from the extension API's page, in the styles of published ones.

An image is an array `(rows, 4)` and becomes `rows` decoder rows. The models differ in where they merge them:

- `SeedPageModel`: the page's literal `forward`; merges by token id, the trunk always gets `inputs_embeds` (LLaVA);
- `TextByIdsModel`: text-only passes hand the trunk ids instead (Qwen2-VL, Fuyu);
- `NegativeIdModel`: placeholders are -3, and a position table is added outside the trunk (BLIP-2);
- `MarkerModel`: merges inside the stack behind a marker token, no module takes `inputs_embeds` (Qwen-VL, ChatGLM);
- `OwnMergeModel`: the stack is called layer by layer, and media also change a scale of every row, so that splitting
  can't be equal;
- `TwoMethodModel`: tier 1.

Constructors are of every generation.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from sensorium.attention import Attention, AttentionMetadata
from sensorium.inputs import INPUT_REGISTRY, DummyData
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.model_executor.models.registry import ModelRegistry
from sensorium.model_executor.models.utils import AutoWeightsLoader
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.sequence import SequenceData

VOCAB_SIZE = 64
IMAGE_TOKEN = 7
MARKER_TOKEN = 5
NEGATIVE_TOKEN = -3
NO_MEDIA_TOKENS = {IMAGE_TOKEN: -100.0, MARKER_TOKEN: -100.0}
"""A logit bias under which no media token is generated."""
MAX_ROWS = 8
IMAGE_WIDTH = 4


class ToyConfig(PretrainedConfig):
    model_type = "sensorium_toy"

    def __init__(self, **kwargs: Any) -> None:
        self.hidden_size = 32
        self.num_hidden_layers = 2
        self.num_attention_heads = 2
        self.vocab_size = VOCAB_SIZE
        self.max_position_embeddings = 256
        super().__init__(**kwargs)


AutoConfig.register("sensorium_toy", ToyConfig, exist_ok=True)


class ToyLayer(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.qkv = nn.Linear(size, 3 * size)
        self.o = nn.Linear(size, size)
        head_size = size // config.num_attention_heads
        self.attn = Attention(config.num_attention_heads, head_size, head_size**-0.5)

    def forward(
        self, positions: torch.Tensor, hidden: torch.Tensor, kv_cache: torch.Tensor, metadata: AttentionMetadata
    ) -> torch.Tensor:
        waves = torch.sin(positions[:, None].float() * torch.linspace(0.1, 1, hidden.shape[-1], device=hidden.device))
        q, k, v = self.qkv(hidden + waves.to(hidden.dtype)).chunk(3, dim=-1)
        return hidden + self.o(self.attn(q, k, v, kv_cache, metadata))


class ToyTrunk(nn.Module):
    def __init__(self, config: ToyConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([ToyLayer(config) for _ in range(config.num_hidden_layers)])

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            hidden = layer(positions, hidden, kv_cache, attn_metadata)
        return hidden


def leaves(value: Any) -> list[torch.Tensor]:
    """The images of a batched argument, each `(rows, 4)`."""
    if isinstance(value, torch.Tensor):
        return list(value.reshape(-1, *value.shape[-2:]))
    return [leaf for each in value for leaf in leaves(each)]


# --- what every model here registers ---


def map_image(ctx: Any, data: Any) -> dict[str, Any]:
    images = data if isinstance(data, list) else [data]
    rows = [torch.from_numpy(np.asarray(image, dtype=np.float32)) for image in images]
    if len({len(each) for each in rows}) == 1:
        return {"pixel_values": torch.stack(rows)}
    return {"pixel_values": rows}


def dummy_data(ctx: Any, seq_len: int, mm_counts: Any) -> DummyData:
    count = mm_counts["image"]
    token = placeholder_of(ctx)
    # A marker in front of each image, for the model that looks for one.
    parts = [part for _ in range(count) for part in ((MARKER_TOKEN, 1), (token, MAX_ROWS))]
    rest = max(seq_len - sum(n for _, n in parts), 1)
    images = [np.ones((MAX_ROWS, IMAGE_WIDTH), dtype=np.float32) for _ in range(count)]
    data = SequenceData.from_prompt_token_counts(*parts, (1, rest))
    return DummyData(data, {"image": images if count > 1 else images[0]})


def placeholder_of(ctx: Any) -> int:
    return NEGATIVE_TOKEN if ctx.model_config.architecture == "NegativeIdModel" else IMAGE_TOKEN


def expand_placeholders(ctx: Any, inputs: Any) -> Any:
    """Each image token becomes a marker and one placeholder per row. Reports no ranges, like most of its kind."""
    images = inputs.get("multi_modal_data", {}).get("image", [])
    images = images if isinstance(images, list) else [images]
    counts = iter([len(image) for image in images])
    ids: list[int] = []
    for token in inputs["prompt_token_ids"]:
        if token == IMAGE_TOKEN:
            ids += [MARKER_TOKEN] + [placeholder_of(ctx)] * next(counts)
        else:
            ids.append(token)
    return {**inputs, "prompt_token_ids": ids}


def registered(cls: type) -> type:
    """The page's four decorators, and the registration of the class."""
    cls = INPUT_REGISTRY.register_input_processor(expand_placeholders)(cls)
    cls = INPUT_REGISTRY.register_dummy_data(dummy_data)(cls)
    cls = MULTIMODAL_REGISTRY.register_max_image_tokens(MAX_ROWS)(cls)
    cls = MULTIMODAL_REGISTRY.register_image_input_mapper(map_image)(cls)
    ModelRegistry.register_model(cls.__name__, cls)
    return cls


class ToyHead(nn.Module):
    """What a text model already has before it becomes multimodal."""

    lm_head: nn.Linear

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        return self.lm_head(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return AutoWeightsLoader(self).load_weights(weights)


@registered
class SeedPageModel(ToyHead, SupportsMultiModal):
    """`forward` as the page prints it, and a constructor of the original engine's third minor version."""

    def __init__(self, config: ToyConfig, multimodal_config: Any, cache_config: Any = None, quant_config: Any = None):
        super().__init__()
        self.vision = nn.Linear(IMAGE_WIDTH, config.hidden_size)
        self.language_model = ToyTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        pixel_values: torch.Tensor,
    ) -> Any:
        embeds = self.language_model.get_input_embeddings(input_ids)
        if pixel_values is not None:
            embeds = embeds.clone()
            embeds[input_ids == IMAGE_TOKEN] = self.vision(torch.cat(leaves(pixel_values)))
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)


@registered
class TextByIdsModel(ToyHead, SupportsMultiModal):
    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.vision = nn.Linear(IMAGE_WIDTH, config.hidden_size)
        self.language_model = ToyTrunk(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        images = kwargs.pop("pixel_values", None)
        if images is None:
            return self.language_model(input_ids, positions, kv_caches, attn_metadata)
        embeds = self.language_model.get_input_embeddings(input_ids).clone()
        embeds[input_ids == IMAGE_TOKEN] = self.vision(torch.cat(leaves(images)))
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)


@registered
class NegativeIdModel(ToyHead, SupportsMultiModal):
    def __init__(self, *, config: Any, prefix: str = "") -> None:
        super().__init__()
        hf = config.model_config.hf_config
        self.vision = nn.Linear(IMAGE_WIDTH, hf.hidden_size)
        self.position_table = nn.Embedding(hf.max_position_embeddings, hf.hidden_size)
        self.language_model = ToyTrunk(hf)
        self.lm_head = nn.Linear(hf.hidden_size, hf.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        pixel_values: torch.Tensor | None = None,
    ) -> torch.Tensor:
        is_text = input_ids >= 0
        embeds = torch.zeros(len(input_ids), self.lm_head.in_features, device=input_ids.device)
        embeds[is_text] = self.language_model.get_input_embeddings(input_ids[is_text])
        if pixel_values is not None:
            embeds[~is_text] = self.vision(torch.cat(leaves(pixel_values)))
        embeds = embeds + self.position_table(positions)
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=embeds)


@registered
class MarkerModel(ToyHead, SupportsMultiModal):
    def __init__(self, config: ToyConfig, cache_config: Any, quant_config: Any) -> None:
        super().__init__()
        self.vision = nn.Linear(IMAGE_WIDTH, config.hidden_size)
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.wpe = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.h = nn.ModuleList([ToyLayer(config) for _ in range(config.num_hidden_layers)])
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        pixel_values: Any = None,
    ) -> torch.Tensor:
        hidden = self.wte(input_ids)
        if pixel_values is not None:
            hidden = hidden.clone()
            markers = (input_ids == MARKER_TOKEN).nonzero()[:, 0].tolist()
            for marker, image in zip(markers, leaves(pixel_values), strict=True):
                hidden[marker + 1 : marker + 1 + len(image)] = self.vision(image)
        hidden = hidden + self.wpe(positions)
        for layer, kv_cache in zip(self.h, kv_caches, strict=True):
            hidden = layer(positions, hidden, kv_cache, attn_metadata)
        return hidden


@registered
class OwnMergeModel(ToyHead, SupportsMultiModal):
    def __init__(self, *, config: Any, prefix: str = "") -> None:
        super().__init__()
        hf = config.model_config.hf_config
        self.vision = nn.Linear(IMAGE_WIDTH, hf.hidden_size)
        self.language_model = ToyTrunk(hf)
        self.lm_head = nn.Linear(hf.hidden_size, hf.vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        pixel_values: Any = None,
    ) -> torch.Tensor:
        hidden = self.language_model.get_input_embeddings(input_ids)
        if pixel_values is not None:
            hidden = hidden.clone()
            hidden[input_ids == IMAGE_TOKEN] = self.vision(torch.cat(leaves(pixel_values)))
        for layer, kv_cache in zip(self.language_model.layers, kv_caches, strict=True):
            hidden = layer(positions, hidden, kv_cache, attn_metadata)
            if pixel_values is not None:  # media reach past the rows that enter the decoder
                hidden = torch.where((input_ids == IMAGE_TOKEN)[:, None], 2 * hidden, hidden)
        return hidden


@registered
class TwoMethodModel(ToyHead, SupportsMultiModal):
    def __init__(self, *, config: Any, prefix: str = "") -> None:
        super().__init__()
        hf = config.model_config.hf_config
        self.vision = nn.Linear(IMAGE_WIDTH, hf.hidden_size)
        self.language_model = ToyTrunk(hf)
        self.lm_head = nn.Linear(hf.hidden_size, hf.vocab_size)

    def get_multimodal_embeddings(self, pixel_values: Any) -> list[torch.Tensor]:
        return [self.vision(image) for image in leaves(pixel_values)]

    def get_input_embeddings(self, input_ids: torch.Tensor, multimodal_embeddings: Any = None) -> torch.Tensor:
        embeds = self.language_model.get_input_embeddings(input_ids)
        if multimodal_embeddings is not None:
            embeds = embeds.clone()
            embeds[input_ids == IMAGE_TOKEN] = torch.cat(list(multimodal_embeddings))
        return embeds

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: list[torch.Tensor],
        attn_metadata: AttentionMetadata,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: Any = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            assert input_ids is not None
            rows = None if pixel_values is None else self.get_multimodal_embeddings(pixel_values)
            inputs_embeds = self.get_input_embeddings(input_ids, rows)
        return self.language_model(None, positions, kv_caches, attn_metadata, inputs_embeds=inputs_embeds)


TOY_MODELS = (SeedPageModel, TextByIdsModel, NegativeIdModel, MarkerModel, OwnMergeModel, TwoMethodModel)


def save_checkpoint(cls: type, directory: Path, seed: int = 0) -> Path:
    """Write a checkpoint with seeded random weights for one of these classes."""
    from sensorium.config import EngineConfig, ModelConfig
    from sensorium.model_executor.adapter import construct_model

    config = ToyConfig(architectures=[cls.__name__], dtype="float32")
    config.save_pretrained(directory)
    engine_config = EngineConfig(
        ModelConfig(str(directory), str(directory), config, "float32", 256, model_class=cls, architecture=cls.__name__)
    )
    torch.manual_seed(seed)
    model = construct_model(cls, engine_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, parameter.shape[-1] ** -0.5 * 1.5)
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, directory / "model.safetensors"
    )
    return directory


def image(seed: int, rows: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """A random image of so many rows."""
    return np.random.default_rng(seed).standard_normal((rows, IMAGE_WIDTH)).astype(np.float32)


def reference_tokens(model: Any, prompt: list[int], images: list[Any], num_tokens: int) -> list[int]:
    """Greedy tokens by whole passes through the model's own `forward`, without any cache.

    `prompt` is expanded. This is the engine-free meaning of the class. Since every pass merges media again, the output
    must not contain their tokens: `NO_MEDIA_TOKENS` keeps them out.
    """
    ids = list(prompt)
    device = next(model.parameters()).device
    pixels = [torch.from_numpy(each)[None].to(device) for each in images]
    layers = sum(isinstance(module, Attention) for module in model.modules())
    with torch.inference_mode():
        for _ in range(num_tokens):
            hidden = model(
                input_ids=torch.tensor(ids, device=device),
                positions=torch.arange(len(ids), device=device),
                kv_caches=[torch.empty(0)] * layers,
                attn_metadata=AttentionMetadata.without_cache([len(ids)], device=device),
                pixel_values=pixels or None,
            )
            logits = model.compute_logits(hidden[-1], None)
            for token, bias in NO_MEDIA_TOKENS.items():
                logits[token] += bias
            ids.append(int(logits.argmax()))
    return ids[len(prompt) :]

"""Runs a loaded model without an engine: one prompt over a real paged cache, whole, in chunks, or token by token."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sensorium.attention import AttentionMetadata, compute_slot_mapping
from sensorium.cache_spec import CacheKind
from sensorium.config import EngineConfig
from sensorium.engine.args import EngineArgs
from sensorium.inputs import INPUT_REGISTRY, token_inputs
from sensorium.model_executor.model_loader import load_model
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.multimodal.byte_patches import as_processed
from sensorium.multimodal.byte_pictures import joined
from sensorium.worker.kv_cache import CacheLayout, zero_row
from tests.helpers.checkpoints import make_tokenizer
from tests.helpers.hf_reference import TEMPORAL_PATCH_SIZE, in_frames


def engine_config(path: Path, **settings: Any) -> EngineConfig:
    """The resolved configuration of a checkpoint, on the CPU."""
    return EngineArgs(model=str(path), device="cpu", **settings).create_engine_config()


def load(path: Path, **settings: Any) -> tuple[Any, EngineConfig]:
    """A checkpoint's model and configuration."""
    config = engine_config(path, **settings)
    return load_model(config), config


NUM_ROWS = 2
"""Of a state: one to read, one to write."""


class DirectRun:
    """One sequence of a model. Blocks are dealt out in reverse order, so that an identity mapping can't hide."""

    def __init__(self, model: Any, config: EngineConfig, *, num_blocks: int = 64) -> None:
        self.model = model
        layout = CacheLayout.of(model, config)
        self.groups = layout.groups([NUM_ROWS if kind is CacheKind.STATE else num_blocks for kind in layout.kinds])
        self.kv_caches = layout.allocate(self.groups, torch.device("cpu"))
        for layer, cache in zip(layout.layers, self.kv_caches, strict=True):
            # Nothing is read before it was written, but for the row of zeros from which states begin.
            for tensor in (cache,) if isinstance(cache, torch.Tensor) else cache:
                num_blank = NUM_ROWS if self.groups[layer.group].kind is CacheKind.STATE else len(tensor)
                tensor[:num_blank] = torch.nan
        self.block_size = config.cache_config.block_size
        self.block_table = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)[None]
        self.num_computed_tokens = self.num_steps = 0

    @torch.inference_mode()
    def step(self, input_ids: Any, positions: Any = None, **kwargs: Any) -> torch.Tensor:
        """Run the sequence's next tokens; logits `(num_tokens, vocab_size)` of all of them.

        `positions`: `(num_tokens,)` or `(3, num_tokens)`; the tokens' indices if not given. `kwargs` go to
        `forward`.
        """
        ids = torch.as_tensor(input_ids)
        num_tokens, start = len(ids), self.num_computed_tokens
        if positions is None:
            positions = np.arange(start, start + num_tokens)
        query_lens = np.array([num_tokens], dtype=np.int32)
        seq_lens = query_lens + start
        metadata = AttentionMetadata.from_numpy(
            query_lens,
            seq_lens,
            self.block_table,
            compute_slot_mapping(self.block_table, query_lens, seq_lens, self.block_size),
        )
        num_groups = len(self.groups)
        source = self.num_steps % NUM_ROWS if start else zero_row(self.groups[-1])
        self.num_steps += 1
        metadata = metadata.with_groups(
            self.groups,
            [metadata.block_table] * num_groups,
            metadata.slot_mapping.expand(num_groups, -1),
            torch.tensor([[source], [self.num_steps % NUM_ROWS]]),
        )
        hidden = self.model(
            input_ids=ids,
            positions=torch.as_tensor(positions),
            kv_caches=self.kv_caches,
            attn_metadata=metadata,
            **kwargs,
        )
        self.num_computed_tokens += num_tokens
        logits: torch.Tensor = self.model.compute_logits(hidden, None)
        return logits


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference against the largest expected value."""
    assert got.shape == expected.shape, f"{tuple(got.shape)} against {tuple(expected.shape)}"
    return float((got.float() - expected.float()).abs().max() / expected.float().abs().max())


@dataclass(frozen=True)
class Prepared:
    """A prompt behind a model's input processor and mappers."""

    token_ids: list[int]
    kwargs: dict[str, Any]
    """Mapped arguments, as Hugging Face's `forward` takes them."""
    positions: np.ndarray[Any, Any]
    """`(num_tokens,)` or, with M-RoPE, `(3, num_tokens)`."""
    mrope_delta: int
    placeholders: dict[str, Any]

    @property
    def batched(self) -> dict[str, Any]:
        """The arguments as the engine passes them for one request."""
        return MultiModalKwargs.batch([self.kwargs])

    def continued(self, num_tokens: int) -> np.ndarray[Any, Any]:
        """Positions of the prompt and `num_tokens` output tokens behind it."""
        more = np.arange(len(self.token_ids), len(self.token_ids) + num_tokens) + self.mrope_delta
        shape = (*self.positions.shape[:-1], num_tokens)
        return np.concatenate((self.positions, np.broadcast_to(more, shape)), axis=-1)


def prepare(
    config: EngineConfig, prompt: str | list[int], data: dict[str, Any] | None = None, **mm_processor_kwargs: Any
) -> Prepared:
    """Run a prompt through the registered input processor and mappers of a tiny checkpoint's model."""
    model_config = config.model_config
    token_ids = make_tokenizer()(prompt)["input_ids"] if isinstance(prompt, str) else prompt
    inputs: Any = INPUT_REGISTRY.process_input(
        model_config,
        token_inputs(token_ids, multi_modal_data=data, mm_processor_kwargs=mm_processor_kwargs or None),
    )
    token_ids, kwargs = inputs["prompt_token_ids"], {}
    for modality, items in (inputs.get("multi_modal_data") or {}).items():
        plugin = MULTIMODAL_REGISTRY.get_plugin(modality)
        kwargs |= plugin.map_input(model_config, items, inputs.get("mm_processor_kwargs") or mm_processor_kwargs)
    positions, delta = np.arange(len(token_ids)), 0
    if model_config.uses_mrope:
        hook: Any = model_config.model_class
        positions, delta = hook.get_mrope_input_positions(token_ids, model_config.hf_config, kwargs)
    return Prepared(token_ids, kwargs, positions, delta, dict(inputs.get("multi_modal_placeholders") or {}))


@torch.inference_mode()
def hf_logits(reference: Any, token_ids: list[int], kwargs: dict[str, Any]) -> torch.Tensor:
    """Logits `(num_tokens, vocab_size)` of the Hugging Face model for one prompt with its media."""
    ids = torch.tensor(token_ids)
    if "image_grid_thw" in kwargs or "video_grid_thw" in kwargs:
        config = reference.config
        types = (ids == config.image_token_id) * 1 + (ids == config.video_token_id) * 2
        kwargs = {**as_processed(kwargs, TEMPORAL_PATCH_SIZE), "mm_token_type_ids": types[None]}
    else:
        kwargs = {name: joined([value]) for name, value in as_processed(kwargs, TEMPORAL_PATCH_SIZE).items()}
    if "pixel_values_videos" not in inspect.signature(reference.forward).parameters and "pixel_values_videos" in kwargs:
        kwargs = {**kwargs, "pixel_values": in_frames(kwargs["pixel_values_videos"])}
        kwargs.pop("pixel_values_videos")
    logits: torch.Tensor = reference(ids[None], **kwargs).logits[0]
    return logits

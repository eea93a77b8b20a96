"""Runs a loaded model without an engine: one prompt over a real paged cache, whole, in chunks, or token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.attention import AttentionMetadata, compute_slot_mapping
from sensorium.config import EngineConfig
from sensorium.engine.args import EngineArgs
from sensorium.model_executor.layers.decoder import head_size_of
from sensorium.model_executor.model_loader import load_model


def engine_config(path: Path, **settings: Any) -> EngineConfig:
    """The resolved configuration of a checkpoint, on the CPU."""
    return EngineArgs(model=str(path), device="cpu", **settings).create_engine_config()


def load(path: Path, **settings: Any) -> tuple[Any, EngineConfig]:
    """A checkpoint's model and configuration."""
    config = engine_config(path, **settings)
    return load_model(config), config


class DirectRun:
    """One sequence of a model. Blocks are dealt out in reverse order, so that an identity mapping can't hide."""

    def __init__(self, model: Any, config: EngineConfig, *, num_blocks: int = 64, block_size: int = 16) -> None:
        text = config.model_config.hf_text_config
        shape = (2, num_blocks, block_size, text.num_key_value_heads, head_size_of(text))
        self.model = model
        self.kv_caches = [
            torch.full(shape, torch.nan, dtype=config.model_config.dtype) for _ in range(text.num_hidden_layers)
        ]
        self.block_size = block_size
        self.block_table = np.arange(num_blocks - 1, -1, -1, dtype=np.int32)[None]
        self.num_computed_tokens = 0

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


def parameters_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters by name."""
    return dict(model.named_parameters())

"""Makes registered text models usable as the inner models of V0's classes."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sensorium.attention import AttentionMetadata, LayerCache
from sensorium.model_executor.layers.decoder import Decoder
from sensorium.model_executor.layers.sampler import get_sampler
from sensorium.model_executor.models.modules import make_empty_intermediate_tensors_factory
from sensorium.model_executor.models.registry import ModelRegistry

MODELS = "sensorium.compat.v0.vllm.model_executor.models"
ROOM = {
    "InternLM2ForCausalLM": "internlm2",
    "MiniCPMForCausalLM": "minicpm",
    "OPTForCausalLM": "opt",
    "PersimmonForCausalLM": "persimmon",
    "Phi3ForCausalLM": "phi3",
}
"""Architectures that only this package has a class for, with its module."""

STAGE_TENSORS = ["hidden_states", "residual"]
"""The tensors that a pipeline stage of V0's decoders passed on."""


class ScalingDecoder(Decoder):
    """A decoder with scaled embeddings that scales all its input rows, as V0's Gemma did. So it returns embeddings
    without the factor to an outer class, which may put other unscaled rows between them."""

    def get_input_embeddings(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)` without the factor."""
        embeddings: torch.Tensor = self.embed_tokens(input_ids)
        return embeddings

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[LayerCache],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See `Decoder.forward`."""
        if inputs_embeds is None:
            assert input_ids is not None, "a decoder needs input_ids or inputs_embeds"
            inputs_embeds = self.get_input_embeddings(input_ids)
        assert self.embed_scale is not None
        scaled = inputs_embeds * self.embed_scale
        return super().forward(None, positions, kv_caches, attn_metadata, intermediate_tensors, scaled)


def class_of_room(architectures: Sequence[str]) -> type[nn.Module] | None:
    """This package's class for an inner model that no class is registered for; None if it has none."""
    name = next((each for each in architectures if each in ROOM), None)
    if name is None or set(architectures) & set(ModelRegistry.get_supported_archs()):
        return None
    found: type[nn.Module] = getattr(importlib.import_module(f"{MODELS}.{ROOM[name]}"), name)
    return found


def with_names_of_v0(model: nn.Module) -> nn.Module:
    """Add to a text model and to its decoder the attributes that V0's outer classes use."""
    for module in (model, getattr(model, "model", None)):
        if not isinstance(module, nn.Module):
            continue
        if not hasattr(module, "make_empty_intermediate_tensors"):
            size = _width_of(model)
            make: Any = make_empty_intermediate_tensors_factory(STAGE_TENSORS, size)
            module.make_empty_intermediate_tensors = make
        if type(module) is Decoder and module.embed_scale is not None and getattr(model, "scales_given_rows", True):
            module.__class__ = ScalingDecoder
    if not hasattr(model, "sampler"):
        model.sampler = get_sampler()
    return model


def _width_of(model: nn.Module) -> int:
    table = next((each for each in model.modules() if hasattr(each, "embedding_dim")), None)
    return 0 if table is None else int(table.embedding_dim)  # type: ignore[arg-type]

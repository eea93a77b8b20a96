"""ColQwen2: Qwen2-VL with a vector for each token instead of logits, for retrieval of pages by late interaction.

Paper: Faysse et al. 2024, "ColPali". Reference: `transformers` `ColQwen2ForRetrieval`, which numbers rows of pictures
consecutively like those of text, unlike Qwen2-VL with its positions in time, height and width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch

from sensorium.attention import AttentionMetadata
from sensorium.config import EngineConfig
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.models.qwen2_vl import Qwen2VLForConditionalGeneration
from sensorium.model_executor.models.utils import WeightsMapper, maybe_prefix


class ColQwen2ForRetrieval(Qwen2VLForConditionalGeneration):
    """Tower, decoder, and a projection. Everything about media is inherited from Qwen2-VL."""

    config_part: ClassVar[str] = "vlm_config"
    names = WeightsMapper(
        orig_to_new_prefix={
            "vlm.model.visual.": "visual.",
            "vlm.visual.": "visual.",
            "vlm.model.language_model.": "language_model.model.",
            "vlm.language_model.": "language_model.model.",
            "vlm.model.": "language_model.model.",
            "vlm.lm_head.": None,
        }
    )

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__(config=config, prefix=prefix)
        size = config.model_config.pooler.size
        assert size is not None, "the config says it"
        del self.language_model.lm_head
        self.embedding_proj_layer = ReplicatedLinear(
            config.model_config.hf_text_config.hidden_size, size, prefix=maybe_prefix(prefix, "embedding_proj_layer")
        )

    @classmethod
    def get_mrope_input_positions(
        cls, input_tokens: Sequence[int], _hf_config: Any, _mm_kwargs: Mapping[str, Any]
    ) -> tuple[np.ndarray[Any, np.dtype[np.int64]], int]:
        """Indices in the prompt, the same in time, height and width."""
        return np.tile(np.arange(len(input_tokens), dtype=np.int64), (3, 1)), 0

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        kv_caches: Sequence[torch.Tensor],
        attn_metadata: AttentionMetadata,
        intermediate_tensors: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """Vectors `(num_tokens, size)`, not normalized."""
        hidden_states = super().forward(
            input_ids, positions, kv_caches, attn_metadata, intermediate_tensors, inputs_embeds, **kwargs
        )
        vectors: torch.Tensor = self.embedding_proj_layer(hidden_states)[0]
        return vectors

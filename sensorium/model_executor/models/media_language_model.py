"""The base class of models whose decoder takes media rows among its inputs, as most multimodal models do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from sensorium.attention import AttentionMetadata
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.model_executor.models.utils import (
    AutoWeightsLoader,
    WeightsMapper,
    merge_multimodal_embeddings,
)
from sensorium.multimodal.byte_pictures import pictures_of
from sensorium.multimodal.inputs import each_item


class MediaLanguageModel(nn.Module, SupportsMultiModal):
    """A decoder `language_model`, and towers for media.

    A model file sets `names`, makes the parts in its constructor, and implements `encode_media`.
    """

    names: ClassVar[WeightsMapper]
    """Maps checkpoints' names, in every layout that is in use, to the module's."""
    language_model: Any
    """Embeds ids, runs the layers, and computes logits, as `LlamaForCausalLM` does."""
    mm_row_width: int | None = None
    """Channels of media rows, if more than the decoder's."""
    mm_host_kwargs: ClassVar[Sequence[str]] = ()
    """Arguments of `encode_media` that Python code reads, and which therefore stay on the host."""

    def encode_media(self, **kwargs: Any) -> Mapping[int, Sequence[torch.Tensor]]:
        """Rows `(num_rows, hidden_size)` of each item, by their placeholder token's id.

        `kwargs` are those of the mappers, batched over items; missing or None for an absent modality.
        """
        raise NotImplementedError

    def get_multimodal_embeddings(self, **kwargs: Any) -> list[torch.Tensor]:
        """Rows `(num_rows, hidden_size)` of each item, in order, one modality after the other."""
        return [rows for items in self.encode_media(**kwargs).values() for rows in items]

    def get_input_embeddings(self, input_ids: torch.Tensor, multimodal_embeddings: Any = None) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`, with media rows, in the prompt's order, at the placeholders."""
        embeddings = self.embed_text(input_ids)
        if multimodal_embeddings is None or not len(multimodal_embeddings):
            return embeddings
        return merge_multimodal_embeddings(input_ids, embeddings, multimodal_embeddings, self.placeholder_token_ids())

    def embed_text(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings `(num_tokens, hidden_size)`."""
        embeddings: torch.Tensor = self.language_model.get_input_embeddings(input_ids)
        return embeddings

    def placeholder_token_ids(self) -> list[int]:
        """The ids of placeholder tokens, which media rows replace."""
        raise NotImplementedError

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
        """Hidden states `(num_tokens, hidden_size)`.

        The engine encodes media before and passes `inputs_embeds`; media in `kwargs`, as the mappers return them, are
        encoded here.
        """
        if inputs_embeds is None and kwargs:
            assert input_ids is not None, "media need the ids that say where they stand"
            inputs_embeds = self.get_input_embeddings(input_ids)
            for token_id, rows in self.encode_media(**kwargs).items():
                inputs_embeds = merge_multimodal_embeddings(input_ids, inputs_embeds, list(rows), token_id)
        hidden_states: torch.Tensor = self.language_model(
            input_ids, positions, kv_caches, attn_metadata, intermediate_tensors, inputs_embeds
        )
        return hidden_states

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        """Logits `(num_rows, vocab_size)`."""
        logits: torch.Tensor = self.language_model.compute_logits(hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill all parts, each by its own `load_weights` if it has one."""
        return AutoWeightsLoader(self).load_weights(weights, mapper=self.names)


class PictureLanguageModel(MediaLanguageModel):
    """A decoder and a tower for pictures, all of one placeholder token, `image_token_id` of the config.

    A model file implements `encode_pictures` instead of `encode_media`.
    """

    config: Any
    """Hugging Face's config."""

    def placeholder_token_ids(self) -> list[int]:
        """See `MediaLanguageModel`."""
        return [self.config.image_token_id]

    def encode_media(
        self,
        *,
        pixel_values: Any = None,
        pixel_bytes: Any = None,
        pixel_table: Any = None,
        image_sizes: Any = None,
        image_embeds: Any = None,
        **kwargs: Any,
    ) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; pictures in either form of `byte_pictures`, or embeddings."""
        if image_embeds is not None:
            return {self.config.image_token_id: each_item(image_embeds, 2)}
        if pixel_values is None and pixel_bytes is None:
            return {}
        pixels = (pixel_values, pixel_bytes, pixel_table)
        return {self.config.image_token_id: self.encode_pictures(pictures_of(*pixels), image_sizes)}

    def encode_pictures(self, pictures: Sequence[torch.Tensor], image_sizes: Any) -> Sequence[torch.Tensor]:
        """Rows `(num_rows, hidden_size)` of each picture.

        Args:
            pictures: `(tiles, channels, height, width)` each.
            image_sizes: Height and width of each picture in pixels, if the processor returns them.
        """
        raise NotImplementedError

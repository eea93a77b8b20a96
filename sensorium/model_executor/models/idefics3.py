"""Idefics3 and SmolVLM: a SigLIP tower over tiles, a connector that joins squares of patches, and Llama's decoder.

Paper: Laurençon et al. 2024, "Building and better understanding vision-language models", section 3; Marafioti et al.
2025, "SmolVLM". Reference: `transformers` `Idefics3ForConditionalGeneration`, `SmolVLMForConditionalGeneration`.
Placeholders: `<image>` becomes, for each tile, `<fake_token_around_image>`, its row and column, and an `<image>` for
each of its rows; each line of tiles ends with a line break, and the whole picture comes last.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from sensorium.config import EngineConfig
from sensorium.distributed import ONE_RANK, constructing_for
from sensorium.model_executor.layers.linear import ReplicatedLinear
from sensorium.model_executor.models.media_common import Pieces, language_config
from sensorium.model_executor.models.media_inputs import PictureInputs, Size, takes_media
from sensorium.model_executor.models.media_language_model import PictureLanguageModel
from sensorium.model_executor.models.siglip import SiglipVisionEmbeddings, SiglipVisionModel
from sensorium.model_executor.models.tiles import Pair
from sensorium.model_executor.models.utils import (
    WeightsMapper,
    init_registered_model,
    maybe_prefix,
    missing_inner_model,
)
from sensorium.model_executor.models.vision_common import merged_squares

MAX_SIDE = 4096
"""The longest side in pixels after the processor's first resizing."""


class Idefics3Pictures(PictureInputs):
    """Pictures as tiles, followed by the whole picture if there are several."""

    settings = ("size", "do_image_splitting")

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels."""
        side: int = dict(self.processor.max_image_size)["longest_edge"]
        return side

    @property
    def rows_per_tile(self) -> int:
        """Decoder rows of a tile."""
        side: int = self.tile_size // self.config.vision_config.patch_size // self.config.scale_factor
        return side**2

    def tile_grid(self, size: Size) -> Pair:
        """Rows and columns of a picture's tiles; (0, 0) if it isn't split."""
        if not self.processor.do_image_splitting:
            return 0, 0
        tile, (height, width) = self.tile_size, self.resized((size[0], size[1]))
        ratio = width / height
        if width >= height:
            across = math.ceil(width / tile)
            down = math.ceil(int(across * tile / ratio) / tile)
        else:
            down = math.ceil(height / tile)
            across = math.ceil(int(down * tile * ratio) / tile)
        return (down, across) if down > 1 or across > 1 else (0, 0)

    def resized(self, size: Pair) -> Pair:
        """Height and width after the processor's first resizing, which bounds the longest edge."""
        edges = dict(self.processor.size)
        if not self.processor.do_resize:
            return size
        if not edges.get("longest_edge"):
            return edges["height"], edges["width"]
        height, width = _even_other_side(size, edges["longest_edge"])
        if max(height, width) > MAX_SIDE:
            ratio = width / height
            height, width = (int(MAX_SIDE / ratio), MAX_SIDE) if width >= height else (MAX_SIDE, int(MAX_SIDE * ratio))
        return max(height, 1), max(width, 1)

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        down, across = self.tile_grid(size)
        break_, last_break = self.ids_of("\n"), self.ids_of("\n\n")
        pieces: list[tuple[int, int]] = []
        for row in range(1, down + 1):
            for column in range(1, across + 1):
                pieces += self._tile(f"<row_{row}_col_{column}>")
            pieces += last_break if row == down else break_
        return (*pieces, *self._tile("<global-img>"), self._fake)

    @property
    def _fake(self) -> tuple[int, int]:
        return self.tokenizer.convert_tokens_to_ids("<fake_token_around_image>"), 1

    def _tile(self, name: str) -> Pieces:
        return (self._fake, *self.ids_of(name), (self.row_id, self.rows_per_tile))

    def pixels_of_size(self, size: Size) -> int:
        """See `PictureInputs`."""
        down, across = self.tile_grid(size)
        return max((down * across + 1) * self.tile_size**2, math.prod(self.resized((size[0], size[1]))))

    def sizes(self) -> Iterable[Size]:
        """See `MediaInputs`: the most tiles on the longest side, and any number on the other."""
        most = max(self.tile_grid((1, 1)))
        tile = self.tile_size
        return [size for n in range(1, most + 1) for size in ((n * tile, most * tile), (most * tile, n * tile))] or [
            (tile, tile)
        ]


def _even_other_side(size: Pair, longest: int) -> Pair:
    """A picture's size with this longest side, and an even other side."""
    (height, width), ratio = size, size[1] / size[0]
    if width >= height:
        other = int(longest / ratio)
        return max(other + other % 2, 1), longest
    other = int(longest * ratio)
    return longest, max(other + other % 2, 1)


@lru_cache(maxsize=64)
def places(rows: int, columns: int, side: int) -> torch.Tensor:
    """The index of each of a tile's patches in the table of `side * side` positions, `(rows * columns,)`.

    A patch's position is its start as a fraction of the tile, rounded as in `transformers` `Idefics3VisionEmbeddings`,
    where equal fractions may give neighbouring indices.
    """
    edges = torch.arange(1 / side, 1.0, 1 / side)

    def nearest(count: int) -> torch.Tensor:
        begins = torch.arange(count, dtype=torch.float32) * (1.0 / torch.tensor(count))
        return torch.bucketize(begins.clamp(max=1.0 - 1e-6), edges, right=True)

    return (nearest(rows)[:, None] * side + nearest(columns)).flatten()


class Idefics3VisionEmbeddings(SiglipVisionEmbeddings):
    """The patches of tiles of any size, each with its position embedding added."""

    def positions(self, rows: int, columns: int) -> torch.Tensor:
        """See `SiglipVisionEmbeddings`."""
        table = self.position_embedding.weight
        return table[places(rows, columns, math.isqrt(len(table))).to(table.device)]


class Idefics3VisionModel(SiglipVisionModel):
    """SigLIP's tower with positions for tiles of any size."""

    embeddings_class = Idefics3VisionEmbeddings


class Idefics3Connector(nn.Module):
    """Joins squares of patches, and projects them to the decoder's width."""

    def __init__(self, hf_config: Any, prefix: str = "") -> None:
        super().__init__()
        self.scale_factor: int = hf_config.scale_factor
        with constructing_for(ONE_RANK):
            self.proj = ReplicatedLinear(
                hf_config.vision_config.hidden_size * self.scale_factor**2,
                hf_config.get_text_config().hidden_size,
                bias=False,
                prefix=f"{prefix}.proj",
            )

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(B, patches, hidden_size)` to `(B, patches / scale_factor^2, text hidden_size)`."""
        rows: torch.Tensor = self.proj(merged_squares(features, math.isqrt(features.shape[1]), self.scale_factor))[0]
        return rows


@takes_media(Idefics3Pictures)
class Idefics3ForConditionalGeneration(PictureLanguageModel):
    """Tower, connector and decoder."""

    names = WeightsMapper(
        orig_to_new_substr={"connector.modality_projection.": "connector."},
        orig_to_new_prefix={
            "model.text_model.": "language_model.model.",
            "model.": "",
            "lm_head.": "language_model.lm_head.",
        },
    )

    @classmethod
    def unsuited_to(cls, hf_config: Any) -> str | None:
        """Why transformers must run a checkpoint: no class is registered for its decoder."""
        return missing_inner_model(hf_config.get_text_config())

    def __init__(self, *, config: EngineConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = config.model_config.hf_config
        self.vision_model = Idefics3VisionModel(
            self.config.vision_config, None, config.quant_config, prefix=maybe_prefix(prefix, "vision_model")
        )
        self.connector = Idefics3Connector(self.config, prefix=maybe_prefix(prefix, "connector"))
        self.language_model = init_registered_model(
            language_config(config), prefix=maybe_prefix(prefix, "language_model")
        )

    def encode_pictures(self, pictures: Sequence[torch.Tensor], image_sizes: Any) -> Sequence[torch.Tensor]:
        """See `PictureLanguageModel`."""
        rows = self.connector(self.vision_model(torch.cat(list(pictures))))
        return [each.flatten(0, 1) for each in torch.split(rows, [len(each) for each in pictures])]

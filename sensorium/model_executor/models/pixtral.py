"""The vision tower of Pixtral, for pictures of any size, with rotary positions by row and column; and pictures' tokens.

Paper: Agrawal et al. 2024, "Pixtral 12B", section 2. Reference: `transformers` `PixtralVisionModel`,
`PixtralProcessor`. Used by LLaVA (the architecture of Pixtral 12B) and Mistral 3. Placeholders: `[IMG]` becomes, for
each row of the picture, as many `[IMG]` as there are columns, and an `[IMG_BREAK]`; the last one is `[IMG_END]`
instead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from sensorium.distributed import constructing_tower
from sensorium.errors import InvalidRequestError
from sensorium.model_executor.layers.decoder import GatedMLP
from sensorium.model_executor.layers.encoder import EncoderAttention, EncoderLayer, PatchEmbedding, image_patches
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.layers.tower import (
    Grid,
    RecordableTower,
    TowerPlan,
    frame_starts,
    patch_positions,
)
from sensorium.model_executor.models.media_common import Pieces, stacked
from sensorium.model_executor.models.media_inputs import PictureInputs, Size
from sensorium.model_executor.models.utils import WeightsMapper
from sensorium.model_executor.models.vision_common import FeatureEncoder, load_encoder_weights
from sensorium.multimodal.hf_processors import read_config_file

NORM_EPS = 1e-5


class PixtralPictures(PictureInputs):
    """A picture has a token for each square of patches, row by row."""

    settings = ("size",)

    @property
    def square_size(self) -> int:
        """Side in pixels of the square that becomes one row."""
        size: int = self.config.vision_config.patch_size * getattr(self.config, "spatial_merge_size", 1)
        return size

    def processor_settings(self) -> dict[str, Any]:
        """Pictures are resized to whole squares."""
        return {**self.given, "patch_size": self.square_size}

    @property
    def most(self) -> tuple[int, int]:
        """The largest height and width, to which the processor shrinks larger pictures."""
        edges = dict(self.processor.size)
        longest = edges.get("longest_edge")
        return (longest, longest) if longest else (edges["height"], edges["width"])

    def resized(self, size: Size) -> Size:
        """Height and width after the processor.

        Raises `InvalidRequestError` (a `ValueError`) for a picture so thin that a side would be shrunk to 0.
        """
        height, width = size
        ratio = max(height / self.most[0], width / self.most[1])
        if ratio > 1 and self.processor.do_resize:
            height, width = math.floor(height / ratio), math.floor(width / ratio)
        if min(height, width) < 1:
            raise InvalidRequestError(
                f"image size: got {size[0]}x{size[1]} pixels, of which {height}x{width} would be left within "
                f"{self.most[0]}x{self.most[1]}, expected at least 1 on each side. Send a picture of a less extreme "
                "shape."
            )
        return self._whole_squares(height, width)

    def _whole_squares(self, height: int, width: int) -> Size:
        square = self.square_size
        return ((height - 1) // square + 1) * square, ((width - 1) // square + 1) * square

    def pixels_of_size(self, size: Size) -> int:
        """See `PictureInputs`."""
        return math.prod(self.resized(size))

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        height, width = self.resized(size)
        row = ((self.row_id, width // self.square_size), (self._separator("break"), 1))
        return (*(row * (height // self.square_size))[:-1], (self._separator("end"), 1))

    def _separator(self, kind: str) -> int:
        """The token after a row, or after the last one."""
        names = read_config_file(self.ctx.model_config.model, "processor_config.json", self.ctx.model_config.revision)
        token = names.get(f"image_{kind}_token", f"[IMG_{kind.upper()}]")
        token_id: int = self.tokenizer.convert_tokens_to_ids(token)
        return token_id

    def sizes(self) -> Iterable[Size]:
        """See `MediaInputs`: for each number of rows, the most columns that tokens and processor allow."""
        square = self.square_size
        tall, wide = self._whole_squares(*self.most)
        for rows in range(1, tall // square + 1):
            columns = min(wide // square, self.max_tokens // rows - 1)
            yield rows * square, max(columns, 1) * square


def pixtral_layer(config: Any, quant_config: QuantizationConfig | None, prefix: str) -> EncoderLayer:
    """A layer of the tower: root-mean-square norms, a gated MLP, no biases."""
    width = config.hidden_size
    with constructing_tower(config.intermediate_size):
        mlp = GatedMLP(width, config.intermediate_size, config.hidden_act, False, quant_config, f"{prefix}.mlp")
    return EncoderLayer(
        EncoderAttention(width, config.num_attention_heads, False, quant_config, prefix=f"{prefix}.attn"),
        mlp,
        RMSNorm(width, eps=NORM_EPS),
        RMSNorm(width, eps=NORM_EPS),
    )


class PixtralVisionModel(RecordableTower):
    """The tower, up to the last layer whose output is used; it returns a row for each patch.

    Args:
        config: A Pixtral vision config.
        feature_layers: See `FeatureEncoder`.
        quant_config: How linear layers hold their weights.
        prefix: The module's name in the model.
        square: For a model that merges squares of patches: the square's side, whose patches are adjacent rows.
    """

    num_class_tokens = 0
    merge_size = 1
    renames = WeightsMapper(
        orig_to_new_substr={
            ".attention.o_proj.": ".attn.out_proj.",
            ".attention.": ".attn.",
            ".attention_norm.": ".norm1.",
            ".ffn_norm.": ".norm2.",
            ".feed_forward.": ".mlp.",
        },
        orig_to_new_prefix={"transformer.": "encoder."},
    )
    inv_freq: torch.Tensor

    def __init__(
        self,
        config: Any,
        feature_layers: Sequence[int] = (-1,),
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
        square: int = 1,
    ) -> None:
        super().__init__()
        self.patch_size: int = config.patch_size
        self.square = square
        self.patch_width = config.num_channels * self.patch_size**2
        self.patch_conv = PatchEmbedding(
            self.patch_width, config.hidden_size, bias=False, prefix=f"{prefix}.patch_conv"
        )
        self.ln_pre = RMSNorm(config.hidden_size, eps=NORM_EPS)
        self.encoder = FeatureEncoder(config, feature_layers, quant_config, f"{prefix}.encoder", pixtral_layer)
        head_size = config.hidden_size // config.num_attention_heads
        exponents = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
        frequencies = 1.0 / config.rope_parameters["rope_theta"] ** exponents
        self.register_buffer("inv_freq", torch.stack((frequencies[0::2], frequencies[1::2])), persistent=False)

    def plan(self, grids: Sequence[Grid]) -> TowerPlan:
        """See `RecordableTower`."""
        positions = np.concatenate([patch_positions(grid, self.square) for grid in grids])
        return TowerPlan(len(positions), {"positions": positions}, starts={"pictures": frame_starts(grids)})

    def compute(self, pixel_values: torch.Tensor, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """See `RecordableTower`; `(patches, hidden_size * feature layers)`. Rotary frequencies follow row and column
        alternately."""
        hidden_states = self.ln_pre(self.patch_conv(pixel_values)[0])
        angles = (tensors["positions"][:, :, None] * self.inv_freq).flatten(1)
        features: torch.Tensor = self.encoder(hidden_states, (angles.cos(), angles.sin()), tensors["pictures"])
        return features

    def encode(self, pictures: Sequence[torch.Tensor], image_sizes: Any) -> tuple[torch.Tensor, list[Grid]]:
        """Rows of all patches of pictures, square by square, and each picture's grid.

        Args:
            pictures: `(pictures, channels, height, width)` each, with padding at the lower and right edges.
            image_sizes: Height and width of each picture without padding.
        """
        given = [picture for group in pictures for picture in group]
        sizes = stacked(image_sizes, 1).tolist()
        whole = [picture[:, :height, :width] for picture, (height, width) in zip(given, sizes, strict=True)]
        grids = [(1, height // self.patch_size, width // self.patch_size) for height, width in sizes]
        patches = [self._patches(picture, grid) for picture, grid in zip(whole, grids, strict=True)]
        return self(torch.cat(patches), grids), grids

    def _patches(self, picture: torch.Tensor, grid: Grid) -> torch.Tensor:
        """The patches of a picture `(channels, height, width)`, square by square."""
        (_, rows, columns), square = grid, self.square
        patches = image_patches(picture[None], self.patch_size)
        squares = patches.view(rows // square, square, columns // square, square, self.patch_width)
        return squares.transpose(1, 2).reshape(rows * columns, self.patch_width)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Fill the tower; layers beyond the last feature are not used."""
        return load_encoder_weights(self, self.renames.apply(weights), self.encoder.num_layers)


class PatchMerger(nn.Module):
    """Merges each square of patches into one row by a linear layer. Source: `transformers` `Mistral3PatchMerger`.

    The weight's input channels are ordered by channel first, then by patch of the square.
    """

    def __init__(self, hidden_size: int, square: int, prefix: str = "") -> None:
        super().__init__()
        self.num_patches = square**2
        self.merging_layer = PatchEmbedding(
            hidden_size * self.num_patches, hidden_size, bias=False, prefix=f"{prefix}.merging_layer"
        )

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """`(patches, hidden_size)`, square by square, to `(patches / square^2, hidden_size)`."""
        squares = patches.view(-1, self.num_patches, patches.shape[-1])
        merged: torch.Tensor = self.merging_layer(squares.transpose(1, 2).flatten(1))[0]
        return merged

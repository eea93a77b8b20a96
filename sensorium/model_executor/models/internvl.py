"""InternVL: a tower over a picture's tiles and the whole picture, a projector that joins squares of patches, and any
decoder.

Paper: Zhu et al. 2025, "InternVL3", section 2.1; Chen et al. 2024, "How Far Are We to GPT-4V?", section 3.3. Reference:
`transformers` `InternVLForConditionalGeneration`. Placeholders: `<IMG_CONTEXT>` becomes as many as all tiles have rows,
between `<img>` and `</img>`. `<video>` becomes, for each frame, its number and such a sequence for one tile, with
pictures' placeholder token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from sensorium.errors import InvalidRequestError
from sensorium.model_executor.layers.encoder import EncoderMLP
from sensorium.model_executor.layers.quantization import QuantizationConfig
from sensorium.model_executor.models.internvl_vision import InternVLVisionModel
from sensorium.model_executor.models.llava import LlavaForConditionalGeneration, drops_first_row, feature_layers_of
from sensorium.model_executor.models.media_common import Pieces
from sensorium.model_executor.models.media_inputs import (
    ClipInputs,
    MediaInputs,
    PictureInputs,
    Size,
    takes_media,
    with_text_in_front,
)
from sensorium.model_executor.models.vision_common import merged_squares
from sensorium.multimodal.byte_pictures import pictures_of
from sensorium.multimodal.inputs import each_item

MAX_TILES = 256
"""The most tiles that a request may ask for: the search for a grid tries all of them."""


def rows_per_tile(hf_config: Any) -> int:
    """Decoder rows of a tile, or of a frame."""
    vision = hf_config.vision_config
    side: int = vision.image_size[0] // vision.patch_size[0] // merge_size(hf_config)
    return side**2


def merge_size(hf_config: Any) -> int:
    """Patches on a side of a square that becomes one row."""
    return int(1 / hf_config.downsample_ratio)


class _Tiles(MediaInputs):
    """Shared by pictures and frames."""

    def tiles(self, num_tiles: int) -> Pieces:
        """The tokens of some tiles."""
        return self.around(num_tiles * rows_per_tile(self.config))

    def around(self, num_rows: int) -> Pieces:
        """The tokens of some rows."""
        return (
            (self._token("start", "<img>"), 1),
            (self.config.image_token_id, num_rows),
            (self._token("end", "</img>"), 1),
        )

    def _token(self, kind: str, default: str) -> int:
        token_id: int = self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, f"{kind}_image_token", default))
        return token_id


class InternVLPictures(_Tiles, PictureInputs):
    """Pictures as tiles, followed by the whole picture if there are several."""

    settings = ("crop_to_patches", "min_patches", "max_patches")

    def processor_settings(self) -> dict[str, Any]:
        """Pictures are split into tiles unless a request sets it otherwise."""
        most = self.given.get("max_patches", 1)
        if not isinstance(most, int) or most > MAX_TILES:
            raise InvalidRequestError(
                f"max_patches of mm_processor_kwargs: got {most!r:.60}, expected a whole number up to {MAX_TILES}. "
                "Lower it."
            )
        return {"crop_to_patches": True, **self.given}

    def num_tiles(self, size: Size) -> int:
        """The number of a picture's tiles, the whole picture included."""
        num_tiles: int = self.processor.get_number_of_image_patches(size[0], size[1], {})
        return num_tiles

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        return self.tiles(self.num_tiles(size))

    def pieces_of_rows(self, num_rows: int) -> Pieces:
        """See `MediaInputs`."""
        return self.around(num_rows)

    def pixels_of_size(self, size: Size) -> int:
        """See `PictureInputs`."""
        return int(self.num_tiles(size) * math.prod(self.config.vision_config.image_size))

    def sizes(self) -> Iterable[Size]:
        """See `MediaInputs`: sizes that fill a grid of tiles."""
        height, width = self.config.vision_config.image_size
        most = max(self.processor.max_patches, 1)
        return [(down * height, across * width) for down in range(1, most + 1) for across in range(1, most // down + 1)]


class InternVLClips(_Tiles, ClipInputs):
    """Frames as tiles, each after its number."""

    placeholder = "<video>"

    @property
    def row_id(self) -> int:
        """See `MediaInputs`."""
        token_id: int = self.config.image_token_id
        return token_id

    @property
    def prompt_id(self) -> int:
        """See `MediaInputs`."""
        token_id: int = self.tokenizer.convert_tokens_to_ids(getattr(self.tokenizer, "video_token", "<video>"))
        return token_id

    def pieces_of_size(self, size: Size) -> Pieces:
        """See `MediaInputs`."""
        others = (
            piece for index in range(2, size[0] + 1) for piece in (*self.ids_of(f"\nFrame{index}: "), *self.tiles(1))
        )
        return (*self.tiles(1), *others)

    def prompt(self, token_ids: Sequence[int], _num_items: int) -> Sequence[int]:
        """See `MediaInputs`: adds the number of each clip's first frame."""
        return with_text_in_front(token_ids, self.prompt_id, "Frame1: ", self.tokenizer)

    def pieces_of_rows(self, num_rows: int) -> Pieces:
        """See `MediaInputs`: the number of frames follows from the rows of each."""
        num_frames, rest = divmod(num_rows, rows_per_tile(self.config))
        if rest:
            raise InvalidRequestError(
                f"got {num_rows} rows, expected a multiple of {rows_per_tile(self.config)}. Pass all of each frame.",
                field="video_embeds",
            )
        return self.pieces_of_size((num_frames,))


class InternVLProjector(EncoderMLP):
    """A norm and two linear layers over the joined patches of a square."""

    def __init__(self, hf_config: Any, prefix: str = "") -> None:
        width = hf_config.vision_config.hidden_size * merge_size(hf_config) ** 2
        output_size = hf_config.get_text_config().hidden_size
        super().__init__(width, output_size, hf_config.projector_hidden_act, output_size=output_size, prefix=prefix)
        self.layer_norm = nn.LayerNorm(width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(..., square^2 * hidden_size)` to `(..., text hidden_size)`."""
        return super().forward(self.layer_norm(features))


@takes_media(InternVLPictures, InternVLClips)
class InternVLForConditionalGeneration(LlavaForConditionalGeneration):
    """Tower, projector and decoder."""

    def make_tower(self, quant_config: QuantizationConfig | None, prefix: str) -> InternVLVisionModel:
        """See `LlavaForConditionalGeneration`."""
        return InternVLVisionModel(
            self.config.vision_config, feature_layers_of(self.config), quant_config, prefix=prefix
        )

    def make_projector(self, prefix: str) -> InternVLProjector:
        """See `LlavaForConditionalGeneration`."""
        return InternVLProjector(self.config, prefix=prefix)

    def encode_media(
        self, *, pixel_values_videos: Any = None, video_embeds: Any = None, **kwargs: Any
    ) -> dict[int, Sequence[torch.Tensor]]:
        """See `MediaLanguageModel`; clips as frames `(frames, channels, height, width)`, or embeddings.

        Pictures and clips share a placeholder token. With both in a prompt, rows go to the right places only if each
        modality is encoded and merged by itself, as the engine does.
        """
        rows = [row for items in super().encode_media(**kwargs).values() for row in items]
        if video_embeds is not None:
            rows += each_item(video_embeds, 2)
        elif pixel_values_videos is not None:
            rows += self.encode_pictures(pictures_of(pixel_values_videos), None)
        return {self.config.image_token_id: rows} if rows else {}

    def encode_pictures(self, pictures: Sequence[torch.Tensor], image_sizes: Any) -> Sequence[torch.Tensor]:
        """See `LlavaForConditionalGeneration`."""
        features = self.vision_tower(torch.cat(list(pictures)))[:, drops_first_row(self.config) :]
        squares = merged_squares(features, math.isqrt(features.shape[1]), merge_size(self.config))
        rows = torch.split(self.multi_modal_projector(squares), [len(each) for each in pictures])
        return [each.flatten(0, 1) for each in rows]

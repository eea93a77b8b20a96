"""The host's part of most multimodal model files: from items to tokens and tensors, and the largest items.

A model file describes each modality by a subclass of `MediaInputs`: the tokens of an item of some size, how it is
mapped, how large it can be. From that, `takes_media` makes the input processor, mappers, maximum numbers of rows, dummy
data and placeholders, and registers them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image

from sensorium.errors import InvalidTypeError
from sensorium.inputs import INPUT_REGISTRY, DummyData, InputContext, TokenInputs
from sensorium.model_executor.models.media_common import (
    Pieces,
    as_items,
    check_embeddings,
    expand_items,
    length_of,
    num_tokens_of,
    stacked,
)
from sensorium.multimodal import MULTIMODAL_REGISTRY, MultiModalKwargs
from sensorium.multimodal.byte_pictures import map_pictures
from sensorium.multimodal.hf_processors import (
    cached_get_image_processor,
    cached_get_tokenizer,
    processor_options,
)
from sensorium.multimodal.image import preprocess, type_name
from sensorium.multimodal.resize_limits import check_pixels
from sensorium.multimodal.video_processor import cached_get_video_processor
from sensorium.sequence import SequenceData

C = TypeVar("C", bound=type)
Size: TypeAlias = tuple[int, ...]
"""A picture's (height, width) or a clip's (frames, height, width), in pixels."""
SIDES = (448, 448)
"""Height and width of blank frames, which processors resize to the tower's size."""


class MediaInputs:
    """The items of one modality of one model.

    Args:
        ctx: The model's context.
        settings: The processor's settings from a request or the engine; None stands for one that isn't set.
    """

    modality: ClassVar[str]
    placeholder: ClassVar[str | None] = None
    """An item's placeholder in a chat prompt; None: the token that the config names."""
    settings: ClassVar[tuple[str, ...]] = ()
    """Names of `mm_processor_kwargs` that change tokens or tensors."""
    maps_by_default: ClassVar[bool] = False
    """Whether the modality's default mapper is used, which takes all settings of the processor."""

    def __init__(self, ctx: InputContext, **settings: Any) -> None:
        self.ctx = ctx
        self.config = ctx.get_hf_config()
        self.given = {name: value for name, value in settings.items() if value is not None}
        self._separators: dict[str, Pieces] = {}

    @classmethod
    def of_model(cls, ctx: InputContext, **settings: Any) -> MediaInputs:
        """The inputs for this model; a subclass may choose another class by its config."""
        return cls(ctx, **settings)

    # For subclasses

    @property
    def row_id(self) -> int:
        """The token of rows in an expanded prompt."""
        token_id: int = self.config.image_token_id
        return token_id

    @property
    def prompt_id(self) -> int:
        """The placeholder token of an item in a prompt before its expansion."""
        return self.row_id

    def pieces_of_size(self, size: Size) -> Pieces:
        """The tokens of an item of this size."""
        raise NotImplementedError

    def pieces_of_rows(self, num_rows: int) -> Pieces:
        """The tokens of an item of which only the number of rows is known: embeddings."""
        raise InvalidTypeError(
            f"{self.modality} embeddings: got a tensor, expected a dict with {self._embeds} and {self._sizes} "
            "(items, 2), from which follows what stands between the rows. Pass both."
        )

    def sizes(self) -> Iterable[Size]:
        """Sizes that contain, for any bound on tokens, that of the largest item within the bound."""
        raise NotImplementedError

    def size_of(self, item: Any) -> Size:
        """An item's size. Raises `InvalidTypeError` (a `TypeError`) for what isn't an item."""
        raise NotImplementedError

    def blank(self, size: Size) -> Any:
        """A blank item of a size."""
        raise NotImplementedError

    def map(self, items: Sequence[Any]) -> Mapping[str, Any]:
        """The model's keyword arguments for items that aren't embeddings."""
        raise NotImplementedError

    def prompt(self, token_ids: Sequence[int], num_items: int) -> Sequence[int]:
        """The prompt before items are expanded: a hook for tokens around items that depend on their neighbours."""
        return token_ids

    def prepare(self, num_items: int) -> Mapping[str, Any]:
        """A hook for what depends on the number of items in a prompt; returns settings for the mapper."""
        return {}

    # For the registries

    @property
    def _embeds(self) -> str:
        return f"{self.modality}_embeds"

    @property
    def _sizes(self) -> str:
        return f"{self.modality}_sizes"

    @property
    def max_tokens(self) -> int:
        """The most tokens of an item in any prompt; one of the model's length is for the output."""
        return self.ctx.model_config.max_model_len - 1

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, for separators that are text."""
        model_config = self.ctx.model_config
        return cached_get_tokenizer(
            model_config.tokenizer,
            trust_remote_code=model_config.trust_remote_code,
            revision=model_config.revision,
        )

    def ids_of(self, text: str) -> Pieces:
        """The tokens of a separator."""
        if text not in self._separators:
            ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._separators[text] = tuple((token_id, 1) for token_id in ids)
        return self._separators[text]

    def pieces(self, item: Any) -> list[Pieces]:
        """The tokens of each picture or clip of an item: of one, or of several that are given as embeddings.

        Raises `InvalidTypeError` (a `TypeError`) or `InvalidRequestError` (a `ValueError`) for an invalid item.
        """
        if isinstance(item, Mapping):
            return self._pieces_of_dict(item)
        if isinstance(item, torch.Tensor):
            rows = check_embeddings(item, None, self._width, self._embeds)
            num_items = len(item) if item.dim() == 3 else 1
            return [self.pieces_of_rows(len(rows) // num_items)] * num_items
        return [self.pieces_of_size(self.size_of(item))]

    def _pieces_of_dict(self, item: Mapping[str, Any]) -> list[Pieces]:
        sizes = item.get(self._sizes)
        if not isinstance(sizes, torch.Tensor) or not sizes.numel() or sizes.shape[-1] != 2 or sizes.min() < 1:
            raise InvalidTypeError(
                f"{self.modality} given as a dict: got the keys {sorted(item)}, expected tensors {self._embeds} (rows, "
                f"hidden_size) and {self._sizes} (items, 2), heights and widths in pixels. Pass both."
            )
        pieces = [self.pieces_of_size((int(height), int(width))) for height, width in stacked(sizes, 1).tolist()]
        check_embeddings(item.get(self._embeds), sum(map(self.num_rows, pieces)), self._width, self._embeds)
        return pieces

    @property
    def _width(self) -> int:
        width: int = self.config.get_text_config().hidden_size
        return width

    def num_rows(self, pieces: Pieces) -> int:
        """Decoder rows among an item's tokens."""
        return num_tokens_of(pieces, self.row_id)

    def largest(self, max_tokens: int) -> Size:
        """The size with the most tokens, at most `max_tokens` unless even the smallest item has more."""
        lengths = {size: length_of(self.pieces_of_size(size)) for size in self.sizes()}
        fitting = [size for size, length in lengths.items() if length <= max_tokens]
        return max(fitting, key=lengths.__getitem__) if fitting else min(lengths, key=lengths.__getitem__)

    def map_items(self, data: Any) -> MultiModalKwargs:
        """The model's keyword arguments, or the `image_embeds` (`video_embeds`) of a request."""
        items = as_items(data)
        rows = [each.get(self._embeds) if isinstance(each, Mapping) else each for each in items]
        given = [each for each in rows if isinstance(each, torch.Tensor)]
        if not given:
            return MultiModalKwargs(self.map(items))
        if len(given) < len(items):
            raise InvalidTypeError(
                f"{self.modality} data: got pictures beside given rows, expected one kind in a call."
            )
        return MultiModalKwargs({self._embeds: given if isinstance(data, list) else given[0]})


class PictureInputs(MediaInputs):
    """Pictures that the checkpoint's image processor maps. A subclass defines their tokens."""

    modality = "image"

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's image processor, with the settings of the request."""
        options = processor_options(self.ctx.model_config)
        return cached_get_image_processor(self.ctx.model_config.model, **self.processor_settings() | options)

    def processor_settings(self) -> dict[str, Any]:
        """Settings of the image processor."""
        return dict(self.given)

    def pixels_of_size(self, size: Size) -> int:
        """Pixels after the processor of a picture of this size."""
        raise NotImplementedError

    def size_of(self, item: Any) -> Size:
        """See `MediaInputs`. Raises `InvalidRequestError` (a `ValueError`) for a picture that would become too
        large."""
        if not isinstance(item, Image.Image):
            raise InvalidTypeError(
                f"Invalid image type: got {type_name(item)}, expected a PIL image or a list of them, or a tensor of "
                "embeddings. Convert the image first."
            )
        size = (item.height, item.width)
        check_pixels("image", *size, self.pixels_of_size(size))
        return size

    def blank(self, size: Size) -> Image.Image:
        """A blank picture."""
        height, width = size
        return Image.new("RGB", (width, height))

    def map(self, items: Sequence[Any]) -> Mapping[str, Any]:
        """See `byte_pictures.map_pictures`."""
        for item in items:
            self.size_of(item)
        return map_pictures(self.processor, items)


class ClipInputs(MediaInputs):
    """Clips whose frames are resized to one size. A subclass defines the tokens of a clip."""

    modality = "video"

    @property
    def row_id(self) -> int:
        """See `MediaInputs`."""
        token_id: int = self.config.video_token_id
        return token_id

    @cached_property
    def processor(self) -> Any:
        """The checkpoint's video processor."""
        options = processor_options(self.ctx.model_config)
        return cached_get_video_processor(self.ctx.model_config.model, **options)

    def size_of(self, item: Any) -> Size:
        """See `MediaInputs`."""
        if not isinstance(item, np.ndarray) or item.ndim != 4:
            raise InvalidTypeError(
                f"Invalid video type: got {type_name(item)}, expected an array of frames (frames, height, width, 3) or "
                "a tensor of embeddings. Stack the frames."
            )
        num_frames, height, width, _ = item.shape
        return num_frames, height, width

    def largest(self, max_tokens: int) -> Size:
        """See `MediaInputs`: as many frames as the tokens allow."""
        one, two = (length_of(self.pieces_of_size((frames, *SIDES))) for frames in (1, 2))
        frames = max(max_tokens // (two - one), 1)
        while frames > 1 and length_of(self.pieces_of_size((frames, *SIDES))) > max_tokens:
            frames -= 1
        return (frames, *SIDES)

    def blank(self, size: Size) -> np.ndarray[Any, Any]:
        """A clip of black frames."""
        return np.zeros((*size, 3), dtype=np.uint8)

    def map(self, items: Sequence[Any]) -> Mapping[str, Any]:
        """`pixel_values_videos` `(1, frames, channels, height, width)` of each clip."""
        clips = [preprocess(self.processor, item)["pixel_values_videos"] for item in items]
        return {"pixel_values_videos": clips if len(clips) > 1 else clips[0]}


def takes_media(*kinds: type[MediaInputs]) -> Callable[[C], C]:
    """Class decorator: the model takes these modalities. Registers everything that the input registry and the
    multimodal registry need."""
    names = tuple(dict.fromkeys(name for kind in kinds for name in kind.settings))

    def process(ctx: InputContext, inputs: TokenInputs, **settings: Any) -> TokenInputs:
        data = inputs.get("multi_modal_data") or {}
        present = [kind.of_model(ctx, **settings) for kind in kinds if kind.modality in data]
        return _expanded(inputs, data, present) if present else inputs

    def dummy_data(ctx: InputContext, seq_len: int, mm_counts: Mapping[str, int], **settings: Any) -> DummyData:
        wanted = [kind.of_model(ctx, **settings) for kind in kinds if mm_counts[kind.modality]]
        return _largest_prompt(wanted, seq_len, mm_counts)

    def register(model_class: C) -> C:
        label = model_class.__name__
        INPUT_REGISTRY.register_input_processor(_named(process, label, names))(model_class)
        INPUT_REGISTRY.register_dummy_data(_named(dummy_data, label, names))(model_class)
        for kind in kinds:
            _register(model_class, kind, names)
        return model_class

    return register


def _register(model_class: type, kind: type[MediaInputs], names: Sequence[str]) -> None:
    """Register one modality."""

    def map_items(ctx: InputContext, data: Any, **settings: Any) -> MultiModalKwargs:
        return kind.of_model(ctx, **settings).map_items(data)

    def max_rows(ctx: InputContext, **settings: Any) -> int:
        inputs = kind.of_model(ctx, **settings)
        return inputs.num_rows(inputs.pieces_of_size(inputs.largest(inputs.max_tokens)))

    def row_id(ctx: InputContext) -> int:
        return kind.of_model(ctx).row_id

    registry, modality, label = MULTIMODAL_REGISTRY, kind.modality, f"{model_class.__name__}.{kind.__name__}"
    for decorator in (
        registry.register_input_mapper(modality, None if kind.maps_by_default else _named(map_items, label, names)),
        registry.register_max_multimodal_tokens(modality, _named(max_rows, label, names)),
        registry.register_placeholder_tokens(modality, row_id),
    ):
        decorator(model_class)
    if kind.placeholder is not None:
        registry.register_placeholder_str(modality, kind.placeholder)(model_class)


def _named(function: Callable[..., Any], label: str, names: Sequence[str]) -> Callable[..., Any]:
    """A function whose signature names the settings that it takes, and whose name has the model's and modality's."""

    def call(*args: Any, **settings: Any) -> Any:
        return function(*args, **settings)

    own = [each for each in inspect.signature(function).parameters.values() if each.kind is not each.VAR_KEYWORD]
    settings = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in names]
    call.__signature__ = inspect.Signature([*own, *settings])  # type: ignore[attr-defined]
    call.__qualname__ = f"{label}.{function.__name__}"
    return call


def _expanded(inputs: TokenInputs, data: Mapping[str, Any], kinds: Sequence[MediaInputs]) -> TokenInputs:
    """Expand the items' placeholders in the prompt."""
    settings = dict(inputs.get("mm_processor_kwargs") or {})
    pieces: dict[int, list[list[Pieces]]] = {}
    for kind in kinds:
        items = as_items(data[kind.modality])
        settings |= kind.prepare(len(items))
        pieces[kind.prompt_id] = [kind.pieces(item) for item in items]
        inputs["prompt_token_ids"] = list(kind.prompt(inputs["prompt_token_ids"], len(items)))
    token_ids, ranges = expand_items(
        inputs["prompt_token_ids"],
        {token_id: [each for item in items for each in item] for token_id, items in pieces.items()},
        {kind.prompt_id: kind.modality for kind in kinds},
        kinds[0].ctx.model_config.max_model_len,
    )
    inputs["prompt_token_ids"] = token_ids
    # An item of several pictures has several ranges, which are found by their tokens.
    inputs["multi_modal_placeholders"] = {
        kind.modality: ranges[kind.prompt_id]
        for kind in kinds
        if all(len(each) == 1 for each in pieces[kind.prompt_id])
    }
    if settings:
        inputs["mm_processor_kwargs"] = settings
    return inputs


def with_text_in_front(token_ids: Sequence[int], before: int, text: str, tokenizer: Any) -> list[int]:
    """Insert text before each token of an id, tokenized together with the text before it.

    The result is that of inserting the text before tokenization: "see <video>" with "Frame" becomes "see Frame<video>",
    of which " Frame" may be one token. Added tokens are never joined with text.
    """
    fixed = set(tokenizer.added_tokens_decoder)
    result: list[int] = []
    for token_id in token_ids:
        if token_id == before:
            start = next((i for i in range(len(result), 0, -1) if result[i - 1] in fixed), 0)
            there = tokenizer.decode(result[start:], clean_up_tokenization_spaces=False)
            result[start:] = tokenizer(there + text, add_special_tokens=False)["input_ids"]
        result.append(token_id)
    return result


def _largest_prompt(kinds: Sequence[MediaInputs], seq_len: int, counts: Mapping[str, int]) -> DummyData:
    """Items as large as `seq_len` tokens allow when they are shared evenly, then zeros."""
    share = seq_len // max(sum(counts[kind.modality] for kind in kinds), 1)
    data: dict[str, list[Any]] = {}
    tokens: list[tuple[int, int]] = []
    for kind in kinds:
        size = kind.largest(min(share, kind.max_tokens))
        data[kind.modality] = [kind.blank(size)] * counts[kind.modality]
        tokens += list(kind.pieces_of_size(size)) * counts[kind.modality]
    tokens.append((0, max(seq_len - length_of(tuple(tokens)), 0)))
    return DummyData(SequenceData.from_prompt_token_counts(*tokens), data or None)

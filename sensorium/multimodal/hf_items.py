"""A checkpoint's Hugging Face processor, asked for one item at a time: what stands for it in a prompt, and its tensors.

A processor expands a text and maps its media in one call. Run on the text of one placeholder and one item, it says
everything about that item: the token ids that take the placeholder's place, and the keyword arguments of `forward`. So
an item is processed once, whatever prompts it stands in, and prompts are expanded by index arithmetic:

    prompt       a P b P          P: the placeholder's token ids
    items        < x x >, < x >   what the processor makes of P with the first item, and with the second
    expanded     a < x x > b < x >

Processors whose ids or tensors depend on the whole prompt show it on two items of different size, and get whole
prompts. Called by the classes that run by modules of transformers; knows no architecture.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from sensorium.errors import InvalidRequestError, SensoriumError
from sensorium.logger import get_logger
from sensorium.multimodal.hf_processors import (
    Backend,
    FrozenSettings,
    cached_get_processor,
    cause,
    processor_options,
    processor_settings,
)
from sensorium.multimodal.inputs import PlaceholderRange
from sensorium.multimodal.item_checks import check_heard
from sensorium.spans import IntArray

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

logger = get_logger(__name__)

ARGUMENTS: Mapping[str, str] = {"image": "images", "video": "videos", "audio": "audio"}
"""Per modality, the argument of a processor that takes a list of items."""
_PARTS: Mapping[str, tuple[str, ...]] = {
    "image": ("image_processor",),
    "video": ("video_processor",),
    "audio": ("feature_extractor", "audio_processor"),
}
"""Per modality, the attributes that hold the part of a processor that looks at its items."""
_NAMES: Mapping[str, tuple[str, ...]] = {
    "image": ("image_token", "boi_token", "image_placeholder", "img_token"),
    "video": ("video_token", "video_placeholder"),
    "audio": ("audio_token", "boa_token", "speech_token", "sound_token"),
}
"""Attributes by which processors name what stands for an item in a text."""
_MARKS: Mapping[str, tuple[str, ...]] = {
    "image": ("image", "img", "vision", "patch"),
    "video": ("video",),
    "audio": ("audio", "speech", "sound"),
}
"""What the names of such tokens contain, where no attribute names them."""
_IDS = "input_ids"
_NOT_PASSED_ON = frozenset(("attention_mask", "labels", "special_tokens_mask", "offset_mapping", "length"))
MAX_TRIES = 12
"""Texts that are tried as a placeholder."""

Tensors: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Processed:
    """What a processor makes of a text and its media."""

    token_ids: IntArray
    """`(num_tokens,)`"""
    tensors: Tensors
    """Keyword arguments of `forward` beside the token ids."""


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands for an item of a modality in a prompt before it is expanded."""

    text: str
    token_ids: tuple[int, ...]


class HFItems:
    """The processor of one checkpoint. Safe to use from several threads.

    Raises `ProcessorError` (a `RuntimeError`), or an error that names a missing package, if there is none.
    """

    def __init__(
        self,
        model: str,
        trust_remote_code: bool,
        revision: str | None,
        backend: Backend,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": revision, "backend": backend}
        self._with = partial(cached_get_processor, model, **options)
        self._settings = processor_settings(settings or {})
        self.processor = self._with(**self._settings)
        parameters = inspect.signature(self.processor.__call__).parameters
        self._arguments = {
            modality: next((each for each in (name, f"{modality}s", f"{modality}_values") if each in parameters), name)
            for modality, name in ARGUMENTS.items()
        }
        self.refusals: dict[str, str] = {}
        """Per modality that the processor has a part for, why its items can't be processed all the same."""

    def with_settings(self, settings: Mapping[str, Any]) -> HFItems:
        """The same with `mm_processor_kwargs` in place of the processor's own settings of these names, beside those
        that it was made with.

        Raises `InvalidRequestError` (a `ValueError`) for a value that the processor refuses.
        """
        merged = {**self._settings, **processor_settings(settings)}
        if merged == self._settings:
            return self
        _ = self.placeholders, self.takes_prompts  # which don't depend on settings; they are found once
        other = copy.copy(self)
        other.processor = self._with(**merged)
        return other

    @cached_property
    def placeholders(self) -> Mapping[str, Placeholder]:
        """Per modality that the processor takes, what stands for an item."""
        found = {name: self._find_placeholder(name) for name in modalities_of(type(self.processor))}
        return {name: placeholder for name, placeholder in found.items() if placeholder is not None}

    @cached_property
    def takes_prompts(self) -> bool:
        """Whether the processor must see whole prompts: its ids or tensors aren't those of the items, put together."""
        return not all(map(self._is_additive, self.placeholders))

    # Processing

    def process_item(self, modality: str, item: Any) -> Processed:
        """What the processor makes of one item.

        Raises `InvalidRequestError` (a `ValueError`) for a modality that it doesn't take; what it raises itself passes
        through.
        """
        placeholder = self.placeholders.get(modality)
        if placeholder is None:
            why = self.refusals.get(modality, "it has no part for them")
            raise InvalidRequestError(
                f"{modality} data: got an item, expected none, since the processor of this checkpoint can't be asked "
                f"for one ({why}). Leave it out."
            )
        return self.process(placeholder.text, {modality: [item]})

    def process(self, text: str, data: Mapping[str, Sequence[Any]], *, add_special_tokens: bool = False) -> Processed:
        """What the processor makes of a text with its media. Raises whatever it raises."""
        given: dict[str, Any] = {
            self._arguments[modality]: [self._prepared(modality, item) for item in items]
            for modality, items in data.items()
        }
        if "audio" in data:
            given["sampling_rate"] = self._sampling_rate
        if "video" in data and getattr(getattr(self.processor, "video_processor", None), "do_sample_frames", False):
            given["do_sample_frames"] = False  # a clip is the frames that were chosen of it
        output = self.processor(text=[text], return_tensors="pt", add_special_tokens=add_special_tokens, **given)
        ids = np.asarray(output[_IDS], dtype=np.int64).reshape(-1)
        tensors = {name: value for name, value in output.items() if name != _IDS and name not in _NOT_PASSED_ON}
        return Processed(ids, {name: value for name, value in tensors.items() if _is_passed_on(value)})

    def check_heard(self, sound: Any, processed: Processed) -> None:
        """Refuse a sound that the processor cuts off. One that hears long sounds makes several windows of them.

        Raises:
            InvalidRequestError: It is longer than a window, and there is one window.
        """
        samples, rate = sound if isinstance(sound, tuple) else (sound, self._sampling_rate)
        parts = (getattr(self.processor, name, None) for name in _PARTS["audio"])
        window_s = next((s for part in parts if (s := getattr(part, "chunk_length", None))), None)
        windows = [len(value) for value in processed.tensors.values() if getattr(value, "ndim", 0) >= 3]
        if window_s is not None and windows and max(windows) == 1:
            check_heard("audio data", len(samples) / rate, window_s)

    @property
    def _sampling_rate(self) -> int:
        parts = (getattr(self.processor, name, None) for name in _PARTS["audio"])
        return int(next(rate for part in parts if (rate := getattr(part, "sampling_rate", None))))

    def _prepared(self, modality: str, item: Any) -> Any:
        """An item in the form that processors take: sounds at their rate, clips as plain arrays."""
        if modality == "audio":
            samples, rate = item if isinstance(item, tuple) else (item, self._sampling_rate)
            samples = np.asarray(samples, dtype=np.float32)
            if rate != self._sampling_rate:
                from sensorium.media.resample import resample_audio

                samples = resample_audio(samples, rate, self._sampling_rate)
            return samples
        return np.asarray(item) if modality == "video" else item

    # What stands for an item

    def _find_placeholder(self, modality: str) -> Placeholder | None:
        """The first text that the processor takes an item for."""
        reasons: list[str] = []
        for text in list(self._candidates(modality))[:MAX_TRIES]:
            try:
                processed = self.process(text, {modality: [dummy_item(modality, 0)]})
            except SensoriumError as error:
                reasons.append(str(error))
                continue
            except Exception as error:  # noqa: BLE001  a text that it doesn't know as a placeholder, or a missing part
                reasons.append(cause(error))
                continue
            ids = tuple(self.processor.tokenizer(text, add_special_tokens=False)[_IDS])
            if ids and processed.tensors and len(processed.token_ids):
                return Placeholder(text, ids)
            reasons.append("it makes nothing of one")
        # The first text is the one that the processor names.
        self.refusals[modality] = reason = reasons[0] if reasons else "nothing is known to stand for one in a text"
        logger.info("the processor can't be asked for %s items: %s", modality, reason)
        return None

    def _candidates(self, modality: str) -> Iterator[str]:
        tokenizer = self.processor.tokenizer
        named = [getattr(holder, name, None) for holder in (self.processor, tokenizer) for name in _NAMES[modality]]
        added = sorted(getattr(tokenizer, "added_tokens_encoder", {}))
        marked = [text for text in added if any(mark in text.lower() for mark in _MARKS[modality])]
        start, end = (getattr(self.processor, f"{modality}_{side}_token", None) for side in ("start", "end"))
        wrapped = [f"{start}{text}{end}" for text in named if text] if start and end else []  # as HunYuanVL wants it
        yield from dict.fromkeys(str(each) for each in [*named, *wrapped, *marked] if each)

    def _is_additive(self, modality: str) -> bool:
        """Whether a prompt with two items of different size is expanded by what each of them becomes alone."""
        placeholder = self.placeholders[modality].text
        items = [dummy_item(modality, 0), dummy_item(modality, 1)]
        text = f"{placeholder} a {placeholder} b"
        try:
            whole = self.process(text, {modality: items})
            ids = np.asarray(self.processor.tokenizer(text, add_special_tokens=False)[_IDS], dtype=np.int64)
            segments = [self.process_item(modality, item).token_ids for item in items]
            expanded, _ = expand(ids, {modality: self.placeholders[modality]}, {modality: segments})
        except Exception as error:  # noqa: BLE001  such as a processor of one item in a text
            logger.info("the processor takes %s items of a prompt together: %s", modality, cause(error))
            return False
        return np.array_equal(expanded, whole.token_ids)


def _is_passed_on(value: Any) -> bool:
    """Whether a processor's result is made of tensors and numbers, as `forward` takes them."""
    if isinstance(value, list | tuple):
        return all(map(_is_passed_on, value))
    return isinstance(value, int | float) or hasattr(value, "dtype")


def hf_items(model_config: ModelConfig) -> HFItems:
    """The processor of a model with the engine's settings: the same object every time. Raises as `HFItems`."""
    settings = FrozenSettings(model_config.mm_processor_kwargs or {})
    return _hf_items(model_config.model, settings=settings, **processor_options(model_config))


@lru_cache(maxsize=16)
def _hf_items(
    model: str, trust_remote_code: bool, revision: str | None, backend: Backend, settings: FrozenSettings
) -> HFItems:
    return HFItems(model, trust_remote_code, revision, backend, settings)


def processor_modalities(model: str, trust_remote_code: bool, revision: str | None) -> tuple[str, ...]:
    """The modalities that a checkpoint's processor has a part for; none where it has no processor."""
    from sensorium.multimodal.hf_composite import find_class

    found = find_class(model, trust_remote_code, revision)
    return () if found is None or not hasattr(found, "get_attributes") else modalities_of(found)


def modalities_of(processor_class: Any) -> tuple[str, ...]:
    """The modalities that a class of processors has a part for."""
    parts = set(processor_class.get_attributes())
    return tuple(modality for modality, names in _PARTS.items() if parts & set(names))


def dummy_item(modality: str, index: int) -> Any:
    """An item of noise to try a processor or a model on; two of them have different sizes."""
    rng = np.random.default_rng(index)
    if modality == "audio":
        return (rng.standard_normal(16_000 + 8_000 * index) * 0.1).astype(np.float32)
    height, width = ((56, 84), (112, 56))[index % 2]
    if modality == "video":
        return rng.integers(0, 256, (4, height, width, 3), dtype=np.uint8)
    from PIL import Image

    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


# Expansion


def expand(
    token_ids: IntArray, placeholders: Mapping[str, Placeholder], segments: Mapping[str, Sequence[IntArray]]
) -> tuple[IntArray, dict[str, list[PlaceholderRange]]]:
    """Put what each item becomes in the place of its placeholder.

    A prompt that comes expanded already is left as it is.

    Args:
        token_ids: The prompt.
        placeholders: Per modality, what stands for an item.
        segments: Per modality, what each item becomes, in the order of the items.

    Returns:
        The expanded prompt, and per modality the range of each item's segment in it.

    Raises:
        InvalidRequestError: (a `ValueError`) There are more or fewer placeholders than items.
    """
    places: list[tuple[int, int, str, int]] = []
    for modality, parts in segments.items():
        ids = placeholders[modality].token_ids
        found = _occurrences(token_ids, ids)
        if len(found) == len(parts):
            places += [(at, len(ids), modality, i) for i, at in enumerate(found)]
            continue
        expanded = _in_order(token_ids, parts)
        if expanded is None:
            raise InvalidRequestError(
                f"{modality} placeholders in the prompt: got {len(found)}, expected {len(parts)}, one "
                f"({placeholders[modality].text!r}) for each item. Put a placeholder where each item stands."
            )
        places += [(at, len(parts[i]), modality, i) for i, at in enumerate(expanded)]
    pieces: list[IntArray] = []
    ranges: dict[str, dict[int, PlaceholderRange]] = {modality: {} for modality in segments}
    end = length = 0
    for at, width, modality, i in sorted(places):
        if at < end:
            raise InvalidRequestError(
                f"{modality} placeholders in the prompt: got ones that overlap, expected them apart. Put text between."
            )
        segment = np.asarray(segments[modality][i])
        pieces += [token_ids[end:at], segment]
        length += at - end
        ranges[modality][i] = PlaceholderRange(offset=length, length=len(segment))
        length += len(segment)
        end = at + width
    pieces.append(token_ids[end:])
    in_order = {modality: [found[i] for i in sorted(found)] for modality, found in ranges.items()}
    return np.concatenate(pieces).astype(np.int64), in_order


def _occurrences(token_ids: IntArray, ids: Sequence[int]) -> list[int]:
    """Where a sequence of ids stands, from left to right, without overlaps."""
    width = len(ids)
    if len(token_ids) < width:
        return []
    windows = np.lib.stride_tricks.sliding_window_view(token_ids, width)
    found: list[int] = []
    for at in np.flatnonzero((windows == np.asarray(ids)).all(axis=1)).tolist():
        if not found or at >= found[-1] + width:
            found.append(at)
    return found


def _in_order(token_ids: IntArray, parts: Sequence[IntArray]) -> list[int] | None:
    """Where segments stand one behind the other; None if they don't."""
    starts, begin = [], 0
    for part in parts:
        found = _occurrences(token_ids[begin:], part.tolist())
        if not found:
            return None
        starts.append(begin + found[0])
        begin += found[0] + len(part)
    return starts


# Keyword arguments on their way from the front to the model

_WHOLE = "prompt"
"""In the place of a modality: the tensors are those of a whole prompt."""


def as_kwargs(processed: Processed, modality: str = _WHOLE) -> dict[str, Any]:
    """What a processor made of an item, or of a whole prompt, as keyword arguments that no other modality has."""
    return {f"{modality}.{name}": value for name, value in (*processed.tensors.items(), (_IDS, processed.token_ids))}


def segment_of(kwargs: Mapping[str, Any]) -> IntArray:
    """The token ids that an item's placeholder becomes, of what `as_kwargs` made."""
    found: IntArray = np.asarray(next(value for name, value in kwargs.items() if name.endswith(f".{_IDS}")))
    return found


def is_of_processor(kwargs: Mapping[str, Any]) -> bool:
    """Whether `as_kwargs` made these."""
    return any(name.endswith(f".{_IDS}") for name in kwargs)


def of_item(kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """The tensors of what `as_kwargs` made, by their own names, and whether they are those of a whole prompt."""
    tensors = {name.partition(".")[2]: value for name, value in kwargs.items()}
    tensors.pop(_IDS, None)
    return tensors, any(name.startswith(f"{_WHOLE}.") for name in kwargs)

"""The media of a request as its caller gave them: items counted, checked, loaded where they are encoded,
identified.

Everything that can be refused without the model's callables is refused here. Identities are taken before an
input processor sees the media, since processors replace, wrap or resample them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import InvalidRequestError, InvalidTypeError, MediaError
from sensorium.media import EncodedMedia, VideoFrames, VideoSampling
from sensorium.media.side_by_side import all_or_none
from sensorium.multimodal.hashing import Identity, identify, identify_encoded, identify_uuid
from sensorium.multimodal.item_checks import check_arrays, check_heard, check_uuids
from sensorium.multimodal.request_media import MediaData
from sensorium.multimodal.video_array import VideoArray
from sensorium.stages import stage

if TYPE_CHECKING:
    from sensorium.config import ModelConfig
    from sensorium.media import MediaLoader
    from sensorium.multimodal.registry import MultiModalRegistry


class MediaCollector:
    """Collects the media of prompts for one model. Safe to call from several threads.

    Args:
        model_config: the model.
        registry: what it registered.
        loader: fetches and decodes encoded media; None refuses them.
        sampling: which frames of an encoded clip are taken, given a request's `mm_processor_kwargs`.
        heard_s: how many seconds of a sound the model hears; None: not known.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        registry: MultiModalRegistry,
        loader: MediaLoader | None,
        sampling: Callable[[Mapping[str, Any]], VideoSampling],
        heard_s: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._model_config = model_config
        self._registry = registry
        self._loader = loader
        self._sampling = sampling
        self._max_audio_s = heard_s

    def collect(
        self, data: Mapping[str, Any], uuids: Mapping[str, Any], mm_processor_kwargs: Mapping[str, Any]
    ) -> list[MediaData]:
        """The media of a prompt, checked and identified; modalities without an item are left out.

        `data`, `uuids`: the prompt's `multi_modal_data` and `multi_modal_uuids`.

        Raises:
            UnknownModalityError: (a `NotImplementedError`) No plugin is registered for the modality.
            UnregisteredModalityError: (a `KeyError`) The model registered no mapper for it.
            InvalidRequestError: (a `ValueError`) The model takes no media, or not so many; or data can't be
            computed
                with.
            InvalidTypeError: (a `TypeError`) An item is missing, or is encoded where nothing can decode it.
            MediaError: Encoded media can't be fetched or decoded.
        """
        given = {modality: value for modality, value in data.items() if value is not None}
        split = {modality: self._split(modality, value) for modality, value in given.items()}
        counts = {modality: len(items) for modality, (items, _) in split.items()}
        self._registry.check_counts(self._model_config, counts)
        unknown = sorted(uuids.keys() - given.keys())
        if unknown:
            raise InvalidRequestError(
                f"got names for {unknown}, of which multi_modal_data has none, expected the same "
                f"modalities. Send the media along with their names.",
                field="multi_modal_uuids",
            )
        collected = []
        for modality, (items, is_bare) in split.items():
            names = check_uuids(modality, uuids.get(modality), len(items))
            loaded = [
                self._item(modality, item, uuid, mm_processor_kwargs) for item, uuid in zip(items, names, strict=True)
            ]
            if loaded:
                values, identities = zip(*loaded, strict=True)
                collected.append(MediaData(modality, values, identities, values[0] if is_bare else list(values)))
        return collected

    async def decode_ahead(self, prompt: object) -> None:
        """Have the encoded media of a prompt decoded, side by side, so that `collect` need not wait for them.

        Cancelling it gives them up. What else is wrong with a prompt is left to `collect`.

        Raises:
            RequestError: As `collect`, for a modality or a number of items that the model doesn't take.
            MediaError: One of them can't be decoded.
        """
        data = prompt.get("multi_modal_data") if isinstance(prompt, Mapping) else None
        if self._loader is None or not isinstance(data, Mapping):
            return
        items = [
            item
            for modality, value in data.items()
            for item in (value if isinstance(value, list) else [value])
            if isinstance(item, EncodedMedia) and item.modality == modality
        ]
        if items:
            given = {modality: value for modality, value in data.items() if value is not None}
            counts = {name: len(value) if isinstance(value, list) else 1 for name, value in given.items()}
            self._registry.check_counts(self._model_config, counts)
            await all_or_none([self._ahead(self._loader, item) for item in items])

    @staticmethod
    async def _ahead(loader: MediaLoader, item: EncodedMedia) -> None:
        with stage("decode", item.modality) if loader.decodes_ahead else nullcontext():
            await loader.adecode_ahead(item)

    def _split(self, modality: str, data: Any) -> tuple[list[Any], bool]:
        """As `split_items`. To the default image mapper a tensor is embeddings, `(num_items, num_rows,
        hidden_size)`.
        """
        if modality == "image" and hasattr(data, "is_sparse") and data.dim() == 3 and len(data) > 1:
            plugin = self._registry.get_plugin(modality)
            if plugin.uses_default_mapper(self._model_config.model_class):
                check_arrays(modality, data)
                return list(data), False
        return split_items(modality, data)

    def _item(
        self, modality: str, item: Any, uuid: str | None, mm_processor_kwargs: Mapping[str, Any]
    ) -> tuple[Any, Identity]:
        """An item as an object that mappers know, and its identity."""
        if item is None:
            raise InvalidTypeError(
                f"{modality} data: got None for an item, expected its content. Send the media along with its name."
            )
        if isinstance(item, str | bytes | Path):
            item = self._fetch(modality, item, mm_processor_kwargs)
        if isinstance(item, EncodedMedia):
            identity = identify_encoded(item.digest)
            is_there = self._loader is not None and self._loader.decodes_ahead
            with nullcontext() if is_there else stage("decode", modality):
                value = self._decode(modality, item)
        else:
            check_arrays(modality, item)
            # An object may be large: it is read only if it has no name.
            identity = _identity_of_object(item) if uuid is None else identify_uuid(uuid)
            value = _as_video_array(item) if modality == "video" else item
        if modality == "audio":
            self._check_heard(value)
        return value, identity if uuid is None else identify_uuid(uuid)

    @cached_property
    def _heard_s(self) -> float | None:
        """The longest sound that the model hears whole, as far as its class or its checkpoint says."""
        return self._max_audio_s()

    def _check_heard(self, sound: Any) -> None:
        """Refuse a sound of which the model's mapper would pass over the end."""
        if self._heard_s is None or not (isinstance(sound, tuple) and len(sound) == 2):
            return
        samples, rate = sound
        num_samples = len(samples) if hasattr(samples, "__len__") else 0
        if isinstance(rate, int | float) and rate > 0:
            check_heard("audio", num_samples / rate, self._heard_s)

    def _fetch(self, modality: str, source: Any, mm_processor_kwargs: Mapping[str, Any]) -> EncodedMedia:
        if self._loader is None or modality not in ("image", "audio", "video"):
            raise InvalidTypeError(
                f"Invalid {modality} type: got {type(source).__name__}, expected an object such as an image or an "
                f"array, since nothing here decodes it. Decode it first."
            )
        sampler = self._sampling(mm_processor_kwargs) if modality == "video" else None
        return self._loader.encoded(modality, source, sampler)

    def _decode(self, modality: str, encoded: EncodedMedia) -> Any:
        if encoded.modality != modality:
            raise MediaError(
                f"{modality} data: got encoded {encoded.modality}, expected {modality}. Send it under its own name."
            )
        decoded = self._loader.decode(encoded) if self._loader else encoded.decode()
        if isinstance(decoded, VideoFrames):
            return VideoArray(decoded.frames, decoded.metadata.as_hf())
        return decoded


def split_items(modality: str, data: Any) -> tuple[list[Any], bool]:
    """A modality's items, and whether one was given bare instead of in a list.

    A list counts its members. The exceptions are lists that are one item by their contents: the frames of a
    video, the samples of a sound.
    """
    if not isinstance(data, list):
        return [data], True
    if modality == "video" and _is_frames(data):
        return [_stacked(data)], True
    if modality == "audio" and data and all(isinstance(sample, int | float) for sample in data):
        return [np.asarray(data, dtype=np.float32)], True
    if modality == "video":
        return [_stacked(item) if isinstance(item, list) and _is_frames(item) else item for item in data], False
    return list(data), False


def _is_frames(items: Sequence[Any]) -> bool:
    """Whether a list holds the frames of one video: pictures, or arrays `(height, width, channels)`."""
    return bool(items) and all(_is_picture(item) or len(getattr(item, "shape", ())) == 3 for item in items)


def _is_picture(item: Any) -> bool:
    return hasattr(item, "getbands") and hasattr(item, "size")


def _stacked(frames: Sequence[Any]) -> np.ndarray[Any, Any]:
    """Frames as one array `(num_frames, height, width, channels)`."""
    arrays = [np.asarray(frame.convert("RGB") if _is_picture(frame) else frame) for frame in frames]
    shapes = {array.shape for array in arrays}
    if len(shapes) > 1:
        raise InvalidRequestError(
            f"video data: got frames of the shapes {sorted(shapes)[:4]}, expected one shape. Resize the frames."
        )
    return np.stack(arrays)


def _identity_of_object(item: Any) -> Identity:
    try:
        return identify(item)
    except OSError as exc:  # a picture that was opened and not yet read
        raise MediaError(
            "media data: got a file that can't be read to its end, expected a whole one. Send it again."
        ) from exc


def _as_video_array(item: Any) -> Any:
    """A clip given as `(frames, metadata)` as one object; other forms as they are."""
    if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Mapping):
        frames = _stacked(item[0]) if isinstance(item[0], list) else item[0]
        if isinstance(frames, np.ndarray):
            return VideoArray(frames, dict(item[1]))
    return item

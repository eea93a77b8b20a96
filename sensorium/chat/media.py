"""The media of chat messages: refused early, fetched, or found by their names.

The `uuid` of a part has two meanings. In the caller's own process it is the item's identity: the caller guarantees that
equal names mean equal contents, and contents are not hashed. For messages from a network it only names content that was
sent before (see `NamedMedia`), so that no client can give one picture the cached rows of another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from sensorium.chat.content import Embeddings, MediaPart
from sensorium.chat.named_media import Key, NamedMedia
from sensorium.errors import (
    InvalidRequestError,
    InvalidTypeError,
    MediaError,
    MediaUnavailableError,
    UnsupportedFeatureError,
)
from sensorium.media import EncodedMedia
from sensorium.media.local import bytes_of_base64
from sensorium.media.side_by_side import all_or_none
from sensorium.multimodal import MultiModalRegistry
from sensorium.multimodal.item_checks import MAX_UUID_CHARS
from sensorium.multimodal.video_sampling import CheckpointSampling
from sensorium.stages import stage

if TYPE_CHECKING:
    from sensorium.config import ModelConfig
    from sensorium.media import MediaLoader


@dataclass(frozen=True, slots=True, eq=False)
class ChatMedia:
    """Gets the media of messages for one model. Safe to call from several threads.

    `loader` fetches media; without it, media are objects. `named` keeps what has a name; without it, names are
    identities. The other two: whether Python objects, and embeddings, are taken.
    """

    model_config: ModelConfig
    registry: MultiModalRegistry
    sampling: CheckpointSampling
    loader: MediaLoader | None
    named: NamedMedia | None
    accept_objects: bool
    accept_embeddings: bool
    are_apart: bool = False
    """Whether media are decoded again for each scope, so that response times don't show whether another scope sent
    them."""

    def check(self, parts: Sequence[MediaPart]) -> None:
        """Refuse media that can't be taken before anything is fetched. Raises `RequestError`."""
        counts: dict[str, int] = {}
        for part in parts:
            counts[part.modality] = counts.get(part.modality, 0) + 1
            self._check_name(part)
            if part.source is not None:
                self._check_source(part)
        self.registry.check_counts(self.model_config, counts)

    def _check_name(self, part: MediaPart) -> None:
        if self.named is None:
            if part.source is None:
                raise InvalidRequestError(
                    "got a uuid, expected the content. Send it; a uuid alone is not enough here.", field=part.where
                )
        elif part.uuid is not None and not 0 < len(part.uuid) <= MAX_UUID_CHARS:
            raise InvalidRequestError(
                f"got {len(part.uuid)} characters, expected 1 to {MAX_UUID_CHARS}. Change it.",
                field=f"{part.where}.uuid",
            )

    def _check_source(self, part: MediaPart) -> None:
        if isinstance(part.source, Embeddings):
            if not self.accept_embeddings:
                raise UnsupportedFeatureError(
                    f"got embeddings, expected {part.modality} content. Embeddings as input are switched off here.",
                    field=part.where,
                )
            given, expected = part.source.value, "base64 of a safetensors file"
        else:
            given, expected = part.source, f"an address or a data URL as {part.modality}_url"
        if not self.accept_objects and not isinstance(given, str | EncodedMedia):
            raise InvalidTypeError(
                f"got a value of type {type(given).__name__}, expected {expected}. Change the part.", field=part.where
            )

    def load(self, parts: Sequence[MediaPart], kwargs: Mapping[str, Any], scope: bytes) -> list[Any]:
        """Each part's media, fetched and not yet decoded. `kwargs`: those of the mappers; `scope`: whose names count.

        Raises:
            MediaError: One can't be fetched, or its name is unknown.
            RequestError: One can't be taken.
        """
        loaded = [self._salted(self._load(part, kwargs), scope) for part in parts]
        return self._with_names(parts, loaded, kwargs, scope)

    async def aload(self, parts: Sequence[MediaPart], kwargs: Mapping[str, Any], scope: bytes) -> list[Any]:
        """As `load`, for an event loop: concurrently, without a thread."""
        fetched = await all_or_none([self._aload(part, kwargs) for part in parts])
        return self._with_names(parts, [self._salted(each, scope) for each in fetched], kwargs, scope)

    def _salted(self, item: Any, scope: bytes) -> Any:
        return replace(item, salt=scope) if self.are_apart and isinstance(item, EncodedMedia) else item

    def _load(self, part: MediaPart, kwargs: Mapping[str, Any]) -> Any:
        if part.source is None or not part.is_encoded:
            return _object(part)
        try:
            return self._loader_for(part).encoded(part.modality, part.source, self._sampler(part, kwargs))
        except MediaError as exc:
            raise type(exc)(f"{part.where}: {exc}") from exc.__cause__

    async def _aload(self, part: MediaPart, kwargs: Mapping[str, Any]) -> Any:
        if part.source is None or not part.is_encoded:
            return _object(part)
        try:
            with stage("fetch", part.modality):
                return await self._loader_for(part).aencoded(part.modality, part.source, self._sampler(part, kwargs))
        except MediaError as exc:
            raise type(exc)(f"{part.where}: {exc}") from exc.__cause__

    def _loader_for(self, part: MediaPart) -> MediaLoader:
        if self.loader is None:
            raise UnsupportedFeatureError(
                "got an address, expected an object, since nothing here fetches media. Load it first.",
                field=part.where,
            )
        return self.loader

    def _sampler(self, part: MediaPart, kwargs: Mapping[str, Any]) -> Any:
        return self.sampling(kwargs) if part.modality == "video" else None

    def _with_names(
        self, parts: Sequence[MediaPart], loaded: Sequence[Any], kwargs: Mapping[str, Any], scope: bytes
    ) -> list[Any]:
        """Named content of the request is stored first, so that the request may refer to it."""
        if self.named is None:
            return list(loaded)
        keys: list[Key] = [(scope, part.modality, part.uuid or "") for part in parts]
        for part, key, item in zip(parts, keys, loaded, strict=True):
            if part.uuid is not None and part.source is not None:
                self.named.put(key, item)
        return [
            item if part.source is not None else self._find(self.named, part, key, kwargs)
            for part, key, item in zip(parts, keys, loaded, strict=True)
        ]

    def _find(self, named: NamedMedia, part: MediaPart, key: Key, kwargs: Mapping[str, Any]) -> Any:
        found = named.get(key, self._sampler(part, kwargs))
        if found is None:
            raise MediaUnavailableError(
                f"got {part.uuid!r:.80} without content, expected the name of {part.modality} that "
                "was sent before and is still kept. Send the content again.",
                field=f"{part.where}.uuid",
            )
        return found


def _object(part: MediaPart) -> Any:
    if not isinstance(part.source, Embeddings):
        return part.source
    value = part.source.value
    return read_embeddings(value, part.where) if isinstance(value, str) else value


def read_embeddings(text: str, where: str) -> Any:
    """Embeddings from base64 of a safetensors file: its only tensor, or all of them by name.

    Raises `InvalidRequestError` (a `ValueError`) for anything else; nothing is unpickled.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = load(bytes_of_base64(text))
    except (ValueError, SafetensorError) as exc:
        raise InvalidRequestError(
            "got something else, expected base64 of a safetensors file. Encode the tensors with safetensors.",
            field=where,
        ) from exc
    return next(iter(tensors.values())) if len(tensors) == 1 else tensors

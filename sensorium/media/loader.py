"""The facade: fetch, cache, decode. One `MediaLoader` per process is shared by all requests."""

from __future__ import annotations

import asyncio
from concurrent.futures import Executor
from typing import TYPE_CHECKING, cast

from sensorium.media.audio import AudioClip
from sensorium.media.budget import MediaBudget
from sensorium.media.cache import DecodedMediaCache
from sensorium.media.decoder_pool import DecoderPool
from sensorium.media.digest import EncodedMedia
from sensorium.media.fetch import MediaFetcher, MediaSource
from sensorium.media.image import BYTES_PER_PIXEL
from sensorium.media.limits import MediaLimits
from sensorium.media.policy import FetchPolicy
from sensorium.media.sampling import FrameSampler, VideoSampling
from sensorium.media.video import VideoFrames

if TYPE_CHECKING:
    from PIL.Image import Image


_DIGEST_HERE_BYTES = 1 << 20


class MediaLoader:
    """Turns sources (URL, data URL, path, bytes) into canonical images, sounds and clips.

    Fetching and decoding are separate steps, so that a caller can look up an item's digest in its own caches between
    them: `encoded` gives an `EncodedMedia`, `decode` the canonical form, `load_*` both at once. Methods that start with
    "a" are for an event loop: they wait without a thread and decode in the pool.

    Args:
        limits: the budgets.
        policy: what may be fetched.
        pool: bounded executor for decoding in the asynchronous methods; the event loop's own by default.
        fetcher: replaces the one made from `limits` and `policy`.
        cache: replaces the one of `limits.max_decoded_cache_bytes`.
        budget: bounds the encoded bytes that all items together hold.
        decoders: processes that decode instead of this one, for untrusted media. `close` ends them.
    """

    def __init__(
        self,
        limits: MediaLimits | None = None,
        policy: FetchPolicy | None = None,
        *,
        pool: Executor | None = None,
        fetcher: MediaFetcher | None = None,
        cache: DecodedMediaCache[Image | AudioClip | VideoFrames] | None = None,
        budget: MediaBudget | None = None,
        decoders: DecoderPool | None = None,
    ) -> None:
        self.limits = limits or MediaLimits()
        self.fetcher = fetcher or MediaFetcher(self.limits, policy, budget=budget)
        self.budget = budget
        self.cache = cache or make_cache(self.limits.max_decoded_cache_bytes)
        self.decoders = decoders
        self._pool = pool

    def encoded(self, modality: str, source: MediaSource, sampler: FrameSampler | None = None) -> EncodedMedia:
        """Fetch without decoding. Raises as `MediaFetcher.afetch` does."""
        fetched = self.fetcher.fetch(source, modality)
        return EncodedMedia(modality, fetched.data, fetched.media_type, sampler or VideoSampling(), fetched.lease)

    async def aencoded(self, modality: str, source: MediaSource, sampler: FrameSampler | None = None) -> EncodedMedia:
        """As `encoded`."""
        fetched = await self.fetcher.afetch(source, modality)
        return EncodedMedia(modality, fetched.data, fetched.media_type, sampler or VideoSampling(), fetched.lease)

    def decode(self, media: EncodedMedia) -> Image | AudioClip | VideoFrames:
        """The canonical form, from the cache if the same item was decoded before."""
        decoders = self.decoders
        if decoders is None:
            return self.cache.get_or_compute(media.digest, lambda: media.decode(self.limits))
        return _copy(self.cache.join(media.digest, lambda: decoders.submit(media)).result())

    async def adecode(self, media: EncodedMedia) -> Image | AudioClip | VideoFrames:
        """As `decode`, in the pool. Cancelling it abandons the item, unless another caller waits for it."""
        decoders = self.decoders
        digest = await _digest(media)
        if decoders is None:
            return await self.cache.aget_or_compute(digest, lambda: media.decode(self.limits), self._pool)
        return await self.cache.aget(digest, lambda: decoders.submit(media), self._pool)

    async def adecode_ahead(self, media: EncodedMedia) -> None:
        """Decode an item into the cache, so that `decode` doesn't block its thread later.

        Does nothing without a cache or without decoder processes. Raises as `adecode` does.
        """
        decoders = self.decoders
        if decoders is not None and self.decodes_ahead:
            digest = await _digest(media)
            await asyncio.wrap_future(self.cache.join(digest, lambda: decoders.submit(media)))

    @property
    def decodes_ahead(self) -> bool:
        """Whether `adecode_ahead` has an effect."""
        return self.decoders is not None and self.limits.max_decoded_cache_bytes > 0

    def start(self) -> None:
        """Start the decoder processes, if there are any. Returns at once."""
        if self.decoders is not None:
            self.decoders.start()

    def close(self) -> None:
        """End the decoder processes. May be called again."""
        if self.decoders is not None:
            self.decoders.close()

    def load_image(self, source: MediaSource) -> Image:
        """Fetch and decode an image; see `decode_image` for the canonical form."""
        return cast("Image", self.decode(self.encoded("image", source)))

    def load_audio(self, source: MediaSource) -> AudioClip:
        """Fetch and decode a sound; mono, at its own rate."""
        return cast(AudioClip, self.decode(self.encoded("audio", source)))

    def load_video(self, source: MediaSource, sampler: FrameSampler | None = None) -> VideoFrames:
        """Fetch a clip and decode the frames that `sampler` chooses; all of them by default."""
        return cast(VideoFrames, self.decode(self.encoded("video", source, sampler)))

    async def aload_image(self, source: MediaSource) -> Image:
        """As `load_image`."""
        return cast("Image", await self.adecode(await self.aencoded("image", source)))

    async def aload_audio(self, source: MediaSource) -> AudioClip:
        """As `load_audio`."""
        return cast(AudioClip, await self.adecode(await self.aencoded("audio", source)))

    async def aload_video(self, source: MediaSource, sampler: FrameSampler | None = None) -> VideoFrames:
        """As `load_video`."""
        return cast(VideoFrames, await self.adecode(await self.aencoded("video", source, sampler)))


async def _digest(media: EncodedMedia) -> bytes:
    """The item's digest, computed beside the event loop if that takes long."""
    if len(media.data) > _DIGEST_HERE_BYTES:
        await asyncio.to_thread(lambda: media.digest)
    return media.digest


def make_cache(max_bytes: int) -> DecodedMediaCache[Image | AudioClip | VideoFrames]:
    """A cache for canonical media."""
    return DecodedMediaCache(max_bytes, size_of=_num_bytes, copy=_copy)


def _num_bytes(media: Image | AudioClip | VideoFrames) -> int:
    if isinstance(media, AudioClip):
        return media.samples.nbytes
    if isinstance(media, VideoFrames):
        return media.frames.nbytes
    return media.width * media.height * BYTES_PER_PIXEL


def _copy(media: Image | AudioClip | VideoFrames) -> Image | AudioClip | VideoFrames:
    if isinstance(media, AudioClip):
        return AudioClip(media.samples.copy(), media.sampling_rate)
    if isinstance(media, VideoFrames):
        return VideoFrames(media.frames.copy(), media.metadata)
    return media.copy()

"""Media: from a URL, a path or bytes to one canonical image, sound or clip, within budgets.

Owns fetching, sniffing, decoding, resampling, encoding for tests and clients, and the cache of decoded items. It knows
nothing of models, tokens or requests, and imports neither torch nor transformers. Callers are the front process, the
offline `LLM` and the chat command line; models never fetch.

    source (URL, data URL, path, bytes)
        -> fetch: one parse, one resolution, one deadline, bytes counted          fetch.py, url.py, address.py, local.py
        -> EncodedMedia: modality + bytes + decode options = identity             digest.py
        -> decode: header first, budgets before and while decoding                image.py, audio.py, video.py
             in this process, or in processes of their own                        decoder_pool.py, decoder_process.py
        -> canonical RGB image | mono float32 samples | uint8 RGB frames          cached by identity in cache.py

Everything that goes wrong is a `sensorium.errors.MediaError` with our own words: no path, address or library text.
"""

from sensorium.media.audio import AudioClip, decode_audio
from sensorium.media.budget import MediaBudget, MediaLease
from sensorium.media.cache import CacheStats, DecodedMediaCache
from sensorium.media.decoder_pool import DecoderPool
from sensorium.media.digest import EncodedMedia
from sensorium.media.fetch import FetchedMedia, MediaFetcher
from sensorium.media.image import canonical_image, decode_image
from sensorium.media.limits import MediaLimits
from sensorium.media.loader import MediaLoader
from sensorium.media.policy import FetchPolicy
from sensorium.media.resample import resample_audio
from sensorium.media.sampling import FrameSampler, VideoMetadata, VideoSampling
from sensorium.media.video import VideoFrames, decode_video

__all__ = [
    "AudioClip",
    "CacheStats",
    "DecodedMediaCache",
    "DecoderPool",
    "EncodedMedia",
    "FetchPolicy",
    "FetchedMedia",
    "FrameSampler",
    "MediaBudget",
    "MediaFetcher",
    "MediaLease",
    "MediaLimits",
    "MediaLoader",
    "VideoFrames",
    "VideoMetadata",
    "VideoSampling",
    "canonical_image",
    "decode_audio",
    "decode_image",
    "decode_video",
    "resample_audio",
]

"""The budgets of media: how many bytes, pixels, frames and seconds one item may cost. All on by default.

Flat numbers only, so that command-line flags can be generated from the fields. The defaults let everyday media of
good size through (a 60-megapixel photograph, an hour of speech, an hour of film sampled at a few hundred frames) and
keep the worst legal item within about two gigabytes of memory and two minutes of work.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from sensorium.errors import ConfigError, MediaTooLargeError
from sensorium.settings import check_settings

_MIB = 1 << 20
# Pillow refuses images above twice its own PIL.Image.MAX_IMAGE_PIXELS; a larger budget would have no effect.
_PILLOW_MAX_PIXELS = 178_956_970


@dataclass(frozen=True, slots=True, kw_only=True)
class MediaLimits:
    """Budgets for one media item unless the name says otherwise. Invariant: every field is positive and finite.

    Attributes:
        max_image_bytes: encoded bytes of one image.
        max_video_bytes: encoded bytes of one clip.
        max_audio_bytes: encoded bytes of one sound.
        max_image_pixels: width x height of one image, read from its header before anything is allocated.
        max_video_frames: frames returned for one clip, after sampling.
        max_video_decoded_frames: frames decoded to get at them.
        max_video_frame_pixels: width x height of one frame. The default is the largest frame of H.264 level 5.1.
        max_video_pixels: width x height x frames returned; the array takes three bytes for each.
        max_video_s: play time of a clip.
        max_audio_s: play time of a sound.
        max_audio_decoded_bytes: samples decoded, over all channels, at four bytes each.
        max_decode_s: wall-clock seconds that decoding one item may take. For pictures, it applies
            where they are decoded in separate processes, as in the server.
        max_decode_bytes: private memory that decoding one item may take there, beside its result. An item gets
            less if its header promises less.
        decode_processes: processes that decode in parallel there, and as many again for items that take long.
        image_fetch_timeout_s: deadline for a whole image fetch: name look-up, redirects and body together.
        video_fetch_timeout_s: the same for a clip.
        audio_fetch_timeout_s: the same for a sound.
        max_redirects: redirects followed for one item; 0 follows none.
        max_concurrent_fetches: concurrent remote fetches of the process; more wait.
        max_decoded_cache_bytes: decoded items kept for reuse, over all items; 0 keeps none.

    Raises:
        ConfigError: a value is not a positive, finite number.
    """

    max_image_bytes: int = 64 * _MIB
    max_video_bytes: int = 256 * _MIB
    max_audio_bytes: int = 128 * _MIB
    max_image_pixels: int = 64_000_000
    max_video_frames: int = 768
    max_video_decoded_frames: int = 108_000
    max_video_frame_pixels: int = 9_437_184
    max_video_pixels: int = 512_000_000
    max_video_s: float = 3600.0
    max_audio_s: float = 3600.0
    max_audio_decoded_bytes: int = 1536 * _MIB
    max_decode_s: float = 120.0
    max_decode_bytes: int = 2048 * _MIB
    decode_processes: int = 2
    image_fetch_timeout_s: float = 5.0
    video_fetch_timeout_s: float = 30.0
    audio_fetch_timeout_s: float = 10.0
    max_redirects: int = 5
    max_concurrent_fetches: int = 64
    max_decoded_cache_bytes: int = 512 * _MIB

    def __post_init__(self) -> None:
        check_settings(self)
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in ("max_redirects", "max_decoded_cache_bytes") else 1e-3
            if value < least:
                raise ConfigError(
                    f"{field.name}: got {value}, expected {'at least 0' if least == 0 else 'more than 0'}. "
                    f"Raise {field.name}; a budget can't be switched off."
                )
        if self.max_image_pixels > _PILLOW_MAX_PIXELS:
            raise ConfigError(
                f"max_image_pixels: got {self.max_image_pixels}, expected at most {_PILLOW_MAX_PIXELS}, the bound of "
                "the image library. Lower max_image_pixels."
            )

    def max_bytes(self, modality: str) -> int:
        """Encoded bytes allowed for an item of `modality` ("image", "video" or "audio")."""
        return {"image": self.max_image_bytes, "video": self.max_video_bytes, "audio": self.max_audio_bytes}[modality]

    def fetch_timeout_s(self, modality: str) -> float:
        """Deadline in seconds for fetching an item of `modality`."""
        return {
            "image": self.image_fetch_timeout_s,
            "video": self.video_fetch_timeout_s,
            "audio": self.audio_fetch_timeout_s,
        }[modality]


def too_large(what: str, got: str, bound: str, remedy: str, field: str) -> MediaTooLargeError:
    """The message for an exceeded budget; `field` is the `MediaLimits` field that sets it."""
    return MediaTooLargeError(f"got {got}, expected at most {bound}. {remedy}, or raise {field}.", field=what)


def takes_too_much_memory(modality: str) -> MediaTooLargeError:
    """The error for an item for which no memory is left, or none within its bound."""
    return MediaTooLargeError(
        f"{modality} takes too much memory to decode: got more than media of its size need, expected less. "
        f"Send a smaller or plainer {modality}."
    )


def check_encoded_bytes(modality: str, num_bytes: int, limits: MediaLimits) -> None:
    """Refuse an item whose encoded bytes exceed the budget.

    Raises:
        MediaTooLargeError: it does.
    """
    bound = limits.max_bytes(modality)
    if num_bytes > bound:
        raise bytes_too_large(modality, num_bytes, bound)


def bytes_too_large(modality: str, num_bytes: int, bound: int, *, at_least: bool = False) -> MediaTooLargeError:
    """The error for too many encoded bytes; `at_least` when reading stopped at the bound."""
    got = f"{'more than ' if at_least else ''}{num_bytes} bytes"
    return too_large(
        f"{modality} has too many bytes", got, str(bound), f"Send a smaller {modality}", f"max_{modality}_bytes"
    )

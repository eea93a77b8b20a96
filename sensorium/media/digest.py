"""Identity of encoded media: the same bytes decoded the same way are the same item, and need no second decoding."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from sensorium.errors import UnknownModalityError
from sensorium.media.audio import AudioClip, decode_audio
from sensorium.media.budget import MediaLease
from sensorium.media.image import decode_image
from sensorium.media.limits import MediaLimits
from sensorium.media.local import is_jpeg_frames
from sensorium.media.sampling import FrameSampler, VideoSampling
from sensorium.media.video import VideoFrames, decode_video

if TYPE_CHECKING:
    from PIL.Image import Image

_DIGEST_BYTES = 32
_DOMAIN = b"sensorium encoded media 1"


@dataclass(frozen=True)
class EncodedMedia:
    """One media item as it came, not decoded yet. Two items with one digest decode to the same thing.

    Attributes:
        modality: "image", "audio" or "video".
        data: the encoded bytes.
        media_type: type of a data URL; only "video/jpeg" changes how bytes are read.
        sampler: which frames of a clip are wanted; without effect on other modalities.
        lease: counts the bytes in a budget for as long as this object lives.
        salt: makes the digest differ from that of the same bytes with another salt: the tenant, where tenants must not
        learn what others sent.
    """

    modality: str
    data: bytes = field(repr=False)
    media_type: str | None = None
    sampler: FrameSampler = field(default_factory=VideoSampling)
    lease: MediaLease | None = field(default=None, repr=False, compare=False)
    salt: bytes = b""

    def __post_init__(self) -> None:
        if self.modality not in ("image", "audio", "video"):
            raise UnknownModalityError(
                f"got {self.modality!r}, expected image, audio or video. Decode other media yourself.", field="modality"
            )

    @cached_property
    def digest(self) -> bytes:
        """BLAKE2b, 32 bytes, over modality, decode options, bytes and salt, each preceded by its length."""
        state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
        for part in (_DOMAIN, self.modality.encode(), self._options().encode(), self.data, self.salt):
            state.update(len(part).to_bytes(8, "little"))
            state.update(part)
        return state.digest()

    def _options(self) -> str:
        if self.modality != "video":
            return ""
        return f"{self.media_type if is_jpeg_frames(self.media_type) else ''}|{self.sampler.key}"

    def decode(self, limits: MediaLimits | None = None) -> Image | AudioClip | VideoFrames:
        """Decode into the canonical form of the modality: an RGB image, a mono sound, or sampled frames.

        Raises:
            MediaError: see `decode_image`, `decode_audio` and `decode_video`.
        """
        if self.modality == "image":
            return decode_image(self.data, limits)
        if self.modality == "audio":
            return decode_audio(self.data, limits)
        return decode_video(self.data, limits, self.sampler, media_type=self.media_type)

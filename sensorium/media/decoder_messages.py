"""Messages between the front and the decoder processes: msgpack with a schema, nothing else.

    front -> fork server   FORK with the three open files of a new process; KILL; SLOW
    front -> decoder       Decode, then Chosen for each Choose
    decoder -> front       Ready, once; Choose (a clip's frames), then Decoded or Failed

Encoded bytes and results go through two anonymous files that a decoder shares with the front.
"""

from __future__ import annotations

import struct
from typing import TypeAlias

import msgspec

from sensorium.errors import (
    InvalidRequestError,
    MediaError,
    MediaTooLargeError,
    MediaTypeError,
    RequestError,
    UnsupportedFeatureError,
)
from sensorium.media.sampling import VideoMetadata

COMMAND = struct.Struct("<cI")
"""To the fork server: what to do, and the number of the process."""
FORK, KILL, SLOW = b"F", b"K", b"S"

ERRORS: dict[str, type[RequestError]] = {
    each.__name__: each
    for each in (MediaError, MediaTooLargeError, MediaTypeError, InvalidRequestError, UnsupportedFeatureError)
}
"""The classes of errors that decoding may raise, by name."""


class Decode(msgspec.Struct, frozen=True, tag=True):
    """Decode the first `num_bytes` of the input file."""

    modality: str
    num_bytes: int
    media_type: str | None


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The process has started."""


class Choose(msgspec.Struct, frozen=True, tag=True):
    """Asks which frames of this clip are wanted."""

    metadata: VideoMetadata


class Chosen(msgspec.Struct, frozen=True, tag=True):
    """The answer to `Choose`; None if the sampler has failed."""

    indices: list[int]


class Decoded(msgspec.Struct, frozen=True, tag=True):
    """The output file begins with the result: pixels with four bytes each, samples, or frames.

    Attributes:
        shape: `(height, width)`, `(num_samples,)` or `(num_frames, height, width, 3)`.
        sampling_rate: of a sound.
        metadata: of a clip.
        is_last: the process ends now, because it keeps too much memory.
    """

    shape: tuple[int, ...]
    sampling_rate: int = 0
    metadata: VideoMetadata | None = None
    is_last: bool = False


class Failed(msgspec.Struct, frozen=True, tag=True):
    """An error of the item: its class in `ERRORS`, and its message."""

    error: str
    message: str
    is_last: bool = False


ToDecoder: TypeAlias = Decode | Chosen
FromDecoder: TypeAlias = Ready | Choose | Decoded | Failed

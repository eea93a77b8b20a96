"""The inverse of decoding: images, samples and frames to encoded bytes and data URLs. For clients, examples and
tests."""

from __future__ import annotations

import base64
import io
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import InvalidRequestError

if TYPE_CHECKING:
    from PIL.Image import Image

# Container by format name: FFmpeg's muxer, media type, codecs in order of preference.
_AUDIO_FORMATS = {
    "wav": ("wav", "audio/wav", ("pcm_s16le",)),
    "flac": ("flac", "audio/flac", ("flac",)),
    "mp3": ("mp3", "audio/mpeg", ("libmp3lame", "mp3")),
    "ogg": ("ogg", "audio/ogg", ("libopus", "opus")),
    "m4a": ("ipod", "audio/mp4", ("aac",)),
    "webm": ("webm", "audio/webm", ("libopus", "opus")),
}
_VIDEO_FORMATS = {
    "mp4": ("mp4", "video/mp4", ("libx264", "mpeg4")),
    "mov": ("mov", "video/quicktime", ("libx264", "mpeg4")),
    "mkv": ("matroska", "video/x-matroska", ("libx264", "mpeg4")),
    "webm": ("webm", "video/webm", ("libvpx-vp9", "libvpx")),
    "avi": ("avi", "video/x-msvideo", ("mpeg4", "mjpeg")),
    "gif": ("gif", "image/gif", ("gif",)),
}


def to_data_url(data: bytes, media_type: str) -> str:
    """`data:<media type>;base64,<data>`."""
    return f"data:{media_type};base64,{base64.b64encode(data).decode('ascii')}"


def encode_image(image: Image, format: str = "PNG", **options: Any) -> bytes:
    """Encode a PIL image; `options` go to Pillow's `save`.

    Raises:
        InvalidRequestError: this build of Pillow can't write the format.
    """
    buffer = io.BytesIO()
    try:
        image.save(buffer, format=format, **options)
    except KeyError:
        raise InvalidRequestError(
            f"image format: got {format!r}, expected one that Pillow writes, such as PNG or JPEG. Set format."
        ) from None
    return buffer.getvalue()


def image_to_data_url(image: Image, format: str = "PNG", **options: Any) -> str:
    """A PIL image as a data URL; PNG keeps every pixel."""
    return to_data_url(encode_image(image, format, **options), f"image/{format.lower()}")


def encode_audio(samples: NDArray[Any], sampling_rate: int, format: str = "wav") -> bytes:
    """Encode float samples, full scale 1, shape `(num_samples,)` or `(channels, num_samples)`, channels 1 or 2.

    Raises:
        InvalidRequestError: the format or the shape is not known.
    """
    import av

    muxer, _, codecs = _known(_AUDIO_FORMATS, "audio", format)
    samples = np.atleast_2d(np.asarray(samples, dtype=np.float32))
    if samples.ndim != 2 or samples.shape[0] not in (1, 2) or samples.shape[1] == 0:
        raise InvalidRequestError(
            f"audio samples: got shape {samples.shape}, expected (num_samples,) or (1 or 2, num_samples). Reshape them."
        )
    layout = "mono" if samples.shape[0] == 1 else "stereo"
    pcm = np.ascontiguousarray((samples.clip(-1, 1) * 32767).round().astype(np.int16).T).reshape(1, -1)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=muxer) as container:
        stream = container.add_stream(_first_available(codecs), rate=sampling_rate, layout=layout)
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout=layout)
        frame.sample_rate = sampling_rate
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


def audio_to_data_url(samples: NDArray[Any], sampling_rate: int, format: str = "wav") -> str:
    """Samples as a data URL; see `encode_audio`."""
    return to_data_url(encode_audio(samples, sampling_rate, format), _AUDIO_FORMATS[format][1])


def encode_video(
    frames: NDArray[np.uint8], fps: float = 10.0, format: str = "mp4", options: dict[str, str] | None = None
) -> bytes:
    """Encode RGB frames, shape `(num_frames, height, width, 3)`; `options` go to the codec.

    Raises:
        InvalidRequestError: the format or the shape is not known.
    """
    import av

    muxer, _, codecs = _known(_VIDEO_FORMATS, "video", format)
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape or frames.dtype != np.uint8:
        raise InvalidRequestError(
            f"video frames: got shape {frames.shape} of {frames.dtype}, expected (num_frames, height, width, 3) of "
            "uint8. Convert them."
        )
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=muxer) as container:
        codec = _first_available(codecs)
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = _pixel_format(codec, frames.shape[1], frames.shape[2])
        for pixels in frames:
            for packet in stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")):
                container.mux(packet)
        for packet in stream.encode(None):
            container.mux(packet)
    return buffer.getvalue()


def video_to_data_url(frames: NDArray[np.uint8], fps: float = 10.0, format: str = "mp4") -> str:
    """Frames as a data URL; see `encode_video`."""
    return to_data_url(encode_video(frames, fps, format), _VIDEO_FORMATS[format][1])


def frames_to_jpeg_data_url(frames: NDArray[np.uint8], fps: float | None = None, quality: int = 90) -> str:
    """Frames as a `video/jpeg` data URL: one JPEG for each, in base64, with commas between."""
    import PIL.Image

    head = "data:video/jpeg" + (f";fps={fps:g}" if fps is not None else "")
    jpegs = (encode_image(PIL.Image.fromarray(pixels), "JPEG", quality=quality) for pixels in frames)
    return f"{head};base64," + ",".join(base64.b64encode(jpeg).decode("ascii") for jpeg in jpegs)


def _known(
    formats: dict[str, tuple[str, str, tuple[str, ...]]], what: str, format: str
) -> tuple[str, str, tuple[str, ...]]:
    if format not in formats:
        raise InvalidRequestError(f"{what} format: got {format!r}, expected one of {', '.join(formats)}. Set format.")
    return formats[format]


def _first_available(codecs: tuple[str, ...]) -> str:
    import av

    return next((codec for codec in codecs if codec in av.codecs_available), codecs[-1])


def _pixel_format(codec: str, height: int, width: int) -> str:
    """Half-resolution colour where the codec allows it: players expect it, and it needs even sides."""
    if codec == "gif":
        return "rgb8"
    if codec == "mjpeg":
        return "yuvj444p"
    return "yuv420p" if height % 2 == width % 2 == 0 or codec in ("mpeg4", "libvpx") else "yuv444p"

"""What stands in front of a stream is skipped, as players do, before every format that is told by its first bytes."""

from __future__ import annotations

import numpy as np
import pytest

from sensorium.errors import MediaError, MediaTypeError
from sensorium.media import decode_audio, decode_video
from sensorium.media.sniff import find_stream
from tests.media.samples import clip, encode_frames, numbered_frames, sound, tone, wav


def id3(size: int, *, footer: bool = False) -> bytes:
    digits = bytes(size >> shift & 0x7F for shift in (21, 14, 7, 0))
    flags = 0x10 if footer else 0
    tag = b"ID3\x04\x00" + bytes([flags]) + digits + b"\0" * size
    return tag + (b"3DI\x04\x00" + bytes([flags]) + digits if footer else b"")


def ape(size: int) -> bytes:
    head = b"APETAGEX" + (2000).to_bytes(4, "little") + (size + 32).to_bytes(4, "little") + b"\0\0\0\0\0\0\0\xa0"
    return head.ljust(32, b"\0") + b"\x01" * size + b"APETAGEX".ljust(32, b"\0")


PREFIXES = {
    "an ID3 tag": id3(20),
    "a large ID3 tag": id3(70_000),
    "an empty ID3 tag": id3(0),
    "an ID3 tag with a footer": id3(300, footer=True),
    "two ID3 tags": id3(20) + id3(150),
    "an ID3 tag and padding": id3(20) + b"\0" * 1_000,
    "an APE tag": ape(50),
    "both tags": id3(9) + ape(50),
    "zeros": b"\0" * 777,
    "a byte order mark": b"\xef\xbb\xbf",
    "an empty line": b"\r\n",
}


def aiff() -> bytes:
    from tests.media.test_audio import soundfile_bytes

    return soundfile_bytes(tone(0.3, 16_000), 16_000, "AIFF", "PCM_16")


def aac() -> bytes:
    import io

    import av

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="adts") as container:
        stream = container.add_stream("aac", rate=16_000, layout="mono")
        pcm = (tone(0.5, 16_000) * 32767).astype(np.int16)[None]
        frame = av.AudioFrame.from_ndarray(pcm, format="s16", layout="mono")
        frame.sample_rate = 16_000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return buffer.getvalue()


SOUNDS = {
    **{format: sound(format, 0.3) for format in ("wav", "flac", "mp3", "ogg", "m4a", "webm")},
    "aiff": aiff(),
    "aac": aac(),
}


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("format", SOUNDS)
def test_sounds_behind_what_players_skip(format: str, prefix: str) -> None:
    """FLAC behind an ID3 tag was taken for MP3, and refused as corrupt."""
    plain = decode_audio(SOUNDS[format])
    tagged = decode_audio(PREFIXES[prefix] + SOUNDS[format])
    assert tagged.sampling_rate == plain.sampling_rate
    assert np.array_equal(tagged.samples, plain.samples)


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("format", ["mp4", "mov", "webm", "mkv", "avi", "gif"])
def test_clips_behind_what_players_skip(format: str, prefix: str) -> None:
    if format == "avi":
        data = encode_frames(numbered_frames(6), "avi", "mpeg4", "yuv420p", {})
    else:
        data = clip(format, num_frames=6)
    assert np.array_equal(decode_video(PREFIXES[prefix] + data).frames, decode_video(data).frames)


@pytest.mark.parametrize("data", [b"", b"\0" * 50, b"ID3", id3(10), id3(50)[:20], ape(5), b"\xef\xbb\xbf", b"APETAGEX"])
def test_prefixes_of_nothing_are_refused(data: bytes) -> None:
    with pytest.raises(MediaError):
        decode_audio(data)
    with pytest.raises(MediaTypeError):
        decode_video(data)


def test_many_tags_end() -> None:
    assert find_stream(id3(0) * 100_000) == ("mp3", id3(0) * (100_000 - 16))


def test_a_broken_size_is_no_tag() -> None:
    data = wav(np.zeros(10, np.int16), 8_000)
    assert find_stream(b"ID3\x04\0\0\xff\xff\xff\xff" + data) == ("mp3", b"ID3\x04\0\0\xff\xff\xff\xff" + data)

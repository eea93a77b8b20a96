"""Sounds: one mono form, and budgets that hold while decoding whatever headers claim."""

import io
import warnings

import numpy as np
import pytest
import soundfile

from sensorium.errors import MediaError, MediaTooLargeError, MediaTypeError
from sensorium.media import MediaLimits, audio, decode_audio
from sensorium.media.audio import to_mono
from sensorium.media.encode import encode_audio, encode_video
from tests.media.samples import clip, numbered_frames, sound, tone, wav

RNG = np.random.default_rng(0)
STEREO = np.stack([tone(0.5, 44_100), RNG.normal(0, 0.1, 22_050).astype(np.float32)])


def soundfile_bytes(samples: np.ndarray, rate: int, format: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=format, subtype=subtype)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("format", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 0.0),
        ("WAV", "PCM_16", 0.0),
        ("WAV", "PCM_24", 0.0),
        ("WAV", "PCM_32", 0.0),
        ("WAV", "FLOAT", 0.0),
        ("WAV", "DOUBLE", 0.0),
        ("WAV", "ALAW", 0.0),
        ("RF64", "PCM_16", 0.0),
        ("AIFF", "PCM_16", 0.0),
        ("FLAC", "PCM_16", 0.0),
        ("FLAC", "PCM_24", 0.0),
        ("OGG", "VORBIS", 1e-5),
        ("MP3", "MPEG_LAYER_III", 1e-5),
    ],
)
def test_samples_equal_soundfile_and_the_mean_of_channels(format: str, subtype: str, tolerance: float) -> None:
    """soundfile and a mean over channels is what transformers' own loader does."""
    data = soundfile_bytes(STEREO.T, 44_100, format, subtype)
    expected, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    clip = decode_audio(data)
    assert clip.sampling_rate == rate
    assert clip.samples.dtype == np.float32
    assert clip.samples.shape == (len(expected),)
    assert np.abs(clip.samples - expected.T.mean(axis=0)).max() <= tolerance


@pytest.mark.parametrize("format", ["wav", "flac", "mp3", "ogg", "m4a", "webm"])
def test_containers(format: str) -> None:
    samples = tone(1.0, 48_000)
    audio, rate = decode_audio(encode_audio(samples, 48_000, format))  # the (array, rate) form of the extension API
    assert rate == 48_000
    assert abs(len(audio) - 48_000) <= 2_048
    middle = slice(10_000, 40_000)
    # Lossy codecs shift by less than a period; the spectrum has its one line where the tone is.
    spectrum = np.abs(np.fft.rfft(audio[middle] * np.hanning(30_000)))
    assert np.argmax(spectrum) * 48_000 / 30_000 == pytest.approx(440, abs=2)
    assert np.abs(audio[middle]).max() == pytest.approx(0.5, abs=0.05)


def test_sound_track_of_a_clip_and_a_clip_without() -> None:
    assert decode_audio(encode_audio(tone(0.5, 48_000), 48_000, "webm")).duration_s == pytest.approx(0.5, abs=0.1)
    with pytest.raises(MediaError, match="sound track"):
        decode_audio(clip("mp4"))
    with pytest.raises(MediaTypeError):
        decode_audio(encode_video(numbered_frames(3), 10, "gif"))


def test_many_channels_are_averaged_alike() -> None:
    samples = RNG.integers(-30_000, 30_000, (1_000, 6)).astype(np.int16)
    expected = (samples.astype(np.float32) / 32_768).mean(axis=1, dtype=np.float32)
    assert np.abs(decode_audio(wav(samples, 8_000)).samples - expected).max() < 1e-6


# --- budgets ---


def test_seconds_are_counted_while_decoding() -> None:
    """Streams written without knowing their length claim 2^32 - 1 bytes; a claim neither refuses nor admits."""
    samples = (tone(2.0, 8_000) * 32_767).astype(np.int16)
    for claimed in (None, 0xFFFFFFFF):
        data = wav(samples, 8_000, claimed_bytes=claimed)
        assert decode_audio(data, MediaLimits(max_audio_s=2.0)).duration_s == 2.0
        with pytest.raises(MediaTooLargeError, match="max_audio_s"):
            decode_audio(data, MediaLimits(max_audio_s=1.9))


@pytest.mark.parametrize("format", ["ogg", "flac", "mp3", "m4a"])
def test_small_files_cannot_become_many_samples(format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of silence fits into a few kilobytes; decoding stops at the budget, not at the end."""
    data = encode_audio(np.zeros(60 * 48_000, np.float32), 48_000, format)
    assert len(data) * 10 < 60 * 48_000 * 4
    mixed = 0

    def count(frame: object) -> np.ndarray:
        nonlocal mixed
        mixed += 1
        return to_mono(frame)  # type: ignore[arg-type]

    monkeypatch.setattr(audio, "to_mono", count)
    with pytest.raises(MediaTooLargeError, match="max_audio_decoded_bytes"):
        decode_audio(data, MediaLimits(max_audio_decoded_bytes=400_000))
    stopped_after, mixed = mixed, 0
    decode_audio(data)
    assert stopped_after * 10 < mixed


def test_decoded_bytes_count_all_channels() -> None:
    samples = np.zeros((1_000, 6), np.int16)
    with pytest.raises(MediaTooLargeError, match="max_audio_decoded_bytes"):
        decode_audio(wav(samples, 8_000), MediaLimits(max_audio_decoded_bytes=23_999))
    assert len(decode_audio(wav(samples, 8_000), MediaLimits(max_audio_decoded_bytes=24_000)).samples) == 1_000


def test_deadline_and_encoded_bytes() -> None:
    data = encode_audio(np.zeros(600 * 8_000, np.float32), 8_000, "flac")
    with pytest.raises(MediaTooLargeError, match="max_decode_s"):
        decode_audio(data, MediaLimits(max_decode_s=1e-3))
    with pytest.raises(MediaTooLargeError, match="max_audio_bytes"):
        decode_audio(data, MediaLimits(max_audio_bytes=100))


# --- broken ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e30, -3e38])
def test_samples_that_are_not_finite_or_absurd_are_refused(value: float) -> None:
    samples = tone(0.1, 8_000)
    samples[100] = value
    with pytest.raises(MediaError, match="invalid samples"):
        decode_audio(wav(samples, 8_000))


def test_overflow_in_the_mean_is_refused_too() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy reports the overflow, which is the point
        with pytest.raises(MediaError, match="invalid samples"):
            decode_audio(wav(np.full((10, 2), 3e38, np.float32), 8_000))


def test_empty_sounds_are_refused() -> None:
    for data in (wav(np.zeros(0, np.int16), 8_000), wav(np.zeros(0, np.int16), 8_000, claimed_bytes=1_000)):
        with pytest.raises(MediaError):
            decode_audio(data)
    for data in (b"", b"RIFF", b"OggS", b"fLaC", b"ID3", b"\xff\xfb", b"\xff\xf1"):
        with pytest.raises(MediaError):
            decode_audio(data)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31])
def test_absurd_sampling_rates_are_refused(rate: int) -> None:
    with pytest.raises(MediaError):
        decode_audio(wav(np.zeros(100, np.int16), rate))


def test_changing_sampling_rate_is_refused() -> None:
    """Two Ogg streams one after the other."""
    first = soundfile_bytes(tone(0.2, 44_100), 44_100, "OGG", "VORBIS")
    second = soundfile_bytes(tone(0.2, 22_050), 22_050, "OGG", "VORBIS")
    with pytest.raises(MediaError):
        decode_audio(first + second)


def test_truncated_flac_is_refused_and_a_stream_cut_short_is_as_long_as_what_came() -> None:
    flac = soundfile_bytes(STEREO.T, 44_100, "FLAC", "PCM_16")
    with pytest.raises(MediaError, match="truncated"):
        decode_audio(flac[: len(flac) // 2])
    mp3 = sound("mp3")
    assert 0 < decode_audio(mp3[: len(mp3) // 2]).duration_s < 0.8


@pytest.mark.parametrize(
    "data",
    [
        b"#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile /etc/hostname\n",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=audio 9 RTP/AVP 0\r\n",
        b"<?xml version='1.0'?><MPD></MPD>",
        b"not a sound at all",
    ],
)
def test_play_lists_and_scripts_are_refused(data: bytes) -> None:
    with pytest.raises(MediaTypeError, match="wav, mp3"):
        decode_audio(data)


def test_library_texts_stay_inside() -> None:
    with pytest.raises(MediaError) as caught:
        decode_audio(b"RIFF\xff\xff\xff\xffWAVEfmt ")
    for leak in ("Errno", "Invalid data", "avcodec", "<none>"):
        assert leak not in str(caught.value)
    assert caught.value.__cause__ is None

"""The resampler against ideal signals, against scipy, and at its edges."""

import numpy as np
import pytest
import scipy.signal

from sensorium.errors import InvalidRequestError
from sensorium.media import resample_audio
from tests.media.samples import tone

RATES = [
    (44_100, 16_000), (48_000, 16_000), (22_050, 16_000), (8_000, 16_000), (16_000, 48_000), (16_000, 24_000),
    (96_000, 16_000), (11_025, 16_000), (16_000, 44_100),
]  # fmt: skip


def decibels(error: np.ndarray, signal: np.ndarray) -> float:
    return float(10 * np.log10((error.astype(np.float64) ** 2).mean() / (signal.astype(np.float64) ** 2).mean()))


@pytest.mark.parametrize(("orig", "target"), RATES)
def test_tones_come_out_without_delay_or_loss(orig: int, target: int) -> None:
    for hertz in (100.0, 1_000.0, 0.42 * min(orig, target)):
        out = resample_audio(tone(1.0, orig, hertz), orig, target)
        expected = tone(1.0, target, hertz)
        assert out.dtype == np.float32
        assert len(out) == len(expected)
        middle = slice(target // 10, -target // 10)
        assert decibels(out[middle] - expected[middle], expected[middle]) < -100


@pytest.mark.parametrize(("orig", "target"), [(44_100, 16_000), (48_000, 16_000), (96_000, 16_000)])
def test_what_the_lower_rate_cannot_hold_is_removed(orig: int, target: int) -> None:
    source = tone(1.0, orig, 0.56 * target)
    out = resample_audio(source, orig, target)
    assert decibels(out[target // 10 : -target // 10], source) < -100


@pytest.mark.parametrize(("orig", "target"), RATES)
def test_agrees_with_scipy_to_scipys_precision(orig: int, target: int) -> None:
    rng = np.random.default_rng(0)
    taps = scipy.signal.firwin(401, 0.7 * min(orig, target) / orig if orig > target else 0.7)
    source = scipy.signal.lfilter(taps, 1.0, rng.normal(0, 0.1, orig)).astype(np.float32)
    divisor = np.gcd(orig, target)
    expected = scipy.signal.resample_poly(source, target // divisor, orig // divisor, window=("kaiser", 12.0))
    out = resample_audio(source, orig, target)
    assert len(out) == len(expected)
    middle = slice(target // 10, -target // 10)
    assert decibels(out[middle] - expected[middle], expected[middle]) < -45


def test_constant_stays_constant() -> None:
    for orig, target in RATES:
        out = resample_audio(np.ones(orig, np.float32), orig, target)
        assert np.abs(out[target // 10 : -target // 10] - 1).max() < 1e-5


def test_odd_rates_are_taken_at_the_nearest_ratio() -> None:
    for orig, target in ((44_101, 16_000), (48_001, 16_000), (7_999, 48_000), (767_999, 16_000)):
        num_samples = orig // 2
        out = resample_audio(tone(0.5, orig, 440.0)[:num_samples], orig, target)
        assert len(out) == -(-num_samples * target // orig)
        spectrum = np.abs(np.fft.rfft(out * np.hanning(len(out))))
        assert np.argmax(spectrum) * target / len(out) == pytest.approx(440, abs=3)


@pytest.mark.parametrize("num_samples", [1, 2, 10, 441, 4_411])
def test_short_sounds(num_samples: int) -> None:
    out = resample_audio(np.ones(num_samples, np.float32), 44_100, 16_000)
    assert len(out) == -(-num_samples * 16_000 // 44_100)
    assert np.isfinite(out).all()


def test_blocks_and_groups_join_without_seams() -> None:
    """A longer sound begins like a shorter one: where blocks are cut doesn't show."""
    source = np.random.default_rng(1).normal(0, 0.1, 400_000).astype(np.float32)
    for orig, target in ((44_100, 16_000), (48_000, 16_000), (8_000, 44_100)):
        whole = resample_audio(source, orig, target)
        part = resample_audio(source[:50_000], orig, target)
        same = len(part) - target // 50
        assert np.abs(whole[:same] - part[:same]).max() < 1e-6


def test_shapes_and_equal_rates() -> None:
    stereo = np.stack([tone(0.1, 8_000), tone(0.1, 8_000, 880.0)])
    out = resample_audio(stereo, 8_000, 16_000)
    assert out.shape == (2, 1_600)
    assert np.array_equal(out[1], resample_audio(stereo[1], 8_000, 16_000))
    same = tone(0.1, 8_000)
    assert resample_audio(same, 8_000, 8_000) is same
    assert resample_audio(same.astype(np.float64), 8_000.0, 8_000).dtype == np.float32
    assert resample_audio(np.zeros(0, np.float32), 8_000, 16_000).shape == (0,)


@pytest.mark.parametrize("rate", [0, -1, 999, 1_000_000, 16_000.5, float("nan"), float("inf")])
def test_rates_are_checked(rate: float) -> None:
    with pytest.raises(InvalidRequestError, match="target_sr"):
        resample_audio(np.zeros(10, np.float32), 16_000, rate)
    with pytest.raises(InvalidRequestError, match="orig_sr"):
        resample_audio(np.zeros(10, np.float32), rate, 16_000)


def test_most_extreme_ratios_stay_small() -> None:
    assert len(resample_audio(np.ones(768_000, np.float32), 768_000, 1_000)) == 1_000
    assert len(resample_audio(np.ones(1_000, np.float32), 1_000, 768_000)) == 768_000

"""The one resampler: band-limited interpolation with a Kaiser-windowed sinc, in plain numpy.

For a ratio `up / down` of the rates, output sample `n` stands at input time `n * down / up`. The fractional part of
that time takes only `up` values ("phases"), each with its own filter. Outputs therefore come in blocks of `up` that
repeat every `down` input samples, and the same group of outputs in all blocks is one matrix product:

    44.1 kHz -> 16 kHz: up = 160, down = 441. Outputs 0 to 79 of a block depend on input samples -186 to 404 of that
    block; all blocks' stretches of 591 samples, as rows, times a matrix of 591 x 80 give them at once.

Source: J. O. Smith, "Digital Audio Resampling Home Page", section "Theory of Ideal Bandlimited Interpolation".

Quality: 64 zero crossings on each side, Kaiser beta 12. Up to 0.9 of the lower Nyquist frequency a tone is off by
less than -95 dB; components above 1.01 of it are below -95 dB; no delay. Rates whose ratio would need more than 4096
phases (44,101 Hz, say) are taken at the nearest ratio that doesn't, usually within a few parts in a million.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sensorium.errors import InvalidRequestError

_ZERO_CROSSINGS = 64
_KAISER_BETA = 12.0
_CUTOFF = 0.955  # of the lower Nyquist frequency, in the middle of the transition band
_MAX_PHASES = 4096
_MAX_GROUP = 128  # outputs per matrix: wide enough for the product to be fast, narrow enough to waste little of it
_MAX_GROUP_ELEMENTS = 1 << 20  # fewer outputs where each depends on very many inputs
_RUN_SAMPLES = 1 << 19
MIN_RATE, MAX_RATE = 1000, 768_000  # beyond these the filters of a ratio would grow without bound


def resample_audio(audio: NDArray[Any], orig_sr: float, target_sr: float) -> NDArray[np.float32]:
    """Resample `audio`, shape `(..., num_samples)`, from `orig_sr` to `target_sr` samples per second.

    The result has `ceil(num_samples * target_sr / orig_sr)` samples. Equal rates return the samples as they are,
    as float32.

    Raises:
        InvalidRequestError: a rate is not a whole number between 1,000 and 768,000.
    """
    orig, target = _whole_rate("orig_sr", orig_sr), _whole_rate("target_sr", target_sr)
    audio = np.asarray(audio, dtype=np.float32)
    if orig == target or audio.size == 0:
        return audio
    if audio.ndim > 1:
        rows = [resample_audio(row, orig, target) for row in audio.reshape(-1, audio.shape[-1])]
        return np.stack(rows).reshape(*audio.shape[:-1], -1)
    step = Fraction(orig, target).limit_denominator(_MAX_PHASES)
    num_out = -(-len(audio) * target // orig)
    return _Polyphase.of(step.denominator, step.numerator).apply(audio, num_out)


def _whole_rate(name: str, rate: float) -> int:
    if not MIN_RATE <= rate <= MAX_RATE or rate != int(rate):
        raise InvalidRequestError(
            f"got {rate}, expected a whole number of samples per second from {MIN_RATE} to {MAX_RATE}. Correct {name}.",
            field=name,
        )
    return int(rate)


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring outputs of a block: `filters`, shape `(width, num_outputs)`, starts at the block's input `first`."""

    start: int
    first: int
    filters: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Polyphase:
    """The filters of one ratio: blocks of `up` outputs for `down` inputs, `reach` inputs more on both sides."""

    up: int
    down: int
    reach: int
    groups: tuple[_Group, ...]

    @staticmethod
    @lru_cache(maxsize=16)
    def of(up: int, down: int) -> _Polyphase:
        """The filters for the reduced ratio `up / down`."""
        scale = _CUTOFF * min(1.0, up / down)  # the cut-off in units of the input's Nyquist frequency
        reach = int(np.ceil(_ZERO_CROSSINGS / scale)) + 1
        size = max(1, min(_MAX_GROUP, _MAX_GROUP_ELEMENTS // (2 * reach)))
        repeat = -(-size // up)  # a ratio such as 1 / 3 gets blocks of many periods
        up, down = up * repeat, down * repeat
        size = -(-up // -(-up // size))  # groups of about one size
        groups = tuple(
            _make_group(start, min(start + size, up), down / up, reach, scale) for start in range(0, up, size)
        )
        return _Polyphase(up, down, reach, groups)

    def apply(self, audio: NDArray[np.float32], num_out: int) -> NDArray[np.float32]:
        """`num_out` outputs for `audio`, shape `(num_samples,)`, which counts as zero beyond its ends."""
        num_blocks = -(-num_out // self.up)
        padded = np.zeros(self.reach + max(len(audio), num_blocks * self.down) + self.reach + 2, np.float32)
        padded[self.reach : self.reach + len(audio)] = audio
        out = np.empty((num_blocks, self.up), np.float32)
        for group in self.groups:
            width, num_outputs = group.filters.shape
            windows = np.lib.stride_tricks.sliding_window_view(padded, width)[group.first :: self.down][:num_blocks]
            run = max(1, _RUN_SAMPLES // width)
            for block in range(0, num_blocks, run):  # windows overlap; they are copied a run at a time
                rows = np.ascontiguousarray(windows[block : block + run])
                out[block : block + run, group.start : group.start + num_outputs] = rows @ group.filters
        return out.reshape(-1)[:num_out].copy()


def _make_group(start: int, stop: int, step: float, reach: int, scale: float) -> _Group:
    """The filters of outputs `start` to `stop`, which stand `step` inputs apart."""
    times = np.arange(start, stop, dtype=np.float64) * step
    first = int(times[0])
    inputs = np.arange(first - reach, int(times[-1]) + reach + 2, dtype=np.float64)
    filters = _kernel(inputs[:, None] - times[None, :], scale)
    unit_gain = filters / filters.sum(axis=0)  # a constant stays exactly constant, at every phase
    return _Group(start, first, unit_gain.astype(np.float32))


def _kernel(distance: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """The windowed sinc, `distance` input samples from its centre."""
    ratio = np.abs(distance) * scale / _ZERO_CROSSINGS
    window = np.where(ratio < 1.0, np.i0(_KAISER_BETA * np.sqrt(np.maximum(0.0, 1.0 - ratio**2))), 0.0)
    return np.sinc(distance * scale) * window

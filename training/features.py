"""Pixels to patches and waveforms to log-mel frames, batched in torch on any device.

Both give what the checkpoint's Hugging Face processors give (Qwen2VLImageProcessor without resizing, and
WhisperFeatureExtractor), which the tests check.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from training.blueprint import MERGE_SIZE, NUM_MEL_BINS, PATCH_SIZE, SAMPLE_RATE, TEMPORAL_PATCH_SIZE

HOP_LENGTH = 160
_N_FFT = 400


def patchify(frames: Tensor) -> Tensor:
    """Normalised patches of equally large images or clips, in the order of the merger.

    Args:
        frames: uint8 ``(batch, num_frames, height, width, 3)``; a single frame stands for ``TEMPORAL_PATCH_SIZE``
            equal ones, and an odd number of frames is filled with the last one.

    Returns:
        float32 ``(batch * time, patches, 3 * TEMPORAL_PATCH_SIZE * PATCH_SIZE**2)``: each temporal slot is a row of
        the batch, since the vision tower attends within slots only.
    """
    if missing := -frames.shape[1] % TEMPORAL_PATCH_SIZE:
        frames = torch.cat([frames, frames[:, -1:].expand(-1, missing, -1, -1, -1)], dim=1)
    batch, num_frames, height, width, channels = frames.shape
    slots, rows, columns = num_frames // TEMPORAL_PATCH_SIZE, height // PATCH_SIZE, width // PATCH_SIZE
    blocks = frames.view(
        *(batch, slots, TEMPORAL_PATCH_SIZE),
        *(rows // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE),
        *(columns // MERGE_SIZE, MERGE_SIZE, PATCH_SIZE, channels),
    )
    # To: batch, slot, row block, column block, row, column | channel, frame, y, x.
    patches = blocks.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
    flat = patches.reshape(batch * slots, rows * columns, -1)
    return flat.float() / 127.5 - 1.0


def log_mel(waveforms: Tensor) -> Tensor:
    """Whisper's log-mel frames, 100 a second.

    Args:
        waveforms: float32 ``(batch, samples)``, zeros after each clip's end for at least 400 samples.

    Returns:
        float32 ``(batch, NUM_MEL_BINS, samples // 160)``.
    """
    window = torch.hann_window(_N_FFT, device=waveforms.device)
    spectrum = torch.stft(waveforms, _N_FFT, HOP_LENGTH, window=window, return_complex=True)
    power = spectrum[..., :-1].abs().square()
    mel = torch.einsum("fm,bft->bmt", mel_filters().to(waveforms.device), power)
    log = mel.clamp(min=1e-10).log10()
    floor = log.amax(dim=(1, 2), keepdim=True) - 8.0
    return (torch.maximum(log, floor) + 4.0) / 4.0


@cache
def mel_filters() -> Tensor:
    """Triangular filters on Slaney's mel scale with area normalisation: float32 ``(201, NUM_MEL_BINS)``."""
    fft_hertz = torch.linspace(0, SAMPLE_RATE / 2, 1 + _N_FFT // 2, dtype=torch.float64)
    edge_mels = torch.linspace(
        _hertz_to_mel(0.0), _hertz_to_mel(SAMPLE_RATE / 2), NUM_MEL_BINS + 2, dtype=torch.float64
    )
    edges = torch.tensor([_mel_to_hertz(float(mel)) for mel in edge_mels], dtype=torch.float64)
    slopes = edges[None, :] - fft_hertz[:, None]
    widths = edges.diff()
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    filters = torch.minimum(rising, falling).clamp(min=0)
    return (filters * (2.0 / (edges[2:] - edges[:-2]))).float()


# Slaney's mel scale: linear to 1 kHz (3 mel per 200 Hz), then logarithmic with 27 mel per factor of 6.4.
_KNEE_HERTZ, _KNEE_MEL = 1000.0, 15.0


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _KNEE_HERTZ:
        return 3.0 * hertz / 200.0
    return _KNEE_MEL + float(torch.log(torch.tensor(hertz / _KNEE_HERTZ, dtype=torch.float64))) * 27.0 / _LOG_STEP


def _mel_to_hertz(mel: float) -> float:
    if mel < _KNEE_MEL:
        return 200.0 * mel / 3.0
    exponent = torch.tensor((mel - _KNEE_MEL) * _LOG_STEP / 27.0, dtype=torch.float64)
    return _KNEE_HERTZ * float(torch.exp(exponent))


_LOG_STEP = float(torch.log(torch.tensor(6.4, dtype=torch.float64)))

"""The bank of spoken words: every word of the catalog, spoken once by each of many espeak-ng voices.

``python -m training.speech BANK.npz --split train`` builds a bank; it needs the Debian package ``espeak-ng``. Clips
are 16 kHz, trimmed of silence and stored as 8-bit mu-law, which keeps a bank of 90 voices near 20 MB.
"""

from __future__ import annotations

import argparse
import io
import random
import subprocess
import wave
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from training.catalog import DIGITS, SPOKEN_WORDS

SAMPLE_RATE = 16_000
_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-gb-x-gbcwmd", "en-029")
_TRAIN_TIMBRES = (
    *("m1", "m2", "m3", "m5", "m6", "m7", "f1", "f2", "f3", "f5", "Alex", "Alicia", "Annie", "Andy"),
    *("Denis", "Gene", "Henrique", "Lee", "Marco", "Michel", "adam", "anika", "belinda", "benjamin"),
    *("caleb", "david", "edward", "gustave", "iven", "john", "linda", "max", "michael", "mike"),
    *("pablo", "paul", "quincy", "rob", "robert", "shelby", "steph", "victor", "zac", "klatt2", "aunty"),
)
_HELD_OUT_TIMBRES = ("m4", "m8", "f4", "Andrea", "Hugo", "Diogo", "travis", "steph3", "norbert", "ed")


@dataclass(frozen=True, slots=True)
class SpeechBank:
    """Spoken words by voice.

    ``waveforms[word]`` holds one float32 waveform in [-1, 1] at 16 kHz per voice, voices in the same order.
    """

    waveforms: dict[str, list[npt.NDArray[np.float32]]]
    voices: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> SpeechBank:
        """Read a bank written by :func:`build_bank`."""
        with np.load(path, allow_pickle=False) as archive:
            words = [str(word) for word in archive["words"]]
            voices = tuple(str(voice) for voice in archive["voices"])
            samples = decode_mu_law(archive["samples"])
            ends = np.cumsum(archive["lengths"])
        clips = np.split(samples, ends[:-1])
        waveforms = {word: clips[index * len(voices) : (index + 1) * len(voices)] for index, word in enumerate(words)}
        return cls(waveforms, voices)


def encode_mu_law(samples: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """Compress samples in [-1, 1] to 8 bits (ITU-T G.711's curve, mu = 255, without its segments)."""
    compressed = np.sign(samples) * np.log1p(255.0 * np.abs(samples)) / np.log(256.0)
    codes: npt.NDArray[np.uint8] = np.round((compressed + 1.0) * 127.5).astype(np.uint8)
    return codes


def decode_mu_law(codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    """The inverse of :func:`encode_mu_law`, up to its rounding."""
    compressed = codes.astype(np.float32) / 127.5 - 1.0
    samples = np.sign(compressed) * np.expm1(np.abs(compressed) * np.log(256.0)) / 255.0
    decoded: npt.NDArray[np.float32] = samples.astype(np.float32)
    return decoded


def voices_of(split: str) -> list[str]:
    """Names of the voices of ``train`` or ``held_out``; no timbre is in both."""
    timbres, per_timbre = (_TRAIN_TIMBRES, 2) if split == "train" else (_HELD_OUT_TIMBRES, 1)
    rng = random.Random(f"voices of {split}")
    return [f"{accent}+{timbre}" for timbre in timbres for accent in rng.sample(_ACCENTS, per_timbre)]


def speak(word: str, voice: str, words_per_minute: int, pitch: int) -> npt.NDArray[np.float32]:
    """One word as a trimmed waveform with a peak of 0.9, float32 at 16 kHz."""
    command = ["espeak-ng", "-v", voice, "-s", str(words_per_minute), "-p", str(pitch), "--stdout", word]
    spoken = subprocess.run(command, check=True, capture_output=True).stdout
    with wave.open(io.BytesIO(spoken)) as reader:
        rate = reader.getframerate()
    # Written to a pipe, the header doesn't know the number of frames: everything behind its 44 bytes is sound.
    raw = np.frombuffer(spoken[44:], dtype="<i2").astype(np.float32) / 32768.0
    samples = resample(raw, SAMPLE_RATE / rate)
    loud = np.flatnonzero(np.abs(samples) > 0.02 * np.abs(samples).max())
    trimmed = samples[max(loud[0] - 160, 0) : loud[-1] + 320]
    scaled: npt.NDArray[np.float32] = (0.9 * trimmed / np.abs(trimmed).max()).astype(np.float32)
    return scaled


def resample(samples: npt.NDArray[np.float32], ratio: float) -> npt.NDArray[np.float32]:
    """Linear resampling to ``ratio`` times as many samples (good enough below 8 kHz for speech)."""
    count = max(int(len(samples) * ratio), 1)
    positions = np.arange(count, dtype=np.float64) / ratio
    return np.interp(positions, np.arange(len(samples)), samples).astype(np.float32)


def build_bank(path: Path, split: str) -> None:
    """Speak every word with every voice of ``split`` at a random speed and pitch, and write the bank."""
    words, voices = (*DIGITS, *SPOKEN_WORDS), voices_of(split)
    rng = random.Random(f"bank of {split}")
    jobs = [(word, voice, rng.randint(110, 190), rng.randint(30, 70)) for word in words for voice in voices]
    with ThreadPoolExecutor() as pool:
        clips = list(tqdm(pool.map(lambda job: speak(*job), jobs), total=len(jobs), desc=f"speaking ({split})"))
    np.savez(
        path,
        words=np.array(words),
        voices=np.array(voices),
        lengths=np.array([len(clip) for clip in clips], dtype=np.int64),
        samples=encode_mu_law(np.concatenate(clips)),
    )


def main() -> None:
    """Build one bank from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("--split", choices=("train", "held_out"), required=True)
    arguments = parser.parse_args()
    build_bank(arguments.path, arguments.split)


if __name__ == "__main__":
    main()

"""Audio: spoken digits and words, tones, sweeps and beeps, and questions about them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from training.catalog import DIGITS, SPOKEN_WORDS
from training.dialogue import FULL_SCALE, Turn, Waveform
from training.speech import SAMPLE_RATE, SpeechBank, resample

MAX_SECONDS = 5.0
# Tone names with their range in Hz; the gaps keep the names apart.
_TONES = {"low": (150.0, 330.0), "medium": (600.0, 1000.0), "high": (1900.0, 3600.0)}


@dataclass(frozen=True, slots=True)
class Sound:
    """A recording: what was put in, and the waveform ``(samples,)`` at 16 kHz.

    ``kind`` is ``digits``, ``words``, ``tone``, ``sweep``, ``beeps`` or ``silence``; ``content`` holds the spoken
    words, the tone's or sweep's name, or as many entries as there are beeps.
    """

    kind: str
    content: tuple[str, ...]
    waveform: Waveform

    @property
    def digits(self) -> str:
        """The spoken digits as figures, separated by spaces."""
        return " ".join(str(DIGITS.index(word)) for word in self.content)


def sample_sound(rng: random.Random, bank: SpeechBank, max_words: int = 5, kind: str | None = None) -> Sound:
    """A sound of some kind with noise, gain and pauses."""
    kind = kind or rng.choices(("digits", "words", "tone", "sweep", "beeps", "silence"), (8, 7, 1.6, 0.8, 2, 0.3))[0]
    content, clean = _SAMPLERS[kind](rng, bank, max_words)
    return Sound(kind, content, degrade(rng, clean))


def degrade(rng: random.Random, clean: Waveform) -> Waveform:
    """Silence around, gain, noise of some colour at 12 to 40 dB below the signal, and rounding to 16 bits."""
    before, after = (int(rng.uniform(0.03, 0.5) * SAMPLE_RATE) for _ in range(2))
    padded = np.pad(clean, (before, after))
    noise = np.random.default_rng(rng.getrandbits(32)).standard_normal(len(padded), dtype=np.float32)
    if rng.random() < 0.5:
        noise = np.convolve(noise, np.full(4, 0.5, np.float32), mode="same")
    power = float(np.sqrt(np.mean(clean**2))) if len(clean) and clean.any() else 0.02
    level = power * 10 ** (-rng.uniform(12, 40) / 20) if rng.random() < 0.75 else 0.0
    gain = 10 ** (-rng.uniform(0, 20) / 20)
    steps = np.clip(np.rint((padded + level * noise) * (gain * FULL_SCALE)), -FULL_SCALE, FULL_SCALE - 1)
    return (steps / FULL_SCALE).astype(np.float32)


def _sample_speech(rng: random.Random, bank: SpeechBank, words: tuple[str, ...]) -> Waveform:
    """The words in one voice at one speed, with short pauses."""
    voice = rng.randrange(len(bank.voices))
    ratio = rng.uniform(0.88, 1.14) if rng.random() < 0.7 else 1.0
    pieces: list[Waveform] = []
    for word in words:
        pieces.append(resample(bank.waveforms[word][voice], ratio) * rng.uniform(0.7, 1.0))
        pieces.append(np.zeros(int(rng.uniform(0.03, 0.25) * SAMPLE_RATE), np.float32))
    speech = np.concatenate(pieces)
    return speech[: int((MAX_SECONDS - 1.0) * SAMPLE_RATE)]


def _sample_digits(rng: random.Random, bank: SpeechBank, max_words: int) -> tuple[tuple[str, ...], Waveform]:
    words = tuple(rng.choices(DIGITS, k=rng.randint(1, max_words)))
    return _fitting(rng, bank, words)


def _sample_words(rng: random.Random, bank: SpeechBank, max_words: int) -> tuple[tuple[str, ...], Waveform]:
    words = tuple(rng.choices(SPOKEN_WORDS, k=rng.randint(1, min(max_words, 4))))
    return _fitting(rng, bank, words)


def _fitting(rng: random.Random, bank: SpeechBank, words: tuple[str, ...]) -> tuple[tuple[str, ...], Waveform]:
    """Drop words from the end until the speech fits: a transcript must not hold what was cut off."""
    state = rng.getstate()
    while True:
        rng.setstate(state)
        waveform = _sample_speech(rng, bank, words)
        if len(waveform) < int((MAX_SECONDS - 1.0) * SAMPLE_RATE):
            return words, waveform
        words = words[:-1]


def _tone(rng: random.Random, start_hz: float, end_hz: float, seconds: float) -> Waveform:
    """A tone that glides from one frequency to another, with soft edges and some overtones."""
    count = int(seconds * SAMPLE_RATE)
    phase = 2 * np.pi * np.cumsum(np.linspace(start_hz, end_hz, count)) / SAMPLE_RATE
    wave = np.sin(phase)
    if rng.random() < 0.3:
        wave = 0.8 * wave + 0.2 * np.sin(2 * phase)
    edge = min(160, count // 2)
    envelope = np.minimum(1.0, np.minimum(np.arange(count), np.arange(count)[::-1]) / edge)
    return (0.8 * wave * envelope).astype(np.float32)


def _sample_tone(rng: random.Random, bank: SpeechBank, max_words: int) -> tuple[tuple[str, ...], Waveform]:
    name = rng.choice(tuple(_TONES))
    hertz = rng.uniform(*_TONES[name])
    return (name,), _tone(rng, hertz, hertz, rng.uniform(0.8, 2.5))


def _sample_sweep(rng: random.Random, bank: SpeechBank, max_words: int) -> tuple[tuple[str, ...], Waveform]:
    low, high = rng.uniform(200, 500), rng.uniform(1200, 3000)
    name = rng.choice(("rising", "falling"))
    start, end = (low, high) if name == "rising" else (high, low)
    return (name,), _tone(rng, start, end, rng.uniform(0.8, 2.0))


def _sample_beeps(rng: random.Random, bank: SpeechBank, max_words: int) -> tuple[tuple[str, ...], Waveform]:
    count = rng.randint(1, 6)
    hertz = rng.uniform(500, 2500)
    beep, pause = rng.uniform(0.08, 0.2), rng.uniform(0.1, 0.3)
    pieces = [_tone(rng, hertz, hertz, beep), np.zeros(int(pause * SAMPLE_RATE), np.float32)] * count
    return ("beep",) * count, np.concatenate(pieces)


def _sample_silence(rng: random.Random, bank: SpeechBank, max_words: int) -> tuple[tuple[str, ...], Waveform]:
    return (), np.zeros(int(rng.uniform(0.5, 2.0) * SAMPLE_RATE), np.float32)


_SAMPLERS: dict[str, Callable[[random.Random, SpeechBank, int], tuple[tuple[str, ...], Waveform]]] = {
    "digits": _sample_digits,
    "words": _sample_words,
    "tone": _sample_tone,
    "sweep": _sample_sweep,
    "beeps": _sample_beeps,
    "silence": _sample_silence,
}


def ask_transcript(sound: Sound, rng: random.Random) -> Turn | None:
    """What is said, word by word."""
    question = rng.choice(("What is said?", "Transcribe the audio.", "What do you hear?", "Write down what is said."))
    if sound.kind in ("digits", "words"):
        return Turn(sound.kind, question, f"I hear: {' '.join(sound.content)}.")
    if question == "What do you hear?":
        return ask_sound(sound, rng)
    return Turn("absent", question, "I can't tell: there is no speech.")


def ask_digits(sound: Sound, rng: random.Random) -> Turn | None:
    """The spoken digits as figures, or that there are none."""
    question = rng.choice(("Which digits are spoken?", "What digits do you hear?", "Which numbers are said?"))
    if sound.kind != "digits":
        missing = "digits" if sound.kind == "words" else "speech"
        return Turn("absent", question, f"I can't tell: there {'are' if missing == 'digits' else 'is'} no {missing}.")
    return Turn("digits", question, f"The digits are {sound.digits}.")


def ask_sound(sound: Sound, rng: random.Random) -> Turn | None:
    """What kind of sound it is."""
    question = rng.choice(("What kind of sound is this?", "Describe the sound.", "What do you hear?"))
    match sound.kind:
        case "tone":
            answer = f"I hear a {sound.content[0]} tone."
        case "sweep":
            answer = f"I hear a {sound.content[0]} tone."
        case "beeps":
            answer = f"I hear {_beeps(len(sound.content))}."
        case "silence":
            answer = "I hear nothing."
        case _:
            if question == "What do you hear?":
                return None
            answer = "I hear speech."
    return Turn("sounds", question, answer)


def _beeps(count: int) -> str:
    return "1 beep" if count == 1 else f"{count} beeps"


def ask_beeps(sound: Sound, rng: random.Random) -> Turn | None:
    """How many beeps there are."""
    question = rng.choice(("How many beeps are there?", "How many beeps do you hear?", "Count the beeps."))
    if sound.kind != "beeps":
        return Turn("absent", question, "I can't tell: there are no beeps.")
    count = len(sound.content)
    return Turn("sounds", question, f"There {'is' if count == 1 else 'are'} {_beeps(count)}.")


def ask_word_count(sound: Sound, rng: random.Random) -> Turn | None:
    """How many words are spoken."""
    if sound.kind not in ("digits", "words"):
        return None
    count = len(sound.content)
    question = "How many words are spoken?"
    return Turn("counting", question, f"There {'is 1 word' if count == 1 else f'are {count} words'}.")


def ask_sound_json(sound: Sound, rng: random.Random) -> Turn | None:
    """The digits or the beep count as JSON."""
    if sound.kind == "digits":
        digits = [int(figure) for figure in sound.digits.split()]
        return Turn("json", "Which digits are spoken? Answer in JSON.", json.dumps({"digits": digits}))
    if sound.kind == "beeps":
        return Turn("json", "How many beeps are there? Answer in JSON.", json.dumps({"count": len(sound.content)}))
    return None


SOUND_ASKERS: tuple[tuple[Callable[[Sound, random.Random], Turn | None], float], ...] = (
    (ask_transcript, 3.0),
    (ask_digits, 1.4),
    (ask_sound, 1.0),
    (ask_beeps, 0.8),
    (ask_word_count, 0.4),
    (ask_sound_json, 0.6),
)

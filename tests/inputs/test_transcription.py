"""How models are asked to transcribe, and the transcript in their answers."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.inputs.transcription import TranscriptionStyle, TranscriptReader, transcription_style

STYLE = TranscriptionStyle(answer="I hear: {text}.", no_speech="I can't tell.", languages=("en", "de"))


def read(style: TranscriptionStyle, pieces: list[str]) -> list[str]:
    reader = TranscriptReader(style)
    return [reader.take(piece, is_last=index == len(pieces) - 1) for index, piece in enumerate(pieces)]


@pytest.mark.parametrize(
    ("answer", "transcript"),
    [
        ("I hear: one two.", "one two"),
        ("I hear: one. Two..", "one. Two."),
        ("I hear: one", "one"),  # cut off
        ("I can't tell.", ""),
        ("I can't tell. Or can I?", "I can't tell. Or can I?"),
        ("One two.", "One two."),
        ("I he", "I he"),
        ("I hear: .", ""),
        ("", ""),
    ],
)
@given(cuts=st.sets(st.integers(0, 23)))
def test_the_transcript_is_the_same_however_the_answer_is_cut(answer: str, transcript: str, cuts: set[int]) -> None:
    edges = [0, *sorted(cuts), len(answer)]
    pieces = [answer[start:end] for start, end in pairwise(edges)]
    assert "".join(read(STYLE, pieces)) == transcript


def test_what_is_certain_is_let_go_at_once() -> None:
    assert read(TranscriptionStyle(), ["o", "ne", ""]) == ["o", "ne", ""]
    assert read(STYLE, ["I hear", ": one", " two", "."]) == ["", "on", "e tw", "o"]


def test_the_instruction_names_the_language_and_takes_what_helps() -> None:
    plain = TranscriptionStyle()
    assert plain.told(None, None) == "Transcribe the audio."
    assert plain.told("de", "Words: Zug") == "Transcribe the audio. The language is German.\nWords: Zug"
    assert plain.told("German", None) == plain.told("de", None)
    assert TranscriptionStyle(language_hint="", languages=("en",)).told("en", None) == "Transcribe the audio."


@pytest.mark.parametrize(
    ("style", "language"),
    [(TranscriptionStyle(), "xx"), (STYLE, "fr"), (TranscriptionStyle(language_hint=""), "en"), (STYLE, "{0}")],
)
def test_a_language_that_cannot_be_told_is_refused(style: TranscriptionStyle, language: str) -> None:
    with pytest.raises(InvalidRequestError, match="language: got"):
        style.told(language, None)


def config(model_class: type | None = None, **settings: Any) -> Any:
    return SimpleNamespace(model_class=model_class, hf_config=SimpleNamespace(**settings))


def test_flags_come_before_the_checkpoint_and_the_checkpoint_before_the_class() -> None:
    class Hears:
        @classmethod
        def get_transcription_style(cls, model_config: Any) -> TranscriptionStyle:
            return TranscriptionStyle(instruction="Write.", answer="So: {text}", max_audio_s=30.0)

    assert transcription_style(config()) == TranscriptionStyle()
    given = config(Hears, transcription={"answer": "Heard {text}!", "languages": ["en"]})
    style = transcription_style(given)
    assert (style.instruction, style.answer, style.languages) == ("Write.", "Heard {text}!", ("en",))
    style = transcription_style(given, instruction="Listen.", answer="{text}")
    assert (style.instruction, style.answer, style.max_audio_s) == ("Listen.", "{text}", 30.0)


@pytest.mark.parametrize("transcription", ["x", {"made_up": 1}, {"answer": "no place"}, {"answer": "{text}{text}"}])
def test_a_checkpoint_that_says_it_wrongly_is_refused(transcription: Any) -> None:
    with pytest.raises(ConfigError, match="transcription"):
        transcription_style(config(transcription=transcription))


def test_a_sound_longer_than_is_heard_is_refused() -> None:
    style = TranscriptionStyle(max_audio_s=30.0)
    style.check_duration(30.0)
    with pytest.raises(InvalidRequestError, match=r"got a sound of 30\.1 s, expected at most the 30 s"):
        style.check_duration(30.1)

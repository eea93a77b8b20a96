"""How a model of speech (Whisper) is told what to write down, and how its answers become the text of a long sound.

A model hears a window of some seconds. A longer sound is written down window by window: each begins where the text of
the one before ends, by the times that the model tells. That is the sequential algorithm of `transformers`'
`WhisperForConditionalGeneration.generate`, whose tokens it gives: spectrograms are cut from that of the whole sound, no
window is told what came before, and none is repeated at another temperature. Nothing here asks the model.

Source: Radford et al. 2022, section 3.8.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from sensorium.errors import InvalidRequestError, UnsupportedFeatureError
from sensorium.timestamps import TimestampRules

Task: TypeAlias = Literal["transcribe", "translate"]

STEP_S = 0.02
"""Of the times that a model tells."""
FRAMES_PER_STEP = 2
"""Of a spectrogram, each 10 ms."""


@dataclass(frozen=True, slots=True)
class SpeechTokens:
    """The ids of one model, and the size of its window."""

    begin: int
    """Where the decoder begins."""
    end: int
    """Ends the output; ids below it are text."""
    window_frames: int
    """Frames of a spectrogram that it hears at once."""
    max_prompt_tokens: int
    """Of text that came before."""
    no_times: int | None = None
    """Asks for text without times; those of times follow it. None: the model tells none."""
    previous: int | None = None
    """Stands in front of text that came before."""
    languages: Mapping[str, int] | None = None
    """By code (ISO 639-1); None: the model knows one language, and isn't told."""
    tasks: Mapping[str, int] | None = None
    max_first_time: int | None = None

    @property
    def rules(self) -> TimestampRules:
        """How times stand in an output."""
        assert self.no_times is not None, "asked only of a model that tells times"
        return TimestampRules(self.no_times + 1, self.end, self.max_first_time)

    def check_task(self, task: Task) -> None:
        """Raises `UnsupportedFeatureError` for what the model isn't told."""
        if task != "transcribe" and task not in (self.tasks or {}):
            raise UnsupportedFeatureError(
                f"got a request to {task}, expected one to transcribe, since the model knows one language. "
                "Use /v1/audio/transcriptions.",
                field="model",
            )

    def code_of(self, language: str) -> str:
        """The code of a language, given by code or English name. Raises `InvalidRequestError` for an unknown one."""
        from transformers.models.whisper.tokenization_whisper import TO_LANGUAGE_CODE

        code = str(TO_LANGUAGE_CODE.get(language.lower(), language.lower()))
        known = ["en"] if self.languages is None else list(self.languages)
        if code not in known:
            raise InvalidRequestError(
                f"got {language!r:.40}, expected one of {known}. Change language.", field="language"
            )
        return code

    def prompt(self, language: str | None, task: Task, before: Sequence[int], *, times: bool) -> list[int]:
        """What the decoder begins with. `language`: a code; `before`: tokens of text that came before."""
        told = [self.begin]
        if self.languages is not None and language is not None:
            told.append(self.languages[language])
        if self.tasks is not None:
            told.append(self.tasks[task])
        if not times and self.no_times is not None:
            told.append(self.no_times)
        if before and self.previous is not None:
            told = [self.previous, *before[-self.max_prompt_tokens :], *told]
        return told


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a transcript with its times, in seconds of the sound."""

    start_s: float
    end_s: float
    token_ids: tuple[int, ...]
    """Of the text; no times among them."""


def segments_of(
    token_ids: Sequence[int], tokens: SpeechTokens, *, seek: int, num_frames: int
) -> tuple[list[Segment], int]:
    """The segments of one window's output, and how many of its frames are done with.

    Worked example, times in steps: `0 "a" 50 50 "b" 80` are two segments, and the window is done; `0 "a" 50 50 "b"` is
    one, and the next window begins at step 50, since the model was cut off in the middle of "b"; `0 "a" 50` is one, and
    the window is done.

    Args:
        token_ids: What the model wrote, without the end.
        tokens: Of the model.
        seek: Frame of the sound at which the window begins.
        num_frames: Of the sound, in this window.
    """
    if tokens.no_times is None:
        return [_segment(token_ids, seek, 0, num_frames // FRAMES_PER_STEP, tokens)], num_frames
    first_time = tokens.no_times + 1
    is_time = [each >= first_time for each in token_ids]
    cuts = [i + 1 for i in range(len(is_time) - 1) if is_time[i] and is_time[i + 1]]
    if not cuts:
        times = [each - first_time for each in token_ids if each > first_time]
        is_last_zero = any(is_time) and [each for each in token_ids if each >= first_time][-1] == first_time
        end = num_frames // FRAMES_PER_STEP if not times or is_last_zero else times[-1]
        return [_segment(token_ids, seek, 0, end, tokens)], num_frames
    ends_with_one_time = is_time[-2:] == [False, True]
    if ends_with_one_time:
        cuts.append(len(token_ids))
    segments, begin = [], 0
    for cut in cuts:
        piece = token_ids[begin:cut]
        segments.append(_segment(piece, seek, piece[0] - first_time, piece[-1] - first_time, tokens))
        begin = cut
    if ends_with_one_time:
        return segments, num_frames
    done = (token_ids[cuts[-1] - 1] - first_time) * FRAMES_PER_STEP
    return segments, done if done > 0 else num_frames


def _segment(token_ids: Sequence[int], seek: int, start: int, end: int, tokens: SpeechTokens) -> Segment:
    begin_s = seek * STEP_S / FRAMES_PER_STEP
    text = tuple(each for each in token_ids if each < tokens.end)
    return Segment(begin_s + start * STEP_S, begin_s + end * STEP_S, text)


def language_name(code: str) -> str:
    """The English name of a language, as "english"."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    return str(LANGUAGES.get(code, code))


def compression_ratio(text: str) -> float:
    """How much shorter the text is compressed, which tells whether it repeats itself."""
    data = text.encode()
    return len(data) / len(zlib.compress(data)) if data else 0.0


def subtitles(segments: Sequence[tuple[Segment, str]], form: Literal["srt", "vtt"]) -> str:
    """Segments with their texts as SubRip or WebVTT."""
    mark = "," if form == "srt" else "."
    blocks = [] if form == "srt" else ["WEBVTT\n"]
    for number, (segment, text) in enumerate(segments, 1):
        head = f"{number}\n" if form == "srt" else ""
        # An empty line, or an arrow, would end the block.
        line = " ".join(text.split()).replace("-->", "->")
        blocks.append(f"{head}{_clock(segment.start_s, mark)} --> {_clock(segment.end_s, mark)}\n{line}\n")
    return "\n".join(blocks)


def _clock(seconds: float, mark: str) -> str:
    milliseconds = round(seconds * 1000)
    hours, rest = divmod(milliseconds, 3_600_000)
    minutes, rest = divmod(rest, 60_000)
    return f"{hours:02}:{minutes:02}:{rest // 1000:02}{mark}{rest % 1000:03}"


def speech_tokens(model_config: Any) -> SpeechTokens | None:
    """Those of a model of speech; None for any other, which is asked in words (`inputs.transcription`)."""
    hook = getattr(model_config.model_class, "get_speech_tokens", None)
    if hook is None:
        return None
    tokens = hook(model_config)
    assert isinstance(tokens, SpeechTokens)
    return tokens

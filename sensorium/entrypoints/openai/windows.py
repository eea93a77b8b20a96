"""A sound of any length through a model of speech: window by window, as text or as text with times."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import numpy as np
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http import EventStream, JsonResponse, only, while_connected, with_first
from sensorium.entrypoints.openai.protocol import TranscriptionForm
from sensorium.errors import InvalidRequestError
from sensorium.inputs.speech import (
    Segment,
    SpeechTokens,
    Task,
    compression_ratio,
    language_name,
    segments_of,
    subtitles,
)
from sensorium.media import AudioClip, EncodedMedia
from sensorium.outputs import CompletionOutput, OutputKind
from sensorium.sampling_params import SamplingParams
from sensorium.stages import stage

MAX_WINDOWS = 10
"""For each window that fits the sound, and for one more. A model that hears nothing to write down may go on in steps of
hundredths of a second, and one request would keep it busy for a day."""
_TIMED = ("verbose_json", "srt", "vtt")
"""Formats of answers that tell times."""


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """A segment with what the answer says of it."""

    segment: Segment
    text: str
    seek: int
    avg_logprob: float


class WindowedTranscript:
    """One request's sound, and the answer in OpenAI's forms."""

    def __init__(
        self, context: ServerContext, tokens: SpeechTokens, form: TranscriptionForm, task: Task, sound: EncodedMedia
    ) -> None:
        self._context = context
        self._tokens = tokens
        self._form = form
        self._task = task
        self._sound: EncodedMedia | None = sound
        self._duration_s = 0.0
        self._language: str | None = None
        self._pieces: list[_Piece] = []

    async def respond(self, request: Request) -> Response:
        """The answer, in one piece or as a stream.

        Raises:
            RequestError: Something about the form or the sound is wrong.
        """
        self._tokens.check_task(self._task)
        if self._form.language is not None:
            self._language = self._tokens.code_of(self._form.language)
        windows = self._windows(request)
        if self._form.stream:
            return EventStream(self._events(await while_connected(request, with_first(windows))))
        await while_connected(request, self._take_all(windows))
        return self._response()

    # The model

    async def _windows(self, request: Request) -> AsyncIterator[list[_Piece]]:
        """The pieces of each window, one window after the other."""
        params = self._form.params(self._context.sampling_defaults)
        before = await self._prompt_ids()
        self._context.check_accepts(request)  # before anything is decoded
        frames = await self._spectrogram()
        num_frames, window = frames.shape[1], self._tokens.window_frames
        times = self._tokens.no_times is not None and (num_frames > window or self._form.response_format in _TIMED)
        if times:
            params = replace(params, timestamps=self._tokens.rules)
        params = replace(params, logprobs=0 if self._form.response_format == "verbose_json" else None)
        if self._language is None and self._tokens.languages is not None:
            self._language = await self._detect(request, frames[:, :window])
        prompt = self._tokens.prompt(self._language, self._task, before, times=times)
        seek = num_windows = 0
        most_windows = MAX_WINDOWS * (num_frames // window + 1)
        while seek < num_frames:
            if num_windows == most_windows:
                raise InvalidRequestError(
                    f"got a sound of which {num_windows} windows brought {seek / num_frames:.0%}, expected all of it. "
                    "Send its parts with speech.",
                    field="file",
                )
            num_windows += 1
            heard = frames[:, seek : seek + window]
            output = await self._ask(request, prompt, heard, params)
            written = list(output.token_ids)
            while written and written[-1] == self._tokens.end:
                written.pop()
            segments, done = segments_of(written, self._tokens, seek=seek, num_frames=heard.shape[1])
            yield await self._texts(segments, seek, _avg_logprob(output))
            seek += done

    async def _ask(
        self, request: Request, prompt: list[int], frames: np.ndarray[Any, Any], params: SamplingParams
    ) -> CompletionOutput:
        """What the model writes about one window."""
        asked = {"prompt_token_ids": prompt, "multi_modal_data": {"audio": [frames]}}
        outputs = self._context.generate(request, asked, params, OutputKind.FINAL_ONLY, model=self._form.model)
        [output] = (await only(outputs)).outputs
        return output

    async def _detect(self, request: Request, frames: np.ndarray[Any, Any]) -> str:
        """The likeliest language of a window, of those that the model knows."""
        assert self._tokens.languages is not None
        by_id = {token_id: code for code, token_id in self._tokens.languages.items()}
        params = SamplingParams(
            temperature=0, max_tokens=1, allowed_token_ids=list(by_id), ignore_eos=True, detokenize=False
        )
        output = await self._ask(request, [self._tokens.begin], frames, params)
        return by_id[output.token_ids[0]]

    async def _spectrogram(self) -> np.ndarray[Any, Any]:
        """The whole sound's, `(mel bins, frames)`. The sound itself is released."""
        assert self._sound is not None
        with stage("decode", "audio"):
            clip = await self._context.media_loader.adecode(self._sound)
        assert isinstance(clip, AudioClip)
        self._sound, self._duration_s = None, clip.duration_s
        config = self._context.engine.config.model_config
        model_class: Any = config.model_class
        with stage("map", "audio"):
            frames = await self._context.engine.in_pool(lambda: model_class.get_spectrogram(config, *clip))
        return cast("np.ndarray[Any, Any]", frames)

    async def _prompt_ids(self) -> list[int]:
        """Tokens of `prompt`, which every window is told as what came before. Raises `InvalidRequestError`."""
        if self._form.prompt is None:
            return []
        if self._tokens.previous is None:
            raise InvalidRequestError(
                "got a text, expected none, since the model can't be told. Remove prompt.", field="prompt"
            )
        tokenizer, text = self._context.tokenizer(), " " + self._form.prompt.strip()
        ids = await self._context.engine.in_pool(lambda: tokenizer.encode(text, add_special_tokens=False))
        if any(each >= self._tokens.end for each in ids):
            raise InvalidRequestError(
                "got a special token of the model in it, expected text. Remove it.", field="prompt"
            )
        return list(ids)

    async def _texts(self, segments: Sequence[Segment], seek: int, avg_logprob: float) -> list[_Piece]:
        tokenizer = self._context.tokenizer()

        def decode() -> list[str]:
            return [tokenizer.decode(list(each.token_ids), skip_special_tokens=True) for each in segments]

        texts = await self._context.engine.in_pool(decode)
        return [_Piece(each, text, seek, avg_logprob) for each, text in zip(segments, texts, strict=True)]

    # The answer

    async def _take_all(self, windows: AsyncIterator[list[_Piece]]) -> None:
        async with aclosing(windows):  # type: ignore[type-var]
            async for pieces in windows:
                self._pieces += pieces

    async def _events(self, windows: AsyncIterator[list[_Piece]]) -> AsyncIterator[Any]:
        """A `transcript.text.delta` for each window, then `transcript.text.done` with all of it."""
        async with aclosing(windows):  # type: ignore[type-var]
            async for pieces in windows:
                delta = "".join(each.text for each in pieces)
                delta = delta if self._pieces else delta.lstrip()
                self._pieces += pieces
                if delta:
                    yield {"type": "transcript.text.delta", "delta": delta}
        text = "".join(each.text for each in self._pieces).lstrip()
        yield {"type": "transcript.text.done", "text": text, "usage": self._usage()}

    def _response(self) -> Response:
        text = "".join(each.text for each in self._pieces).strip()
        form = self._form.response_format
        if form in ("srt", "vtt"):
            pieces = [(each.segment, each.text) for each in self._pieces if each.text.strip()]
            return PlainTextResponse(subtitles(pieces, cast("Literal['srt', 'vtt']", form)))
        if form == "text":
            return PlainTextResponse(text)
        body: dict[str, Any] = {"text": text, "usage": self._usage()}
        if form == "verbose_json":
            language = language_name(self._language or "en")
            segments = [self._segment(number, each) for number, each in enumerate(self._pieces)]
            told = {"task": self._task, "language": language, "duration": self._duration_s}
            body = {**told, **body, "segments": segments}
        return JsonResponse(body)

    def _segment(self, number: int, piece: _Piece) -> dict[str, Any]:
        segment = piece.segment
        return {
            "id": number,
            "seek": piece.seek,
            "start": round(segment.start_s, 2),
            "end": round(segment.end_s, 2),
            "text": piece.text,
            "tokens": list(segment.token_ids),
            "temperature": self._form.temperature or 0.0,
            "avg_logprob": piece.avg_logprob,
            "compression_ratio": compression_ratio(piece.text),
            "no_speech_prob": None,
        }

    def _usage(self) -> dict[str, Any]:
        return {"type": "duration", "seconds": math.ceil(self._duration_s)}


def _avg_logprob(output: CompletionOutput) -> float:
    """Of the tokens of one window; 0 where nobody asked."""
    entries = output.logprobs or []
    if not entries:
        return 0.0
    chosen = [entry[token_id].logprob for entry, token_id in zip(entries, output.token_ids, strict=True)]
    return sum(chosen) / len(chosen)

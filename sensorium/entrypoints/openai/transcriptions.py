"""`/v1/audio/transcriptions` and `/v1/audio/translations`: a sound as a file, its words as text.

A model of speech is told by tokens what to write down, window by window; see `windows`. Any other model that takes
audio is asked for it; see `inputs.transcription`. Of that a sound longer than the model's limit is refused, and so is a
transcript that doesn't end.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from sensorium.entrypoints.openai.context import ServerContext
from sensorium.entrypoints.openai.http import EventStream, JsonResponse, only, tenant_of, while_connected, with_first
from sensorium.entrypoints.openai.multipart import read_form
from sensorium.entrypoints.openai.protocol import TranscriptionForm, parse_body
from sensorium.entrypoints.openai.windows import WindowedTranscript
from sensorium.errors import ContextLengthError, UnsupportedFeatureError
from sensorium.inputs.speech import SpeechTokens, Task, speech_tokens
from sensorium.inputs.transcription import TranscriptionStyle, TranscriptReader, transcription_style
from sensorium.media import AudioClip, EncodedMedia, MediaLoader
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.outputs import OutputKind, RequestOutput
from sensorium.stages import stage


class TranscriptionRoutes:
    """Transcribes sounds.

    Args:
        context: the engine and what goes with it.
        instruction: the instruction to the model, instead of its default.
        answer: the format of its answer, with `{text}` for the transcript, instead of its default.
    """

    def __init__(self, context: ServerContext, *, instruction: str | None = None, answer: str | None = None) -> None:
        self._context = context
        self._settings = {"instruction": instruction, "answer": answer}
        self._known_style: TranscriptionStyle | None = None
        self._known_speech: SpeechTokens | None = None
        self._knows_speech = False

    async def transcriptions(self, request: Request) -> Response:
        """`POST /v1/audio/transcriptions`."""
        return await self._answer(request, "transcribe")

    async def translations(self, request: Request) -> Response:
        """`POST /v1/audio/translations`: into English, by a model of speech."""
        return await self._answer(request, "translate")

    async def _answer(self, request: Request, task: Task) -> Response:
        self._check_hears()
        loader = self._context.media_loader
        upload = await read_form(
            request, file_name="file", modality="audio", max_file_bytes=loader.limits.max_audio_bytes
        )
        form = parse_body(TranscriptionForm, TranscriptionForm.values(upload.fields))
        self._context.check_model(form.model)
        speech = await self._speech()
        form.check_format(tells_times=speech is not None and speech.no_times is not None)
        salt = b"" if self._context.share_caches else tenant_of(request)
        sound = replace(loader.encoded("audio", upload.file), salt=salt)
        if speech is not None:
            return await WindowedTranscript(self._context, speech, form, task, sound).respond(request)
        if task != "transcribe":
            raise UnsupportedFeatureError(
                f"got {self._context.model_names[0]!r}, which is asked in words, expected a model of speech, "
                "which is told to translate. Use /v1/audio/transcriptions, and a prompt.",
                field="model",
            )
        transcript = _Transcript(form, await self._style(), sound)
        del upload, sound  # the sound is released once the core has it
        if form.stream:
            generated = self._generate(request, transcript, OutputKind.DELTA)
            return EventStream(transcript.events(await while_connected(request, with_first(generated))))
        output = await while_connected(request, self._whole(request, transcript))
        return transcript.response(output)

    def _check_hears(self) -> None:
        model_class = self._context.engine.config.model_config.model_class
        if not MULTIMODAL_REGISTRY.get_plugin("audio").has_input_mapper(model_class):
            raise UnsupportedFeatureError(
                f"got {self._context.model_names[0]!r}, which takes no audio, expected a model that hears.",
                field="model",
            )

    async def _speech(self) -> SpeechTokens | None:
        if not self._knows_speech:
            config = self._context.engine.config.model_config
            self._known_speech = await self._context.engine.in_pool(lambda: speech_tokens(config))
            self._knows_speech = True
        return self._known_speech

    async def _style(self) -> TranscriptionStyle:
        if self._known_style is None:
            config = self._context.engine.config.model_config
            self._known_style = await self._context.engine.in_pool(
                lambda: transcription_style(config, **self._settings)
            )
        return self._known_style

    async def _generate(
        self, request: Request, transcript: _Transcript, kind: OutputKind
    ) -> AsyncIterator[RequestOutput]:
        params = transcript.form.params(self._context.sampling_defaults)
        transcript.check()
        self._context.check_accepts(request)  # before anything is decoded
        await transcript.measure(self._context.media_loader)
        prompt = await self._context.render(request, transcript.messages())
        transcript.forget_sound()
        outputs = self._context.generate(request, prompt, params, kind, model=transcript.form.model)
        del prompt  # the media that it holds
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                transcript.check_end(output)
                yield output

    async def _whole(self, request: Request, transcript: _Transcript) -> RequestOutput:
        return await only(self._generate(request, transcript, OutputKind.FINAL_ONLY))


class _Transcript:
    """One sound, and the answer in OpenAI's forms."""

    def __init__(self, form: TranscriptionForm, style: TranscriptionStyle, sound: EncodedMedia) -> None:
        self.form = form
        self._style = style
        self._sound: EncodedMedia | None = sound
        self._duration_s = 0.0
        self._num_tokens = 0

    def check(self) -> None:
        """Raises `InvalidRequestError` for an unknown language."""
        self._style.told(self.form.language, self.form.prompt)

    def messages(self) -> list[dict[str, Any]]:
        """The chat that asks for it."""
        told = self._style.told(self.form.language, self.form.prompt)
        return [{"role": "user", "content": [{"type": "audio", "audio": self._sound}, {"type": "text", "text": told}]}]

    async def measure(self, loader: MediaLoader) -> None:
        """Determine the length of the sound; the decoded sound is kept for the request.

        Raises:
            MediaError: It can't be decoded.
            InvalidRequestError: It is longer than the model's limit.
        """
        assert self._sound is not None
        with stage("decode", "audio"):
            clip = await loader.adecode(self._sound)
        assert isinstance(clip, AudioClip)
        self._style.check_duration(clip.duration_s)
        self._duration_s = clip.duration_s

    def forget_sound(self) -> None:
        """Release the sound."""
        self._sound = None

    def check_end(self, output: RequestOutput) -> None:
        """Raises `InvalidRequestError` for a transcript that was cut off without `max_tokens`."""
        if self.form.max_tokens is None and output.outputs and output.outputs[0].finish_reason == "length":
            raise ContextLengthError(
                "got a sound whose transcript doesn't end within the model's context. Send a shorter sound, or "
                "set max_tokens to get its beginning.",
                field="file",
            )

    def response(self, output: RequestOutput) -> Response:
        """The answer in one piece."""
        (whole,) = output.outputs
        text = TranscriptReader(self._style).take(whole.text, is_last=True)
        self._num_tokens = len(whole.token_ids)
        if self.form.response_format == "text":
            return PlainTextResponse(text)
        body: dict[str, Any] = {"text": text, "usage": self._usage(output)}
        if self.form.response_format == "verbose_json":
            language = self.form.language or "unknown"
            body = {"task": "transcribe", "language": language, "duration": self._duration_s, **body}
        return JsonResponse(body)

    async def events(self, outputs: AsyncIterator[RequestOutput]) -> AsyncIterator[Any]:
        """The answer in pieces: `transcript.text.delta`s, then `transcript.text.done` with all of it."""
        reader, pieces = TranscriptReader(self._style), []
        async with aclosing(outputs):  # type: ignore[type-var]
            async for output in outputs:
                (delta,) = output.outputs
                self._num_tokens += len(delta.token_ids)
                if piece := reader.take(delta.text, is_last=delta.finished):
                    pieces.append(piece)
                    yield {"type": "transcript.text.delta", "delta": piece}
        yield {"type": "transcript.text.done", "text": "".join(pieces), "usage": self._usage(output)}

    def _usage(self, output: RequestOutput) -> dict[str, Any]:
        num_prompt, num_audio = len(output.prompt_token_ids), sum(output.media_token_counts.get("audio", ()))
        return {
            "type": "tokens",
            "input_tokens": num_prompt,
            "input_token_details": {"audio_tokens": num_audio, "text_tokens": num_prompt - num_audio},
            "output_tokens": self._num_tokens,
            "total_tokens": num_prompt + self._num_tokens,
        }

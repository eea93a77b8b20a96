"""How a model is asked to write down speech, and where the transcript stands in its answer.

A model that takes audio transcribes when the prompt asks for it in the words of its training, and it may answer with a
sentence around the transcript. Both are said, in this order, by the server's flags, by `transcription` in the
checkpoint's `config.json`, by the model class's `get_transcription_style`, and else by the defaults here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from sensorium.errors import ConfigError, InvalidRequestError
from sensorium.multimodal.item_checks import check_heard

if TYPE_CHECKING:
    from sensorium.config import ModelConfig

_HOOK = "get_transcription_style"
_TEXT = "{text}"


@dataclass(frozen=True, slots=True)
class TranscriptionStyle:
    """The instruction to a model, and the format of its answer.

    Attributes:
        instruction: the text after the sound. language_hint: how the prompt names the language, with `{language}` for
        its English name; "" where it can't be told. languages: codes (ISO 639-1) of what it understands; empty: any.
        answer: its answer, with `{text}` for the transcript. no_speech: its answer where nothing is said. max_audio_s:
        the longest sound that it hears whole; None: not known.

    Raises:
        ConfigError: `answer` doesn't hold the transcript once.
    """

    instruction: str = "Transcribe the audio."
    language_hint: str = "The language is {language}."
    languages: tuple[str, ...] = ()
    answer: str = _TEXT
    no_speech: str | None = None
    max_audio_s: float | None = None

    def __post_init__(self) -> None:
        if self.answer.count(_TEXT) != 1:
            raise ConfigError(
                f"transcription answer: got {self.answer!r:.120}, expected {_TEXT} in it, once. Correct it."
            )

    def told(self, language: str | None, prompt: str | None) -> str:
        """The instruction for one sound. `language`: a code or an English name; `prompt`: more that helps.

        Raises:
            InvalidRequestError: The language isn't known, or not one of the model's.
        """
        hint = "" if language is None else self.language_hint.replace("{language}", self._name_of(language))
        if language is not None and not hint and not self.languages:
            raise InvalidRequestError(
                f"got {language!r:.40}, expected none, since the model can't be told. Remove language.",
                field="language",
            )
        return "\n".join(filter(None, (" ".join(filter(None, (self.instruction, hint))), prompt)))

    def _name_of(self, language: str) -> str:
        from transformers.models.whisper.tokenization_whisper import LANGUAGES, TO_LANGUAGE_CODE

        code = TO_LANGUAGE_CODE.get(language.lower(), language.lower())
        if code not in LANGUAGES or (self.languages and code not in self.languages):
            expected = f"one of {list(self.languages)}" if self.languages else "a code of ISO 639-1 such as 'en'"
            raise InvalidRequestError(f"got {language!r:.40}, expected {expected}. Change language.", field="language")
        return str(LANGUAGES[code]).capitalize()

    def check_duration(self, duration_s: float) -> None:
        """Refuse a sound of which the model would hear only the beginning. Raises `InvalidRequestError`."""
        if self.max_audio_s is not None:
            check_heard("file", duration_s, self.max_audio_s)


def transcription_style(
    model_config: ModelConfig, *, instruction: str | None = None, answer: str | None = None
) -> TranscriptionStyle:
    """The style of a model; `instruction` and `answer`, where given, are the operator's.

    Raises:
        ConfigError: The checkpoint's `transcription` isn't one.
    """
    hook = getattr(model_config.model_class, _HOOK, None)
    style = TranscriptionStyle() if hook is None else hook(model_config)
    assert isinstance(style, TranscriptionStyle)
    changes = _from_checkpoint(getattr(model_config.hf_config, "transcription", None))
    changes |= {name: value for name, value in (("instruction", instruction), ("answer", answer)) if value is not None}
    return replace(style, **changes)


def _from_checkpoint(given: object) -> dict[str, Any]:
    if given is None:
        return {}
    known = {field.name for field in fields(TranscriptionStyle)}
    if not isinstance(given, Mapping) or given.keys() - known:
        raise ConfigError(
            f"transcription: got {given!r:.120} in the checkpoint's config, expected an object with some of "
            f"{sorted(known)}. Correct it."
        )
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


class TranscriptReader:
    """Takes the transcript out of an answer that comes in pieces, and lets go of each piece as soon as it is certain.

    An answer that isn't in the model's usual form is the transcript as it stands.
    """

    def __init__(self, style: TranscriptionStyle) -> None:
        self._before, _, self._after = style.answer.partition(_TEXT)
        self._no_speech = style.no_speech
        self._held = ""
        self._is_begun = False

    def take(self, text: str, *, is_last: bool) -> str:
        """What is new of the transcript, given what is new of the answer."""
        self._held += text
        if not self._is_begun and not self._begin(is_last):
            return ""
        return self._release(is_last)

    def _begin(self, is_last: bool) -> bool:
        """Whether it is decided how the answer begins."""
        if is_last and self._held.strip() == self._no_speech:
            self._held = ""
        elif not is_last and any(each.startswith(self._held) for each in (self._before, self._no_speech or "")):
            return False
        elif self._held.startswith(self._before):
            self._held = self._held.removeprefix(self._before)
        else:
            self._after = ""
        self._is_begun = True
        return True

    def _release(self, is_last: bool) -> str:
        if is_last:
            released, self._held = self._held.removesuffix(self._after), ""
            return released
        end = len(self._held) - len(self._after)
        released, self._held = self._held[: max(end, 0)], self._held[max(end, 0) :]
        return released

"""Prompts that a verification makes itself: texts of token ids, and conversations about pictures, clips and sounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from sensorium.errors import RequestError, UnregisteredModalityError
from sensorium.inputs.speech import SpeechTokens, speech_tokens
from sensorium.logger import get_logger
from sensorium.model_executor.models.transformers.model import text_token_ids

if TYPE_CHECKING:
    from sensorium.entrypoints.llm import LLM
    from sensorium.inputs.preprocess import ProcessedRequest
    from sensorium.sampling_params import SamplingParams

logger = get_logger(__name__)

TEXT_LENGTHS = (5, 37, 90)
"""Tokens of the texts, as far as the context goes."""
_SIZES = ((92, 64), (128, 160))
"""Width and height of the pictures, one for each case."""
_NUM_FRAMES = 6
_SAMPLE_RATE = 16_000


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt."""

    name: str
    prepare: Callable[[LLM, SamplingParams], ProcessedRequest]
    """The prompt as an engine admits it, anew for each run."""


def cases(
    llm: LLM, num_new_tokens: int, left_out: list[str] | None = None, *, text_only: bool = False
) -> Iterator[Case]:
    """Cases that a model can be asked, with room for so many tokens behind them.

    `left_out` gets those about media that the model takes, but can't be asked about, with the reason. `text_only`
    leaves out media, except those without which a model can't be asked anything.
    """
    model_config = llm.engine.config.model_config
    most = model_config.max_model_len - num_new_tokens
    lengths = sorted({min(length, most) for length in TEXT_LENGTHS})
    ids, begin = text_token_ids(model_config, sum(lengths)), 0
    tokens = speech_tokens(model_config)
    for length in lengths:
        part = ids[begin : begin + length]
        yield _text_case(part) if tokens is None else _spoken_case(part, tokens)
        begin += length
    if tokens is not None:
        return  # of no use without a sound, and asked nothing in words
    if not model_config.is_multimodal_model or text_only:
        return
    if llm.get_tokenizer() is None:
        if left_out is not None:
            left_out.append("media: the checkpoint has no tokenizer, which writes the prompts about them")
        return
    for case in _media_cases():
        reason = _refusal(case, llm)
        if reason is None:
            yield case
        elif left_out is not None and reason:
            left_out.append(f"{case.name}: {reason}")


def _text_case(ids: list[int]) -> Case:
    return Case(
        f"text of {len(ids)}",
        lambda llm, params: llm.engine.preprocess("verify", {"prompt_token_ids": ids}, params),
    )


def _spoken_case(ids: list[int], tokens: SpeechTokens) -> Case:
    """A sound, other ones for texts of other lengths, and a text of which the first token is the decoder's first."""
    sound = _sound(np.random.default_rng(len(ids)))
    prompt = {"prompt_token_ids": [tokens.begin, *ids[1:]], "multi_modal_data": {"audio": sound}}
    return Case(
        f"sound with text of {len(ids)}", lambda llm, params: llm.engine.preprocess("verify", dict(prompt), params)
    )


def _media_cases() -> Iterator[Case]:
    rng = np.random.default_rng(0)
    for width, height in _SIZES:
        picture = _picture(rng, width, height)
        yield _chat_case(f"picture of {width} x {height}", {"type": "image", "image": picture})
    frames = np.stack([np.asarray(_picture(rng, 84, 56)) for _ in range(_NUM_FRAMES)])
    yield _chat_case(f"clip of {_NUM_FRAMES} frames", {"type": "video", "video": frames})
    yield _chat_case("sound of 0.5 s", {"type": "audio", "audio": _sound(rng)})


def _sound(rng: np.random.Generator) -> tuple[np.ndarray[Any, Any], int]:
    """A tone in noise, and its rate."""
    seconds = np.arange(_SAMPLE_RATE // 2) / _SAMPLE_RATE
    samples = 0.3 * np.sin(2 * np.pi * 440 * seconds) + 0.05 * rng.standard_normal(len(seconds))
    return samples.astype(np.float32), _SAMPLE_RATE


def _picture(rng: np.random.Generator, width: int, height: int) -> Any:
    from PIL import Image

    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BILINEAR)


def _chat_case(name: str, part: Mapping[str, Any]) -> Case:
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]
    return Case(name, lambda llm, params: llm.preprocess_chat(messages, params))


def _refusal(case: Case, llm: LLM) -> str | None:
    """Why a model can't be asked; empty if it doesn't take such media; None if it can."""
    try:
        case.prepare(llm, llm.get_default_sampling_params())
    except UnregisteredModalityError:
        return ""
    except RequestError as error:
        logger.info("%s is not asked about: %s", case.name, error)
        return str(error)
    return None

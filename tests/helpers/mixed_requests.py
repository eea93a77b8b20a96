"""Random requests of a family: text, pictures of many sizes, clips and sounds, some of them the same again."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from PIL import Image

from sensorium import SamplingParams
from tests.helpers.serving import Planned

WORDS = [
    "look",
    "at",
    "the",
    "red",
    "bird",
    "over",
    "a",
    "small",
    "house",
    "and",
    "say",
    "what",
    "you",
    "hear",
    "or",
    "see",
    "now",
    "please",
]
IMAGE_SIDES = (28, 40, 56, 75, 112, 130)
SAMPLING_RATE = 16_000


@cache
def picture(seed: int) -> Image.Image:
    """A picture whose size and content depend on the seed."""
    rng = np.random.default_rng(seed)
    width, height = rng.choice(IMAGE_SIDES, 2)
    return Image.fromarray(rng.integers(0, 256, (int(height), int(width), 3), dtype=np.uint8))


@cache
def clip(seed: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A clip of 2 to 6 frames `(num_frames, height, width, 3)`."""
    rng = np.random.default_rng(seed + 1000)
    return rng.integers(0, 256, (int(rng.integers(1, 4)) * 2, 56, int(rng.choice([56, 84])), 3), dtype=np.uint8)


@cache
def sound(seed: int) -> tuple[np.ndarray[Any, np.dtype[np.float32]], int]:
    """Up to a second of noise."""
    rng = np.random.default_rng(seed + 2000)
    return rng.standard_normal(int(rng.integers(2_000, SAMPLING_RATE))).astype(np.float32) * 0.1, SAMPLING_RATE


@dataclass(frozen=True)
class Media:
    """How a modality stands in a family's prompts."""

    placeholder: str
    make: Callable[[int], Any]
    max_items: int
    min_items: int = 0


QWEN_VL = {
    "image": Media("<|vision_start|><|image_pad|><|vision_end|>", picture, 3),
    "video": Media("<|vision_start|><|video_pad|><|vision_end|>", clip, 2),
}
AUDIO = Media("<|audio_bos|><|AUDIO|><|audio_eos|>", sound, 2)
MEDIA: dict[str, dict[str, Media]] = {
    "gemma3": {},
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "qwen3_5": {},
    "qwen3_moe": {},
    "gpt_oss": {},
    "gemma3_vision": {"image": Media("<|vision_start|>", picture, 3)},
    "paligemma2": {"image": Media("<image>", picture, 2)},
    "llava": {"image": Media("<image>", picture, 3)},
    "llava_pixtral": {"image": Media("[IMG]", picture, 3)},
    "llava_next": {"image": Media("<image>", picture, 3)},
    "llava_onevision": {"image": Media("<image>", picture, 3), "video": Media("<video>", clip, 1)},
    "internvl": {"image": Media("<IMG_CONTEXT>", picture, 2), "video": Media("<video>", clip, 1)},
    "mistral3": {"image": Media("[IMG]", picture, 3)},
    "idefics3": {"image": Media("<image>", picture, 2)},
    "smolvlm": {"image": Media("<image>", picture, 2)},
    "qwen2_vl": QWEN_VL,
    "qwen2_5_vl": QWEN_VL,
    "qwen3_vl": QWEN_VL,
    "qwen3_vl_moe": QWEN_VL,
    "qwen2_audio": {"audio": AUDIO},
    "qwen2_5_omni_thinker": {**QWEN_VL, "audio": AUDIO},
    "mllama": {"image": Media("<|image|>", picture, 1)},
    "whisper": {"audio": Media("<|startoftranscript|><|en|><|transcribe|><|notimestamps|>", sound, 1, min_items=1)},
}


def limits(family: str) -> dict[str, int]:
    """`limit_mm_per_prompt` that the requests of a family need."""
    return {modality: media.max_items for modality, media in MEDIA[family].items()}


def random_prompt(family: str, rng: random.Random) -> Any:
    """Words with media between them; from a small pool, so that prefixes and items come again."""
    parts: list[str] = []
    data: dict[str, list[Any]] = {}
    for modality, media in MEDIA[family].items():
        for _ in range(max(rng.choice([0, 0, 1, 1, media.max_items]), media.min_items)):
            parts.append(media.placeholder)
            data.setdefault(modality, []).append(media.make(rng.randrange(6)))
    order = list(range(len(parts)))
    most_words = 8 if MEDIA[family] else 40
    text = ["".join(w + " " for w in rng.choices(WORDS, k=rng.randrange(0, most_words))) for _ in range(len(parts) + 1)]
    common = "you are a helpful friend who looks and listens. " if rng.random() < 0.5 else ""
    prompt = common + (text[0] or "say ") + "".join(parts[i] + text[i + 1] for i in order)
    return {"prompt": prompt, "multi_modal_data": data} if data else prompt


def random_plan(
    family: str,
    num_requests: int,
    rng: random.Random,
    *,
    spread: int,
    aborts: float,
    max_tokens: int = 14,
    tag: str = "",
) -> list[Planned]:
    """Requests that arrive over `spread` steps, a share of which is aborted some steps later."""
    plan = []
    for i in range(num_requests):
        arrival = rng.randrange(spread + 1)
        abort = arrival + rng.randrange(1, 30) if rng.random() < aborts else None
        params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, max_tokens), ignore_eos=True)
        plan.append(Planned(f"{tag}{i}", random_prompt(family, rng), params, arrival, abort, priority=rng.randrange(3)))
    return plan


def random_token_plan(
    num_requests: int, rng: random.Random, *, spread: int, aborts: float, max_tokens: int = 14, longest: int = 48
) -> list[Planned]:
    """The same of prompts of token ids, for checkpoints without a tokenizer; half of them begin alike."""
    common = [rng.randrange(5, 300) for _ in range(20)]
    plan = []
    for i in range(num_requests):
        ids = [rng.randrange(5, 300) for _ in range(rng.randrange(1, longest - len(common)))]
        arrival = rng.randrange(spread + 1)
        abort = arrival + rng.randrange(1, 30) if rng.random() < aborts else None
        params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, max_tokens), ignore_eos=True)
        prompt = {"prompt_token_ids": common + ids if rng.random() < 0.5 else ids}
        plan.append(Planned(str(i), prompt, params, arrival, abort, priority=rng.randrange(3)))
    return plan

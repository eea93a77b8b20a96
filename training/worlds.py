"""The mix: which media an item holds, which questions it gets, and how a batch's layout is chosen.

A *layout* fixes the shapes of an item's media, so that a batch of items of one layout stacks into one tensor.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from training.catalog import STRANGERS
from training.charts import CHART_ASKERS, sample_chart
from training.clips import CLIP_ASKERS, sample_clip
from training.dialogue import Item, Media, Turn
from training.pages import PAGE_ASKERS, sample_page
from training.pairs import PAIR_ASKERS, sample_pair
from training.scenes import MAX_SHAPES, SCENE_ASKERS, sample_scene
from training.sounds import SOUND_ASKERS, sample_sound
from training.speech import SpeechBank

_Ask = Callable[[random.Random], Turn | None]
_Sampled = tuple[tuple[Media, ...], _Ask]
_Subject = TypeVar("_Subject")

SKILLS = (
    *("scene", "counting", "compare", "reading", "chart", "motion", "blinking"),
    *("digits", "words", "sounds", "absent", "json"),
)
_SYSTEM_PROMPTS = ("You are a helpful assistant.", "Answer in one short sentence.", "You see, watch and listen.")
_SMALL_TALK = (
    ("Hello!", "Hello! Show me an image, a video or a sound."),
    ("Hi!", "Hello! Show me an image, a video or a sound."),
    ("Who are you?", "I am a small demo model that sees, watches and listens."),
    ("What can you do?", "I describe shapes, read text and charts, watch clips and hear words."),
)


@dataclass(frozen=True, slots=True)
class Layout:
    """Media of an item: the world it shows, ``height`` and ``width`` in pixels, ``num_frames`` of a clip."""

    world: str
    height: int = 0
    width: int = 0
    num_frames: int = 0


@dataclass(frozen=True, slots=True)
class Source:
    """Where items come from: the split decides fonts and voices; ``difficulty`` in (0, 1] grows during training."""

    split: str
    bank: SpeechBank | None
    difficulty: float = 1.0

    def grown(self, largest: int, smallest: int = 1) -> int:
        """A limit that grows from ``smallest`` to ``largest`` with the difficulty."""
        return max(smallest, min(largest, round(largest * self.difficulty)))


_SCENE_SIZES = (*[(128, 128)] * 5, (160, 160), (128, 192), (192, 128), (144, 160), (192, 192))
_PAGE_SIZES = (*[(64, 256), (96, 192), (128, 128)] * 2, (96, 256), (128, 192), (160, 160), (192, 192))
_CHART_SIZES = (*[(160, 160), (144, 192)] * 2, (160, 192), (192, 192))
_CLIP_SIZES = (*[(96, 96)] * 4, (96, 128), (112, 112), (128, 128))
_CLIP_LENGTHS = (8, 8, 12, 12, 16)

# How often each world is drawn, in batches.
WORLD_WEIGHTS = {
    "scene": 7.0,
    "page": 4.5,
    "sound": 3.2,
    "clip": 3.5,
    "pair": 3.2,
    "chart": 2.8,
    "both": 0.6,
    "none": 0.12,
}
_GOLDEN_RATIO = (5**0.5 - 1) / 2


def world_of(index: int) -> str:
    """The world of batch number ``index``.

    Multiples of the golden ratio, taken modulo one, lie evenly: any few batches in a row hold the worlds about as
    often as their weights say, and so does every n-th batch.
    """
    mark = index * _GOLDEN_RATIO % 1.0 * sum(WORLD_WEIGHTS.values())
    for world, weight in WORLD_WEIGHTS.items():
        mark -= weight
        if mark < 0:
            return world
    return world


def layout_of(world: str, rng: random.Random) -> Layout:
    """A layout of one world."""
    match world:
        case "scene":
            return Layout(world, *rng.choice(_SCENE_SIZES))
        case "page":
            return Layout(world, *rng.choice(_PAGE_SIZES))
        case "chart":
            return Layout(world, *rng.choice(_CHART_SIZES))
        case "pair" | "both":
            return Layout(world, 128, 128)
        case "clip":
            return Layout(world, *rng.choice(_CLIP_SIZES), num_frames=rng.choice(_CLIP_LENGTHS))
    return Layout(world)


def sample_item(
    rng: random.Random, layout: Layout, source: Source, num_turns: int, skills: Sequence[str] = SKILLS
) -> Item:
    """An item of a layout with ``num_turns`` turns on ``skills``; media are sampled until a turn on them is found."""
    while True:
        media, asker = _WORLDS[layout.world](rng, layout, source)
        turns = _ask(asker, rng, num_turns, skills)
        if turns:
            system = rng.choice(_SYSTEM_PROMPTS) if rng.random() < 0.08 else None
            return Item(media, turns, system, question_first=rng.random() < 0.12)


def _ask(ask: _Ask, rng: random.Random, num_turns: int, skills: Sequence[str]) -> tuple[Turn, ...]:
    """Up to ``num_turns`` turns with different answers; fewer if they don't come up in a fair number of tries."""
    turns: dict[str, Turn] = {}
    for _ in range(12 * num_turns):
        turn = ask(rng)
        if turn is not None and turn.skill in skills:
            turns.setdefault(turn.answer, turn)
        if len(turns) == num_turns:
            break
    return tuple(turns.values())


def _asker(subject: _Subject, askers: Sequence[tuple[Callable[[_Subject, random.Random], Turn | None], float]]) -> _Ask:
    """Asks one of the questions about ``subject``, each as often as its weight says."""
    functions, weights = zip(*askers, strict=True)

    def ask(rng: random.Random) -> Turn | None:
        [function] = rng.choices(functions, weights)
        turn: Turn | None = function(subject, rng)
        return turn

    return ask


def _scene(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    few_names = rng.random() < 0.45
    count = rng.randint(0 if rng.random() < 0.15 else 1, source.grown(MAX_SHAPES, 2))
    if not few_names and rng.random() < 0.5:
        count = min(count, 4)
    scene = sample_scene(rng, layout.width, layout.height, count, few_names)
    return (Media("image", scene.render(rng)),), _asker(scene, SCENE_ASKERS)


def _pair(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    pair = sample_pair(rng, layout.width, layout.height)
    return tuple(Media("image", scene.render(rng)) for scene in (pair.first, pair.second)), _asker(pair, PAIR_ASKERS)


def _page(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    page = sample_page(rng, layout.width, layout.height, source.split, source.grown(8, 2))
    return (Media("image", page.render(rng)),), _asker(page, PAGE_ASKERS)


def _chart(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    chart = sample_chart(rng, layout.width, layout.height, source.split)
    return (Media("image", chart.render(rng)),), _asker(chart, CHART_ASKERS)


def _clip(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    clip = sample_clip(rng, layout.width, layout.height, layout.num_frames)
    return (Media("video", clip.render(rng)),), _asker(clip, CLIP_ASKERS)


def _sound(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    assert source.bank is not None
    sound = sample_sound(rng, source.bank, source.grown(5, 1))
    return (Media("audio", sound.waveform),), _asker(sound, SOUND_ASKERS)


def _both(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    """An image and a sound in one request, the question about either."""
    image, ask_image = _scene(rng, layout, source)
    sound, ask_sound = _sound(rng, layout, source)
    media = (*image, *sound) if rng.random() < 0.5 else (*sound, *image)

    def ask(rng: random.Random) -> Turn | None:
        """What is absent from one medium may be in the other, so only what is there is asked for."""
        turn = (ask_image if rng.random() < 0.5 else ask_sound)(rng)
        return None if turn is None or turn.skill == "absent" or turn.question == "What do you see?" else turn

    return media, ask


def _none(rng: random.Random, layout: Layout, source: Source) -> _Sampled:
    """No media at all: small talk, and questions about what was not sent."""

    def ask(rng: random.Random) -> Turn | None:
        if rng.random() < 0.5:
            question, answer = rng.choice(_SMALL_TALK)
            return Turn("absent", question, answer)
        question, missing = rng.choice(
            (
                ("Describe the image.", "image"),
                ("What do you see?", "image"),
                ("What does the text say?", "image"),
                ("How many shapes are there?", "image"),
                ("Describe the video.", "video"),
                ("What happens in the video?", "video"),
                ("What is said?", "sound"),
                ("Transcribe the audio.", "sound"),
                (f"What color is the {rng.choice(STRANGERS)}?", "image"),
            )
        )
        return Turn("absent", question, f"I can't tell: there is no {missing}.")

    return (), ask


_WORLDS: dict[str, Callable[[random.Random, Layout, Source], _Sampled]] = {
    "scene": _scene,
    "pair": _pair,
    "page": _page,
    "chart": _chart,
    "clip": _clip,
    "sound": _sound,
    "both": _both,
    "none": _none,
}

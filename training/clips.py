"""Short clips: shapes that move, stand still or blink, and questions about what happens."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw

from training.catalog import COLOR_NAMES, DIRECTIONS, KINDS, PLACES, counted, listed, with_article
from training.dialogue import Pixels, Turn
from training.drawing import RGB, Shape, draw_shape, sample_backdrop
from training.scenes import sample_shape

# The speed of a moving shape, as a fraction of the frame's side per clip.
_TRAVEL = (0.3, 0.6)


@dataclass(frozen=True, slots=True)
class Actor:
    """A shape with its motion (pixels per frame) and the frames in which it can be seen."""

    shape: Shape
    direction: str | None
    step: tuple[float, float]
    visible: tuple[bool, ...]

    @property
    def blinks(self) -> int:
        """How many times the shape vanishes and comes back."""
        return sum(before and not now for before, now in zip(self.visible, self.visible[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Clip:
    """Actors on a plain background; the clip has two frames a second."""

    width: int
    height: int
    num_frames: int
    background: RGB
    actors: tuple[Actor, ...]

    def render(self, rng: random.Random) -> Pixels:
        """The clip as pixels ``(frames, height, width, 3)``."""
        smooth = 2 if rng.random() < 0.5 else 1
        return np.stack([self._frame(index, smooth) for index in range(self.num_frames)])

    def _frame(self, index: int, supersample: int) -> Pixels:
        canvas = Image.new("RGB", (self.width * supersample, self.height * supersample), self.background)
        draw = ImageDraw.Draw(canvas)
        for actor in self.actors:
            if actor.visible[index]:
                x, y = actor.shape.x + index * actor.step[0], actor.shape.y + index * actor.step[1]
                draw_shape(draw, replace(actor.shape, x=x, y=y), self.background, supersample)
        return np.asarray(canvas if supersample == 1 else canvas.reduce(supersample))


def sample_clip(rng: random.Random, width: int, height: int, num_frames: int) -> Clip:
    """One to three actors whose paths don't cross, with different names."""
    backdrop = sample_backdrop(rng)
    while True:
        actors: list[Actor] = []
        for _ in range(rng.choice((1, 1, 2, 2, 3))):
            actor = _sample_actor(rng, width, height, num_frames, backdrop.colors)
            if all(actor.shape.name != other.shape.name and _apart(actor, other, num_frames) for other in actors):
                actors.append(actor)
        if actors:
            return Clip(width, height, num_frames, backdrop.rgb, tuple(actors))


def _sample_actor(rng: random.Random, width: int, height: int, num_frames: int, colors: tuple[str, ...]) -> Actor:
    side = min(width, height)
    radius = rng.uniform(0.085, 0.15) * side
    act = rng.choice(("move", "move", "blink", "stand"))
    direction = rng.choice(tuple(DIRECTIONS)) if act == "move" else None
    travel = rng.uniform(*_TRAVEL) * side if direction else 0.0
    unit = DIRECTIONS[direction] if direction else (0, 0)
    path = (unit[0] * travel, unit[1] * travel)
    x = rng.uniform(radius + 1 + max(0.0, -path[0]), width - radius - 1 - max(0.0, path[0]))
    y = rng.uniform(radius + 1 + max(0.0, -path[1]), height - radius - 1 - max(0.0, path[1]))
    shape = sample_shape(rng, rng.choice(KINDS), rng.choice(colors), x, y, radius)
    step = (path[0] / (num_frames - 1), path[1] / (num_frames - 1))
    visible = _sample_blinks(rng, num_frames) if act == "blink" else (True,) * num_frames
    return Actor(shape, direction, step, visible)


def _sample_blinks(rng: random.Random, num_frames: int) -> tuple[bool, ...]:
    """Visible frames of a shape that starts and ends visible and vanishes one to four times for one or two frames."""
    count = rng.randint(1, min(4, (num_frames - 2) // 3))
    gaps = [rng.randint(1, 2) for _ in range(count)]
    spare = num_frames - sum(gaps) - (count + 1)
    if spare < 0:
        gaps, spare = [1] * count, num_frames - count - (count + 1)
    runs = [1] * (count + 1)
    for _ in range(spare):
        runs[rng.randrange(len(runs))] += 1
    visible = [True] * runs[0]
    for gap, run in zip(gaps, runs[1:], strict=True):
        visible += [False] * gap + [True] * run
    return tuple(visible)


def _apart(first: Actor, second: Actor, num_frames: int) -> bool:
    """Whether two actors never touch."""
    reach = first.shape.radius + second.shape.radius + 1
    for index in range(num_frames):
        dx = first.shape.x - second.shape.x + index * (first.step[0] - second.step[0])
        dy = first.shape.y - second.shape.y + index * (first.step[1] - second.step[1])
        if dx * dx + dy * dy < reach * reach:
            return False
    return True


def ask_motion(clip: Clip, rng: random.Random) -> Turn | None:
    """Which way a shape moves."""
    actor = rng.choice(clip.actors)
    name = actor.shape.name
    question = rng.choice(
        (f"Which way does the {name} move?", f"Where does the {name} move?", f"How does the {name} move?")
    )
    answer = f"The {name} moves {actor.direction}." if actor.direction else f"The {name} does not move."
    return Turn("motion", question, answer)


def ask_mover(clip: Clip, rng: random.Random) -> Turn | None:
    """What moves."""
    movers = [actor for actor in clip.actors if actor.direction]
    if len(movers) > 1:
        return None
    question = rng.choice(("What moves?", "Which shape moves?"))
    if not movers:
        return Turn("motion", question, "Nothing moves.")
    return Turn("motion", question, f"The {movers[0].shape.name} moves {movers[0].direction}.")


def ask_events(clip: Clip, rng: random.Random) -> Turn | None:
    """Everything that happens."""
    question = rng.choice(("What happens in the video?", "Describe the video.", "Describe the clip."))
    actors = sorted(
        clip.actors,
        key=lambda actor: (COLOR_NAMES.index(actor.shape.color), KINDS.index(actor.shape.kind)),
    )
    parts = [f"{with_article(actor.shape.name)} {_act(actor)}" for actor in actors]
    sentence = listed(parts)
    return Turn("motion", question, sentence[0].upper() + sentence[1:] + ".")


def _act(actor: Actor) -> str:
    if actor.blinks:
        return f"blinks {_times(actor.blinks)}"
    return f"moves {actor.direction}" if actor.direction else "stands still"


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


def ask_blinks(clip: Clip, rng: random.Random) -> Turn | None:
    """How often a shape blinks."""
    blinking = [actor for actor in clip.actors if actor.blinks]
    actor = rng.choice(blinking) if blinking and rng.random() < 0.85 else rng.choice(clip.actors)
    name = actor.shape.name
    question = rng.choice((f"How many times does the {name} blink?", f"How often does the {name} blink?"))
    answer = f"The {name} blinks {_times(actor.blinks)}." if actor.blinks else f"The {name} does not blink."
    return Turn("blinking", question, answer)


def ask_blinker(clip: Clip, rng: random.Random) -> Turn | None:
    """What blinks."""
    blinking = [actor for actor in clip.actors if actor.blinks]
    if len(blinking) > 1:
        return None
    answer = f"The {blinking[0].shape.name} blinks." if blinking else "Nothing blinks."
    return Turn("blinking", rng.choice(("What blinks?", "Which shape blinks?")), answer)


def ask_shape_count(clip: Clip, rng: random.Random) -> Turn | None:
    """How many shapes are in the clip."""
    count = len(clip.actors)
    question = rng.choice(("How many shapes are there?", "How many shapes are in the video?"))
    return Turn("counting", question, f"There {'is' if count == 1 else 'are'} {counted(count, 'shape')}.")


def ask_end(clip: Clip, rng: random.Random) -> Turn | None:
    """Where a moving shape ends up, if the place is clear."""
    movers = [actor for actor in clip.actors if actor.direction]
    if not movers:
        return None
    actor = rng.choice(movers)
    last = clip.num_frames - 1
    x = (actor.shape.x + last * actor.step[0]) / clip.width
    y = (actor.shape.y + last * actor.step[1]) / clip.height
    if min(abs(x - 1 / 3), abs(x - 2 / 3), abs(y - 1 / 3), abs(y - 2 / 3)) < 0.05:
        return None
    place = PLACES[3 * int(3 * y) + int(3 * x)]
    return Turn("motion", f"Where is the {actor.shape.name} at the end?", f"The {actor.shape.name} is {place}.")


def ask_absent_actor(clip: Clip, rng: random.Random) -> Turn | None:
    """The motion of a shape that isn't there."""
    name = f"{rng.choice(COLOR_NAMES)} {rng.choice(KINDS)}"
    if any(actor.shape.name == name for actor in clip.actors):
        return None
    question = rng.choice((f"Which way does the {name} move?", f"How many times does the {name} blink?"))
    return Turn("absent", question, f"I can't tell: there is no {name}.")


def ask_motion_json(clip: Clip, rng: random.Random) -> Turn | None:
    """A shape's motion or blinks as JSON."""
    actor = rng.choice(clip.actors)
    name = actor.shape.name
    if rng.random() < 0.5:
        answer = json.dumps({"direction": actor.direction or "none"})
        return Turn("json", f"Which way does the {name} move? Answer in JSON.", answer)
    return Turn("json", f"How many times does the {name} blink? Answer in JSON.", json.dumps({"count": actor.blinks}))


CLIP_ASKERS: tuple[tuple[Callable[[Clip, random.Random], Turn | None], float], ...] = (
    (ask_motion, 2.0),
    (ask_mover, 1.0),
    (ask_events, 1.3),
    (ask_blinks, 2.2),
    (ask_blinker, 0.8),
    (ask_shape_count, 0.5),
    (ask_end, 0.7),
    (ask_absent_actor, 0.5),
    (ask_motion_json, 0.8),
)

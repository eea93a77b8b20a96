"""Two pictures to compare: the second is the first with at most one change."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace

from training.catalog import KINDS, counted, with_article
from training.dialogue import Turn
from training.drawing import sample_rgb
from training.scenes import Scene, sample_scene, sample_shape, sample_spot


@dataclass(frozen=True, slots=True)
class Pair:
    """Two scenes and the sentence that tells their difference."""

    first: Scene
    second: Scene
    change: str


def sample_pair(rng: random.Random, width: int, height: int) -> Pair:
    """A scene of one to four shapes with different names, and a changed copy of it."""
    while True:
        first = sample_scene(rng, width, height, rng.randint(1, 4))
        if len({shape.name for shape in first.shapes}) < len(first.shapes):
            continue
        changed = rng.choice((_recolor, _reshape, _move, _add, _remove, _keep))(first, rng)
        if changed is not None:
            return changed


def _with_shape(scene: Scene, index: int, **fields: object) -> Scene:
    shapes = list(scene.shapes)
    shapes[index] = replace(shapes[index], **fields)  # type: ignore[arg-type]
    return replace(scene, shapes=tuple(shapes))


def _recolor(scene: Scene, rng: random.Random) -> Pair | None:
    index = rng.randrange(len(scene.shapes))
    old = scene.shapes[index]
    color = rng.choice([color for color in scene.colors if color != old.color])
    if any(shape.name == f"{color} {old.kind}" for shape in scene.shapes):
        return None
    second = _with_shape(scene, index, color=color, rgb=sample_rgb(rng, color))
    return Pair(scene, second, f"The {old.name} became {color}.")


def _reshape(scene: Scene, rng: random.Random) -> Pair | None:
    index = rng.randrange(len(scene.shapes))
    old = scene.shapes[index]
    kind = rng.choice([kind for kind in KINDS if kind != old.kind])
    if any(shape.name == f"{old.color} {kind}" for shape in scene.shapes):
        return None
    return Pair(scene, _with_shape(scene, index, kind=kind), f"The {old.name} became {with_article(kind)}.")


def _move(scene: Scene, rng: random.Random) -> Pair | None:
    index = rng.randrange(len(scene.shapes))
    old = scene.shapes[index]
    spot = sample_spot(rng, scene.width, scene.height, list(scene.shapes), crowd=len(scene.shapes))
    if spot is None:
        return None
    second = _with_shape(scene, index, x=spot[0], y=spot[1])
    new = second.shapes[index]
    inside = old.radius < new.x < scene.width - old.radius and old.radius < new.y < scene.height - old.radius
    if not inside or scene.place(old) == second.place(new):
        return None
    destination = second.place(new).removeprefix("at ").removeprefix("on ").removeprefix("in ")
    return Pair(scene, second, f"The {old.name} moved to {destination}.")


def _add(scene: Scene, rng: random.Random) -> Pair | None:
    spot = sample_spot(rng, scene.width, scene.height, list(scene.shapes), crowd=len(scene.shapes))
    if spot is None:
        return None
    new = sample_shape(rng, rng.choice(KINDS), rng.choice(scene.colors), *spot)
    if any(shape.name == new.name for shape in scene.shapes):
        return None
    return Pair(scene, replace(scene, shapes=(*scene.shapes, new)), f"{with_article(new.name).capitalize()} was added.")


def _remove(scene: Scene, rng: random.Random) -> Pair | None:
    index = rng.randrange(len(scene.shapes))
    shapes = scene.shapes[:index] + scene.shapes[index + 1 :]
    return Pair(scene, replace(scene, shapes=shapes), f"The {scene.shapes[index].name} was removed.")


def _keep(scene: Scene, rng: random.Random) -> Pair | None:
    return Pair(scene, scene, "Nothing changed.")


def ask_change(pair: Pair, rng: random.Random) -> Turn | None:
    """What changed from the first picture to the second."""
    question = rng.choice(("What changed?", "What is different in the second image?", "Compare the two images."))
    return Turn("compare", question, pair.change)


def ask_same(pair: Pair, rng: random.Random) -> Turn | None:
    """Whether the pictures are the same."""
    question = rng.choice(("Are the two images the same?", "Do the two images show the same?"))
    return Turn("compare", question, "Yes." if pair.change == "Nothing changed." else "No.")


def ask_more(pair: Pair, rng: random.Random) -> Turn | None:
    """Which picture has more shapes."""
    difference = len(pair.first.shapes) - len(pair.second.shapes)
    answers = {0: "Both images have the same number of shapes.", 1: "The first image has more shapes."}
    return Turn("compare", "Which image has more shapes?", answers.get(difference, "The second image has more shapes."))


def ask_count_in_one(pair: Pair, rng: random.Random) -> Turn | None:
    """How many shapes one of the two pictures has."""
    which, scene = rng.choice((("first", pair.first), ("second", pair.second)))
    answer = f"The {which} image has {counted(len(scene.shapes), 'shape')}."
    return Turn("counting", f"How many shapes does the {which} image have?", answer)


def ask_color_in_one(pair: Pair, rng: random.Random) -> Turn | None:
    """The colour of a shape in one of the two pictures, or that it is not there."""
    which, scene = rng.choice((("first", pair.first), ("second", pair.second)))
    kind = rng.choice([shape.kind for shape in (*pair.first.shapes, *pair.second.shapes)])
    matches = [shape for shape in scene.shapes if shape.kind == kind]
    question = f"What color is the {kind} in the {which} image?"
    if not matches:
        return Turn("absent", question, f"I can't tell: there is no {kind}.")
    return Turn("compare", question, f"The {kind} is {matches[0].color}.") if len(matches) == 1 else None


PAIR_ASKERS: tuple[tuple[Callable[[Pair, random.Random], Turn | None], float], ...] = (
    (ask_change, 3.0),
    (ask_same, 0.7),
    (ask_more, 0.7),
    (ask_count_in_one, 0.7),
    (ask_color_in_one, 1.0),
)

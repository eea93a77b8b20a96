"""Still scenes of shapes: how one is sampled and painted, and what is asked about it."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from training.catalog import COLOR_NAMES, KINDS, PLACES, STRANGERS, counted, listed, plural, with_article
from training.dialogue import Pixels, Turn
from training.drawing import RGB, Shape, finish, paint, sample_angle, sample_backdrop, sample_rgb

MAX_SHAPES = 9
# A centre closer than this (as a fraction of the side) to a border between places has no clear place.
_PLACE_MARGIN = 0.035


@dataclass(frozen=True, slots=True)
class Scene:
    """Shapes that don't overlap on a plain background; sizes in pixels."""

    width: int
    height: int
    background: RGB
    colors: tuple[str, ...]
    shapes: tuple[Shape, ...]

    def place(self, shape: Shape) -> str:
        """Where a shape stands, as one of the catalog's ``PLACES``."""
        row, column = int(3 * shape.y / self.height), int(3 * shape.x / self.width)
        return PLACES[3 * row + column]

    def render(self, rng: random.Random) -> Pixels:
        """The scene as pixels ``(height, width, 3)``."""
        image = paint((self.width, self.height), self.background, self.shapes, 1 if rng.random() < 0.25 else 2)
        return finish(rng, image)


def sample_scene(rng: random.Random, width: int, height: int, count: int, few_names: bool = False) -> Scene:
    """A scene of ``count`` shapes; ``few_names`` draws from few kinds and colours, so that counts exceed one."""
    backdrop = sample_backdrop(rng)
    colors = rng.sample(backdrop.colors, rng.randint(1, 3)) if few_names else list(backdrop.colors)
    kinds = rng.sample(KINDS, rng.randint(1, 3)) if few_names else list(KINDS)
    shapes: list[Shape] = []
    outline = rng.random() < 0.12
    while len(shapes) < count:
        spot = sample_spot(rng, width, height, shapes, crowd=count)
        if spot is None:
            shapes.clear()
            continue
        shapes.append(sample_shape(rng, rng.choice(kinds), rng.choice(colors), *spot, outline=outline))
    return Scene(width, height, backdrop.rgb, backdrop.colors, tuple(shapes))


def sample_shape(
    rng: random.Random, kind: str, color: str, x: float, y: float, radius: float, outline: bool = False
) -> Shape:
    """A shape with a sampled rotation and tint."""
    return Shape(kind, color, x, y, radius, sample_angle(rng, kind), sample_rgb(rng, color), outline)


def sample_spot(
    rng: random.Random, width: int, height: int, taken: list[Shape], crowd: int
) -> tuple[float, float, float] | None:
    """A free centre with a clear place, and a radius: (x, y, radius); None if none was found soon."""
    side = min(width, height)
    largest = side * (0.2 if crowd <= 3 else 0.155 if crowd <= 6 else 0.125)
    for attempt in range(60):
        radius = rng.uniform(min(6.5, largest * 0.6), largest * (1.0 if attempt < 30 else 0.7))
        x = rng.uniform(radius + 1, width - radius - 1)
        y = rng.uniform(radius + 1, height - radius - 1)
        if not (_has_clear_place(x / width) and _has_clear_place(y / height)):
            continue
        if all((x - s.x) ** 2 + (y - s.y) ** 2 > (radius + s.radius + 2) ** 2 for s in taken):
            return x, y, radius
    return None


def _has_clear_place(fraction: float) -> bool:
    return min(abs(fraction - 1 / 3), abs(fraction - 2 / 3)) > _PLACE_MARGIN


# Questions. Each asker returns None where its question has no one right answer in this scene.

Asker = Callable[[Scene, random.Random], Turn | None]


def ask_description(scene: Scene, rng: random.Random) -> Turn | None:
    """Everything with its place for few shapes, counts by name for more."""
    question = rng.choice(("Describe the image.", "Describe the picture.", "What is in the image?", "What do you see?"))
    shapes = sorted(scene.shapes, key=lambda shape: (PLACES.index(scene.place(shape)), shape.x))
    if not shapes:
        return Turn("scene", question, "The image is empty.")
    if len(shapes) <= 3:
        parts = [f"{with_article(shape.name)} {scene.place(shape)}" for shape in shapes]
        places = [scene.place(shape) for shape in shapes]
        if len(set(places)) < len(places):
            return None
        return Turn("scene", question, f"There {'is' if len(parts) == 1 else 'are'} {listed(parts)}.")
    counts = Counter(shape.name for shape in shapes)
    if len(counts) > 4:
        return None
    names = sorted(counts, key=lambda name: (COLOR_NAMES.index(name.split()[0]), KINDS.index(name.split()[1])))
    parts = [counted(counts[name], name) for name in names]
    return Turn("scene", question, f"There are {len(shapes)} shapes: {listed(parts)}.")


def ask_color(scene: Scene, rng: random.Random) -> Turn | None:
    """The colour of the only shape of its kind, or that there is none."""
    kind = rng.choice([s.kind for s in scene.shapes]) if scene.shapes and rng.random() < 0.85 else rng.choice(KINDS)
    matches = [shape for shape in scene.shapes if shape.kind == kind]
    question = rng.choice(
        (f"What color is the {kind}?", f"What is the color of the {kind}?", f"Which color is the {kind}?")
    )
    if not matches:
        return Turn("absent", question, f"I can't tell: there is no {kind}.")
    return Turn("scene", question, f"The {kind} is {matches[0].color}.") if len(matches) == 1 else None


def ask_kind(scene: Scene, rng: random.Random) -> Turn | None:
    """The kind of the only shape of its colour, or that there is none."""
    present = [shape.color for shape in scene.shapes]
    color = rng.choice(present) if present and rng.random() < 0.85 else rng.choice(COLOR_NAMES)
    matches = [shape for shape in scene.shapes if shape.color == color]
    question = rng.choice((f"What is the {color} shape?", f"What shape is {color}?", f"Which shape is {color}?"))
    if not matches:
        return Turn("absent", question, f"I can't tell: there is no {color} shape.")
    return (
        Turn("scene", question, f"The {color} shape is {with_article(matches[0].kind)}.") if len(matches) == 1 else None
    )


def ask_place(scene: Scene, rng: random.Random) -> Turn | None:
    """Where the only shape of a name stands, or that there is none."""
    name = pick_name(scene, rng, 0.85)
    matches = [shape for shape in scene.shapes if shape.name == name]
    question = rng.choice((f"Where is the {name}?", f"Where can you see the {name}?", f"Where do you see the {name}?"))
    if not matches:
        return Turn("absent", question, f"I can't tell: there is no {name}.")
    return Turn("scene", question, f"The {name} is {scene.place(matches[0])}.") if len(matches) == 1 else None


def ask_what_is_at(scene: Scene, rng: random.Random) -> Turn | None:
    """What stands at a place."""
    occupied = [scene.place(shape) for shape in scene.shapes]
    place = rng.choice(occupied) if occupied and rng.random() < 0.8 else rng.choice(PLACES)
    matches = [shape for shape in scene.shapes if scene.place(shape) == place]
    question = rng.choice((f"What is {place}?", f"What do you see {place}?", f"Which shape is {place}?"))
    if len(matches) > 1:
        return None
    found = with_article(matches[0].name) if matches else "nothing"
    return Turn("scene", question, f"There is {found} {place}.")


def ask_relation(scene: Scene, rng: random.Random) -> Turn | None:
    """Whether one shape is left of, right of, above or below another."""
    names = Counter(shape.name for shape in scene.shapes)
    unique = [shape for shape in scene.shapes if names[shape.name] == 1]
    if len(unique) < 2:
        return None
    first, second = rng.sample(unique, 2)
    relation = rng.choice(("left of", "right of", "above", "below"))
    horizontal = relation.endswith("of")
    gap = (second.x - first.x) / scene.width if horizontal else (second.y - first.y) / scene.height
    if abs(gap) < 0.1:
        return None
    holds = (gap > 0) == (relation in ("left of", "above"))
    question = f"Is the {first.name} {relation} the {second.name}?"
    return Turn("scene", question, "Yes, it is." if holds else "No, it is not.")


def ask_existence(scene: Scene, rng: random.Random) -> Turn | None:
    """Whether a shape of a name, colour or kind is there."""
    name = pick_name(scene, rng, 0.5)
    name = rng.choice((name, name, name.split()[1], f"{name.split()[0]} shape"))
    there = any(matches_name(shape, name) for shape in scene.shapes)
    question = rng.choice((f"Is there {with_article(name)}?", f"Do you see {with_article(name)}?"))
    return Turn("scene", question, "Yes, there is." if there else "No, there is not.")


def ask_largest(scene: Scene, rng: random.Random) -> Turn | None:
    """The largest or smallest of a few shapes, if it stands out."""
    if not 2 <= len(scene.shapes) <= 4:
        return None
    word = rng.choice(("largest", "smallest"))
    ordered = sorted(scene.shapes, key=lambda shape: shape.radius, reverse=word == "largest")
    ratio = ordered[0].radius / ordered[1].radius
    if max(ratio, 1 / ratio) < 1.35:
        return None
    question = rng.choice((f"Which shape is the {word}?", f"What is the {word} shape?"))
    return Turn("scene", question, f"The {ordered[0].name} is the {word}.")


def ask_count(scene: Scene, rng: random.Random) -> Turn | None:
    """How many shapes there are: all, of a colour, of a kind, or of a name."""
    question, noun, count = _counting(scene, rng)
    return Turn("counting", question, f"There {'is' if count == 1 else 'are'} {counted(count, noun)}.")


def _counting(scene: Scene, rng: random.Random) -> tuple[str, str, int]:
    """A question for a count, the noun that is counted, and the count."""
    name = pick_name(scene, rng, 0.9)
    noun = rng.choice(("shape", "shape", f"{name.split()[0]} shape", name.split()[1], name))
    many = plural(noun)
    question = rng.choice((f"How many {many} are there?", f"How many {many} do you see?", f"Count the {many}."))
    return question, noun, sum(matches_name(shape, noun) for shape in scene.shapes)


def ask_stranger(scene: Scene, rng: random.Random) -> Turn | None:
    """Something that this world does not hold."""
    stranger = rng.choice(STRANGERS)
    question, missing = rng.choice(
        (
            (f"What color is the {stranger}?", stranger),
            (f"Where is the {stranger}?", stranger),
            (f"What is the {stranger} doing?", stranger),
            ("What does the text say?", "text"),
            ("Read the text.", "text"),
            ("What is the value of bar A?", "chart"),
            ("What is said?", "speech"),
            ("How many beeps are there?", "sound"),
        )
    )
    return Turn("absent", question, f"I can't tell: there is no {missing}.")


def ask_json(scene: Scene, rng: random.Random) -> Turn | None:
    """A count, a table of counts by colour, or one shape's fields, as JSON."""
    form = rng.random()
    if form < 0.35:
        question, _, count = _counting(scene, rng)
        return Turn("json", f"{question} Answer in JSON.", json.dumps({"count": count}))
    if form < 0.65:
        counts = Counter(shape.color for shape in scene.shapes)
        table = {color: counts[color] for color in COLOR_NAMES if counts[color]}
        return (
            Turn("json", "Count the shapes by color. Answer in JSON.", json.dumps(table)) if len(table) <= 4 else None
        )
    name = pick_name(scene, rng, 1.0)
    matches = [shape for shape in scene.shapes if shape.name == name]
    if form < 0.8:
        kinds = [shape for shape in scene.shapes if shape.kind == name.split()[1]]
        if len(kinds) != 1:
            return None
        answer = json.dumps({"color": kinds[0].color, "kind": kinds[0].kind})
        return Turn("json", f"Describe the {kinds[0].kind} in JSON.", answer)
    if len(matches) != 1:
        return None
    return Turn("json", f"Where is the {name}? Answer in JSON.", json.dumps({"place": scene.place(matches[0])}))


def pick_name(scene: Scene, rng: random.Random, present: float) -> str:
    """A shape's name: of one that is there with probability ``present`` (if there is any), else any name."""
    if scene.shapes and rng.random() < present:
        return rng.choice(scene.shapes).name
    return f"{rng.choice(COLOR_NAMES)} {rng.choice(KINDS)}"


def matches_name(shape: Shape, name: str) -> bool:
    """Whether a shape is called by ``shape``, ``red shape``, ``circle`` or ``red circle``."""
    color, _, kind = name.rpartition(" ")
    return color in ("", shape.color) and kind in ("shape", shape.kind)


SCENE_ASKERS: tuple[tuple[Asker, float], ...] = (
    (ask_description, 1.6),
    (ask_color, 1.0),
    (ask_kind, 1.0),
    (ask_place, 1.3),
    (ask_what_is_at, 1.0),
    (ask_relation, 1.2),
    (ask_existence, 0.8),
    (ask_largest, 0.8),
    (ask_count, 3.0),
    (ask_stranger, 0.7),
    (ask_json, 1.6),
)

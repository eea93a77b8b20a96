"""The generator: the same items for the same seed, and answers that follow from what was painted."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from training.catalog import COLOR_NAMES, COLORS, DIGITS, DIRECTIONS, KINDS, PLACES, counted, listed, plural
from training.charts import ask_table, ask_value, sample_chart
from training.clips import ask_blinks, ask_motion, sample_clip
from training.dialogue import Item
from training.drawing import draw_shape, paint, sample_backdrop
from training.loader import collate
from training.pages import ask_text, sample_page, sample_text
from training.pairs import sample_pair
from training.scenes import MAX_SHAPES, Scene, ask_count, ask_place, ask_relation, sample_scene, sample_shape
from training.sounds import MAX_SECONDS, ask_digits, sample_sound
from training.speech import SAMPLE_RATE, decode_mu_law, encode_mu_law, resample, voices_of
from training.worlds import SKILLS, WORLD_WEIGHTS, Source, layout_of, sample_item

SEEDS = range(40)


def make_item(world: str, seed: int, source: Source) -> Item:
    rng = random.Random(seed)
    return sample_item(rng, layout_of(world, rng), source, num_turns=3)


@pytest.mark.parametrize("world", WORLD_WEIGHTS)
def test_equal_seeds_give_equal_items(world: str, source: Source) -> None:
    first, second, other = (make_item(world, seed, source) for seed in (1, 1, 2))
    assert first.turns == second.turns
    assert [media.modality for media in first.media] == [media.modality for media in second.media]
    for one, same in zip(first.media, second.media, strict=True):
        np.testing.assert_array_equal(one.data, same.data)
    assert first.turns != other.turns


@pytest.mark.parametrize("world", WORLD_WEIGHTS)
def test_turns_are_of_known_skills_and_never_repeat_an_answer(world: str, source: Source) -> None:
    for seed in SEEDS:
        turns = make_item(world, seed, source).turns
        assert {turn.skill for turn in turns} <= set(SKILLS)
        assert len({turn.answer for turn in turns}) == len(turns)
        for turn in turns:
            assert turn.question.endswith((".", "?", "!"))
            if turn.skill == "json":
                assert isinstance(json.loads(turn.answer), dict)
            else:
                assert turn.answer.endswith(".")


@pytest.mark.parametrize("world", WORLD_WEIGHTS)
def test_items_of_a_layout_stack(world: str, source: Source) -> None:
    rng = random.Random(3)
    layout = layout_of(world, rng)
    batch = collate([sample_item(rng, layout, source, 2) for _ in range(3)])
    assert len(batch.input_ids) == 3
    assert len(batch.media_slots) == len(batch.media_rows) == len(set(batch.media_slots.tolist()))


def test_a_shape_shows_its_color_where_its_place_says() -> None:
    """The centre pixel of each painted shape has the shape's colour, but for rings, which are open there."""
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = sample_scene(rng, 128, 160, rng.randint(1, MAX_SHAPES))
        pixels = np.asarray(paint((scene.width, scene.height), scene.background, scene.shapes)).astype(int)
        for shape in scene.shapes:
            height = int(shape.y - (shape.radius * 0.78 if shape.kind == "ring" else 0))
            assert tuple(pixels[height, int(shape.x)]) == pytest.approx(shape.rgb, abs=40)
            row, column = divmod(PLACES.index(scene.place(shape)), 3)
            assert row == int(shape.y / scene.height * 3)
            assert column == int(shape.x / scene.width * 3)


def test_shapes_keep_apart_and_inside() -> None:
    for seed in SEEDS:
        scene = sample_scene(random.Random(seed), 128, 128, MAX_SHAPES)
        for index, shape in enumerate(scene.shapes):
            assert shape.radius < shape.x < 128 - shape.radius
            assert shape.radius < shape.y < 128 - shape.radius
            for other in scene.shapes[:index]:
                assert (shape.x - other.x) ** 2 + (shape.y - other.y) ** 2 > (shape.radius + other.radius) ** 2


def scene_of(*names_and_centres: tuple[str, float, float]) -> Scene:
    rng = random.Random(0)
    shapes = []
    for name, x, y in names_and_centres:
        color, kind = name.split()
        shapes.append(sample_shape(rng, kind, color, x, y, radius=12))
    return Scene(120, 120, (255, 255, 255), COLOR_NAMES, tuple(shapes))


def test_answers_about_a_known_scene() -> None:
    scene = scene_of(("red circle", 20, 20), ("red star", 60, 60), ("blue circle", 100, 100))
    answers: dict[str, str] = {}
    for seed in range(600):
        for ask in (ask_count, ask_place, ask_relation):
            turn = ask(scene, random.Random(seed))
            if turn is not None:
                answers[turn.question] = turn.answer
    assert answers["How many red shapes are there?"] == "There are 2 red shapes."
    assert answers["How many circles are there?"] == "There are 2 circles."
    assert answers["How many blue circles are there?"] == "There is 1 blue circle."
    assert answers["Count the shapes."] == "There are 3 shapes."
    assert answers["Where is the red star?"] == "The red star is in the center."
    assert answers["Where is the blue circle?"] == "The blue circle is at the bottom right."
    assert answers["Is the red circle left of the red star?"] == "Yes, it is."
    assert answers["Is the red circle below the blue circle?"] == "No, it is not."


def test_a_pair_differs_as_its_change_says() -> None:
    changes = set()
    for seed in range(120):
        pair = sample_pair(random.Random(seed), 128, 128)
        before, after = ({shape.name for shape in scene.shapes} for scene in (pair.first, pair.second))
        sizes = len(pair.first.shapes), len(pair.second.shapes)
        if pair.change == "Nothing changed.":
            assert pair.first == pair.second
        elif "added" in pair.change:
            assert sizes[1] == sizes[0] + 1
            assert (after - before).pop() in pair.change.lower()
        elif "removed" in pair.change:
            assert sizes[1] == sizes[0] - 1
            assert (before - after).pop() in pair.change
        elif "moved" in pair.change:
            assert before == after
            assert pair.first != pair.second
        else:
            assert (before - after).pop() in pair.change
            assert set((after - before).pop().split()) & set(pair.change.rstrip(".").split())
        changes.add(pair.change.split()[-2])
    assert len(changes) > 4


def test_chart_values_are_bar_heights() -> None:
    """A bar's top edge stands at its value on the scale that the chart has."""
    for seed in SEEDS:
        rng = random.Random(seed)
        chart = sample_chart(rng, 160, 160, "held_out")
        pixels = chart.render(random.Random(1)).astype(int)
        pitch = (160 - 6 - 28) / len(chart.values)
        for index, value in enumerate(chart.values):
            column = pixels[10:140, int(28 + (index + 0.5) * pitch)]
            colored = np.abs(column - chart.rgbs[index]).max(axis=1) < 45
            assert colored.sum() == pytest.approx(value / chart.top * 130, abs=3)
        table = ask_table(chart, rng)
        assert table is not None
        assert json.loads(table.answer) == dict(zip(chart.labels, chart.values, strict=True))
        turn = ask_value(chart, rng)
        assert turn is not None
        if turn.skill == "chart":
            label, value_said = turn.answer.rstrip(".").split()[-3], int(turn.answer.rstrip(".").split()[-1])
            assert json.loads(table.answer)[label] == value_said


def test_clips_move_and_blink_as_told() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        clip = sample_clip(rng, 96, 96, 12)
        for actor in clip.actors:
            if actor.direction:
                signs = tuple(int(np.sign(round(step, 6))) for step in actor.step)
                assert signs == DIRECTIONS[actor.direction]
            runs = "".join("x" if seen else " " for seen in actor.visible).split()
            assert actor.blinks == len(runs) - 1
            assert actor.visible[0]
            assert actor.visible[-1]
        for ask in (ask_motion, ask_blinks):
            turn = ask(clip, rng)
            assert turn is not None
            actor = next(actor for actor in clip.actors if actor.shape.name in turn.answer)
            said_still = "does not" in turn.answer
            assert said_still == (not (actor.direction if turn.skill == "motion" else actor.blinks))


def test_a_clip_is_blank_where_its_only_actor_is_hidden() -> None:
    for seed in range(200):
        clip = sample_clip(random.Random(seed), 96, 96, 12)
        if len(clip.actors) == 1 and clip.actors[0].blinks:
            frames = clip.render(random.Random(0))
            shown = [bool((frame != frames[0, 0, 0]).any()) for frame in frames]
            assert tuple(shown) == clip.actors[0].visible
            return
    raise AssertionError("no clip with one blinking actor in 200 seeds")


def test_text_is_never_cut_off_and_is_what_the_answer_says() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        page = sample_page(rng, 192, 96, "held_out")
        turn = ask_text(page, rng)
        assert turn is not None
        assert turn.answer == f'It says "{page.text}".'
        pixels = page.render(random.Random(0)).astype(int)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert np.abs(edge - page.background).max() < 60, page.text


def test_texts_have_a_case_that_can_be_seen() -> None:
    for seed in range(500):
        text = sample_text(random.Random(seed), 8)
        assert 1 <= len(text) <= 8
        if text.isalpha() and text.islower():
            assert not set(text) <= set("cosuvwxz")


def test_spoken_digits_are_the_words_in_order(source: Source) -> None:
    assert source.bank is not None
    for seed in SEEDS:
        rng = random.Random(seed)
        sound = sample_sound(rng, source.bank, kind="digits")
        turn = ask_digits(sound, rng)
        assert turn is not None
        assert turn.answer == f"The digits are {' '.join(str(DIGITS.index(word)) for word in sound.content)}."
        assert len(sound.waveform) <= MAX_SECONDS * SAMPLE_RATE
        assert sound.waveform.dtype == np.float32
        assert np.abs(sound.waveform).max() <= 1


@pytest.mark.parametrize(("low", "high", "name"), [(150, 330, "low"), (600, 1000, "medium"), (1900, 3600, "high")])
def test_a_tone_has_the_pitch_of_its_name(low: float, high: float, name: str, source: Source) -> None:
    assert source.bank is not None
    sounds = [sample_sound(random.Random(seed), source.bank, kind="tone") for seed in SEEDS]
    for sound in (sound for sound in sounds if sound.content == (name,)):
        spectrum = np.abs(np.fft.rfft(sound.waveform))
        hertz = spectrum.argmax() * SAMPLE_RATE / len(sound.waveform)
        assert low - 5 < hertz < high + 5


def test_no_voice_is_on_both_sides() -> None:
    timbres = [{voice.split("+")[1] for voice in voices_of(split)} for split in ("train", "held_out")]
    assert not timbres[0] & timbres[1]


def test_mu_law_keeps_speech_to_three_percent() -> None:
    samples = np.linspace(-1, 1, 999, dtype=np.float32)
    np.testing.assert_allclose(decode_mu_law(encode_mu_law(samples)), samples, atol=1e-4, rtol=0.03)


def test_resampling_keeps_a_line() -> None:
    line = np.linspace(0, 1, 100, dtype=np.float32)
    half = resample(line, 0.5)
    assert len(half) == 50
    np.testing.assert_allclose(half, line[::2], atol=1e-6)


def test_colors_can_be_told_apart_from_their_backdrop() -> None:
    for seed in SEEDS:
        backdrop = sample_backdrop(random.Random(seed))
        for color in backdrop.colors:
            for anchor in COLORS[color]:
                assert max(abs(a - b) for a, b in zip(anchor, backdrop.rgb, strict=True)) > 25


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_can_be_drawn(kind: str, rng: random.Random) -> None:
    from PIL import Image, ImageDraw

    canvas = Image.new("RGB", (64, 64), (255, 255, 255))
    draw_shape(ImageDraw.Draw(canvas), sample_shape(rng, kind, "red", 32, 32, 20), (255, 255, 255))
    painted = (np.asarray(canvas) != 255).any(axis=-1).mean()
    assert 0.08 < painted < 0.4


def test_words_of_the_catalog() -> None:
    assert plural("cross") == "crosses"
    assert counted(0, "red star") == "no red stars"
    assert counted(1, "red star") == "1 red star"
    assert listed(["a", "b", "c"]) == "a, b and c"

"""The bundled checkpoint: loads in transformers with its own files, and answers items that it never saw.

Pictures and clips come from a held-out seed, texts are set in a held-out font (Pillow's own), and the words are spoken
by a held-out voice, which ``spoken_words.npz`` holds.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors import safe_open

from training.answering import NetworkAnswerer, SensoriumAnswerer, TransformersAnswerer
from training.encoding import MODEL_FOLDER
from training.evaluate import held_out_items
from training.network import Thinker
from training.speech import SpeechBank
from training.worlds import SKILLS, Source

ITEMS = 6
# Right answers of `ITEMS` that must be reached; what the model reaches over many items is in training/README.md.
LEAST = dict.fromkeys(SKILLS, ITEMS) | {"reading": 5, "digits": 5, "words": 5}


@pytest.fixture(scope="module")
def held_out() -> Source:
    return Source("held_out", SpeechBank.load(Path(__file__).parent / "spoken_words.npz"))


@pytest.fixture(scope="module")
def answerer() -> TransformersAnswerer:
    return TransformersAnswerer(MODEL_FOLDER)


@pytest.mark.parametrize("skill", LEAST)
def test_held_out_items_are_answered(skill: str, held_out: Source, answerer: TransformersAnswerer) -> None:
    items = list(held_out_items(skill, ITEMS, held_out))
    answers = answerer.answers(items)
    right = [item.turns[0].answer for item in items]
    wrong = [(expected, got) for expected, got in zip(right, answers, strict=True) if expected != got]
    assert ITEMS - len(wrong) >= LEAST[skill], wrong


def test_one_forward_pass_judges_as_generation_does(held_out: Source, answerer: TransformersAnswerer) -> None:
    items = [item for skill in ("counting", "chart", "digits") for item in held_out_items(skill, 4, held_out)]
    expected = [item.turns[0].answer for item in items]
    generated, predicted = answerer.answers(items), NetworkAnswerer(MODEL_FOLDER).answers(items)
    right = [answer == reference for answer, reference in zip(generated, expected, strict=True)]
    assert [answer == reference for answer, reference in zip(predicted, expected, strict=True)] == right
    assert True in right


def test_sensorium_answers_as_transformers_does(held_out: Source, answerer: TransformersAnswerer) -> None:
    """Right or wrong: the same words, with all items in one batch."""
    items = [item for skill in SKILLS for item in held_out_items(skill, 2, held_out)]
    engine = SensoriumAnswerer(MODEL_FOLDER, num_blocks=2048)
    assert engine.answers(items) == answerer.answers(items)


def test_int8_weights_answer_as_well(held_out: Source) -> None:
    """Every skill, and so every tower; one answer in fifty may turn on a rounding."""
    items = [item for skill in SKILLS for item in held_out_items(skill, 4, held_out)]
    expected = [item.turns[0].answer for item in items]
    right = [
        sum(a == b for a, b in zip(engine.answers(items), expected, strict=True))
        for engine in (
            SensoriumAnswerer(MODEL_FOLDER, num_blocks=2048),
            SensoriumAnswerer(MODEL_FOLDER, num_blocks=2048, device="cpu", quantization="int8"),
        )
    ]
    assert right[1] >= right[0] - 1


def test_the_weights_fit_the_network_and_the_limit() -> None:
    path = MODEL_FOLDER / "model.safetensors"
    assert sum(file.stat().st_size for file in MODEL_FOLDER.iterdir()) <= 16_000_000
    shapes = {name: tuple(tensor.shape) for name, tensor in Thinker().state_dict().items()}
    with safe_open(path, "pt") as file:
        assert {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()} == shapes  # noqa: SIM118


def test_the_model_folder_is_complete() -> None:
    names = {file.name for file in MODEL_FOLDER.iterdir()}
    assert names >= {
        *("README.md", "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"),
        *("preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json"),
    }

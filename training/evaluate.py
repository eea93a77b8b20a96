"""Accuracy by skill on held-out items: ``python -m training.evaluate``.

Items come from another seed than training, set in other fonts and spoken by other voices. An answer counts if it is
the reference answer, letter by letter. The table has a column per engine: Hugging Face transformers and Sensorium, and
``sensorium-int8`` with weights quantized at load.
``--engines network`` gives the same figures sooner, by one forward pass of the training network per item.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from training.answering import Answerer, NetworkAnswerer, SensoriumAnswerer, TransformersAnswerer
from training.dialogue import Item
from training.encoding import MODEL_FOLDER
from training.speech import SpeechBank
from training.worlds import SKILLS, Source, layout_of, sample_item

SEED = "held out"
# Where a skill's questions come up, so that sampling for a skill need not try every world.
_WORLDS_OF = {
    "scene": ("scene",),
    "counting": ("scene",),
    "compare": ("pair",),
    "reading": ("page",),
    "chart": ("chart",),
    "motion": ("clip",),
    "blinking": ("clip",),
    "digits": ("sound",),
    "words": ("sound",),
    "sounds": ("sound",),
    "absent": ("scene", "page", "chart", "clip", "sound", "none"),
    "json": ("scene", "page", "chart", "clip", "sound"),
}
_ENGINES: dict[str, Callable[[Path], Answerer]] = {
    "transformers": TransformersAnswerer,
    "sensorium": SensoriumAnswerer,
    "sensorium-int8": partial(SensoriumAnswerer, quantization="int8"),
    "network": NetworkAnswerer,
}
_CHUNK = 64


def held_out_items(skill: str, count: int, source: Source) -> Iterator[Item]:
    """The first ``count`` held-out items of a skill: always the same ones for the same fonts and voices."""
    rng = random.Random(f"{SEED} {skill}")
    for _ in range(count):
        layout = layout_of(rng.choice(_WORLDS_OF[skill]), rng)
        yield sample_item(rng, layout, source, num_turns=1, skills=(skill,))


def accuracy(answerer: Answerer, items: Sequence[Item]) -> float:
    """Share of items that are answered exactly."""
    answers = answerer.answers(items)
    return sum(answer == item.turns[0].answer for answer, item in zip(answers, items, strict=True)) / len(items)


def main() -> None:
    """Evaluate every skill with every engine and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER)
    parser.add_argument("--bank", type=Path, default=Path(".assets/speech_held_out.npz"))
    parser.add_argument("--items", type=int, default=500, help="items per skill")
    parser.add_argument("--skills", nargs="+", choices=SKILLS, default=SKILLS)
    parser.add_argument("--engines", nargs="+", choices=tuple(_ENGINES), default=("transformers", "sensorium"))
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    source = Source("held_out", SpeechBank.load(arguments.bank))
    answerers: dict[str, Answerer] = {name: _ENGINES[name](arguments.model) for name in arguments.engines}
    table: dict[str, dict[str, float]] = {}
    print(f"{'skill':<12}" + "".join(f"{name:>16}" for name in answerers))
    for skill in arguments.skills:
        items = list(held_out_items(skill, arguments.items, source))
        table[skill] = {name: _chunked_accuracy(answerer, items, skill) for name, answerer in answerers.items()}
        print(f"{skill:<12}" + "".join(f"{100 * share:>14.1f} %" for share in table[skill].values()), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"items": arguments.items, "accuracy": table}, indent=2) + "\n")


def _chunked_accuracy(answerer: Answerer, items: Sequence[Item], skill: str) -> float:
    """Accuracy with a progress bar: items go to the engine in chunks."""
    right = 0.0
    for start in tqdm(range(0, len(items), _CHUNK), desc=skill, leave=False):
        chunk = items[start : start + _CHUNK]
        right += accuracy(answerer, chunk) * len(chunk)
    return right / len(items)


if __name__ == "__main__":
    main()

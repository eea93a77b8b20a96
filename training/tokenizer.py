"""The demo model's tokenizer: byte-level BPE in which printed text falls into single characters.

A word is one token only where a sentence puts it: after a space, or at the start of a line. Everything else, such as
what stands between quotes, is cut into characters, so that reading an unknown text is spelling it. Any text can be
written: what no merge covers are bytes.

``python -m training.tokenizer FOLDER`` trains it on questions and answers of the generator.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from training.blueprint import SPECIAL_TOKENS, VOCAB_SIZE

# A JSON key with its colon | the first word of a line | a word after a space | one character.
_PIECES = r""""[a-z_]+":|(?<![^\n])[A-Za-z]+\n?| [a-z]+|[\s\S]"""


def new_tokenizer() -> Tokenizer:
    """An untrained tokenizer with the pieces described above."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_tokenizer(texts: Iterator[str]) -> Tokenizer:
    """Learn the merges from ``texts``; the vocabulary has exactly ``VOCAB_SIZE`` entries or fewer."""
    tokenizer = new_tokenizer()
    trainer = BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def corpus(bank: Path, seed: int = 0, items_per_world: int = 3000) -> Iterator[str]:
    """Questions and answers of the generator, and the frame of the chat template."""
    from training.speech import SpeechBank
    from training.worlds import WORLD_WEIGHTS, Source, layout_of, sample_item

    rng = random.Random(seed)
    source = Source("train", SpeechBank.load(bank))
    for world in WORLD_WEIGHTS:
        for _ in range(items_per_world):
            item = sample_item(rng, layout_of(world, rng), source, num_turns=2)
            yield from (f"system\n{item.system}",) if item.system else ()
            for turn in item.turns:
                yield f"user\n{turn.question}"
                yield f"assistant\n{turn.answer}"
                yield turn.question
                yield turn.answer


def main() -> None:
    """Train the tokenizer and write ``tokenizer.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--bank", type=Path, default=Path(".assets/speech_train.npz"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    train_tokenizer(corpus(arguments.bank)).save(str(arguments.folder / "tokenizer.json"))


if __name__ == "__main__":
    main()

"""The tokenizer: any text comes back, words of sentences are whole, printed text is spelled."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.blueprint import SPECIAL_TOKENS, TOKEN_ID, VOCAB_SIZE
from training.encoding import IGNORE, encode_item, num_audio_tokens, tokenizer
from training.tokenizer import new_tokenizer, train_tokenizer
from training.worlds import WORLD_WEIGHTS, Source, layout_of, sample_item


@given(st.text())
def test_any_text_comes_back(text: str) -> None:
    ids = tokenizer().encode(text).ids
    assert tokenizer().decode(ids, skip_special_tokens=False) == text


def test_special_tokens_have_the_ids_of_the_config() -> None:
    for token in SPECIAL_TOKENS:
        assert tokenizer().encode(token).ids == [TOKEN_ID[token]]
    assert tokenizer().get_vocab_size() <= VOCAB_SIZE


def test_words_of_a_sentence_are_tokens_and_quoted_text_is_letters() -> None:
    assert tokenizer().encode("There are 3 red circles.").tokens == ["There", "Ġare", "Ġ", "3", "Ġred", "Ġcircles", "."]
    quoted = tokenizer().encode('It says "circles".').tokens
    assert quoted[4:-2] == list("circles")


def test_training_it_again_gives_the_same_merges() -> None:
    texts = ["There are two red circles.", "user\nWhere is the star?", '{"count": 3}'] * 3
    first, second = (train_tokenizer(iter(texts)).to_str() for _ in range(2))
    assert first == second != new_tokenizer().to_str()


@pytest.mark.parametrize("world", WORLD_WEIGHTS)
def test_labels_are_the_answers_and_nothing_else(world: str, rng: random.Random, source: Source) -> None:
    item = sample_item(rng, layout_of(world, rng), source, num_turns=3)
    encoded = encode_item(item)
    answers = encoded.labels[encoded.labels != IGNORE].tolist()
    text = tokenizer().decode(answers, skip_special_tokens=False)
    assert text == "".join(f"{turn.answer}<|im_end|>" for turn in item.turns)
    assert encoded.positions.shape == (3, len(encoded.input_ids))


def test_rows_of_a_sound() -> None:
    """A second has 100 frames: 50 after the convolution, 25 after pooling."""
    assert num_audio_tokens(16_000) == 25
    assert num_audio_tokens(16_001) == 25
    assert num_audio_tokens(16_000 + 4 * 160) == 26

"""Outputs drawn by chance from what masks allow, without a model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
from llguidance import LLTokenizer

from sensorium.anonymous_file import anonymous_file
from sensorium.grammar.mask_server import MaskServer
from sensorium.grammar.matchers import compile_grammar
from sensorium.grammar.messages import AddRow, AppendToken, RowUpdates
from sensorium.grammar.row_matcher import RowMatcher
from sensorium.grammar.store import GrammarStore
from sensorium.grammar.vocabulary import index_vocabulary
from sensorium.inputs.vocabulary import vocabulary_of
from sensorium.structured_outputs import StructuredOutputs
from sensorium.token_masks import MaskMemory, RowFailure, RowState


def index_of(tokenizer: Any, num_padding: int = 0) -> LLTokenizer:
    """The index over a Hugging Face tokenizer's vocabulary, with ids behind it that have no token."""
    return index_vocabulary(vocabulary_of(tokenizer, (), len(tokenizer) + num_padding))


def row_of(form: StructuredOutputs, index: LLTokenizer) -> RowMatcher:
    return RowMatcher(form, index, compile_grammar(form, index))


class Rows:
    """A mask server in this process."""

    def __init__(self, index: LLTokenizer, num_slots: int = 4, end_token_ids: tuple[int, ...] = ()) -> None:
        self.store = GrammarStore(index)
        fd = anonymous_file(size_bytes=MaskMemory.size_bytes(num_slots, index.vocab_size))
        self.memory = MaskMemory(fd, num_slots, index.vocab_size)
        self.server = MaskServer(self.store, self.memory, end_token_ids)
        self._number = 0

    def update(self, *updates: Any) -> dict[int, RowFailure]:
        self._number += 1
        done = self.server.apply(RowUpdates(self._number, list(updates)))
        assert done.number == self._number
        return done.failures

    def add(self, slot: int, form: StructuredOutputs, token_ids: tuple[int, ...] = (), **options: bool) -> None:
        self.store.load(form)
        assert self.update(AddRow(slot, form, list(token_ids), options.get("hides_end", False))) == {}

    def append(self, slot: int, token_id: int) -> None:
        assert self.update(AppendToken(slot, token_id)) == {}

    def state(self, slot: int) -> RowState:
        return RowState(self.memory.states[slot])

    def allowed(self, slot: int) -> list[int]:
        bits = np.unpackbits(self.memory.masks[slot].view(np.uint8), bitorder="little")
        return np.flatnonzero(bits).tolist()

    def walk(self, slot: int, rng: random.Random, ends: set[int], max_tokens: int = 400) -> list[int] | None:
        """Tokens up to the end of the output; None if it hasn't ended by then."""
        token_ids: list[int] = []
        while len(token_ids) < max_tokens:
            if self.state(slot) is RowState.COMPLETE:
                return token_ids
            assert self.state(slot) is RowState.HELD
            token_id = rng.choice(self.allowed(slot))
            if token_id in ends:
                return token_ids
            token_ids.append(token_id)
            self.append(slot, token_id)
        return None

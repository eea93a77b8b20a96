"""What a reader walks who follows one picture from the chat route to the encoder."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.helpers.request_walk import rooms_of, walk

MAX_FILES = 60
RETURNS = {
    "engine": "its front part hands requests over, its core takes them in",
    "inputs": "media are decoded before a thread is taken for the rest",
    "media": "fetched while the chat is rendered, decoded once the request has a place",
    "model_executor": "the model's file says what its prompts and pictures become, and has the encoder",
}
"""Rooms that the way comes back to, once each, and why."""
MAX_KINDS = 8


@pytest.mark.parametrize("family", ["llava", "qwen2_vl"])
def test_a_picture_passes_few_files_and_comes_back_to_a_room_at_most_once(family: str) -> None:
    """It went back and forth between two rooms that imported each other, and its reader read both over and over.

    Of a model with a mapper of its own, three rooms were come back to twice.
    """
    way = walk(family)
    assert len(way.files) <= MAX_FILES
    visits = [room for room, _ in rooms_of(way.files)]
    assert visits[0] == "entrypoints"
    assert visits[-1] == "model_executor"
    assert {"chat", "media", "engine", "inputs", "multimodal", "scheduler", "executor", "worker"} <= set(visits)
    counts = Counter(visits)
    assert max(counts.values()) <= 2, rooms_of(way.files)
    assert {room for room, count in counts.items() if count > 1} <= RETURNS.keys(), rooms_of(way.files)
    assert len(way.kinds) <= MAX_KINDS, sorted(way.kinds)

"""What a reader walks who follows one picture from the chat route to the encoder."""

from __future__ import annotations

from collections import Counter

from tests.helpers.request_walk import rooms_of, walk

MAX_FILES = 60


def test_a_picture_passes_few_files_and_comes_back_to_a_room_at_most_once() -> None:
    """It went back and forth between two rooms that imported each other, and its reader read both over and over."""
    way = walk()
    assert len(way) <= MAX_FILES
    visits = [room for room, _ in rooms_of(way)]
    assert visits[0] == "entrypoints"
    assert visits[-1] == "model_executor"
    assert {"chat", "media", "engine", "inputs", "multimodal", "scheduler", "executor", "worker"} <= set(visits)
    assert max(Counter(visits).values()) <= 2, rooms_of(way)

"""Recorded passes without a GPU: what a graph reads and writes is the same, only launching is not."""

from __future__ import annotations

from collections.abc import Callable


class HostReplay:
    """Records by remembering the function. Everything that it reads lies in fixed places, as for a graph."""

    def __init__(self) -> None:
        self.num_replays = 0

    def record(self, run: Callable[[], None]) -> Callable[[], None]:
        run()

        def replay() -> None:
            self.num_replays += 1
            run()

        return replay

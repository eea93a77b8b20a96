"""Passes answers between two threads: the event loop has a thread of its own, the terminal the main thread.

So a line can be read and edited while the engine's loop goes on, and Ctrl-C stops an answer and nothing else.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Coroutine, Iterator
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from sensorium.entrypoints.chat.backends import Backend, Piece
from sensorium.entrypoints.chat.conversation import Messages

_STOP_TIMEOUT_S = 5.0
_T = TypeVar("_T")


class LoopThread:
    """An event loop in a thread, from `__init__` to `close`."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="sensorium-chat", daemon=True)
        self._thread.start()

    def call(self, work: Coroutine[Any, Any, _T]) -> _T:
        """Run something to its end and return what it returns. An interrupt cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def answer(self, backend: Backend, messages: Messages) -> Iterator[Piece]:
        """Pieces of an answer as they arrive. Closing the iterator stops the answer. Raises what the backend raises."""
        pieces: queue.SimpleQueue[Piece | Exception | None] = queue.SimpleQueue()

        async def pump() -> None:
            try:
                async with aclosing(backend.stream(messages)) as stream:  # type: ignore[type-var]
                    async for piece in stream:
                        pieces.put(piece)
            except Exception as error:  # noqa: BLE001  raised where the pieces are read
                pieces.put(error)
            else:
                pieces.put(None)

        future = asyncio.run_coroutine_threadsafe(pump(), self._loop)
        try:
            while (piece := pieces.get()) is not None:
                if isinstance(piece, Exception):
                    raise piece
                yield piece
        finally:
            future.cancel()

    def close(self) -> None:
        """Cancel what still runs, then stop the loop."""
        with suppress(TimeoutError):
            asyncio.run_coroutine_threadsafe(_end_all(), self._loop).result(_STOP_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)
        if not self._thread.is_alive():
            self._loop.close()


async def _end_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)
    await asyncio.get_running_loop().shutdown_default_executor()

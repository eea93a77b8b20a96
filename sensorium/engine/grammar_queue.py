"""Requests whose grammar is being compiled: they wait outside the scheduler's waiting queue, so that no other request
waits behind them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future

from sensorium.errors import SensoriumError
from sensorium.logger import get_logger
from sensorium.messages import EngineRequest
from sensorium.structured_outputs import StructuredOutputs

logger = get_logger(__name__)


class GrammarQueue:
    """Invariant: a request is here from `add` until `take_ready` returns it or `abort` names it."""

    def __init__(self, compile_grammar: Callable[[StructuredOutputs], Future[None]]) -> None:
        self._compile_grammar = compile_grammar
        self._waiting: dict[str, tuple[EngineRequest, Future[None]]] = {}
        self._has_news = threading.Event()

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._waiting

    def add(self, request: EngineRequest) -> None:
        """Have the request's grammar compiled."""
        grammar = request.sampling_params.structured_outputs
        assert grammar is not None
        future = self._compile_grammar(grammar)
        self._waiting[request.request_id] = (request, future)
        future.add_done_callback(lambda _: self._has_news.set())

    def abort(self, request_ids: Iterable[str]) -> list[str]:
        """Forget requests; returns which of these were here."""
        found = [request_id for request_id in request_ids if request_id in self._waiting]
        for request_id in found:
            self._waiting.pop(request_id)[1].cancel()
        return found

    def take_ready(self) -> Iterator[tuple[EngineRequest, SensoriumError | None]]:
        """Requests whose grammar is compiled, in the order in which they came, or what is wrong with it."""
        if not self._has_news.is_set():
            return
        self._has_news.clear()
        for request_id, (request, future) in list(self._waiting.items()):
            if future.done():
                del self._waiting[request_id]
                yield request, _error_of(future)

    def wait(self, timeout_s: float) -> None:
        """Return when a grammar is done, or after a while."""
        self._has_news.wait(timeout_s)


def _error_of(future: Future[None]) -> SensoriumError | None:
    error = future.exception()
    if error is None or isinstance(error, SensoriumError):
        return error
    logger.error("compiling a grammar failed", exc_info=error)
    return SensoriumError("The engine could not compile structured_outputs. Send the request again.")

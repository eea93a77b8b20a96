"""Compiles grammars without making anyone wait: a thread that talks to the grammar processes, and futures.

Starts the processes when the first grammar comes, and again if they end. What is known of a grammar, good or bad, is
remembered, so that a repeated one costs one message.
"""

from __future__ import annotations

import itertools
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, Pipe, wait

import msgspec

from sensorium.errors import InvalidRequestError, OverloadedError, SensoriumError, UnsupportedFeatureError
from sensorium.grammar.messages import NO_CHECK, CancelCheck, CheckGrammar, LoadGrammar, Verdict
from sensorium.grammar.service import GrammarService
from sensorium.logger import get_logger
from sensorium.messages import Vocabulary
from sensorium.structured_outputs import FIELD, StructuredOutputs

logger = get_logger(__name__)

_MAX_REMEMBERED = 1024
MAX_OPEN = 256
"""Grammars that may be compiled at once, or wait for it."""
_FAILED = "The engine could not compile structured_outputs. Send the request again."


@dataclass(slots=True, eq=False)
class _Job:
    """A grammar that is being compiled, and who waits for it."""

    check_id: int
    grammar: StructuredOutputs
    futures: list[Future[None]] = field(default_factory=list)
    is_loading: bool = False


class GrammarCompiler:
    """One pair of grammar processes at a time. `compile` may be called from any thread."""

    def __init__(self, num_rows: int, deadline_s: float) -> None:
        """`num_rows`: masks that there may be at once. `deadline_s`: most seconds that a compile takes."""
        self._num_rows = num_rows
        self._deadline_s = deadline_s
        self._vocabulary: Vocabulary | None = None
        self.service: GrammarService | None = None
        """The processes that compiled grammars are in; None before the first and after they ended."""
        self._thread: threading.Thread | None = None
        self._waking: Connection | None = None
        self._woken: Connection | None = None
        self._incoming: deque[tuple[StructuredOutputs, Future[None]] | None] = deque()
        self._ids = itertools.count(NO_CHECK + 1)
        self._service_ids = itertools.count(1)
        self._jobs: dict[StructuredOutputs, _Job] = {}
        self._known: OrderedDict[StructuredOutputs, Verdict] = OrderedDict()
        self._unsupported: str | None = None
        """Why no output can be held to any grammar."""
        self._is_closing = False

    def use_vocabulary(self, vocabulary: Vocabulary) -> None:
        """Say what tokens outputs consist of; once, before the first grammar."""
        if self._vocabulary is None:
            self._vocabulary = vocabulary

    def compile(self, grammar: StructuredOutputs) -> Future[None]:
        """Resolves once rows may be held to the grammar; cancelling gives it up.

        The future raises:
            InvalidRequestError: The grammar means nothing, or takes too much.
            OverloadedError: Too many grammars wait.
            UnsupportedFeatureError: No grammar can be held to with this tokenizer.
        """
        future: Future[None] = Future()
        if self._vocabulary is None:
            future.set_exception(
                UnsupportedFeatureError(
                    "got some, but the engine has no tokenizer, expected one. Load the model with "
                    "its tokenizer, or remove structured_outputs.",
                    field="structured_outputs",
                )
            )
            return future
        future.add_done_callback(self._wake_if_cancelled)
        self._incoming.append((replace(grammar, start_after=None), future))
        self._start()
        self._wake()
        return future

    def drop(self, service: GrammarService) -> None:
        """Give up processes that don't answer as they should."""
        if self.service is service:
            self.service = None
            self._incoming.append(None)
            threading.Thread(target=service.close, name="sensorium-grammar-close", daemon=True).start()
            self._wake()

    def close(self) -> None:
        """End the processes and the thread."""
        self._is_closing = True
        if self._thread is not None:
            self._wake()
            self._thread.join()
        if self.service is not None:
            self.service.close()
            self.service = None

    # The thread

    def _start(self) -> None:
        if self._thread is None:
            self._woken, self._waking = Pipe(duplex=False)
            self._thread = threading.Thread(target=self._run, name="sensorium-grammar", daemon=True)
            self._thread.start()

    def _wake(self) -> None:
        if self._waking is not None:
            self._waking.send_bytes(b"!")

    def _wake_if_cancelled(self, future: Future[None]) -> None:
        if future.cancelled():
            self._wake()

    def _run(self) -> None:
        assert self._woken is not None
        while not self._is_closing:
            service = self.service
            sources = [self._woken] if service is None else [self._woken, service.checks, service.loads]
            try:
                ready = wait(sources)
                if self._woken in ready:
                    self._woken.recv_bytes()
                    self._take_incoming()
                for source in ready:
                    if source is not self._woken and self.service is service:
                        self._take(msgspec.msgpack.decode(source.recv_bytes(), type=Verdict))  # type: ignore[union-attr]
            except (EOFError, OSError, msgspec.MsgspecError):
                self._service_ended(service)
            except Exception:
                logger.exception("compiling grammars failed")
                self._service_ended(service)
        self._end_jobs(lambda: SensoriumError(_FAILED))

    def _take_incoming(self) -> None:
        while self._incoming:
            entry = self._incoming.popleft()
            if entry is None:
                self._known.clear()
                self._end_jobs(lambda: SensoriumError(_FAILED))
            elif not entry[1].cancelled():
                self._add(*entry)
        for job in [each for each in self._jobs.values() if all(future.cancelled() for future in each.futures)]:
            del self._jobs[job.grammar]
            if self.service is not None:
                self.service.checks.send_bytes(msgspec.msgpack.encode(CancelCheck(job.check_id)))

    def _add(self, grammar: StructuredOutputs, future: Future[None]) -> None:
        job = self._jobs.get(grammar)
        if job is not None:
            job.futures.append(future)
            return
        if self._unsupported is not None:
            _fail(future, UnsupportedFeatureError(self._unsupported, field=FIELD))
            return
        known = self._known.get(grammar)
        if known is not None and known.error is not None:
            _settle(future, known)
            return
        if len(self._jobs) >= MAX_OPEN:
            _fail(
                future,
                OverloadedError(
                    f"got one more to compile while {MAX_OPEN} wait, expected fewer. Send the request again later.",
                    field="structured_outputs",
                ),
            )
            return
        job = self._jobs[grammar] = _Job(next(self._ids), grammar, [future])
        if self.service is None:
            assert self._vocabulary is not None
            service_id = next(self._service_ids)
            self.service = GrammarService(service_id, self._vocabulary, self._num_rows, self._deadline_s)
        if known is None:
            self.service.checks.send_bytes(msgspec.msgpack.encode(CheckGrammar(job.check_id, grammar)))
        else:
            self._load(job, known)

    def _load(self, job: _Job, verdict: Verdict) -> None:
        assert self.service is not None
        job.is_loading = True
        order = LoadGrammar(job.check_id, job.grammar, verdict.cost_bytes)
        self.service.loads.send_bytes(msgspec.msgpack.encode(order))

    def _take(self, verdict: Verdict) -> None:
        if verdict.check_id == NO_CHECK:
            self._unsupported = verdict.error
            self._end_jobs(lambda: UnsupportedFeatureError(verdict.error, field=FIELD))
            return
        job = next((each for each in self._jobs.values() if each.check_id == verdict.check_id), None)
        if job is None:
            return
        if not job.is_loading:
            self._remember(job.grammar, verdict)
        if verdict.error is None and not job.is_loading:
            self._load(job, verdict)
            return
        del self._jobs[job.grammar]
        for future in job.futures:
            _settle(future, verdict)

    def _remember(self, grammar: StructuredOutputs, verdict: Verdict) -> None:
        self._known[grammar] = verdict
        while len(self._known) > _MAX_REMEMBERED:
            self._known.popitem(last=False)

    def _service_ended(self, service: GrammarService | None) -> None:
        """Fail all waiting compilations; the next grammar starts new processes."""
        if service is None:
            return
        if not self._is_closing and self._unsupported is None:
            logger.error("the grammar processes have ended")
        self._known = OrderedDict((grammar, each) for grammar, each in self._known.items() if each.error is not None)
        if self.service is service:
            self.service = None
        service.close()
        self._end_jobs(lambda: SensoriumError(_FAILED))

    def _end_jobs(self, error: Callable[[], SensoriumError]) -> None:
        jobs, self._jobs = self._jobs, {}
        for job in jobs.values():
            for future in job.futures:
                _fail(future, error())


def _settle(future: Future[None], verdict: Verdict) -> None:
    if verdict.error is not None:
        _fail(future, InvalidRequestError(verdict.error, field=verdict.field, reason=verdict.reason))
    elif future.set_running_or_notify_cancel():
        future.set_result(None)


def _fail(future: Future[None], error: SensoriumError) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)

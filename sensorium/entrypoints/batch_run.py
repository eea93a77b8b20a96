"""Runs a list of prompts through an engine: preprocessing in threads ahead of the steps, results in order.

Worked example with two threads: while the engine steps the first requests, the threads decode and map the next ones'
media. At most twice `max_num_seqs` prompts are preprocessed and not yet queued, which bounds memory. An engine without
work waits a moment for more prompts than the first: see `_gather`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from sensorium.engine.llm_engine import LLMEngine
from sensorium.errors import RequestError
from sensorium.inputs.preprocess import ProcessedRequest
from sensorium.lora import LoRARequest
from sensorium.outputs import OutputKind, PoolingRequestOutput, RequestOutput
from sensorium.pooling_params import PoolingParams
from sensorium.sampling_params import SamplingParams

Output = RequestOutput | PoolingRequestOutput

_GATHER_S = 0.15
"""How long an idle engine waits for more prompts than the first."""


@dataclass(frozen=True, slots=True, eq=False)
class Job:
    """One prompt of a run. `prompt` may be a function that builds it, which then runs in a thread too."""

    prompt: Any
    params: SamplingParams
    priority: int = 0
    pooling: PoolingParams | None = None
    lora_request: LoRARequest | str | None = None


class Progress(Protocol):
    """The calls that a run makes to a progress bar."""

    def finished(self, output: Output) -> None:
        """A request ended."""

    def close(self) -> None:
        """The run ended."""


class BatchRun:
    """One call of `LLM.generate`. Used once."""

    def __init__(
        self, engine: LLMEngine, jobs: Sequence[Job], *, num_threads: int, prefix: str, progress: Progress | None
    ) -> None:
        self._engine = engine
        self._jobs = jobs
        self._num_threads = max(num_threads, 1)
        self._prefix = prefix
        self._progress = progress
        self._lookahead = 2 * engine.config.scheduler_config.max_num_seqs
        self._pending: deque[tuple[int, Future[ProcessedRequest]]] = deque()
        self._results: dict[int, Output] = {}
        self._errors: dict[int, RequestError] = {}

    def run(self) -> list[Output | RequestError]:
        """Finish every job. The result of a bad job is its error; the others are not affected.

        Raises:
            EngineDeadError: The engine can't go on.
        """
        with self._pool() as submit:
            next_job = 0
            while len(self._results) + len(self._errors) < len(self._jobs):
                while next_job < len(self._jobs) and len(self._pending) < self._lookahead:
                    self._pending.append((next_job, submit(next_job)))
                    next_job += 1
                if self._pending and not self._engine.has_unfinished_requests():
                    self._gather()
                self._queue_ready()
                if self._engine.has_unfinished_requests():
                    self._step()
        if self._progress is not None:
            self._progress.close()
        return [self._results[i] if i in self._results else self._errors[i] for i in range(len(self._jobs))]

    @contextmanager
    def _pool(self) -> Iterator[Callable[[int], Future[ProcessedRequest]]]:
        pool = ThreadPoolExecutor(self._num_threads, thread_name_prefix="sensorium-preprocess")
        try:
            yield lambda index: pool.submit(self._preprocess, index)
        except BaseException:
            self._abort_all()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _preprocess(self, index: int) -> ProcessedRequest:
        job = self._jobs[index]
        prompt = job.prompt() if callable(job.prompt) else job.prompt
        return self._engine.preprocess(
            *(self._request_id(index), prompt, job.params),
            priority=job.priority,
            pooling=job.pooling,
            lora_request=job.lora_request,
        )

    def _request_id(self, index: int) -> str:
        return f"{self._prefix}-{index}"

    def _queue_ready(self) -> None:
        """Queue preprocessed jobs in order; stop at the first that isn't ready."""
        while self._pending and self._pending[0][1].done():
            index, future = self._pending.popleft()
            try:
                self._engine.add_processed(future.result(), OutputKind.FINAL_ONLY)
            except RequestError as error:
                self._errors[index] = error

    def _step(self) -> None:
        for output in self._engine.step():
            if output.finished:
                self._results[int(output.request_id.rsplit("-", 1)[1])] = output
                if self._progress is not None:
                    self._progress.finished(output)

    def _gather(self) -> None:
        """Wait for a prompt, and then for a moment until as many are there as run at once.

        A step takes about as long for one request as for many, and the threads that prepare prompts are slowed down by
        the steps as much as these are by them. What fills a step isn't known: most of a prompt may be cached.
        """
        wait([self._pending[0][1]])
        deadline = time.monotonic() + _GATHER_S
        for _, future in list(self._pending)[: self._engine.config.scheduler_config.max_num_seqs]:
            if wait([future], deadline - time.monotonic()).not_done:
                return

    def _abort_all(self) -> None:
        done = self._results.keys() | self._errors.keys()
        self._engine.abort_request([self._request_id(i) for i in range(len(self._jobs)) if i not in done])

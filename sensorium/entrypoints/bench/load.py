"""The load generator: sends prepared requests at planned times and measures the answers.

Everything that can be prepared before the clock starts is: bodies are bytes, and repeated media are held once. The
generator's own cost is measured and reported, so that it isn't mistaken for the server's.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np

from sensorium.config import Count
from sensorium.entrypoints.bench.events import Sample, StreamedAnswer
from sensorium.entrypoints.bench.http_client import BrokenAnswerError, HttpClient
from sensorium.settings import Bounds, check_settings

UNFINISHED = "not finished in time"


@dataclass(frozen=True, kw_only=True)
class Arrivals:
    """When requests are sent."""

    streams: Count | None = None
    """Requests in flight: as one ends the next is sent [16]. With a rate: most in flight at once; none by default."""
    rate: Annotated[float, Bounds(0, above=True)] | None = None
    """Requests per second at random times, instead of one after another."""
    burstiness: Annotated[float, Bounds(0, 1000)] = 1.0
    """With a rate, how irregular: 1 is a Poisson process, more comes in bursts, 0 keeps even distances. The squared
    coefficient of variation of the gaps, which follow a gamma distribution."""

    def __post_init__(self) -> None:
        check_settings(self)

    def times_s(self, count: int, seed: int) -> list[float]:
        """Seconds from the start at which each request arrives; all zero without a rate."""
        if self.rate is None:
            return [0.0] * count
        mean = 1 / self.rate
        if self.burstiness == 0:
            gaps = np.full(count, mean)
        else:
            shape = 1 / self.burstiness
            gaps = np.random.default_rng([seed, 1 << 42]).gamma(shape, mean / shape, count)
        times: list[float] = (np.cumsum(gaps) - gaps[0]).tolist()
        return times

    @property
    def max_streams(self) -> int | None:
        """Most requests in flight; None for no bound."""
        return self.streams or (16 if self.rate is None else None)


@dataclass(frozen=True, slots=True, eq=False)
class LoadResult:
    """The result of a run."""

    samples: list[Sample]
    """In the order of the requests; those that were never sent are missing at the end."""
    wall_s: float
    """From the first request's start to the last one's end."""
    cpu_s: float
    """Processor time of this program meanwhile."""
    max_lag_s: float
    """Longest delay of a send that this program caused, not counting the wait for a free stream."""


class LoadRun:
    """One run. Used once."""

    def __init__(
        self,
        client: HttpClient,
        requests: Sequence[Sequence[bytes]],
        arrivals: Arrivals,
        *,
        seed: int = 0,
        max_s: float = 600.0,
        finished: Callable[[Sample], None] | None = None,
    ) -> None:
        """`finished` is called for each request that ended; `max_s` bounds the whole run."""
        self._client = client
        self._requests = requests
        self._arrivals = arrivals
        self._seed = seed
        self._max_s = max_s
        self._finished = finished
        self._samples: list[Sample] = []
        self._max_lag_s = 0.0

    async def run(self) -> LoadResult:
        """Send everything; requests that have not ended after `max_s` fail."""
        cpu_s, start_s = time.process_time(), time.monotonic()
        try:
            async with asyncio.timeout(self._max_s):
                await (self._closed() if self._arrivals.rate is None else self._open(start_s))
        except TimeoutError:
            pass
        cpu_s = time.process_time() - cpu_s
        end_s = max((sample.end_s for sample in self._samples), default=start_s)
        return LoadResult(self._samples, end_s - start_s, cpu_s, self._max_lag_s)

    async def _closed(self) -> None:
        """As many workers as streams, each sending one request after the other."""
        waiting = iter(self._requests)

        async def work(own: Iterator[Sequence[bytes]]) -> None:
            for request in own:
                await self._send(request, self._sample(time.monotonic()))

        async with asyncio.TaskGroup() as group:
            for _ in range(min(self._arrivals.max_streams or 1, len(self._requests))):
                group.create_task(work(waiting))

    async def _open(self, start_s: float) -> None:
        """Requests at their times, whether or not earlier ones have ended."""
        bound = self._arrivals.max_streams
        free = asyncio.Semaphore(bound) if bound is not None else None
        times_s = self._arrivals.times_s(len(self._requests), self._seed)
        async with asyncio.TaskGroup() as group:
            for request, offset_s in zip(self._requests, times_s, strict=True):
                due_s = start_s + offset_s
                if (wait_s := due_s - time.monotonic()) > 0:
                    await asyncio.sleep(wait_s)
                self._max_lag_s = max(self._max_lag_s, time.monotonic() - due_s)
                group.create_task(self._send(request, self._sample(due_s), free))

    def _sample(self, start_s: float) -> Sample:
        sample = Sample(start_s)
        self._samples.append(sample)
        return sample

    async def _send(self, request: Sequence[bytes], sample: Sample, free: asyncio.Semaphore | None = None) -> None:
        answer = StreamedAnswer(sample)
        try:
            if free is not None:
                await free.acquire()
            try:
                sample.sent_s = time.monotonic()
                answer.finish(await self._client.send(request, answer.take), time.monotonic())
            finally:
                if free is not None:
                    free.release()
        except (BrokenAnswerError, OSError) as error:  # a TimeoutError of connecting included
            sample.end_s, sample.error = time.monotonic(), _reason(error)
        except asyncio.CancelledError:
            sample.end_s, sample.error = time.monotonic(), UNFINISHED
            raise
        if self._finished is not None:
            self._finished(sample)


def _reason(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if isinstance(error, BrokenAnswerError) else f"{type(error).__name__}: {text}"

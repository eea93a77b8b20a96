"""The stream of outputs that one reader of the asynchronous engine waits on. A slow reader costs memory, but doesn't
delay the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sensorium.outputs import CompletionOutput, OutputKind, PoolingRequestOutput, RequestOutput

Output = RequestOutput | PoolingRequestOutput
_T = TypeVar("_T")


class OutputStream:
    """Outputs of one request, between the engine, which never waits, and a reader, which may be slow.

    Outputs that the reader hasn't taken are joined into one.
    """

    def __init__(self, kind: OutputKind) -> None:
        self._kind = kind
        self._unread: list[Output] = []
        self._error: BaseException | None = None
        self._has_news = asyncio.Event()
        self._preparation: asyncio.Task[Any] | None = None

    async def unless_failed(self, preparation: Coroutine[Any, Any, _T]) -> _T:
        """The result of a request's preparation. `fail` ends the preparation at once, and its error is raised here."""
        task = asyncio.ensure_future(preparation)
        self._preparation = task
        if self._error is not None:
            task.cancel()
        try:
            result = await task
        except asyncio.CancelledError:
            if self._error is None:  # the reader was cancelled, and the preparation with it
                raise
        finally:
            self._preparation = None  # it would keep its result alive
        if self._error is not None:
            raise self._error
        return result

    def put(self, output: Output) -> None:
        """Give the reader an output."""
        if self._kind is not OutputKind.DELTA:
            self._unread.clear()  # each holds the whole output
        self._unread.append(output)
        self._has_news.set()

    def fail(self, error: BaseException) -> None:
        """End the stream: the reader gets the outputs so far, then the error."""
        if self._error is None:
            self._error = error
        if self._preparation is not None:
            self._preparation.cancel()
        self._has_news.set()

    async def get(self) -> Output:
        """The next output, with everything since the last one. Raises the error passed to `fail`."""
        await self._has_news.wait()
        if not self._unread:
            assert self._error is not None
            raise self._error
        unread, self._unread = self._unread, []
        if self._error is None:
            self._has_news.clear()
        return unread[0] if len(unread) == 1 else join_deltas(unread)


def join_deltas(outputs: Sequence[Output]) -> Output:
    """Joins consecutive deltas into one.

    For example, `"Hel"` and `"lo"` of output 0 become `"Hello"` of output 0.
    """
    last = outputs[-1]
    if not isinstance(last, RequestOutput):
        return last
    by_index: dict[int, list[CompletionOutput]] = {}
    prompt_logprobs = None
    for output in outputs:
        assert isinstance(output, RequestOutput)
        prompt_logprobs = output.prompt_logprobs if prompt_logprobs is None else prompt_logprobs
        for completion in output.outputs:
            by_index.setdefault(completion.index, []).append(completion)
    joined = [_join(by_index[index]) for index in sorted(by_index)]
    return replace(last, outputs=joined, prompt_logprobs=prompt_logprobs)


def _join(deltas: Sequence[CompletionOutput]) -> CompletionOutput:
    last = deltas[-1]
    if len(deltas) == 1:
        return last
    logprobs = None if last.logprobs is None else [entry for delta in deltas for entry in delta.logprobs or ()]
    return replace(
        last,
        text="".join(delta.text for delta in deltas),
        token_ids=[token_id for delta in deltas for token_id in delta.token_ids],
        logprobs=logprobs,
        text_offsets=None if logprobs is None else [offset for delta in deltas for offset in delta.text_offsets or ()],
    )

"""Runs the requests of a file through the application, several at a time, each with its own outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.routing import Route

from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.entrypoints.batch.output_file import BatchOutput
from sensorium.entrypoints.batch.records import BatchLine, Record, Response, custom_id_of, parse_line
from sensorium.entrypoints.batch.uploads import UPLOAD_PATHS, form_of
from sensorium.entrypoints.openai.errors import error_body
from sensorium.errors import EngineDeadError, InvalidRequestError, RequestError
from sensorium.media import MediaLoader

PATHS = (
    *("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses"),
    *("/rerank", "/score", "/classify", "/pooling"),
    *UPLOAD_PATHS,
)
"""Routes that a line may name, if the application has them."""
_RESTART_INTERVAL_S = 0.1


@dataclass(slots=True)
class BatchCounts:
    """How many lines had which outcome."""

    answered: int = 0
    failed: int = 0
    """Answered with an error, or not a request."""
    skipped: int = 0
    """Done by an earlier run."""


class BatchRunner:
    """One run. Used once."""

    def __init__(
        self,
        app: Starlette,
        engine: AsyncLLMEngine,
        loader: MediaLoader,
        output: BatchOutput,
        *,
        concurrency: int,
        max_line_bytes: int,
        progress: Callable[[BatchCounts], None] | None = None,
    ) -> None:
        """`loader` reads the files that lines name as uploads; `progress` is called after each line."""
        self.counts = BatchCounts()
        self._engine = engine
        self._loader = loader
        self._output = output
        self._concurrency = concurrency
        self._max_line_bytes = max_line_bytes
        self._progress = progress
        own = {route.path for route in app.routes if isinstance(route, Route)}
        self._paths = [path for path in PATHS if path in own]
        self._seen: set[str] = set()
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        self._client = httpx.AsyncClient(
            transport=transport, base_url="http://localhost", timeout=None, trust_env=False
        )

    async def run(self, lines: Iterator[tuple[int, bytes]]) -> BatchCounts:
        """Answer every line that isn't done yet. Raises `EngineDeadError` if the engine ends first."""
        reading = asyncio.Lock()

        async def work() -> None:
            while True:
                async with reading:
                    found = await asyncio.to_thread(next, lines, None)
                if found is None:
                    return
                await self._take(*found)
                if self._progress is not None:
                    self._progress(self.counts)

        try:
            async with self._client, asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(work())
        except ExceptionGroup as errors:  # with except*, Python up to 3.11.3 would raise the group again
            dead, others = errors.split(EngineDeadError)
            if dead is None or others is not None:
                raise
            raise dead.exceptions[0] from None
        return self.counts

    async def _take(self, number: int, text: bytes) -> None:
        if number in self._output.done_lines:
            self.counts.skipped += 1
            return
        try:
            line = self._parse(text)
        except InvalidRequestError as error:
            self._record(Record.refused(custom_id_of(text[: self._max_line_bytes]), number, str(error)))
            return
        if line.custom_id in self._output.done_ids:
            self.counts.skipped += 1
            return
        self._record(Record.answered(line.custom_id, await self._answer(line)))

    def _parse(self, text: bytes) -> BatchLine:
        if len(text) > self._max_line_bytes:
            raise InvalidRequestError(
                f"got more than {self._max_line_bytes} bytes, expected at most so many. Raise max_body_bytes."
            )
        line = parse_line(text)
        if line.custom_id in self._seen:
            raise InvalidRequestError(
                f"got {line.custom_id!r:.80} a second time, expected a new one.", field="custom_id"
            )
        if line.url not in self._paths:
            raise InvalidRequestError(f"got {line.url!r:.80}, expected one of {self._paths}. Change it.", field="url")
        self._seen.add(line.custom_id)
        return line

    async def _answer(self, line: BatchLine) -> Response:
        """Send a line once more if the engine's core ended while it was being answered."""
        num_restarts = self._engine.num_restarts
        response = await self._post(line)
        if response.status_code == 503 and await self._has_restarted(num_restarts):
            response = await self._post(line)
        return response

    async def _post(self, line: BatchLine) -> Response:
        try:
            content: dict[str, Any] = {"content": bytes(line.body), "headers": {"Content-Type": "application/json"}}
            if line.url in UPLOAD_PATHS:
                content = await form_of(line.body, self._loader)
        except RequestError as error:
            return Response(error.status, "", msgspec.Raw(msgspec.json.encode(error_body(error))))
        response = await self._client.post(line.url, **content)
        return Response(response.status_code, response.headers.get("x-request-id", ""), _raw(response.content))

    async def _has_restarted(self, num_restarts: int) -> bool:
        """Whether the core ended and a new one runs. Raises `EngineDeadError` if none will."""
        while not self._engine.is_running:
            if self._engine.has_ended:
                raise EngineDeadError("the engine has ended. Run the same command again to go on.")
            await asyncio.sleep(_RESTART_INTERVAL_S)
        return self._engine.num_restarts != num_restarts

    def _record(self, record: Record) -> None:
        self._output.write(record)
        if record.is_success:
            self.counts.answered += 1
        else:
            self.counts.failed += 1


def _raw(content: bytes) -> msgspec.Raw:
    """A body as JSON; other text becomes a JSON string."""
    try:
        msgspec.json.decode(content, type=msgspec.Raw)
    except msgspec.DecodeError:
        return msgspec.Raw(msgspec.json.encode(content.decode("utf-8", "replace")))
    return msgspec.Raw(content)


def progress_bar(total: int | None) -> tuple[Any, Callable[[BatchCounts], None]]:
    """A progress bar on standard error, and the function to call after each line."""
    from tqdm import tqdm

    bar = tqdm(total=total, desc="lines", unit="line", dynamic_ncols=True)

    def show(counts: BatchCounts) -> None:
        bar.set_postfix_str(f"{counts.failed} failed, {counts.skipped} done before", refresh=False)
        bar.update()

    return bar, show

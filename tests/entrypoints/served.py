"""A real server on a free port of the loopback, in a thread, for tests that talk to it over HTTP."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from sensorium import EngineArgs
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core_client import IN_THIS_PROCESS
from sensorium.entrypoints.openai.http_server import HttpServer
from sensorium.entrypoints.openai.listening import listening, url_of
from sensorium.entrypoints.openai.server import running_app, uvicorn_config
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.media import MediaLimits
from tests.helpers.waiting import HANG_S, until

SETTINGS: dict[str, Any] = {"device": "cpu", "num_blocks": 512, "max_num_seqs": 16, "max_model_len": 1024}


@dataclass
class Served:
    """A running server, and its engine to look into."""

    url: str
    engine: AsyncLLMEngine
    loop: asyncio.AbstractEventLoop
    server: HttpServer

    def settle(self) -> None:
        """Wait until nothing of any request is left."""
        until(self._is_idle, lambda: (self.engine.load(), self.engine.stats))

    def _is_idle(self) -> bool:
        stats = self.engine.stats  # None as long as nothing has reached the core
        is_core_idle = stats is None or not (stats.num_running or stats.num_waiting or stats.kv_cache_usage)
        return is_core_idle and not self.engine.load().num_open


@dataclass
class _Start:
    ready: threading.Event = field(default_factory=threading.Event)
    served: Served | None = None
    error: BaseException | None = None


@contextmanager
def served(
    path: Path | str, server: dict[str, Any] | None = None, limits: MediaLimits | None = None, **engine: Any
) -> Iterator[Served]:
    """Serve a checkpoint as "tiny" until the block ends."""
    args = ServerArgs(port=0, drain_s=1.0, served_model_name=("tiny",), log_level="WARNING", **(server or {}))
    start = _Start()
    engine_args = EngineArgs(str(path), **{**SETTINGS, **engine})
    thread = threading.Thread(target=_run, args=(engine_args, args, limits, start))
    thread.start()
    try:
        assert start.ready.wait(HANG_S)
        if start.error is not None:
            raise start.error
        assert start.served is not None
        yield start.served
    finally:
        if start.served is not None:
            start.served.server.should_exit = True
        thread.join(HANG_S)
        assert not thread.is_alive()


def _run(engine_args: EngineArgs, args: ServerArgs, limits: MediaLimits | None, start: _Start) -> None:
    async def run() -> None:
        async with running_app(engine_args, args, limits, make_core=IN_THIS_PROCESS) as (app, engine):
            with listening(args) as sockets:
                url = url_of(args, sockets).replace("https:", "http:")  # tests say which they speak
                server = HttpServer(uvicorn_config(app, args), args.max_connections, args.deadlines, url=url)
                task = asyncio.create_task(server.serve(sockets))
                while not server.started:
                    await asyncio.sleep(0.01)
                start.served = Served(url, engine, asyncio.get_running_loop(), server)
                start.ready.set()
                await task

    try:
        asyncio.run(run())
    except BaseException as error:  # noqa: BLE001  raised by who waits for the server
        start.error = error
    finally:
        start.ready.set()


def start_command(path: Path, *more_flags: str) -> tuple[subprocess.Popen[str], str, str]:
    """`sensorium serve` in a process of its own, which is ready, its address, and its log until then."""
    command = [sys.executable, "-m", "sensorium.entrypoints.cli.main", "serve", str(path), "--port", "0"]
    flags = ["--num-blocks", "128", "--max-model-len", "1024", "--drain-s", "5"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    process = subprocess.Popen([*command, *flags, *more_flags], stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stderr is not None
    lines = []
    for line in process.stderr:
        lines.append(line)
        if found := re.search(r"http://127\.0\.0\.1:\d+", line):
            return process, found[0], "".join(lines)
    raise AssertionError("".join(lines))


def data_url(picture: Image.Image) -> str:
    """A picture as requests carry it."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()

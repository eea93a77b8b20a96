"""A server in its own process for benchmarks, with its current counts and memory."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.request import urlopen

START_TIMEOUT_S = 180.0
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class ServerProcess:
    """A running `sensorium serve`."""

    url: str
    pid: int

    def pids(self) -> dict[str, int]:
        """The front, and the core, its only child."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return {"front": self.pid, "core": int(children[0])}

    def footprint(self) -> dict[str, float]:
        """Open files, threads and resident MiB of both processes."""
        found: dict[str, float] = {}
        for name, pid in self.pids().items():
            found[f"{name}_files"] = len(os.listdir(f"/proc/{pid}/fd"))
            found[f"{name}_threads"] = len(os.listdir(f"/proc/{pid}/task"))
            found[f"{name}_mib"] = round(
                int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE_BYTES / 2**20, 1
            )
        return found

    def metrics(self) -> dict[str, float]:
        """`/metrics` by name, labels left in it."""
        with urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name.removeprefix("sensorium_"): float(value) for name, value in pairs}


@contextmanager
def serving(model: str, *flags: str) -> Iterator[ServerProcess]:
    """`sensorium serve MODEL` with these flags on a free port, until the block ends."""
    port = free_port()
    command = [sys.executable, "-m", "sensorium.entrypoints.cli.main", "serve", model, "--port", str(port), *flags]
    with started(command, f"http://127.0.0.1:{port}") as process:
        yield ServerProcess(f"http://127.0.0.1:{port}", process.pid)


@contextmanager
def started(command: list[str], url: str, health: str = "/health") -> Iterator[subprocess.Popen[bytes]]:
    """A server's process, from when its health route answers until the block ends."""
    process = subprocess.Popen(command)
    try:
        _await_health(process, url + health)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def _await_health(process: subprocess.Popen[bytes], url: str) -> None:
    deadline_s = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline_s:
        try:
            with urlopen(url, timeout=5):
                return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"the server is not ready: exit status {process.poll()}, after at most {START_TIMEOUT_S:g} s")

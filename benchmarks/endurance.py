"""Endurance: checks that a server frees everything after thousands of requests: aborted, hostile, or with pictures.

    python -m benchmarks.endurance aborts --requests 8000
    python -m benchmarks.endurance mixed --requests 2000
    python -m benchmarks.endurance images --requests 10000

Each starts `sensorium serve`, sends requests over HTTP, compares good answers with those of a quiet run, and checks
that the numbers of requests, KV blocks, tasks, open files and threads are the same as before. Memory is compared with
that after the first hundred requests, and with that after half of all. Prints figures, and one JSON line; exits with
status 1 if a check fails.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field

from benchmarks.good_requests import good_requests, image_request
from benchmarks.hostile_requests import HOSTILE
from benchmarks.http_client import Connection
from benchmarks.http_server import ServerProcess, serving

CHAT = "/v1/chat/completions"
NUM_WARM = 100
MAX_GROWTH_MIB = 64.0
"""After the hundredth request: allocators keep what the largest batch took."""
MAX_LATE_GROWTH_MIB = 16.0
"""In the second half."""
MAX_NEW_THREADS = 10
"""Pools start their threads when they first need them: two for media, eight for blocking calls."""
MAX_NEW_FILES = 1
"""The channel to the process for items that are slow to decode, which starts when there is one."""
SERVER_FLAGS = (
    *("--max-model-len", "512", "--num-blocks", "1024", "--max-num-seqs", "32", "--max-waiting-requests", "4096"),
    *("--mm-processor-cache-bytes", str(8 << 20), "--encoder-cache-rows", "4096", "--log-level", "WARNING"),
    *("--max-decoded-cache-bytes", str(2 << 20), "--limit-mm-per-prompt", '{"image": 2}'),
)
"""Caches so small that they are full, and evict, after a hundred requests."""
GAUGES = ("open_requests", "unstarted_requests", "running_requests", "waiting_requests", "kv_cache_usage_ratio")


@dataclass
class Run:
    """One run against one server, and its results."""

    server: ServerProcess
    num_requests: int
    width: int
    expected: dict[int, bytes] = field(default_factory=dict)
    """By request, the answer of a quiet run."""
    counts: dict[str, int] = field(default_factory=dict)

    def count(self, what: str) -> None:
        """Count an event."""
        self.counts[what] = self.counts.get(what, 0) + 1


Worker = Callable[[Run, Connection, int], Awaitable[None]]


async def ask(connection: Connection, body: bytes) -> bytes:
    """The text of a whole answer; raises `AssertionError` if there is none."""
    answer = await connection.request("POST", CHAT, body)
    assert answer.status == 200, (answer.status, answer.body[:300])
    text: str = answer.json()["choices"][0]["message"]["content"]
    return text.encode()


async def ask_half_closed(connection: Connection, body: bytes) -> bytes:
    """The same, for a client that closes its sending side after the request."""
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    answer = await connection.raw(head.encode() + b"\r\n\r\n" + body, closes=True)
    while answer.startswith(b"HTTP/1.1 100 "):
        answer = answer.partition(b"\r\n\r\n")[2]
    assert answer.startswith(b"HTTP/1.1 200"), answer[:300]
    text: str = json.loads(answer.partition(b"\r\n\r\n")[2])["choices"][0]["message"]["content"]
    return text.encode()


async def check_good(run: Run, connection: Connection, name: int, body: bytes, *, half_closes: bool = False) -> None:
    """Send the request, and compare the answer with that of the quiet run, or record it if this is the quiet run."""
    text = await (ask_half_closed if half_closes else ask)(connection, body)
    if run.expected.setdefault(name, text) == text:
        run.count("good_equal")
    else:
        run.count("good_differ")


async def in_turn(run: Run, indices: Iterable[int], work: Worker) -> None:
    """Work through the indices, `run.width` at a time, each worker on its own connection."""
    todo = iter(indices)

    async def worker() -> None:
        async with Connection(run.server.url) as connection:
            for index in todo:
                await work(run, connection, index)

    async with asyncio.TaskGroup() as group:
        for _ in range(run.width):
            group.create_task(worker())


async def abort_one(run: Run, connection: Connection, index: int) -> None:
    """Start a stream and close the connection at a random moment; every twentieth is read to its end."""
    rng = random.Random(index)
    good = good_requests()
    name = index % len(good)
    if index % 20 == 0:
        await check_good(run, connection, name, good[name])
        return
    body = json.dumps({**json.loads(good[name]), "stream": True, "max_tokens": 64}).encode()
    try:
        async with asyncio.timeout(rng.expovariate(5.0)):
            async for _ in connection.stream(CHAT, body):
                pass
        run.count("finished")
    except TimeoutError:
        run.count("hung_up")
    finally:
        connection.close()


async def mix_one(run: Run, connection: Connection, index: int) -> None:
    """Send a good request for one of three, and a hostile one for the others."""
    good = good_requests()
    if index % 3 == 0:
        name = index // 3 % len(good)
        await check_good(run, connection, name, good[name], half_closes=index % 4 == 0)
        return
    attack = HOSTILE[index % len(HOSTILE)]
    outcome = await attack(connection, index)
    run.count(f"hostile_{outcome}")


async def show_one(run: Run, connection: Connection, index: int) -> None:
    """Send a new picture, or every fifth time one of fifty that are repeated."""
    name = index % 50 if index % 5 == 0 else 1000 + index
    text = await ask(connection, image_request(name))
    if name < 50:
        run.count("repeated_equal" if run.expected.setdefault(name, text) == text else "repeated_differ")
    else:
        run.count("distinct")


WORKERS: dict[str, Worker] = {"aborts": abort_one, "mixed": mix_one, "images": show_one}


async def quiet_run(run: Run) -> None:
    """Send every good request alone, and record its answer."""
    async with Connection(run.server.url) as connection:
        for name, body in enumerate(good_requests()):
            await check_good(run, connection, name, body)


async def settle(run: Run) -> float:
    """Wait until the server has no open requests; returns the seconds."""
    start_s = time.monotonic()
    while any(run.server.metrics().get(name) for name in GAUGES):
        if time.monotonic() - start_s > 30:
            break
        await asyncio.sleep(0.05)
    settled_s = time.monotonic() - start_s
    await asyncio.sleep(1.5)  # the server closes what clients have left
    return settled_s


def held(run: Run) -> dict[str, float]:
    """The server's current counts and memory."""
    metrics = run.server.metrics()
    names = (*GAUGES, "event_loop_tasks", "waiting_media_bytes")
    return {**run.server.footprint(), **{name: metrics[name] for name in names if name in metrics}}


async def watch(run: Run, start_s: float) -> None:
    """Print a line from time to time, so that a slow run can be told from a hang."""
    while True:
        await asyncio.sleep(10)
        footprint = run.server.footprint()
        seconds, done = time.monotonic() - start_s, sum(run.counts.values())
        memory = f"front {footprint['front_mib']:.0f} MiB, core {footprint['core_mib']:.0f} MiB"
        print(f"{seconds:6.0f} s  {done:6} requests  {memory}", file=sys.stderr)


async def measure(run: Run, work: Worker) -> dict[str, object]:
    """The quiet run, the warm-up and the long run; returns counts and memory before and after."""
    if work is not show_one:
        await quiet_run(run)
    await in_turn(run, range(NUM_WARM), work)
    await settle(run)
    before = held(run)
    run.counts.clear()
    start_s = time.monotonic()
    watcher = asyncio.create_task(watch(run, start_s))
    middle, end = NUM_WARM + run.num_requests // 2, NUM_WARM + run.num_requests
    await in_turn(run, range(NUM_WARM, middle), work)
    half = run.server.footprint()
    await in_turn(run, range(middle, end), work)
    seconds = time.monotonic() - start_s
    watcher.cancel()
    settled_s = await settle(run)
    after = held(run)
    figures = {"requests": run.num_requests, "seconds": round(seconds, 1), "settled_s": round(settled_s, 2)}
    figures["requests_per_s"] = round(run.num_requests / seconds, 1)
    return {
        **figures,
        **run.counts,
        "checks": checks(run, before, half, after),
        "before": before,
        "half": half,
        "after": after,
    }


def checks(run: Run, before: dict[str, float], half: dict[str, float], after: dict[str, float]) -> dict[str, bool]:
    """All checks."""
    same = [name for name in before if name.endswith(("_tasks", "_bytes"))]
    files = [after[name] - before[name] for name in before if name.endswith("_files")]
    threads = [after[name] - before[name] for name in before if name.endswith("_threads")]
    memory = [name for name in half if name.endswith("_mib")]
    return {
        "exact": not any(run.counts.get(name) for name in ("good_differ", "repeated_differ")),
        "hostile_refused": not run.counts.get("hostile_wrong"),
        "idle": not any(after[name] for name in GAUGES),
        "baseline": all(after[name] <= before[name] for name in same) and max(files) <= MAX_NEW_FILES,
        "threads_bounded": max(threads) <= MAX_NEW_THREADS,
        "memory_flat": all(after[name] - before[name] <= MAX_GROWTH_MIB for name in memory)
        and all(after[name] - half[name] <= MAX_LATE_GROWTH_MIB for name in memory),
    }


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", choices=WORKERS)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--width", type=int, default=32, help="requests under way at once")
    args = parser.parse_args()
    with serving(args.model, *SERVER_FLAGS) as server:
        run = Run(server, args.requests, args.width)
        figures = asyncio.run(measure(run, WORKERS[args.run]))
    print(json.dumps({"run": args.run, **figures}))
    found = figures["checks"]
    assert isinstance(found, dict)
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    raise SystemExit(main())

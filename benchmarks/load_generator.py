"""The load generator's own cost: `sensorium bench serve` against a server that does nothing but stream.

    python benchmarks/load_generator.py --streams 64

The server is a process of its own that sends made-up tokens as fast as they are taken, so that the generator is what
limits. Ends with one JSON line: processor time of the generator per token, and tokens per second that it can take in.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
from typing import Any

from sensorium.entrypoints.bench.load import Arrivals
from sensorium.entrypoints.bench.serve import ServeBenchArgs, run_blocking
from sensorium.entrypoints.bench.spans import Span
from sensorium.entrypoints.bench.workload import Workload

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunk(event: dict[str, Any] | str) -> bytes:
    data = b"data: " + (event if isinstance(event, str) else json.dumps(event)).encode() + b"\n\n"
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


def token(text: str) -> bytes:
    """About as long as this server's own."""
    choice = {"index": 0, "delta": {"content": text}, "logprobs": None, "finish_reason": None}
    head = {"id": "chatcmpl-0123456789abcdef0123456789abcdef", "created": 1, "model": "nothing"}
    return chunk({**head, "object": "chat.completion.chunk", "choices": [choice]})


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    piece = token(" word")
    try:
        while True:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next(
                int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"Content-Length")
            )
            count = json.loads(await reader.readexactly(length))["max_tokens"]
            writer.write(HEAD)
            for _ in range(count):
                writer.write(piece)
                await asyncio.sleep(0)  # a token of each stream in turn, as a step gives them
            usage = {"prompt_tokens": 1, "completion_tokens": count}
            writer.write(chunk({"choices": [], "usage": usage}) + chunk("[DONE]") + b"0\r\n\r\n")
            await writer.drain()
    except (asyncio.IncompleteReadError, ConnectionError):
        writer.close()


async def serve() -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=256)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    if parsed.serve:
        asyncio.run(serve())
        return 0
    with subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            args = ServeBenchArgs(url=f"http://127.0.0.1:{int(server.stdout.readline())}", model="nothing")
            tokens = Span(parsed.output_tokens, parsed.output_tokens)
            workload = Workload(num_requests=parsed.requests, output_tokens=tokens)
            figures = run_blocking(args, workload, Arrivals(streams=parsed.streams), shows_progress=False).figures
        finally:
            server.terminate()
    names = ("completed", "failed", "output_tokens", "output_tokens_per_s", "client")
    print(json.dumps({"streams": parsed.streams, **{name: figures[name] for name in names}}))
    return 0 if figures["failed"] == 0 else 1


if __name__ == "__main__":
    raise SystemExit(main())

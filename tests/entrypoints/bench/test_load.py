"""The load generator against a server that does as it is told: what it sends and times, what it calls a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest

from sensorium.entrypoints.bench.http_client import HttpClient
from sensorium.entrypoints.bench.load import UNFINISHED, Arrivals, LoadResult, LoadRun
from tests.entrypoints.bench.fake_server import (
    END,
    STREAM_HEAD,
    Answer,
    FakeServer,
    event,
    fake_server,
    token,
    usage,
    whole,
)

ROLE = event('{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": null}]}')
LAST = event('{"choices": [{"index": 0, "delta": {}, "finish_reason": "length"}]}')
DONE = event("[DONE]") + END


def load(answer: Answer, bodies: Sequence[bytes], arrivals: Arrivals, **options: Any) -> tuple[LoadResult, FakeServer]:
    async def run() -> tuple[LoadResult, FakeServer]:
        async with fake_server(answer) as server:
            client = HttpClient(server.url)
            requests = [client.request("POST", "/v1/chat/completions", [body]) for body in bodies]
            result = await LoadRun(client, requests, arrivals, **options).run()
            client.close()
            return result, server

    return asyncio.run(run())


async def slow_answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(STREAM_HEAD + ROLE)
    for _ in range(3):
        await asyncio.sleep(0.02)
        writer.write(token())
    writer.write(LAST + usage(7, 4) + DONE)


def test_times_and_counts_of_a_stream() -> None:
    result, server = load(slow_answer, [b"a"], Arrivals())
    [sample] = result.samples
    assert (sample.error, sample.num_prompt_tokens, sample.num_output_tokens) == (None, 7, 4)
    assert len(sample.token_s) == 3
    assert sample.ttft_s >= 0.019
    assert sample.ttft_s + sum(sample.gaps_s) >= 0.059, "three pauses of 20 ms, however late they are noticed"
    assert sample.e2e_s >= sample.ttft_s + sum(sample.gaps_s)
    assert server.bodies == [b"a"]


def test_a_closed_loop_keeps_its_streams_full_and_no_fuller() -> None:
    seen: list[float] = []
    result, server = load(
        slow_answer, [str(i).encode() for i in range(12)], Arrivals(streams=4), finished=lambda s: seen.append(s.end_s)
    )
    assert (server.most_open, server.num_connections, len(seen)) == (4, 4, 12)
    assert [sample.error for sample in result.samples] == [None] * 12
    assert server.bodies == sorted(server.bodies, key=int)


def test_a_rate_sends_at_its_times_and_waiting_counts() -> None:
    arrivals = Arrivals(rate=100.0, burstiness=0, streams=1)
    result, server = load(slow_answer, [b"a"] * 4, arrivals)
    assert server.most_open == 1
    starts = [sample.start_s - result.samples[0].start_s for sample in result.samples]
    assert starts == pytest.approx([0.0, 0.01, 0.02, 0.03])
    last = result.samples[-1]
    assert last.sent_s - last.start_s >= 0.1, "three answers of 60 ms stood before it"
    assert last.ttft_s >= 0.1


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (whole(b'{"error": {"message": "no such model"}}', "404 Not Found"), "status 404: no such model"),
        (whole(b"<html>", "502 Bad Gateway"), "status 502: <html>"),
        (whole(b"", "503 x"), "status 503"),
        (STREAM_HEAD + ROLE + token() + END, "the stream ended early"),
        (STREAM_HEAD + ROLE + LAST + DONE, "the stream held no tokens"),
        (STREAM_HEAD + event("nonsense") + END, "an event that is no chunk of an answer"),
        (STREAM_HEAD + token() + event('{"error": {"message": "x"}}') + DONE, "in the stream: x"),
    ],
)
def test_failures_are_named_and_do_not_end_the_run(data: bytes, error: str) -> None:
    async def answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        if body == b"good":
            await slow_answer(path, body, writer)
        else:
            writer.write(data)

    result, _ = load(answer, [b"bad", b"good"], Arrivals(streams=1))
    assert [sample.error for sample in result.samples] == [error, None]


def test_a_run_ends_at_its_bound() -> None:
    async def answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + token())
        await asyncio.Event().wait()

    result, _ = load(answer, [b"a"] * 5, Arrivals(streams=2), max_s=0.2)
    assert [sample.error for sample in result.samples] == [UNFINISHED] * 2


def test_a_server_that_goes_away() -> None:
    async def answer(path: str, body: bytes, writer: asyncio.StreamWriter) -> None:
        writer.transport.abort()

    result, server = load(answer, [b"a", b"b"], Arrivals(streams=1))
    assert all(sample.error for sample in result.samples)
    assert len(server.bodies) == 2, "a request is not sent again after a new connection broke"

"""Loads a server that speaks OpenAI's API, this one or another, and reports what its clients see."""

from __future__ import annotations

import asyncio
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import msgspec

from sensorium.config import Amount
from sensorium.entrypoints.bench.bodies import BodyMaker
from sensorium.entrypoints.bench.chart import Panel, share_below
from sensorium.entrypoints.bench.events import Sample
from sensorium.entrypoints.bench.http_client import BrokenAnswerError, HttpClient
from sensorium.entrypoints.bench.load import Arrivals, LoadResult, LoadRun
from sensorium.entrypoints.bench.report import plain
from sensorium.entrypoints.bench.spans import Target
from sensorium.entrypoints.bench.stats import Times, client_cost, summary
from sensorium.entrypoints.bench.workload import RequestSource, Workload
from sensorium.errors import ConfigError
from sensorium.settings import Bounds, check_settings

_PATHS = {"chat": "/v1/chat/completions", "completions": "/v1/completions"}


@dataclass(frozen=True, kw_only=True)
class ServeBenchArgs:
    """Which server, and how it is asked."""

    url: str = "http://127.0.0.1:8000"
    """Address of the server, with or without /v1. Nothing else is contacted."""
    model: str | None = None
    """The model's name in requests; the first that the server lists by default."""
    api_key: str | None = None
    """Sent as bearer token; the environment's SENSORIUM_API_KEY by default."""
    endpoint: Literal["chat", "completions"] = "chat"
    """Which route is asked."""
    ignore_eos: bool = True
    """Have answers go on to their full length. Switch it off for a server that refuses this field."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Fields for every request."""
    warmup: Amount = 2
    """Requests of the same kind that are sent first and not measured."""
    max_s: Annotated[float, Bounds(0, above=True)] = 600.0
    """Bound on the measured run; what has not ended by then fails."""
    goodput: tuple[Target, ...] = ()
    """A bound such as ttft:500, tpot:50, itl:200 (the longest gap) or e2e:5000, in milliseconds; may be given several
    times. Goodput is the rate of requests that keep all of them."""

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True, slots=True, eq=False)
class ServeBench:
    """What was measured."""

    figures: dict[str, Any]
    panels: list[Panel | None]


async def run(
    args: ServeBenchArgs,
    workload: Workload,
    arrivals: Arrivals,
    finished: Callable[[Sample], None] | None = None,
) -> ServeBench:
    """Prepare, warm up, measure. `finished` is called for each measured request.

    Raises:
        ConfigError: The server can't be reached, or refuses the warm-up, or the workload doesn't fit the endpoint.
    """
    if args.endpoint == "completions" and workload.has_media:
        raise ConfigError("endpoint: got 'completions' and media, expected 'chat', which takes media. Set endpoint.")
    client = HttpClient(args.url, args.api_key)
    try:
        model = args.model or await _first_model(client, args.url)
        await _warm_up(client, _requests(client, args, model, RequestSource(workload, offset=1), args.warmup), args)
        requests = _requests(client, args, model, RequestSource(workload), workload.num_requests)
        gc.collect()
        gc.freeze()  # the prepared objects stay alive; the collector need not scan them while the clock runs
        load = LoadRun(client, requests, arrivals, seed=workload.seed, max_s=args.max_s, finished=finished)
        result = await load.run()
    finally:
        client.close()
        gc.unfreeze()
    return ServeBench(_figures(args, model, workload, arrivals, result), _panels(result))


def _requests(
    client: HttpClient, args: ServeBenchArgs, model: str, source: RequestSource, count: int
) -> list[list[bytes]]:
    fields = {**({"ignore_eos": True} if args.ignore_eos else {}), **args.extra_body}
    maker = BodyMaker(source, model, is_chat=args.endpoint == "chat", fields=fields)
    path = _PATHS[args.endpoint]
    return [client.request("POST", path, maker.body(request)) for request in source.requests(count)]


async def _first_model(client: HttpClient, url: str) -> str:
    try:
        status, body = await client.get("/v1/models")
    except (BrokenAnswerError, OSError) as error:
        raise ConfigError(f"url: got {url!r}, where no server answers ({error}). Start one, or set url.") from error
    try:
        return str(msgspec.json.decode(body)["data"][0]["id"])
    except (msgspec.MsgspecError, KeyError, IndexError, TypeError):
        raise ConfigError(
            f"model: got a list of models with status {status} from {url!r} that can't be read, expected one. "
            "Set model, or api_key if the server wants one."
        ) from None


async def _warm_up(client: HttpClient, requests: Sequence[Sequence[bytes]], args: ServeBenchArgs) -> None:
    if not requests:
        return
    result = await LoadRun(client, requests, Arrivals(streams=len(requests)), max_s=args.max_s).run()
    for sample in result.samples:
        if sample.error is not None:
            raise ConfigError(f"warm-up: got {sample.error}, where an answer was expected. Correct the settings.")


def _figures(
    args: ServeBenchArgs, model: str, workload: Workload, arrivals: Arrivals, result: LoadResult
) -> dict[str, Any]:
    figures = summary(result, args.goodput)
    settings = {"endpoint": args.endpoint, **plain(workload), **plain(replace(arrivals, streams=arrivals.max_streams))}
    if arrivals.rate is None:
        del settings["burstiness"]
    return {
        "benchmark": "serve",
        "url": args.url,
        "model": model,
        **figures,
        "not_sent": workload.num_requests - len(result.samples),
        "client": client_cost(result),
        "settings": settings,
    }


def _panels(result: LoadResult) -> list[Panel | None]:
    times = Times.of(result.samples)
    return [
        share_below("Time to first token", times.ttft),
        share_below("Time per output token", times.tpot),
        share_below("Gap between tokens", times.itl),
        share_below("Whole request", times.e2e),
    ]


def run_blocking(
    args: ServeBenchArgs, workload: Workload, arrivals: Arrivals, *, shows_progress: bool | None = None
) -> ServeBench:
    """As `run`, with a progress bar if wanted; by default in a terminal."""
    if not (sys.stderr.isatty() if shows_progress is None else shows_progress):
        return asyncio.run(run(args, workload, arrivals))
    from tqdm import tqdm

    with tqdm(total=workload.num_requests, desc="requests", unit="req", dynamic_ncols=True) as bar:
        return asyncio.run(run(args, workload, arrivals, lambda _: bar.update()))

"""Metrics, dashboard, log lines and traces say what happened, agree with the documentation, and hold no contents."""

from __future__ import annotations

import io
import json
import logging
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from sensorium.entrypoints.openai.records import RequestRecord
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.entrypoints.openai.tracing import Traces
from sensorium.errors import ConfigError
from sensorium.logger import JsonFormatter, LogSettings, TextFormatter, configure
from tests.entrypoints.served import Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import HANG_S, until

DOCS = Path(__file__).parents[2] / "docs"
SECRET = "xyzzy-secret"
sending_traces = Traces.to
"""As it is outside of this module's server."""
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(scope="module")
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture(scope="module")
def server(exported: InMemorySpanExporter) -> Iterator[Served]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exported))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Traces, "to", classmethod(lambda cls, endpoint: cls(provider)))
        with served(make_checkpoint("qwen2_vl"), {"otlp_traces_endpoint": "http://127.0.0.1:1"}) as running:
            yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=HANG_S) as client:
        yield client


@pytest.fixture
def lines() -> Iterator[io.StringIO]:
    """What the log says, as JSON."""
    with logged(JsonFormatter()) as stream:
        yield stream


@contextmanager
def logged(formatter: logging.Formatter) -> Iterator[io.StringIO]:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(formatter)
    root = logging.getLogger("sensorium")
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        yield stream
    finally:
        root.removeHandler(handler)
        root.setLevel(level)


def chat(seed: int = 1, **fields: Any) -> dict[str, Any]:
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture(seed))}},
        {"type": "text", "text": f"What is {SECRET}?"},
    ]
    return {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "ignore_eos": True, **fields}


def values(text: str) -> dict[str, float]:
    """Samples by name and labels."""
    samples = (line.rsplit(" ", 1) for line in text.splitlines() if line and not line.startswith("#"))
    return {name: float(value) for name, value in samples}


def metrics(client: httpx.Client) -> dict[str, float]:
    return values(client.get("/metrics").text)


def names(samples: dict[str, float]) -> set[str]:
    return {name.partition("{")[0] for name in samples}


def families(samples: dict[str, float]) -> set[str]:
    """Names of our metrics, as documentation has them."""
    ours = {name for name in names(samples) if name.startswith("sensorium_") and not name.endswith("_created")}
    return {re.sub(r"_(bucket|count|sum)$", "", name) for name in ours}


def eventually(client: httpx.Client, name: str, value: float) -> None:
    """Wait until a metric has a value: the core tells its own now and then."""
    until(lambda: metrics(client).get(name) == value, lambda: (name, metrics(client).get(name)))


# Metrics


def test_metrics_count_what_happened(client: httpx.Client, server: Served) -> None:
    before = metrics(client)
    with client.stream("POST", "/v1/chat/completions", json=chat(11, stream=True)) as response:
        assert response.read()
    whole = client.post("/v1/chat/completions", json=chat(11)).json()
    assert client.post("/v1/chat/completions", json={**chat(), "n": -1}).status_code == 400
    broken = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    assert client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": [broken]}]}).is_error
    assert client.get("/nothing").status_code == 404
    server.settle()
    eventually(client, "sensorium_running_requests", 0)
    after = metrics(client)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    assert grown('sensorium_requests_total{outcome="finished"}') == 2
    assert grown('sensorium_finished_outputs_total{reason="length"}') == 2
    assert grown('sensorium_http_requests_total{route="/v1/chat/completions",status="200"}') == 2
    assert grown('sensorium_http_requests_total{route="other",status="404"}') == 1
    assert grown('sensorium_failures_total{kind="invalid_request"}') == 1
    assert grown('sensorium_failures_total{kind="not_found"}') == 1
    assert sum(grown(name) for name in after if name.startswith("sensorium_failures_total")) == 3
    assert grown("sensorium_output_tokens_total") == 12
    assert grown("sensorium_prompt_tokens_total") == 2 * whole["usage"]["prompt_tokens"]
    cached = whole["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert grown("sensorium_cached_prompt_tokens_total") == cached > 0
    assert grown('sensorium_media_items_total{modality="image"}') == 2
    for stage in ("fetch", "decode", "map"):
        assert grown(f'sensorium_media_seconds_total{{modality="image",stage="{stage}"}}') > 0
    assert grown("sensorium_encode_seconds_total") > 0
    assert grown("sensorium_forward_seconds_total") > 0
    # The broken picture was never asked for.
    assert grown("sensorium_processor_cache_queries_total") == 2
    assert grown("sensorium_processor_cache_hits_total") == 1
    for name in ("first_token", "queue", "prefill", "output_token", "request"):
        assert grown(f"sensorium_{name}_seconds_count") == 2, name
        assert 0 <= grown(f"sensorium_{name}_seconds_sum") < 60, name
    assert grown("sensorium_prepare_seconds_count") == 3
    assert grown("sensorium_inter_token_seconds_count") <= 5, "of the stream alone"


def test_gaps_between_the_tokens_of_a_stream_are_counted(client: httpx.Client, server: Served) -> None:
    """Tokens that come while the reader is busy come together, and then there is no gap: so this waits for some."""
    name = "sensorium_inter_token_seconds"
    while (after := metrics(client))[f"{name}_count"] == 0:
        with client.stream("POST", "/v1/chat/completions", json=chat(11, stream=True)) as response:
            assert response.read()
        server.settle()
    assert after[f'{name}_bucket{{le="+Inf"}}'] == after[f"{name}_count"]
    assert 0 < after[f"{name}_sum"] < 60
    client.post("/v1/chat/completions", json=chat(11)).raise_for_status()
    assert metrics(client)[f"{name}_count"] == after[f"{name}_count"], "an answer in one piece has no gaps"


def test_a_client_that_goes_is_counted_as_such(client: httpx.Client, server: Served) -> None:
    name = 'sensorium_requests_total{outcome="cancelled"}'
    before = metrics(client).get(name, 0)
    with client.stream("POST", "/v1/chat/completions", json=chat(stream=True, max_tokens=800)) as response:
        next(response.iter_lines())
    server.settle()
    eventually(client, name, before + 1)


def test_every_metric_is_documented_and_every_documented_one_exists(client: httpx.Client, server: Served) -> None:
    client.post("/v1/chat/completions", json=chat())
    client.get("/nothing")
    server.settle()
    found = families(metrics(client))
    documented = set(re.findall(r"sensorium_[a-z_]+", (DOCS / "operations.md").read_text()))
    assert found == documented


def test_every_query_of_the_dashboard_names_metrics_that_exist(client: httpx.Client, server: Served) -> None:
    client.post("/v1/chat/completions", json=chat())
    client.get("/nothing")
    server.settle()
    samples = metrics(client)
    dashboard = json.loads((DOCS / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", ())]
    queries += [each["query"]["query"] for each in dashboard["templating"]["list"] if each["type"] == "query"]
    assert len(queries) > 40
    for query in queries:
        used = re.findall(r"\b(?:sensorium|process)_[a-z_]+", query)
        assert used, query
        assert set(used) <= names(samples), query
        assert query.count("(") == query.count(")")
        assert query.count("{") == query.count("}")
        for label in re.findall(r"by \(([a-z_, ]+)\)", query):
            for each in label.split(", "):
                pattern = rf"^(?:{'|'.join(used)}){{[^}}]*\b{each}="
                assert any(re.search(pattern, name) for name in samples), (query, each)
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    shown = {name for query in queries for name in re.findall(r"sensorium_[a-z_]+?(?=_bucket|_sum|_count|\b)", query)}
    assert families(samples) - shown == {"sensorium_encoded_rows_total"}


# Logs


def test_a_request_leaves_one_line_of_facts_and_none_of_its_contents(client: httpx.Client, lines: io.StringIO) -> None:
    headers = {"X-Request-Id": "my-request", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    response = client.post("/v1/chat/completions", json=chat(3), headers=headers)
    bad_image = [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{SECRET}"}}]
    for body in ({"n": -1, **chat()}, {"messages": [{"role": "user", "content": bad_image}]}, {SECRET: 1}):
        assert client.post("/v1/chat/completions", json=body).is_error
    address = [{"type": "image_url", "image_url": {"url": f"http://127.0.0.1/{SECRET}.png"}}]
    assert client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": address}]}).is_error
    client.get("/metrics")
    text = lines.getvalue()
    assert SECRET not in text
    assert response.json()["choices"][0]["message"]["content"] not in text
    parsed = [json.loads(line) for line in text.splitlines()]
    for line in parsed:
        assert {"time", "level", "logger", "message", "request_id"} <= line.keys()
    [line] = [line for line in parsed if line["request_id"] == "my-request"]
    assert line["message"] == "POST /v1/chat/completions 200"
    usage = response.json()["usage"]
    assert (line["status"], line["method"], line["client"]) == (200, "POST", "127.0.0.1")
    assert (line["prompt_tokens"], line["output_tokens"]) == (usage["prompt_tokens"], 6)
    assert (line["finish_reasons"], line["media"], line["trace_id"]) == (["length"], {"image": 1}, TRACE)
    assert 0 < line["first_token_s"] <= line["seconds"]
    failures = [line["failure"] for line in parsed if "failure" in line]
    assert len(failures) == 4
    assert "media_forbidden" in failures


def written_lines(stream: io.StringIO) -> list[str]:
    """The lines once there are any: a request's is written after its answer, whose reader may be faster."""
    until(lambda: stream.getvalue().endswith("\n"))
    return stream.getvalue().splitlines()


def test_lines_as_text_carry_the_same_facts(client: httpx.Client) -> None:
    with logged(TextFormatter("%(levelname)s %(message)s")) as stream:
        client.get("/version", headers={"X-Request-Id": "abc"})
        [line] = written_lines(stream)
    head, brace, rest = line.partition(" {")
    assert head == "INFO GET /version 200"
    assert json.loads(brace + rest)["request_id"] == "abc"


def test_an_exception_is_a_field_of_its_line(lines: io.StringIO) -> None:
    try:
        raise ValueError("why")
    except ValueError:
        logging.getLogger("sensorium.x").exception("it broke")
    line = json.loads(lines.getvalue())
    assert (line["level"], line["message"]) == ("ERROR", "it broke")
    assert "ValueError: why" in line["exception"]


def test_the_format_of_lines_is_a_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="log_format: got 'xml'"):
        ServerArgs(log_format="xml")
    library = logging.getLogger("a_library")
    configure(ServerArgs(log_format="json", log_level="WARNING").log_settings, "a_library")
    library.warning("hello %s", "you")
    library.info("not important enough")
    assert json.loads(capsys.readouterr().err)["message"] == "hello you"
    library.handlers.clear()
    assert LogSettings() == ServerArgs().log_settings


# Traces


@pytest.fixture(autouse=True)
def no_earlier_spans(exported: InMemorySpanExporter) -> None:
    """Ids of spans are random, and every test begins with the same random numbers."""
    exported.clear()


def spans_of(exported: InMemorySpanExporter, request_id: str) -> list[ReadableSpan]:
    """The spans of a request, once they are there: they come when its record is read, after the answer."""

    def roots() -> list[ReadableSpan]:
        spans = exported.get_finished_spans()
        return [span for span in spans if (span.attributes or {}).get("sensorium.request_id") == request_id]

    until(roots)
    return below(roots()[0], exported.get_finished_spans())


def below(root: ReadableSpan, spans: Sequence[ReadableSpan]) -> list[ReadableSpan]:
    """A span, and all that are inside it."""
    inside = [span for span in spans if span.parent is not None and span.parent.span_id == root.context.span_id]
    return [root, *(each for span in inside for each in below(span, spans))]


def tree(spans: list[ReadableSpan]) -> dict[str, str | None]:
    """Each span's name with that of its parent; an outer parent is its id."""
    by_id = {span.context.span_id: span.name for span in spans}
    parents = {span.name: span.parent for span in spans}
    return {name: parent and by_id.get(parent.span_id, f"{parent.span_id:016x}") for name, parent in parents.items()}


def test_a_request_is_a_tree_of_spans_under_its_callers(client: httpx.Client, exported: InMemorySpanExporter) -> None:
    headers = {"X-Request-Id": "traced", "traceparent": f"00-{TRACE}-{PARENT}-01"}
    usage = client.post("/v1/chat/completions", json=chat(7), headers=headers).json()["usage"]
    spans = spans_of(exported, "traced")
    root = "POST /v1/chat/completions"
    decodes = [span for span in spans if span.name == "decode"]
    assert len(decodes) == 2, "a picture and tokens"
    others = tree([span for span in spans if span not in decodes])
    assert others == {
        root: PARENT,
        "fetch": root,
        "render": root,
        "prepare": root,
        "map": "prepare",
        "generate": root,
        "queue": "generate",
        "prefill": "generate",
    }
    assert {tree([*spans, each])["decode"] for each in decodes} == {"prepare", "generate"}
    assert f"{spans[0].context.trace_id:032x}" == TRACE
    named = {span.name: span for span in spans}
    outer = named[root]
    for span in spans:
        assert outer.start_time <= span.start_time <= span.end_time <= outer.end_time, span.name
    assert abs(outer.start_time / 1e9 - time.time()) < 60
    order = [named[name] for name in ("render", "prepare", "queue", "prefill")]
    assert [span.start_time for span in order] == sorted(span.start_time for span in order)
    made = dict(named["generate"].attributes or {})
    assert made["gen_ai.usage.input_tokens"] == usage["prompt_tokens"]
    assert made["gen_ai.usage.output_tokens"] == 6
    assert made["sensorium.media.image"] == 1
    assert dict(outer.attributes or {})["http.response.status_code"] == 200
    assert SECRET not in "".join(span.to_json() for span in spans)


def test_a_failure_is_told_and_a_wrong_parent_ignored(client: httpx.Client, exported: InMemorySpanExporter) -> None:
    headers = {"X-Request-Id": "failed", "traceparent": "nonsense"}
    assert client.post("/v1/chat/completions", json={"messages": 1}, headers=headers).status_code == 400
    [span] = spans_of(exported, "failed")
    assert span.parent is None
    assert dict(span.attributes or {})["error.type"] == "invalid_type"


def test_spans_reach_a_collector_over_http() -> None:
    received: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    collector = ThreadingHTTPServer(("127.0.0.1", 0), Collector)
    thread = threading.Thread(target=collector.serve_forever)
    thread.start()
    try:
        traces = sending_traces(f"http://127.0.0.1:{collector.server_port}/v1/traces")
        now_s = time.monotonic()
        traces.take(RequestRecord("r", "GET", "/version", now_s, route="/version", status=200, end_s=now_s + 0.5))
        traces.close()
    finally:
        collector.shutdown()
        collector.server_close()
        thread.join()
    message = ExportTraceServiceRequest()
    message.ParseFromString(received[0])
    [resource] = message.resource_spans
    assert "sensorium" in {each.value.string_value for each in resource.resource.attributes}
    [span] = resource.scope_spans[0].spans
    assert span.name == "GET /version"
    assert span.end_time_unix_nano - span.start_time_unix_nano == pytest.approx(5e8, abs=1000)


def test_without_the_flag_opentelemetry_is_not_imported() -> None:
    code = (
        "import sys, sensorium.entrypoints.openai.server, sensorium.entrypoints.cli.main; "
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert result.stdout.strip() == "False"

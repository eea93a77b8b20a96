"""`sensorium run-batch`: every line has its own outcome, which is the server's; a run that was killed goes on."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sensorium import LLM, EngineArgs, SamplingParams
from sensorium.engine.core_client import IN_THIS_PROCESS
from sensorium.entrypoints.batch.input_file import BatchInput
from sensorium.entrypoints.batch.output_file import BatchOutput
from sensorium.entrypoints.batch.runner import BatchCounts, BatchRunner
from sensorium.entrypoints.cli.main import main
from sensorium.entrypoints.openai.server import make_media_loader, running_app
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import EngineDeadError
from sensorium.media import MediaLoader
from tests.entrypoints.served import SETTINGS, data_url
from tests.entrypoints.test_transcriptions import spoken
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import until

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 6, "ignore_eos": True}
CHAT = "/v1/chat/completions"


def line(custom_id: str, url: str = CHAT, **body: Any) -> str:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": url, "body": body})


def chat(custom_id: str, content: Any, **fields: Any) -> str:
    return line(custom_id, messages=[{"role": "user", "content": content}], **{**GREEDY, **fields})


def image(url: str) -> list[dict[str, Any]]:
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What?"}]


def run(folder: Path, lines: list[str], model: str = "", **server: Any) -> tuple[list[dict[str, Any]], BatchCounts]:
    """Answer lines in this process; what the output holds afterwards."""
    source, target = folder / "in.jsonl", folder / "out.jsonl"
    source.write_text("\n".join(lines))
    settings = {**SETTINGS, "max_model_len": 2048, "allowed_local_media_path": str(folder)}
    engine_args, args = EngineArgs(model or str(make_checkpoint("qwen2_vl")), **settings), ServerArgs(**server)

    async def answer() -> BatchCounts:
        with BatchInput(str(source), max_line_bytes=100_000) as opened, BatchOutput(str(target)) as output:
            async with running_app(engine_args, args, make_core=IN_THIS_PROCESS) as (app, engine):
                loader = make_media_loader(engine_args, args, None)
                runner = BatchRunner(app, engine, loader, output, concurrency=4, max_line_bytes=100_000)
                return await runner.run(iter(opened))

    counts = asyncio.run(answer())
    return [json.loads(each) for each in target.read_text().splitlines()], counts


def test_lines_of_every_kind_have_their_own_outcome(tmp_path: Path) -> None:
    picture(1).save(tmp_path / "picture.png")
    lines = [
        chat("text", "Say something"),
        chat("image", image(data_url(picture(1)))),
        chat("file", image("picture.png")),
        chat("outside", image("/etc/passwd")),
        line("completion", "/v1/completions", prompt="Once", **GREEDY),
        line("embedding", "/v1/embeddings", input="Once"),
        "nonsense",
        chat("text", "Say something else"),
        line("secret", "/metrics"),
        chat("refused", "a", n=1000),
        line("stream", messages=[], stream=True),
        chat("long", "x" * 120_000),
        chat("last", "Say something"),
    ]
    records, counts = run(tmp_path, lines)
    by_id = {record["custom_id"]: record for record in records if record["error"] is None}
    assert len(records) == len(lines)
    assert (counts.answered, counts.failed, counts.skipped) == (6, 7, 0)
    assert {name: record["response"]["status_code"] for name, record in by_id.items()} == {
        **dict.fromkeys(("text", "image", "file", "completion", "embedding", "last"), 200),
        "outside": 403,
        "refused": 400,
    }
    answers = {name: record["response"]["body"] for name, record in by_id.items()}
    llm = LLM(str(make_checkpoint("qwen2_vl")), **{**SETTINGS, "max_model_len": 2048})
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    expected = llm.chat([{"role": "user", "content": image(data_url(picture(1)))}], params)[0].outputs[0].text
    assert answers["image"]["choices"] == answers["file"]["choices"]
    assert answers["image"]["choices"][0]["message"]["content"] == expected
    assert answers["completion"]["choices"][0]["text"] == llm.generate("Once", params)[0].outputs[0].text
    assert answers["refused"]["error"]["message"].startswith("n: got 1000")
    assert len(by_id["text"]["response"]["request_id"]) == 32
    errors = {record["error"]["line"]: record for record in records if record["error"] is not None}
    messages = {number: (record["custom_id"], record["error"]["message"]) for number, record in errors.items()}
    assert messages[7] == (None, "line 7: got text that is no JSON, expected one JSON object a line. Correct it.")
    assert messages[8][0] == "text"
    assert "a second time" in messages[8][1]
    assert "url: got '/metrics'" in messages[9][1]
    assert "body.stream" in messages[11][1]
    assert "100000 bytes" in messages[12][1]
    again, counts = run(tmp_path, lines)
    assert again == records
    assert (counts.answered, counts.failed, counts.skipped) == (0, 0, len(lines))


def test_transcriptions_take_their_files_from_the_line(tmp_path: Path) -> None:
    sound = spoken("seven", "three", format="flac")
    (tmp_path / "sound.flac").write_bytes(sound)
    url = "data:audio/flac;base64," + base64.b64encode(sound).decode()
    path = "/v1/audio/transcriptions"
    lines = [
        line("data", path, file=url, temperature=0),
        line("file", path, file_url="sound.flac", response_format="text"),
        line("none", path, language="en"),
        line("outside", path, file="/etc/passwd"),
        line("nested", path, file=url, prompt={"a": 1}),
    ]
    records, _ = run(tmp_path, lines, "demo")
    found = {record["custom_id"]: record["response"] for record in records}
    assert found["data"]["body"]["text"] == "seven three"
    assert found["file"]["body"].strip() == "seven three"
    assert {name: answer["status_code"] for name, answer in found.items() if name not in ("data", "file")} == {
        "none": 400,
        "outside": 403,
        "nested": 400,
    }
    assert found["none"]["body"]["error"]["message"].startswith("body.file: got nothing")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "sensorium.entrypoints.cli.main", "run-batch", *arguments]


def test_a_run_that_is_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    lines = [chat(str(i), f"Say {i}", max_tokens=40) for i in range(60)]
    source.write_text("\n".join(lines))
    flags = ["--num-blocks", "128", "--max-model-len", "512", "--concurrency", "2"]
    arguments = ["run-batch", str(make_checkpoint("qwen2_vl")), "-i", str(source), "-o", str(target), *flags]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "sensorium.entrypoints.cli.main", *arguments]
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        until(lambda: process.poll() is not None or (target.exists() and target.read_bytes().count(b"\n") >= 4))
        process.kill()
    content = target.read_bytes()
    num_before = content.count(b"\n")
    assert num_before < 60, "killed too late"
    target.write_bytes(content + content.splitlines(keepends=True)[-1][:50])  # what a kill may leave
    records, counts = run(tmp_path, lines)
    assert counts == BatchCounts(answered=60 - num_before, failed=0, skipped=num_before)
    assert target.read_bytes().startswith(content)
    assert sorted(int(record["custom_id"]) for record in records) == list(range(60))
    assert {record["response"]["status_code"] for record in records} == {200}


@dataclass
class EndingEngine:
    """As much of an engine as a run looks at."""

    is_running: bool = False
    has_ended: bool = False
    num_restarts: int = 0


def run_beside(engine: EndingEngine, target: Path, answer: Any) -> BatchCounts:
    app = Starlette(routes=[Route("/v1/completions", answer, methods=["POST"])])

    async def go() -> BatchCounts:
        with BatchOutput(str(target)) as output:
            runner = BatchRunner(app, engine, MediaLoader(), output, concurrency=1, max_line_bytes=1000)  # type: ignore[arg-type]
            return await runner.run(iter([(1, line("a", "/v1/completions").encode())]))

    return asyncio.run(go())


def test_a_dead_engine_ends_the_run_and_spoils_no_line(tmp_path: Path) -> None:
    async def answer(request: Request) -> Response:
        return JSONResponse({}, 503)

    with pytest.raises(EngineDeadError, match="Run the same command again"):
        run_beside(EndingEngine(has_ended=True), tmp_path / "out.jsonl", answer)
    assert (tmp_path / "out.jsonl").read_text() == ""


@pytest.mark.parametrize(("statuses", "expected"), [([503, 200], 200), ([503, 503], 503)])
def test_a_line_that_a_core_took_with_it_is_asked_once_more(tmp_path: Path, statuses: list[int], expected: int) -> None:
    engine, left = EndingEngine(is_running=True), list(statuses)

    async def answer(request: Request) -> Response:
        engine.is_running = False
        asyncio.get_running_loop().call_later(0.02, restart)
        return JSONResponse({}, left.pop(0))

    def restart() -> None:
        engine.is_running, engine.num_restarts = True, engine.num_restarts + 1

    counts = run_beside(engine, tmp_path / "out.jsonl", answer)
    assert json.loads((tmp_path / "out.jsonl").read_text())["response"]["status_code"] == expected
    assert (counts.answered, left) == (int(expected == 200), [])


def test_from_standard_input_to_standard_output_with_a_config_file(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "batch.yaml"
    config.write_text(f"model: {make_checkpoint('qwen2_vl')}\nnum_blocks: 64\nmax_model_len: 128\n")
    lines = (chat("one", "a") + "\n" + chat("two", "b", n=0) + "\n").encode()
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines)))
    assert main(["run-batch", "--config", str(config), "-i", "-", "-o", "-"]) == 1
    captured = capfd.readouterr()
    records = [json.loads(each) for each in captured.out.splitlines()]
    assert {record["custom_id"]: record["response"]["status_code"] for record in records} == {"one": 200, "two": 400}
    assert "1 answered, 1 failed, 0 done before" in captured.err


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["-i", "in", "-o", "in"], "output: got 'in', which is the input"),
        (["-i", "https://a/in", "-o", "out"], "input: got 'https://a/in'"),
        (["-i", "in", "-o", "out", "--concurrency", "-1"], "concurrency: got -1"),
    ],
)
def test_refusals_before_anything_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], error: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["run-batch", "demo", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"sensorium: {error}")
    assert not list(tmp_path.iterdir())

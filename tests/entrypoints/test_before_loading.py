"""What can be known before a model is loaded is said at once, in one sentence: settings, files, the port, extras.

A certificate that wasn't there, or a port that was taken, was once noticed when the model had been loaded, and without
the extra `serve` the command ended in "No module named 'uvicorn'".
"""

from __future__ import annotations

import asyncio
import re
import socket
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import httpx
import pytest

from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.engine.core import EngineCore
from sensorium.entrypoints.cli.main import main
from sensorium.entrypoints.extras import EXTRAS
from sensorium.entrypoints.openai import listening
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError
from tests.entrypoints.test_tls import CERTIFICATE
from tests.helpers.checkpoints import make_checkpoint

ROOT = Path(__file__).parents[2]

ENCRYPTED_KEY = Path(__file__).parent / "encrypted_key.pem"
"""A key of its own behind the password "password"."""

WRONG = {
    "no certificate": (
        ["--ssl-certfile", "none.pem", "--ssl-keyfile", str(CERTIFICATE)],
        "ssl_certfile: got 'none.pem'",
    ),
    "no key": (["--ssl-certfile", str(CERTIFICATE), "--ssl-keyfile", "none.pem"], "ssl_keyfile: got 'none.pem'"),
    "a folder": (["--ssl-certfile", "/", "--ssl-keyfile", str(CERTIFICATE)], "ssl_certfile: got '/'"),
    "no PEM": (["--ssl-certfile", __file__, "--ssl-keyfile", __file__], "ssl_certfile and ssl_keyfile: .*no PEM"),
    "encrypted": (["--ssl-certfile", str(CERTIFICATE), "--ssl-keyfile", str(ENCRYPTED_KEY)], "the key is encrypted"),
    "one of two": (["--ssl-certfile", str(CERTIFICATE)], "ssl_certfile and ssl_keyfile: got one"),
    "no folder of media": (["--allowed-local-media-path", "/none"], "allowed_local_media_path: got '/none'"),
    "a file for a folder": (["--allowed-local-media-path", __file__], "allowed_local_media_path: got"),
    "no network": (["--allowed-media-network", "10.1.2.3/8"], "allowed_media_network: got '10.1.2.3/8'"),
    "no template": (["--chat-template", "none.jinja"], "chat_template: got 'none.jinja'"),
    "a folder for a template": (["--chat-template", "/"], "chat_template: got '/'"),
    "a picture for a template": (["--chat-template", str(ROOT / "docs/playground.png")], "chat_template: got"),
    "half a template": (["--chat-template", "{% for m in messages %}\n{{ m"], "chat_template: .*line 2"),
    "no tokenizer": (["--tokenizer", "/none"], "tokenizer: got '/none'"),
    "no such host": (["--host", "host.invalid"], "host: got 'host.invalid'"),
    "another's address": (["--host", "192.0.2.1"], "host: got '192.0.2.1'"),
    "no address": (["--otlp-traces-endpoint", "somewhere"], "otlp_traces_endpoint: got 'somewhere'"),
    "no config": (["--config", "none.yaml"], "config: got 'none.yaml'"),
}


@pytest.fixture
def never_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("an engine is started")

    monkeypatch.setattr(AsyncLLMEngine, "start", load)
    monkeypatch.setattr(EngineCore, "__init__", load)


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What the command says, which is one line, before it ends."""
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("sensorium: ")
    assert said.count("\n") == 1
    return said


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("what", WRONG)
def test_a_server_says_at_once_what_is_wrong(what: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags, expected = WRONG[what]
    assert re.search(expected, refusal(["serve", "demo", "--port", "0", *flags], capsys))


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("model", ["/none", "./none", "~/none of this", "a/b/c", __file__, str(ROOT / "docs")])
@pytest.mark.parametrize("command", [["serve"], ["chat"], ["generate"]])
def test_a_model_that_is_not_there_is_named(command: list[str], model: str, capsys: pytest.CaptureFixture[str]) -> None:
    prompt = ["Hello"] if command == ["generate"] else []
    assert f"model: got {model!r}" in refusal([*command, model, *prompt], capsys)


OFFLINE = ("no template", "a folder for a template", "half a template", "no tokenizer", "no config")


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("what", OFFLINE)
@pytest.mark.parametrize("command", ["run-batch", "chat", "generate"])
def test_so_do_the_other_commands(command: str, what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags, expected = WRONG[what]
    requests = tmp_path / "requests.jsonl"
    requests.write_text("")
    more = {"run-batch": ["-i", str(requests), "-o", str(tmp_path / "answers.jsonl")], "generate": ["Hello"]}
    assert re.search(expected, refusal([command, "demo", *more.get(command, []), *flags], capsys))


@pytest.mark.usefixtures("never_loads")
@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_port_that_is_taken_is_noticed_before_loading(host: str, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = refusal(["serve", "demo", "--host", host, "--port", str(port)], capsys)
    assert f"port: got {port}, which another process listens on" in said


def test_two_servers_that_load_do_not_share_a_port() -> None:
    """Sockets that are bound and don't listen yet may have the same address."""
    with listening.listening(ServerArgs(port=0)) as [first]:
        port = first.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port: got {port}"), listening.listening(ServerArgs(port=port)):
            pass
    with listening.listening(ServerArgs(port=port)):  # and it is free again at once
        pass


def test_whoever_connects_while_the_model_loads_is_answered() -> None:
    """The address is taken first; a request that comes then waits until there is a model."""
    path = make_checkpoint("qwen2")
    code = f"""
import asyncio, sys
from sensorium.entrypoints.openai.listening import listening
from sensorium.entrypoints.openai.server_args import ServerArgs
with listening(ServerArgs(port=0)) as sockets:
    print(sockets[0].getsockname()[1], flush=True)
    sys.stdin.readline()
    from sensorium import EngineArgs
    from sensorium.entrypoints.openai.server import serve
    from sensorium.media import MediaLimits
    settings = {{"num_blocks": 64, "device": "cpu"}}
    asyncio.run(serve(EngineArgs({str(path)!r}, **settings), ServerArgs(), MediaLimits(), sockets))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    with process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            port = int(process.stdout.readline())

            async def ask() -> int:
                async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
                    answer = asyncio.create_task(client.get(f"http://127.0.0.1:{port}/health?generate=1"))
                    _, writer = await asyncio.open_connection("127.0.0.1", port)  # connects although nobody accepts
                    writer.close()
                    assert not answer.done()
                    assert process.stdin is not None
                    process.stdin.write("\n")
                    process.stdin.flush()
                    return (await answer).status_code

            assert asyncio.run(ask()) == 200
            process.terminate()
            assert process.wait() == 0
        finally:
            process.kill()


def test_a_refusal_needs_no_torch() -> None:
    code = """
import sys
from sensorium.entrypoints.cli.main import main
print(main(["serve", "demo", "--ssl-certfile", "none.pem", "--ssl-keyfile", "none.pem"]))
print(sorted({"torch", "transformers", "starlette", "uvicorn"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:2] == ["2", "[]"]


# Extras

WITHOUT = """
import sys
from importlib.machinery import PathFinder
absent, find = set(sys.argv.pop(1).split(",")), PathFinder.find_spec
def find_spec(cls, name, *rest):
    return None if name in absent or name.split(".")[0] in absent else find(name, *rest)
PathFinder.find_spec = classmethod(find_spec)
from sensorium.entrypoints.cli.main import main
sys.exit(main(sys.argv[1:]))
"""

NEEDS = {
    "serve": ("serve", ["serve", "demo"]),
    "run-batch": ("serve", ["run-batch", "demo", "-i", __file__, "-o", "/dev/null"]),
    "--otlp-traces-endpoint": ("tracing", ["serve", "demo", "--otlp-traces-endpoint", "http://127.0.0.1:1/v1"]),
    "--chart": ("bench", ["bench", "latency", "demo", "--chart", "chart.png"]),
}

NEED_NONE = {
    "generate": ["generate", "demo", "Hello", "--max-tokens", "2"],
    "chat": ["chat", "demo", "--max-tokens", "2"],
    "env": ["env"],
    "bench": ["bench", "latency", "demo", "--output-tokens", "2", "--repeats", "1", "--text-words", "4"],
}


def run_without(extras: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """The command, where these extras are not installed."""
    absent = ",".join(module for extra in extras for module in EXTRAS[extra])
    command = [sys.executable, "-c", WITHOUT, absent, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)


@pytest.mark.parametrize("what", NEEDS)
def test_what_needs_an_extra_says_which(what: str) -> None:
    extra, arguments = NEEDS[what]
    done = run_without([extra], arguments)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    assert f"pip install 'sensorium[{extra}]'" in done.stderr
    assert what in done.stderr.replace("_", "-") or what.strip("-").replace("-", "_") in done.stderr


@pytest.mark.parametrize("what", NEED_NONE)
def test_what_needs_no_extra_runs_without_any(what: str) -> None:
    done = run_without(list(EXTRAS), NEED_NONE[what])
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr


def test_the_extras_are_those_of_the_package() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    names = {"opentelemetry.sdk": "opentelemetry-sdk"}
    names["opentelemetry.exporter.otlp.proto.http"] = "opentelemetry-exporter-otlp-proto-http"
    for extra, modules in EXTRAS.items():
        packages = {re.split(r"[>=<;\[ ]", each)[0] for each in declared[extra]}
        ours = {names.get(module, module.replace("_", "-")) for module in modules}
        assert ours <= packages
        assert packages - ours <= {"opentelemetry-api"}  # the SDK brings it

"""`sensorium chat` as people use it: in a terminal, in a pipe, with a model here and with a server."""

from __future__ import annotations

import io
import json
import os
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from scripts.demo import picture as shapes
from sensorium.entrypoints.cli.main import main
from tests.entrypoints.served import Served, data_url, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import HANG_S

KEY = "a-key"
CHAT = ["-m", "sensorium.entrypoints.cli.main", "chat"]
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|\r")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("qwen2_vl"), {"api_key": (KEY,)}, limit_mm_per_prompt={"image": 2}) as running:
        yield running


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))


def answer(server: Served, messages: list[Any]) -> str:
    body = {"messages": messages, "temperature": 0, "max_tokens": 8, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}
    response = httpx.post(
        f"{server.url}/v1/chat/completions", json=body, headers=headers, timeout=HANG_S, trust_env=False
    )
    text: str = response.json()["choices"][0]["message"]["content"]
    return text


def test_with_a_server_through_a_pipe(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture(1).save(tmp_path / "a.png")
    pipe(monkeypatch, f"What is @{tmp_path}/a.png", "And now?")
    monkeypatch.setenv("SENSORIUM_API_KEY", KEY)
    flags = ["--temperature", "0", "--max-tokens", "8", "--ignore-eos"]
    assert main(["chat", "--url", f"{server.url}/v1", *flags]) == 0
    image = {"type": "image_url", "image_url": {"url": data_url(picture(1))}}
    turns: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "What is"}, image]}]
    first = answer(server, turns)
    turns += [{"role": "assistant", "content": first}, {"role": "user", "content": "And now?"}]
    assert capsys.readouterr().out == f"{first}\n{answer(server, turns)}\n"
    server.settle()


def test_what_a_server_refuses_is_shown_and_the_chat_goes_on(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture(1).save(tmp_path / "a.png")
    pipe(monkeypatch, f"@{tmp_path}/a.png @{tmp_path}/a.png @{tmp_path}/a.png What?", "Hello")
    assert main(["chat", "--url", server.url, "--api-key", KEY, "--max-tokens", "2"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("sensorium: status 400: ")
    assert len(captured.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--url", "http://127.0.0.1:1"], "the server: got no answer"),
        (["--url", "http://[", "--api-key", KEY], "url: got 'http://['"),
        (
            ["--url", "http://127.0.0.1:1", "--num-blocks", "3"],
            "url: got a server and the engine's settings",
        ),
        (["--url", "http://127.0.0.1:1", "--max-decode-s", "3"], "url: got a server and the engine's settings"),
        (["demo", "--api-key", KEY], "api_key: got a key without a server"),
    ],
)
def test_servers_that_cannot_be_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], error: str
) -> None:
    pipe(monkeypatch)
    assert main(["chat", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"sensorium: {error}")


def test_the_config_file_names_the_model_of_a_server(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The name was passed over, and the server's first model answered."""
    (tmp_path / "chat.yaml").write_text("model: another")
    pipe(monkeypatch, "Hello")
    assert main(["chat", "--url", server.url, "--api-key", KEY, "--config", str(tmp_path / "chat.yaml")]) == 1
    assert "another" in capsys.readouterr().err


def test_a_server_that_wants_another_key(
    server: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pipe(monkeypatch)
    assert main(["chat", "--url", server.url, "--api-key", "another"]) == 2
    assert "status 401" in capsys.readouterr().err


class InTerminal:
    """A process whose terminal is ours to type on."""

    def __init__(self, *arguments: str) -> None:
        self._fd, self._other = os.openpty()
        name = os.ttyname(self._other)
        # A session's leader that opens a terminal gets it as its own, so that Ctrl-C reaches it.
        command = ["sh", "-c", 'exec "$@" <"$0" >"$0" 2>&1', name, sys.executable, *arguments]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"}
        self.process = subprocess.Popen(command, env=environment, start_new_session=True)
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._fd, text.encode())

    def expect(self, pattern: str, timeout_s: float = HANG_S) -> str:
        """What comes up to a match, without control sequences; the match is consumed."""
        deadline_s = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.seen)):
            is_running = self.process.poll() is None and time.monotonic() < deadline_s
            if select.select([self._fd], [], [], 0.1)[0]:
                self.seen = _CONTROL.sub("", self.seen + os.read(self._fd, 65536).decode("utf-8", "replace"))
            else:
                assert is_running, f"no {pattern!r} in {self.seen!r}"
        before, self.seen = self.seen[: found.end()], self.seen[found.end() :]
        return before

    def press_until(self, key: str, pattern: str) -> str:
        """Press a key, again after a while as people do: readline misses a signal just before it waits for a key."""
        for _ in range(4):
            self.type(key)
            with suppress(AssertionError):
                return self.expect(pattern, timeout_s=5.0)
        return self.expect(pattern)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._fd)
        os.close(self._other)


def test_in_a_terminal_with_the_bundled_model(tmp_path: Path) -> None:
    shapes().save(tmp_path / "shapes.png")
    saved = tmp_path / "saved.json"
    terminal = InTerminal(*CHAT, "demo", "--temperature", "0", "--max-model-len", "2048")
    try:
        terminal.expect(r"demo\. /help for help\.\n> ")
        terminal.type(f"{tmp_path}/shapes.png\n")
        terminal.expect(r"image .*shapes\.png, [\d,]+ bytes: goes with the next message\n> ")
        terminal.type("How manx\x7fy shapes are there?\n")  # a slip, taken back
        shown = terminal.expect(r"\[\d+ tokens; first after [\d.]+ s[^\]]*\]\n> ")
        assert "There are 2 shapes." in shown
        terminal.type("half a line")
        terminal.expect("half a line")
        terminal.press_until("\x03", r"\(/quit or Ctrl-D to leave\)\n> ")  # drops it
        terminal.type(f"/save {saved}\n")
        terminal.expect("1 turns written")
        terminal.expect("> ")
        terminal.type("\x04")
        assert terminal.process.wait(HANG_S) == 0
    finally:
        terminal.close()
    question = json.loads(saved.read_text())["messages"][0]["content"]
    assert question == [
        {"type": "image_url", "image_url": {"url": f"{tmp_path}/shapes.png"}},
        {"type": "text", "text": "How many shapes are there?"},
    ]


def test_ctrl_c_stops_an_answer_and_not_the_program(server: Served) -> None:
    flags = ["--ignore-eos", "--max-tokens", "900", "--logit-bias", '{"33": 100}']
    terminal = InTerminal(*CHAT, "--url", server.url, "--api-key", KEY, *flags)
    try:
        terminal.expect("tiny. /help for help.\n> ")
        terminal.type("Go on\n")
        terminal.expect(r"(\S)\1\1\1")
        terminal.press_until("\x03", r"\(stopped\)\n> ")
        server.settle()  # the server has nothing left to do for it
        terminal.type("/reset\n")
        terminal.expect("forgotten\n> ")
        terminal.type("/quit\n")
        assert terminal.process.wait(HANG_S) == 0
    finally:
        terminal.close()

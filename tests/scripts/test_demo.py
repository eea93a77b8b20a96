"""`scripts/demo.py` starts the server, gets true answers that are Hugging Face's, and stops it when it is told to."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from tests.helpers.waiting import HANG_S

SCRIPT = Path(__file__).parents[2] / "scripts" / "demo.py"


@contextmanager
def demo(*flags: str) -> Iterator[subprocess.Popen[str]]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(
        [sys.executable, str(SCRIPT), *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    with process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGINT)  # so that it ends its server too
                try:
                    process.wait(HANG_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def answer_to(question: str, output: str) -> str:
    found = re.search(rf"^  {re.escape(question)}\n  (.+)$", output, re.MULTILINE)
    assert found, output
    return found[1]


def is_open(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False, timeout=HANG_S).is_success
    except httpx.HTTPError:
        return False


def test_it_answers_truly_and_as_hugging_face_does_and_exits() -> None:
    with demo("--exit") as process:
        output, _ = process.communicate(timeout=HANG_S)
    assert process.returncode == 0, output
    assert all(word in answer_to("What is in the image?", output) for word in ("red", "circle"))
    assert "circle" in answer_to("What moves?", output)
    assert "3" in answer_to("How many beeps are there?", output)
    assert "4 of 4 answers are those of Hugging Face's class" in output
    found = re.search(r"The playground: (http://127\.0\.0\.1:\d+)/", output)
    assert found, output
    assert not is_open(found[1])


def test_the_playground_is_there_until_ctrl_c_ends_all() -> None:
    with demo("--no-compare") as process:
        assert process.stdout is not None
        url = None
        for line in process.stdout:
            if found := re.search(r"The playground: (http://127\.0\.0\.1:\d+)/", line):
                url = found[1]
            if "Ctrl-C stops" in line:
                break
        assert url is not None
        page = httpx.get(f"{url}/", trust_env=False, timeout=HANG_S)
        assert "<title>Sensorium</title>" in page.text
        process.send_signal(signal.SIGINT)
        assert process.wait(HANG_S) == 0
        assert not is_open(url)

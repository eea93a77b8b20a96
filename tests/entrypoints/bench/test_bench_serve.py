"""`sensorium bench serve` as a command, on a served checkpoint: figures, files, charts, refusals."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from PIL import Image

from sensorium.entrypoints.cli.main import main
from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint

KEY = "a-key"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("qwen2_vl"), {"api_key": (KEY,)}, limit_mm_per_prompt={"image": 2}) as running:
        yield running


SMALL = ["--num-requests", "6", "--warmup", "1", "--text-words", "2-5", "--output-tokens", "3-5"]


def bench(server: Served, *flags: str, key: str = KEY) -> int:
    return main(["bench", "serve", "--url", server.url, "--api-key", key, *SMALL, *flags])


def test_media_in_a_closed_loop(server: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, figures_file = tmp_path / "run.html", tmp_path / "run.json"
    flags = [
        "--streams",
        "3",
        "--images",
        "1-2",
        "--image-size",
        "56x56",
        "--image-size",
        "84x56:2",
        "--goodput",
        "e2e:60000",
    ]
    assert bench(server, *flags, "--chart", str(page), "--json", str(figures_file), "--label", "a <run>") == 0
    lines = capsys.readouterr().out.splitlines()
    figures = json.loads(lines[-1])
    assert json.loads(figures_file.read_text()) == figures
    assert (figures["model"], figures["completed"], figures["failed"], figures["not_sent"]) == ("tiny", 6, 0, 0)
    assert 18 <= figures["output_tokens"] <= 30
    assert figures["goodput"]["share"] == 1.0
    assert figures["settings"]["image_size"] == ["56x56", "84x56:2"]
    assert any(line.startswith("ttft_ms") and "p99" in line for line in lines)
    text = page.read_text()
    assert "a &lt;run&gt;" in text
    assert not re.search(r"(src|href)=|https?://(?!127\.0\.0\.1)|@import|url\(", text), "a page of its own"
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(drawings) == 4
    for drawing in drawings:
        assert ET.fromstring(drawing).attrib["role"] == "img"


def test_completions_at_a_rate_with_a_picture(
    server: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    picture = tmp_path / "run.png"
    assert bench(server, "--rate", "200", "--endpoint", "completions", "--chart", str(picture)) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["completed"], figures["settings"]["rate"]) == (6, 200.0)
    assert figures["client"]["cpu_us_per_token_event"] > 0
    with Image.open(picture) as chart:
        assert chart.width > 500


def test_a_config_file(server: Served, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "bench.yaml"
    config.write_text(f"url: {server.url}/v1\napi-key: {KEY}\nnum-requests: 9\ntext-words: 3\ngoodput: [ttft:1]\n")
    assert main(["bench", "serve", "--config", str(config), "--num-requests", "2", "--output-tokens", "2"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["completed"], figures["output_tokens"], figures["settings"]["text_words"]) == (2, 4, "3")
    assert figures["goodput"]["targets"] == ["ttft:1"]


def test_failures_of_the_run_are_counted(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, "--images", "3", "--warmup", "0") == 1
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (figures["completed"], figures["failed"]) == (0, 6)
    [error] = figures["errors"]
    assert error.startswith("status 400: ")


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["--images", "3"], "warm-up: got status 400"),
        (["--images", "1", "--endpoint", "completions"], "endpoint: got 'completions' and media"),
        (["--chart", "x.gif"], "chart: got 'x.gif'"),
        (["--json", "/nowhere/x.json"], "json: got '/nowhere/x.json'"),
        (["--extra-body", '{"nonsense": 1}'], "warm-up: got status 400: nonsense"),
        (["--rate", "0"], "rate: got 0.0"),
    ],
)
def test_refusals_before_anything_is_measured(
    server: Served, capsys: pytest.CaptureFixture[str], flags: list[str], error: str
) -> None:
    assert bench(server, *flags) == 2
    assert capsys.readouterr().err.startswith(f"sensorium: {error}")


def test_a_key_that_is_wrong_and_a_server_that_is_not_there(server: Served, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, key="another") == 2
    assert "status 401" in capsys.readouterr().err
    assert main(["bench", "serve", "--url", "http://127.0.0.1:1"]) == 2
    assert "no server answers" in capsys.readouterr().err


def test_values_that_flags_refuse(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--text-words", "9-3"])
    assert "span: got '9-3', expected a number or two such as '32-128'" in capsys.readouterr().err

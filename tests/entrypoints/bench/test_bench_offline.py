"""`sensorium bench throughput`, `latency` and `startup` on tiny checkpoints: what is counted, written, refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from sensorium.entrypoints.bench import startup
from sensorium.entrypoints.bench.startup import measure
from sensorium.entrypoints.cli.main import main
from sensorium.errors import ConfigError
from tests.helpers.checkpoints import make_checkpoint

TINY = str(make_checkpoint("qwen2_vl"))
SMALL = ["--num-blocks", "256", "--max-model-len", "1024", "--device", "cpu"]


def figures_of(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["bench", *arguments, *SMALL]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_throughput_with_pictures(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page, file = tmp_path / "a.html", tmp_path / "a.json"
    flags = ["--num-requests", "5", "--repeats", "3", "--text-words", "3", "--output-tokens", "2-4", "--images", "1-2"]
    files = ["--chart", str(page), "--json", str(file), "--image-size", "56x56"]
    figures = figures_of(capsys, "throughput", TINY, *flags, *files)
    assert (figures["benchmark"], figures["requests"], figures["settings"]["images"]) == ("throughput", 5, "1-2")
    assert 10 <= figures["output_tokens"] <= 20
    assert figures["output_tokens_per_s"] == sorted(figures["output_tokens_per_s_of_runs"])[1]
    assert figures["output_tokens_per_s"] == pytest.approx(figures["output_tokens"] / figures["wall_s"], rel=0.05)
    assert figures["ttft_ms"]["max"] / 1e3 <= figures["wall_s"]
    assert json.loads(file.read_text()) == figures
    assert "<svg" in page.read_text()


def test_latency_of_a_batch(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--batch-size", "2", "--repeats", "4", "--text-words", "3", "--output-tokens", "5", "--plain"]
    figures = figures_of(capsys, "latency", TINY, *flags)
    assert (figures["batch_size"], figures["repeats"], figures["output_tokens"]) == (2, 4, 10)
    assert figures["ttft_ms"]["p50"] <= figures["batch_ms"]["p50"]
    assert figures["step_ms"]["mean"] * 4 <= figures["batch_ms"]["max"]


def test_startup_in_fresh_processes(capsys: pytest.CaptureFixture[str]) -> None:
    figures = figures_of(capsys, "startup", TINY, "--repeats", "1")
    times = [figures[f"{name}_ms"]["p50"] for name in ("imported", "ready", "first_token")]
    assert times == sorted(times)
    assert times[0] > 0
    assert figures["stages_s"]
    assert figures["settings"] == {"num_blocks": 256, "max_model_len": 1024, "device": "cpu"}


def test_a_start_that_fails_says_why_and_one_that_hangs_is_ended(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"timeout_s: got no first token within 0\.05 s"):
        measure(TINY, {}, 0.05)
    monkeypatch.setattr(startup, "_PROBE", "a_module_that_is_not_there")
    with pytest.raises(ConfigError, match=r"could not be started: .*a_module_that_is_not_there"):
        measure(str(tmp_path), {}, 60)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["throughput", "--repeats", "0"], "repeats: got 0"),
        (["throughput", "--plain", "--images", "1"], "plain: got media"),
        (["startup", "--repeats", "0"], "repeats: got 0"),
        (["latency", "--json", "/nowhere/a"], "json: got '/nowhere/a'"),
    ],
)
def test_refusals_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert main(["bench", arguments[0], TINY, *arguments[1:]]) == 2
    assert capsys.readouterr().err.startswith(f"sensorium: {error}")


def test_the_environment(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["python"] == sys.version.split()[0]
    assert {"sensorium", "torch", "transformers", "cpu", "cores", "memory", "native CPU kernels"} <= found.keys()
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(found)
    assert lines[0].startswith("sensorium ")

"""The command line: every setting has a flag, a config file and flags agree, and the process serves and ends well."""

from __future__ import annotations

import argparse
import importlib
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.bench.workload import Workload
from sensorium.entrypoints.cli.flags import field_docs, read_config
from sensorium.entrypoints.cli.main import main, make_parser
from sensorium.entrypoints.cli.serve import settings
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError
from sensorium.media.limits import MediaLimits
from sensorium.sampling_params import SamplingParams
from tests.entrypoints.served import start_command
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S, until


def parse(*arguments: str) -> tuple[EngineArgs, ServerArgs, MediaLimits]:
    return settings(make_parser().parse_args(["serve", *arguments]))


@pytest.mark.parametrize("kind", [EngineArgs, ServerArgs, MediaLimits])
def test_every_field_is_a_flag_with_help(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    text = capsys.readouterr().out
    for field in fields(kind):
        if field.name != "model":
            assert f"--{field.metadata.get('flag', field.name).replace('_', '-')} " in text.replace(",", " ")
            assert field_docs(kind)[field.name], field.name


def test_defaults_are_those_of_the_settings() -> None:
    assert parse("a-model") == (EngineArgs("a-model"), ServerArgs(), MediaLimits())


def test_flags_of_all_kinds() -> None:
    engine, server, limits = parse(
        *("m", "--max-model-len", "64", "--no-enable-prefix-caching", "--limit-mm-per-prompt", '{"image": 4}'),
        *("--api-key", "a", "--api-key", "b", "--max-token-gap-s", "0.5", "--max-image-pixels", "1000", "--port", "0"),
    )
    assert (engine.max_model_len, engine.enable_prefix_caching, engine.max_token_gap_s) == (64, False, 0.5)
    assert engine.limit_mm_per_prompt == {"image": 4}
    assert parse("m", "--plugin", "a.py", "--plugin", "my_models")[0].plugins == ("a.py", "my_models")
    assert (server.api_key, server.port, limits.max_image_pixels) == (("a", "b"), 0, 1000)


def test_a_config_file_fills_in_and_flags_win(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(
        "model: one\nmax-model-len: 64\nmax_num_seqs: 3\napi_key: [a, b]\nhf_overrides: {x: 1}\ndrain_s: 5\n"
        "plugin: a.py\n"
    )
    engine, server, _ = parse("--config", str(path), "--max-num-seqs", "5")
    assert (engine.model, engine.max_model_len, engine.max_num_seqs) == ("one", 64, 5)
    assert (engine.hf_overrides, server.api_key, server.drain_s) == ({"x": 1}, ("a", "b"), 5)
    assert engine.plugins == ("a.py",)
    assert parse("two", "--config", str(path))[0].model == "two"


@pytest.mark.parametrize(
    ("text", "match"),
    [("nonsense: 1", "nonsense"), ("port: x", "port"), ("port: true", "port"), ("- a", "mapping|list"), ("{", "YAML")],
)
def test_a_config_file_that_is_wrong_is_refused(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=match):
        parse("m", "--config", str(path))


@pytest.mark.parametrize("command", ["serve", "chat", "generate", "run_batch", "bench_serve", "bench_latency"])
def test_a_config_file_holds_what_the_flags_below_it_say_and_nothing_else(command: str, tmp_path: Path) -> None:
    """`generate` and `chat` took every field of their settings' classes from the file, `tool_parser` and `n` among
    them, for which they have no flag because they have no use; and `json-schema`, a flag, they did not take.
    """
    parser = argparse.ArgumentParser()
    importlib.import_module(f"sensorium.entrypoints.cli.{command}").fill(parser)
    below = parser.format_help().rpartition("--config FILE")[2]
    flags = {name.replace("-", "_") for name in re.findall(r"^  --([\w-]+)", below, re.MULTILINE)}
    settings = parser.get_default("config_settings")
    assert {setting.flag for setting in settings.values()} == flags | ({"model"} & settings.keys())
    left_out = sorted(_ALL_FIELDS - settings.keys())
    assert left_out
    for name in left_out:
        (tmp_path / "c.yaml").write_text(f"{name}: 1")
        with pytest.raises(ConfigError, match=rf"unknown names \['{name}'\]"):
            read_config(str(tmp_path / "c.yaml"), settings)


_ALL_FIELDS = {
    name
    for kind in (ServerArgs, EngineArgs, MediaLimits, SamplingParams, Workload)
    for name in kind.__dataclass_fields__
}


@pytest.mark.parametrize(
    "arguments", [[], ["bench"], ["serve"], ["generate"], ["chat"], ["run-batch"], ["bench", "latency"]]
)
def test_help_loads_no_heavy_library(arguments: list[str]) -> None:
    heavy = {"torch", "transformers", "starlette", "matplotlib", "pydantic", "av"}
    code = f"""
import sys
from sensorium.entrypoints.cli.main import main
try:
    main({[*arguments, "--help"]!r})
except SystemExit as end:
    print("status", end.code, sorted({heavy!r} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_S, check=True)
    assert result.stdout.splitlines()[-1] == "status 0 []"


def test_errors_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "m", "--port", "99999"]) == 2
    assert capsys.readouterr().err == "sensorium: port: got 99999, expected 0 to 65535. Set port (--port).\n"


@pytest.mark.parametrize("how", ["stop", "core dies", "core dies twice"])
def test_the_process_serves_and_ends_with_the_right_status(how: str) -> None:
    process, url, _ = start_command(make_checkpoint("qwen2_vl"), *(["--restart-core", "1"] if "twice" in how else []))
    with process:
        try:
            assert httpx.get(f"{url}/health?generate=1", trust_env=False, timeout=HANG_S).is_success
            (core,) = _children(process.pid)
            if how == "core dies twice":
                core = _kill_and_await_another(core, process.pid, url)
            if how == "stop":
                process.send_signal(signal.SIGTERM)
            else:
                os.kill(core, signal.SIGKILL)
            assert process.wait(HANG_S) == (0 if how == "stop" else 1)
            until(lambda: not Path(f"/proc/{core}").exists(), "the core outlives its front")
        finally:
            process.kill()


def _kill_and_await_another(core: int, front: int, url: str) -> int:
    os.kill(core, signal.SIGKILL)
    health = f"{url}/health?generate=1"
    until(
        lambda: core not in _children(front) and httpx.get(health, trust_env=False, timeout=HANG_S).is_success,
        "no new core",
    )
    (another,) = _children(front)
    return another


def _children(pid: int) -> list[int]:
    return [int(text) for text in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

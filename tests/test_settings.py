"""Every setting is checked where it is resolved, before anything is loaded, and an error names it and its flag."""

from __future__ import annotations

import argparse
import math
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import numpy as np
import pytest
from PIL import Image

from sensorium import LLM, SamplingParams
from sensorium.config import (
    CacheConfig,
    DeviceConfig,
    LoadConfig,
    PoolerConfig,
    ReasoningParser,
    SchedulerConfig,
    ToolParser,
)
from sensorium.engine.args import EngineArgs
from sensorium.entrypoints.bench.load import Arrivals
from sensorium.entrypoints.bench.offline import OfflineBenchArgs
from sensorium.entrypoints.bench.serve import ServeBenchArgs
from sensorium.entrypoints.bench.startup import StartupBenchArgs
from sensorium.entrypoints.bench.workload import Workload
from sensorium.entrypoints.cli.flags import add_config, add_flags, build, field_docs, read_settings
from sensorium.entrypoints.cli.main import LazyParser, main
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError, MediaForbiddenError
from sensorium.media.limits import MediaLimits
from sensorium.parsing.detect import AUTO, NONE
from sensorium.parsing.formats import FORMATS
from sensorium.parsing.reasoning import REASONING_FORMATS
from sensorium.settings import Bounds, FileName, check_setting, check_settings, field_type_of
from tests.helpers.checkpoints import make_checkpoint

KINDS = (
    *(EngineArgs, ServerArgs, MediaLimits, CacheConfig, SchedulerConfig, DeviceConfig, LoadConfig, PoolerConfig),
    *(Workload, Arrivals, OfflineBenchArgs, StartupBenchArgs, ServeBenchArgs),
)


def wrong_values(hint: Any) -> list[Any]:
    """What can't be meant for a field of this type."""
    form = field_type_of(hint)
    origin = typing.get_origin(form.kind)
    wrong: list[Any] = [object(), b"x"]
    if not form.is_optional:
        wrong.append(None)
    if form.choices:
        return [*wrong, "foo", "", 1, True, *form.choices[0][:-1:2]]
    if form.kind is bool:
        return [*wrong, 1, 0, "true", "", 1.0]
    if form.kind in (int, float):
        wrong += [True, False, "1", "", math.nan, -math.inf, [1], 1j]
        for bounds in form.bounds:
            wrong += [bounds.low if bounds.above else bounds.low - 1, -1e300, 10**400 if form.kind is int else -3]
            if math.isfinite(bounds.high):
                wrong += [bounds.high * 2 + 1, math.inf]
        return wrong + ([1.5, 2.0] if form.kind is int else [])
    if form.kind is str:
        return [*wrong, 1, True, ["x"], "a\0b", *(["", " "] if form.is_file_name else [])]
    if origin is not None and issubclass(origin, Mapping):
        return [*wrong, "{}", [], 3, {1: 1}]
    if origin is not None and issubclass(origin, Sequence):
        element = "x" if int in typing.get_args(form.kind) else 3
        return [*wrong, "x", 3, [element], {"a": 1}]
    return wrong


CASES = [
    pytest.param(kind, field.name, hint, id=f"{kind.__name__}.{field.name}")
    for kind in KINDS
    for hints in [typing.get_type_hints(kind, include_extras=True)]
    for field in fields(kind)
    for hint in [hints[field.name]]
]


@pytest.mark.parametrize(("kind", "name", "hint"), CASES)
def test_every_field_refuses_what_cannot_be_meant(kind: type, name: str, hint: Any) -> None:
    """`block_size=0` ran as 16, `mm_split="of"` as auto, `num_blocks=-4` was a raw ValueError."""
    given = {"model": "demo"} if kind is EngineArgs else {}
    kind(**given)
    for value in wrong_values(hint):
        with pytest.raises(ConfigError, match=f"^{name}") as caught:
            kind(**{**given, name: value})
        assert "expected" in str(caught.value), value
        assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "settings",
    [
        {"block_size": 0},
        {"mm_split": "of"},
        {"mm_split": "on"},
        {"pooling_type": "foo"},
        {"pooling_type": ""},
        {"max_token_gap_s": -1},
        {"max_token_gap_s": 0},
        {"encoder_cache_rows": -3},
        {"num_blocks": -4},
        {"num_blocks": 0},
        {"max_num_batched_tokens": 0},
        {"kv_cache_bytes": 0},
        {"max_waiting_requests": 0},
        {"preprocess_threads": 0},
        {"num_threads": 0},
        {"tool_parser": "hermes2"},
        {"tokenizer_mode": "fast"},
        {"tokenizer_mode": "slow"},
        {"limit_mm_per_prompt": {"image": -1}},
        {"limit_mm_per_prompt": {"image": True}},
        {"limit_mm_per_prompt": {"image": 1.5}},
        {"seed": 2**63},
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"device": "cuda:-1"},
        {"device": "cpu:0"},
        {"device": "mps"},
        {"chat_template": "no/such/file.jinja"},
        {"num_blocks": 4, "kv_cache_bytes": 1 << 20},
        {"code_revision": "main"},
        {"skip_tokenizer_init": True, "chat_template": "{{ 1 }}"},
        {"skip_tokenizer_init": True, "tokenizer": "demo"},
        {"tensor_parallel_size": 0},
        {"quantization": "int4"},
        {"max_steps_in_flight": 0},
        {"plugins": "a.py"},
    ],
    ids=str,
)
def test_wrong_settings_name_their_field_before_anything_is_loaded(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="|".join(settings)):
        EngineArgs("no-such/model", **settings).create_engine_config()


def test_a_directory_has_no_revisions(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="revision: got 'v2' for a directory"):
        EngineArgs(str(tmp_path), revision="v2").create_engine_config()


def test_what_can_be_meant_is_taken_in_its_own_type() -> None:
    args = EngineArgs(Path("a"), num_blocks=np.int64(7), max_token_gap_s=math.inf, dtype="BFLOAT16")  # type: ignore[arg-type]
    assert (args.model, args.num_blocks, args.dtype) == ("a", 7, "bfloat16")
    assert type(args.num_blocks) is int
    assert ServerArgs(log_level="debug").log_level == "DEBUG"  # type: ignore[arg-type]
    assert EngineArgs("a", memory_fraction=1, encoder_cache_rows=0, mm_processor_cache_bytes=0).memory_fraction == 1


@pytest.mark.parametrize(
    "settings",
    [
        {"allowed_media_network": ("10.1.0.1/16",)},
        {"allowed_media_network": ("x",)},
        {"allow_remote_media": False, "allowed_media_host": ("a",)},
        {"otlp_traces_endpoint": "127.0.0.1:4318"},
        {"otlp_traces_endpoint": "http://[::1"},
        {"ssl_certfile": "a"},
        {"api_key": ("",)},
        {"served_model_name": ("",)},
        {"port": 65536},
        {"drain_s": math.nan},
    ],
    ids=str,
)
def test_wrong_settings_of_a_server_name_their_field(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        ServerArgs(**settings)


def test_closed_sets_are_those_of_their_rooms() -> None:
    assert set(get_args(ToolParser)) == {AUTO, NONE, *FORMATS}
    assert set(get_args(ReasoningParser)) == {AUTO, NONE, *REASONING_FORMATS}


@pytest.mark.parametrize("kind", KINDS)
def test_the_command_line_takes_its_choices_from_closed_sets(kind: type, capsys: pytest.CaptureFixture[str]) -> None:
    parser = LazyParser()
    add_flags(parser, kind, leave_out=["model"])
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        for choice in field_type_of(hint).choices:
            flag = f"--{name.replace('_', '-')}"
            assert getattr(parser.parse_args([flag, choice.upper()]), name) == choice
            with pytest.raises(SystemExit):
                parser.parse_args([flag, "foo"])
            assert f"argument {flag}: invalid choice: 'foo'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--block-size", "0"], "--block-size"),
        (["--max-token-gap-s", "nan"], "--max-token-gap-s"),
        (["--memory-fraction", "1.5"], "--memory-fraction"),
        (["--encoder-cache-rows", "-3"], "--encoder-cache-rows"),
        (["--limit-mm-per-prompt", '{"image": "x"}'], "--limit-mm-per-prompt"),
        (["--port", "-1"], "--port"),
        (["--max-image-pixels", "-1"], "max_image_pixels"),
    ],
)
@pytest.mark.parametrize("command", ["serve", "run-batch"])
def test_an_error_of_the_command_line_names_the_flag(
    flags: list[str], named: str, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if command == "run-batch":
        if flags[0] == "--port":
            return
        flags = ["-i", "no-such-input", "-o", "-", *flags]
    assert main([command, "no-such-model", *flags]) == 2
    error = capsys.readouterr().err
    assert named in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_setting_that_names_a_file_takes_a_path(kind: type) -> None:
    """`plugins` took texts alone, while every single file could be a `Path`."""
    named = ("file", "folder", "directory", "path")
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        words = set(re.findall(r"[a-z]+", field_docs(kind).get(name, "").lower()))
        if field_type_of(hint).kind is str and words & set(named) and not name.endswith("host"):
            assert field_type_of(hint).is_file_name, name
    assert EngineArgs(Path("a"), plugins=[Path("b.py")]).plugins == ("b.py",)  # type: ignore[arg-type, list-item]


def test_closed_sets_of_a_config_file_are_checked(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("scheduling_policy: fair\n")
    with pytest.raises(ConfigError, match="scheduling_policy: got 'fair'"):
        build(EngineArgs, {"model": "m", **_values(tmp_path / "c.yaml")})


def _values(path: Path) -> Mapping[str, Any]:
    parser = argparse.ArgumentParser()
    add_config(parser)
    add_flags(parser, EngineArgs)
    return read_settings(parser.parse_args(["--config", str(path)]))


# The checks themselves


@dataclass(frozen=True)
class Example:
    """One field of each form."""

    count: Annotated[int, Bounds(1, 9)] = 1
    share: Annotated[float, Bounds(0, 1, above=True)] = 0.5
    way: Literal["one", "two"] | None = None
    file: Annotated[str, FileName()] | None = None
    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        check_settings(self)


def test_messages_say_what_was_got_what_is_expected_and_what_to_do() -> None:
    for settings, message in (
        ({"count": 10}, "count: got 10, expected 1 to 9. Set count (--count)."),
        ({"share": 0}, "share: got 0, expected more than 0, at most 1. Set share (--share)."),
        ({"way": "three"}, "way: got 'three', expected one of 'one', 'two' or None. Set way (--way)."),
        ({"names": "ab"}, "names: got 'ab', expected a tuple. Set names (--names)."),
    ):
        with pytest.raises(ConfigError) as caught:
            Example(**settings)  # type: ignore[arg-type]
        assert str(caught.value) == message
    assert Example(names=["a"]).names == ("a",)  # type: ignore[arg-type]
    assert check_setting("x", 3, int | None) == 3


def test_a_cache_that_no_machine_has_room_for_is_one_sentence() -> None:
    with pytest.raises(ConfigError, match=r"KV cache: got 2147483647 blocks .*--num-blocks"):
        LLM(str(make_checkpoint("llama")), num_blocks=2**31 - 1, block_size=1 << 16, device="cpu")


def test_a_folder_of_local_media_holds_for_programs_too(tmp_path: Path) -> None:
    """`LLM` took the setting and read every file nevertheless."""
    (tmp_path / "inside").mkdir()
    for name in ("inside/a.png", "b.png"):
        Image.new("RGB", (56, 56)).save(tmp_path / name)
    llm = LLM(
        str(make_checkpoint("qwen2_vl")),
        allowed_local_media_path=str(tmp_path / "inside"),
        num_blocks=64,
        max_model_len=512,
        device="cpu",
    )

    def chat(name: str) -> Any:
        part = {"type": "image_url", "image_url": {"url": str(tmp_path / name)}}
        return llm.chat([{"role": "user", "content": [part]}], SamplingParams(max_tokens=1))

    assert chat("inside/a.png")[0].outputs
    with pytest.raises(MediaForbiddenError):
        chat("b.png")
    llm.shutdown()


def test_a_setting_that_there_is_not_is_named_with_the_one_that_may_be_meant() -> None:
    with pytest.raises(ConfigError, match=r"^block_sizes: got a setting that there isn't, expected 'block_size'"):
        LLM("no-such-model", block_sizes=16)
    with pytest.raises(ConfigError, match="expected a field of EngineArgs"):
        LLM("no-such-model", xyzzy=16)

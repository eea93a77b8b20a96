"""`sensorium generate`: prompts from everywhere, media by path, answers as text and JSON lines, as they come."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from scripts import demo
from sensorium import LLM, SamplingParams
from sensorium.entrypoints.cli.main import main
from sensorium.media.encode import encode_audio, encode_video
from tests.entrypoints.served import SETTINGS
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.mixed_requests import picture

TINY = str(make_checkpoint("qwen2_vl"))
SMALL = ["--num-blocks", "128", "--max-model-len", "1024"]
GREEDY = ["--temperature", "0", "--max-tokens", "8", "--ignore-eos"]


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(TINY, **SETTINGS)


def text_of(llm: LLM, messages: list[Any] | str) -> str:
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    outputs = llm.generate(messages, params) if isinstance(messages, str) else llm.chat(messages, params)
    return outputs[0].outputs[0].text


def generate(*arguments: str, model: str = TINY) -> int:
    return main(["generate", model, *arguments, *SMALL, *GREEDY])


@pytest.mark.parametrize("stream", ["--stream", "--no-stream"])
def test_one_prompt_whole_and_as_it_comes(llm: LLM, capsys: pytest.CaptureFixture[str], stream: str) -> None:
    assert generate("--system", "Be brief", "Say something", stream) == 0
    messages = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": "Say something"}]
    assert capsys.readouterr().out == text_of(llm, messages) + "\n"
    assert generate("Once", "--plain", stream) == 0
    assert capsys.readouterr().out == text_of(llm, "Once") + "\n"


def test_prompts_of_a_file_as_json_lines_each_with_its_own_outcome(
    llm: LLM, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    messages = [{"role": "user", "content": "Say something"}]
    lines = [{"prompt": "One"}, {"messages": messages}, {"messages": [{"role": "user", "content": [{"type": "x"}]}]}]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n\n".join(map(json.dumps, lines)))
    assert generate("Zero", "--file", str(path), "--format", "jsonl", "--n", "2") == 1
    captured = capsys.readouterr()
    records = [json.loads(line) for line in captured.out.splitlines()]
    assert [record["index"] for record in records] == [0, 1, 2, 3]
    assert [record.get("prompt", record.get("messages")) for record in records][:3] == ["Zero", "One", messages]
    assert records[2]["outputs"] == [{"text": text_of(llm, messages), "finish_reason": "length", "num_tokens": 8}] * 2
    assert (records[3]["outputs"], records[0]["error"]) == ([], None)
    assert "messages[0].content[0].type" in records[3]["error"]
    assert captured.err.startswith("sensorium: prompt 4: messages[0]")


def test_a_text_file_and_standard_input(
    llm: LLM, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("One\nTwo\n")
    assert generate("--file", str(path)) == 0
    one, two = (text_of(llm, [{"role": "user", "content": each}]) for each in ("One", "Two"))
    assert capsys.readouterr().out == f"[1] One\n{one}\n\n[2] Two\n{two}\n\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Two\nlines\n"))
    assert generate() == 0
    assert capsys.readouterr().out == text_of(llm, [{"role": "user", "content": "Two\nlines"}]) + "\n"


def test_pictures_in_a_chat_and_in_a_plain_prompt(llm: LLM, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    paths = [str(tmp_path / f"{seed}.png") for seed in (1, 2)]
    for seed, path in enumerate(paths, 1):
        picture(seed).save(path)
    flags = [flag for path in paths for flag in ("--image", path)]
    assert generate("Compare.", *flags, "--format", "jsonl") == 0
    record = json.loads(capsys.readouterr().out)
    llm_of_two = LLM(TINY, **SETTINGS, limit_mm_per_prompt={"image": 2})
    parts = [{"type": "image", "image": path} for path in paths]
    expected = text_of(llm_of_two, [{"role": "user", "content": [*parts, {"type": "text", "text": "Compare."}]}])
    assert record["outputs"][0]["text"] == expected
    placeholder = "<|vision_start|><|image_pad|><|vision_end|>"
    assert generate(f"{placeholder}What?", "--plain", *flags[:2], "--format", "jsonl") == 0
    record = json.loads(capsys.readouterr().out)
    prompt = {"prompt": f"{placeholder}What?", "multi_modal_data": {"image": picture(1)}}
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
    assert record["outputs"][0]["text"] == llm.generate(prompt, params)[0].outputs[0].text


def test_the_bundled_model_sees_watches_and_hears(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    demo.picture().save(tmp_path / "shapes.png")
    (tmp_path / "moving.mp4").write_bytes(encode_video(demo.clip(), fps=4.0))
    (tmp_path / "beeps.wav").write_bytes(encode_audio(demo.sound(), demo.SAMPLING_RATE))
    for name, text, expected in (
        ("image=shapes.png", "How many shapes are there?", "2"),
        ("video=moving.mp4", "What moves?", "green circle"),
        ("audio=beeps.wav", "How many beeps are there?", "3"),
    ):
        modality, _, file = name.partition("=")
        arguments = ["generate", "demo", text, f"--{modality}", str(tmp_path / file), "--max-model-len", "2048"]
        assert main([*arguments, "--temperature", "0", "--max-tokens", "48"]) == 0
        assert expected in capsys.readouterr().out


def test_a_config_file(llm: LLM, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = tmp_path / "generate.yaml"
    config.write_text(
        "num-blocks: 128\nmax_model_len: 1024\ntemperature: 0\nmax-tokens: 8\nignore_eos: true\nstop: [zzz]\n"
    )
    assert main(["generate", TINY, "--config", str(config), "Say something"]) == 0
    assert capsys.readouterr().out == text_of(llm, [{"role": "user", "content": "Say something"}]) + "\n"


def test_answers_of_a_given_form(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    flags = [*SMALL, "--temperature", "0", "--max-tokens", "64"]
    assert main(["generate", TINY, "Which?", "--choice", "red", "--choice", "blue", *flags]) == 0
    assert capsys.readouterr().out in ("red\n", "blue\n")
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    path = tmp_path / "schema.json"
    path.write_text(json.dumps(schema))
    config = tmp_path / "settings.yaml"
    config.write_text(f"json-schema: {path}")
    for given in (["--json-schema", str(path)], ["--json-schema", json.dumps(schema)], ["--config", str(config)]):
        assert main(["generate", TINY, "Which?", *given, *flags]) == 0
        assert json.loads(capsys.readouterr().out)["a"] in (1, 2)


@pytest.mark.parametrize(
    ("flags", "error"),
    [
        (["a", "--regex", "b", "--json-object"], "structured_outputs: got json_object and regex"),
        (["a", "--json-schema", "nowhere"], "json_schema: got 'nowhere'"),
        ([], "prompt: got none"),
        (["a", "--image", "nowhere.png"], "media: got 'nowhere.png', expected a file"),
        (["a", "--plain", "--system", "b"], "plain: got a system text"),
        (["a", "b", "--stream"], "stream: got several answers"),
        (["a", "--top-p", "2"], "top_p: got 2.0"),
        (["--file", "nowhere"], "file: got 'nowhere'"),
    ],
)
def test_refusals_before_anything_is_loaded(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, flags: list[str], error: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert generate(*flags) == 2
    assert capsys.readouterr().err.startswith(f"sensorium: {error}")


def test_a_line_of_a_file_that_is_no_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n{"prompt": 1}\n')
    assert generate("--file", str(path)) == 2
    assert "got a line 2 that can't be read" in capsys.readouterr().err

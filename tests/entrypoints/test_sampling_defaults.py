"""Requests of every route that leave sampling out are sampled as the checkpoint's generation config says."""

from __future__ import annotations

import json
import shutil
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

import sensorium
from sensorium.engine.async_llm_engine import AsyncLLMEngine
from sensorium.entrypoints.cli.main import main
from sensorium.media.encode import encode_audio
from sensorium.sampling_params import SamplingParams
from tests.entrypoints.served import Served, served
from tests.helpers.waiting import HANG_S

VALUES = {"temperature": 0.25, "top_k": 3, "top_p": 0.75, "repetition_penalty": 1.05, "max_new_tokens": 9}
SAMPLING = {name: value for name, value in VALUES.items() if name != "max_new_tokens"}
MESSAGES = [{"role": "user", "content": "Say something."}]

Ask = Callable[[httpx.Client, dict[str, Any]], httpx.Response]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "demo"
    shutil.copytree(Path(sensorium.__file__).parent / "demo_model", path)
    (path / "generation_config.json").write_text(json.dumps({"do_sample": True, "eos_token_id": [2, 0], **VALUES}))
    return path


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    with served(folder) as running:
        yield running


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[SamplingParams]:
    """The parameters that reach the engine."""
    params: list[SamplingParams] = []
    generate = AsyncLLMEngine.generate

    def record(self: AsyncLLMEngine, prompt: Any, given: Any = None, **options: Any) -> AsyncIterator[Any]:
        params.append(given)
        return generate(self, prompt, given, **options)

    monkeypatch.setattr(AsyncLLMEngine, "generate", record)
    return params


def chat(http: httpx.Client, fields: dict[str, Any]) -> httpx.Response:
    return http.post("/v1/chat/completions", json={"messages": MESSAGES, **fields})


def completion(http: httpx.Client, fields: dict[str, Any]) -> httpx.Response:
    return http.post("/v1/completions", json={"prompt": "Say", **fields})


def response(http: httpx.Client, fields: dict[str, Any]) -> httpx.Response:
    return http.post("/v1/responses", json={"input": "Say something.", **fields})


def transcription(http: httpx.Client, fields: dict[str, Any]) -> httpx.Response:
    sound = encode_audio(np.zeros(8000, np.float32), 16000, "wav")
    data = {name: str(value) for name, value in fields.items()}
    return http.post("/v1/audio/transcriptions", files={"file": ("a.wav", sound)}, data=data)


@pytest.mark.parametrize("ask", [chat, completion, response, transcription])
def test_every_route_takes_the_values_of_the_checkpoint(ask: Ask, server: Served, seen: list[SamplingParams]) -> None:
    """They were ignored: requests that left sampling to the model were sampled at temperature 1."""
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as http:
        ask(http, {})
        ask(http, {"temperature": 0.5})
    first, second = seen
    assert {name: getattr(first, name) for name in SAMPLING} == SAMPLING
    assert {name: getattr(second, name) for name in SAMPLING} == {**SAMPLING, "temperature": 0.5}
    # A transcript goes on to its end, whatever bound answers have.
    assert first.max_tokens == (None if ask is transcription else 9)


def test_a_response_tells_the_values_that_it_was_sampled_with(server: Served) -> None:
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as http:
        body = response(http, {}).json()
    assert (body["temperature"], body["top_p"]) == (0.25, 0.75)


def test_answers_of_a_batch_file_take_them_too(folder: Path, tmp_path: Path, seen: list[SamplingParams]) -> None:
    line = {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": MESSAGES}}
    (tmp_path / "in.jsonl").write_text(json.dumps(line))
    flags = ["--num-blocks", "64", "--device", "cpu", "-i", str(tmp_path / "in.jsonl"), "-o", str(tmp_path / "out")]
    assert main(["run-batch", str(folder), *flags]) == 0
    assert {name: getattr(seen[-1], name) for name in SAMPLING} == SAMPLING


@pytest.mark.parametrize(("flags", "temperature"), [([], 0.25), (["--temperature", "0"], 0.0)])
def test_so_does_generate(
    flags: list[str], temperature: float, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from sensorium.entrypoints.llm import LLM

    seen: list[SamplingParams] = []
    chat_of = LLM.chat

    def record(self: LLM, messages: Any, params: Any = None, **options: Any) -> Any:
        seen.append(params)
        return chat_of(self, messages, params, **options)

    monkeypatch.setattr(LLM, "chat", record)
    assert main(["generate", str(folder), "Say something.", "--num-blocks", "64", "--device", "cpu", *flags]) == 0
    assert capsys.readouterr().out.strip()
    assert {name: getattr(seen[0], name) for name in SAMPLING} == {**SAMPLING, "temperature": temperature}
    assert seen[0].max_tokens == 9

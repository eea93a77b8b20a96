"""Adapters over HTTP: each is a model of its own name."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from sensorium import EngineArgs
from sensorium.entrypoints.cli.flags import add_flags, build
from sensorium.entrypoints.openai.preflight import check_settings
from sensorium.entrypoints.openai.server_args import ServerArgs
from sensorium.errors import ConfigError
from tests.entrypoints.served import served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.lora import TinyAdapter
from tests.helpers.waiting import HANG_S


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    folder = tmp_path_factory.mktemp("adapters")
    modules = {name: str(TinyAdapter("llama", seed=i).save(folder / name)) for i, name in enumerate(("sql", "chat"))}
    with (
        served(make_checkpoint("llama"), enable_lora=True, lora_modules=modules) as running,
        httpx.Client(base_url=running.url, timeout=HANG_S) as client,
    ):
        yield client
        running.settle()


def test_adapters_are_models(client: httpx.Client) -> None:
    """Each has the model as its parent; folders are told to nobody."""
    models = client.get("/v1/models").json()["data"]
    assert [(each["id"], each["parent"]) for each in models] == [("tiny", None), ("sql", "tiny"), ("chat", "tiny")]
    assert client.get("/v1/models/sql").json()["id"] == "sql"
    refused = client.get("/v1/models/other")
    assert refused.status_code == 404
    assert "adapters" not in refused.text


ROUTES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0},
    "/v1/completions": {"prompt": "Hello", "max_tokens": 8, "temperature": 0},
    "/v1/responses": {"input": "Hello", "max_output_tokens": 16, "temperature": 0, "store": False},
    "/v1/embeddings": {"input": "Hello"},
}


def _told(route: str, answer: dict[str, Any]) -> Any:
    if route == "/v1/embeddings":
        return answer["data"][0]["embedding"]
    return answer["output"][0]["content"] if route == "/v1/responses" else answer["choices"]


@pytest.mark.parametrize("route", ROUTES)
def test_every_route_answers_by_the_adapter_that_it_names(route: str, client: httpx.Client) -> None:
    answers = {}
    for name in ("tiny", "sql", "chat", "sql"):
        response = client.post(route, json={**ROUTES[route], "model": name})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert answer["model"] == name
        told = str(_told(route, answer))
        assert answers.setdefault(name, told).split("'id'")[0] == told.split("'id'")[0]
    assert len(set(answers.values())) == 3
    unknown = client.post(route, json={**ROUTES[route], "model": "other"})
    assert (unknown.status_code, unknown.json()["error"]["param"]) == (404, "model")


def test_flags_name_adapters() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser, EngineArgs, leave_out=("model",))
    given = ["--enable-lora", "--lora-modules", "sql=a=b", "chat=/c", "--lora-modules", '{"more": "d"}']
    args = build(
        EngineArgs, vars(parser.parse_args([*given, "--max-loras", "2", "--max-lora-rank", "64"])) | {"model": "m"}
    )
    assert args.lora_modules == {"sql": "a=b", "chat": "/c", "more": "d"}
    assert (args.enable_lora, args.max_loras, args.max_lora_rank) == (True, 2, 64)
    for wrong in (["sql"], ["=a"], ["sql="], ["sql=a", "sql=b"], ["{}}"]):
        with pytest.raises(SystemExit):
            parser.parse_args(["--lora-modules", *wrong])


def test_an_adapter_has_another_name_than_the_model(tmp_path: Path) -> None:
    folder = TinyAdapter("llama", ("o_proj",)).save(tmp_path / "one")
    args = EngineArgs(str(make_checkpoint("llama")), enable_lora=True, lora_modules={"tiny": str(folder)})
    with pytest.raises(ConfigError, match="got the name 'tiny', which is the model's"):
        check_settings("serve", args, ServerArgs(served_model_name=("tiny",)))

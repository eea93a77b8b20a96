"""Vectors, labels and scores over HTTP, asked by OpenAI's client and by plain requests."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from torch.nn import functional as F

from tests.entrypoints.served import served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.pooling_checkpoints import (
    add_modules,
    bert,
    make_pooling_checkpoint,
    reference_output,
)
from tests.helpers.waiting import HANG_S

DOCUMENTS = ["short", "a document that is longer than the others", "other words"]
SETTINGS: dict[str, Any] = {"max_model_len": None}


@pytest.fixture(scope="module")
def embedder() -> Path:
    return add_modules(make_pooling_checkpoint("BertModel", bert(is_matryoshka=True)))


@pytest.fixture(scope="module")
def reranker() -> Path:
    return make_pooling_checkpoint("BertForSequenceClassification", bert(num_labels=1))


@pytest.fixture(scope="module")
def embedding_server(embedder: Path) -> Iterator[httpx.Client]:
    with served(embedder, **SETTINGS) as running, httpx.Client(base_url=running.url, timeout=HANG_S) as client:
        yield client
        assert client.get("/health?generate=1").is_success
        running.settle()


@pytest.fixture(scope="module")
def reranking_server(reranker: Path) -> Iterator[httpx.Client]:
    with served(reranker, **SETTINGS) as running, httpx.Client(base_url=running.url, timeout=HANG_S) as client:
        yield client
        running.settle()


def vector(folder: Path, text: str, size: int | None = None) -> torch.Tensor:
    return F.normalize(reference_output(folder, "BertModel", text).mean(0)[:size], dim=0)


def asked(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.is_success, response.text
    return response.json()


def refused(client: httpx.Client, path: str, **body: Any) -> Any:
    response = client.post(path, json=body)
    assert response.status_code == 400, response.text
    return response.json()["error"]


@pytest.mark.parametrize("kind", ["float", "base64"])
def test_embeddings_by_openais_client(embedding_server: httpx.Client, embedder: Path, kind: Any) -> None:
    base_url = f"{str(embedding_server.base_url).rstrip('/')}/v1"
    with openai.OpenAI(base_url=base_url, api_key="none", max_retries=0) as client:
        answer = client.embeddings.create(model="tiny", input=["One", "Another"], dimensions=8, encoding_format=kind)
    for text, each in zip(("One", "Another"), answer.data, strict=True):
        got = each.embedding
        if isinstance(got, str):
            got = np.frombuffer(base64.b64decode(got), "<f4").tolist()
        assert got == pytest.approx(vector(embedder, text, 8).tolist(), abs=1e-5)
    assert answer.usage.prompt_tokens == len("<One>") + len("<Another>")


def test_token_ids_and_cut_texts_are_embedded(embedding_server: httpx.Client, embedder: Path) -> None:
    body = {"truncate_prompt_tokens": 6, "encoding_format": "float"}
    (whole,) = asked(embedding_server, "/v1/embeddings", input="abcd")["data"]
    (cut,) = asked(embedding_server, "/v1/embeddings", input="abcdefgh", **body)["data"]
    assert cut["embedding"] == pytest.approx(whole["embedding"], abs=1e-6)
    error = refused(embedding_server, "/v1/embeddings", input="x" * 200)
    assert error["code"] == "context_length_exceeded"
    assert error["param"] == "input"
    tokens = asked(embedding_server, "/tokenize", prompt="abcd")["tokens"]
    (by_ids,) = asked(embedding_server, "/v1/embeddings", input=[tokens])["data"]
    assert by_ids["embedding"] == pytest.approx(whole["embedding"], abs=1e-6)
    (raw,) = asked(embedding_server, "/v1/embeddings", input="abcd", normalize=False)["data"]
    expected = reference_output(embedder, "BertModel", "abcd").mean(0)
    assert raw["embedding"] == pytest.approx(expected.tolist(), abs=1e-5)


def test_pooling_gives_a_vector_for_each_token(embedding_server: httpx.Client, embedder: Path) -> None:
    answer = asked(embedding_server, "/pooling", input=["a", "bc"], task="token_embed")
    for text, each in zip(("a", "bc"), answer["data"], strict=True):
        expected = F.normalize(reference_output(embedder, "BertModel", text), dim=-1)
        assert np.allclose(each["data"], expected, atol=1e-5)


def test_vectors_score_by_their_cosine(embedding_server: httpx.Client, embedder: Path) -> None:
    answer = asked(embedding_server, "/score", text_1="a query", text_2=DOCUMENTS)
    scores = [float(vector(embedder, "a query") @ vector(embedder, each)) for each in DOCUMENTS]
    assert [each["score"] for each in answer["data"]] == pytest.approx(scores, abs=1e-5)


@pytest.mark.parametrize("path", ["/rerank", "/v1/rerank", "/v2/rerank"])
def test_rerank_gives_the_best_first(reranking_server: httpx.Client, reranker: Path, path: str) -> None:
    scores = [
        float(reference_output(reranker, "BertForSequenceClassification", "query", each).sigmoid())
        for each in DOCUMENTS
    ]
    order = sorted(range(3), key=lambda index: -scores[index])
    answer = asked(
        reranking_server, path, model="tiny", query="query", documents=[{"text": DOCUMENTS[0]}, *DOCUMENTS[1:]]
    )
    assert [each["index"] for each in answer["results"]] == order
    for each in answer["results"]:
        assert each["relevance_score"] == pytest.approx(scores[each["index"]], abs=1e-5)
        assert each["document"] == {"text": DOCUMENTS[each["index"]]}
    assert answer["usage"]["total_tokens"] == sum(len(f"<query>{each}>") for each in DOCUMENTS)
    best = asked(reranking_server, path, query="query", documents=DOCUMENTS, top_n=1, return_documents=False)
    assert [each.keys() for each in best["results"]] == [{"index", "relevance_score"}]


def test_scores_of_pairs_and_labels(reranking_server: httpx.Client, reranker: Path) -> None:
    answer = asked(reranking_server, "/v1/score", text_1=DOCUMENTS, text_2=DOCUMENTS[::-1])
    for index, each in enumerate(answer["data"]):
        pair = (DOCUMENTS[index], DOCUMENTS[2 - index])
        expected = reference_output(reranker, "BertForSequenceClassification", *pair).sigmoid()
        assert each["score"] == pytest.approx(float(expected), abs=1e-5)
    answer = asked(reranking_server, "/classify", input=DOCUMENTS, use_activation=False)
    for text, each in zip(DOCUMENTS, answer["data"], strict=True):
        expected = reference_output(reranker, "BertForSequenceClassification", text)
        assert each["probs"] == pytest.approx(expected.tolist(), abs=1e-5)
        assert each["label"] == "LABEL_0"
        assert each["num_classes"] == 1


def test_what_a_model_is_not_served_for_is_refused(
    embedding_server: httpx.Client, reranking_server: httpx.Client
) -> None:
    error = refused(embedding_server, "/classify", input="a")
    assert error["code"] == "unsupported_task"
    assert "got classify, expected one of embed, token_embed" in error["message"]
    error = refused(reranking_server, "/v1/embeddings", input="a")
    assert "got embed, expected one of classify" in error["message"]
    error = refused(embedding_server, "/v1/completions", prompt="a")
    assert "got a request to generate" in error["message"]
    with served(make_checkpoint("qwen2")) as running, httpx.Client(base_url=running.url, timeout=HANG_S) as client:
        for path, body in (("/score", {"text_1": "a", "text_2": "b"}), ("/rerank", {"query": "a", "documents": ["b"]})):
            assert "got a request to score, expected one to generate" in refused(client, path, **body)["message"]
        assert "set --runner pooling" in refused(client, "/classify", input="a")["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/rerank", {"query": "a", "documents": []}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "top_n": 0}, "top_n"),
        ("/rerank", {"query": "a", "documents": ["b", 1]}, "documents[1]"),
        ("/rerank", {"query": "a", "documents": ["b" * 300]}, "documents"),
        ("/rerank", {"query": "a", "documents": ["b"], "truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ("/score", {"text_1": ["a", "b"], "text_2": ["a", "b", "c"]}, "text_1"),
        ("/score", {"text_1": "a", "text_2": "b", "rank": 1}, "rank"),
        ("/classify", {"input": "a", "messages": []}, "messages"),
        ("/classify", {}, "input"),
        ("/pooling", {"input": "a", "task": "sing"}, "task"),
        ("/pooling", {"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ("/pooling", {"input": "a", "dimensions": 4}, "dimensions"),
    ],
)
def test_mistakes_name_their_field(reranking_server: httpx.Client, path: str, body: dict[str, Any], param: str) -> None:
    assert refused(reranking_server, path, **body)["param"] == param


def test_requests_are_counted(reranking_server: httpx.Client) -> None:
    def count() -> float:
        lines = reranking_server.get("/metrics").text.splitlines()
        return sum(float(line.split()[1]) for line in lines if line.startswith("sensorium_prompt_tokens_total"))

    before = count()
    used = asked(reranking_server, "/rerank", query="a", documents=DOCUMENTS)["usage"]["prompt_tokens"]
    assert count() == before + used

"""Scoring texts over HTTP: prompts given back with the log probability of each token, which are Hugging Face's own.

Evaluation harnesses ask for `echo` with `logprobs` and for `max_tokens` of 0 or 1, and got a 400.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch
from transformers import AutoTokenizer

from tests.entrypoints.served import Served, served
from tests.helpers.checkpoints import make_checkpoint, make_hf_model
from tests.helpers.waiting import HANG_S

TEXT = "Straße, 你好 and é"
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("llama"), max_num_batched_tokens=64) as running:
        yield running
        running.settle()


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(make_checkpoint("llama"))


def ids_of(tokenizer: Any, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text)
    return ids


def reference(ids: list[int]) -> torch.Tensor:
    """`(num_tokens - 1, vocab_size)`: log probabilities of what follows each token but the last."""
    with torch.inference_mode():
        logits = make_hf_model("llama").eval()(torch.tensor([ids])).logits[0]
    return torch.log_softmax(logits[:-1].float(), dim=-1)


def ask(http: httpx.Client, prompt: Any, **fields: Any) -> list[dict[str, Any]]:
    response = http.post(PATH, json={"prompt": prompt, "temperature": 0, "echo": True, **fields})
    assert response.status_code == 200, response.text
    choices: list[dict[str, Any]] = response.json()["choices"]
    return choices


def streamed(http: httpx.Client, prompt: Any, **fields: Any) -> dict[int, list[dict[str, Any]]]:
    """The pieces of each choice."""
    body = {"prompt": prompt, "temperature": 0, "echo": True, "stream": True, **fields}
    response = http.post(PATH, json=body)
    assert response.status_code == 200, response.text
    pieces: dict[int, list[dict[str, Any]]] = {}
    for line in response.text.splitlines():
        if line.startswith("data: {"):
            for choice in json.loads(line[6:])["choices"]:
                pieces.setdefault(choice["index"], []).append(choice)
    return pieces


def check_prompt(logprobs: dict[str, Any], ids: list[int], text: str, num_top: int) -> None:
    """What is said of a prompt's tokens is what Hugging Face's model says."""
    expected = reference(ids)
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    own = expected[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].tolist()
    assert logprobs["token_logprobs"][1 : len(ids)] == pytest.approx(own, abs=1e-3)
    for position, (found, token) in enumerate(
        zip(logprobs["top_logprobs"][1 : len(ids)], logprobs["tokens"][1 : len(ids)], strict=True)
    ):
        assert found[token] == logprobs["token_logprobs"][1 + position]
        assert num_top <= len(found) <= num_top + 1
        best = expected[position].topk(max(num_top, 1)).values.tolist()
        assert sorted(found.values(), reverse=True)[:num_top] == pytest.approx(best[:num_top], abs=1e-3)
    offsets = logprobs["text_offset"][: len(ids)]
    assert offsets == sorted(offsets)
    assert offsets[0] == 0
    for offset, token in zip(offsets, logprobs["tokens"], strict=False):
        if not token.startswith(("bytes:", "token_id:")):
            assert text[offset:].startswith(token)


@pytest.mark.parametrize("num_top", [0, 1, 4])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
@pytest.mark.parametrize("given", ["text", "ids"])
def test_a_prompt_comes_back_with_the_models_log_probabilities(
    http: httpx.Client, tokenizer: Any, given: str, max_tokens: int, num_top: int
) -> None:
    ids = ids_of(tokenizer, TEXT)
    prompt = TEXT if given == "text" else ids
    (choice,) = ask(http, prompt, max_tokens=max_tokens, logprobs=num_top, ignore_eos=True)
    logprobs = choice["logprobs"]
    assert choice["text"].startswith(TEXT)
    assert {len(each) for each in logprobs.values()} == {len(ids) + max_tokens}
    check_prompt(logprobs, ids, TEXT, num_top)
    assert choice["finish_reason"] == "length"
    if not max_tokens:
        assert choice["text"] == TEXT
        return
    assert logprobs["text_offset"][len(ids)] == len(TEXT)
    alone = ask(http, prompt, max_tokens=max_tokens, logprobs=num_top, ignore_eos=True, echo=False)[0]
    assert TEXT + alone["text"] == choice["text"]
    assert alone["logprobs"]["tokens"] == logprobs["tokens"][len(ids) :]
    assert [len(TEXT) + each for each in alone["logprobs"]["text_offset"]] == logprobs["text_offset"][len(ids) :]


def test_the_likelihood_of_a_continuation_is_found_as_a_harness_finds_it(http: httpx.Client, tokenizer: Any) -> None:
    """Contexts and continuations as token ids, in one batch; the answer's one token is left out of the sum."""
    pairs = [("The fox", " jumps"), ("Once", " upon a time"), ("a", "b")]
    batch = [ids_of(tokenizer, context + continuation) for context, continuation in pairs]
    lengths = [len(ids_of(tokenizer, context)) for context, _ in pairs]
    choices = ask(http, batch, max_tokens=1, logprobs=1, seed=1234)
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    for choice, ids, start in zip(choices, batch, lengths, strict=True):
        scored = choice["logprobs"]["token_logprobs"][start:-1]
        best = [max(top.values()) for top in choice["logprobs"]["top_logprobs"][start:-1]]
        expected = reference(ids)[start - 1 :]
        own = expected[torch.arange(len(ids) - start), torch.tensor(ids[start:])]
        assert sum(scored) == pytest.approx(own.sum().item(), abs=1e-3)
        is_greedy = [score == top for score, top in zip(scored, best, strict=True)]
        assert is_greedy == (expected.argmax(dim=-1) == torch.tensor(ids[start:])).tolist()


@pytest.mark.parametrize("max_tokens", [0, 3])
@pytest.mark.parametrize("n", [1, 2])
def test_a_stream_says_the_same(http: httpx.Client, tokenizer: Any, n: int, max_tokens: int) -> None:
    """Also where one output of a prompt is ahead of the one that brings the prompt's log probabilities."""
    prompts = [TEXT, "Once upon a time there was " * 8, "a"]
    fields = {"max_tokens": max_tokens, "logprobs": 2, "n": n, "ignore_eos": True}
    whole, pieces = ask(http, prompts, **fields), streamed(http, prompts, **fields)
    assert pieces.keys() == {choice["index"] for choice in whole}
    for choice in whole:
        own = pieces[choice["index"]]
        assert "".join(piece["text"] for piece in own) == choice["text"]
        for name, values in choice["logprobs"].items():
            joined = [value for piece in own for value in piece["logprobs"][name]]
            if name in ("tokens", "text_offset"):
                assert joined == values
            else:
                assert len(joined) == len(values)
        assert own[-1]["finish_reason"] == choice["finish_reason"]


def test_a_prompt_alone_comes_back_too(http: httpx.Client, tokenizer: Any) -> None:
    (choice,) = ask(http, TEXT, max_tokens=2)
    assert choice["text"].startswith(TEXT)
    assert choice["logprobs"] is None
    response = http.post(PATH, json={"prompt": TEXT, "max_tokens": 0})
    assert response.json()["choices"][0]["text"] == ""
    assert response.json()["usage"]["completion_tokens"] == 0
    assert response.json()["usage"]["prompt_tokens"] == len(ids_of(tokenizer, TEXT))


def test_special_tokens_of_a_prompt_of_ids_show_where_they_are_to(http: httpx.Client, tokenizer: Any) -> None:
    ids = [tokenizer.eos_token_id, *ids_of(tokenizer, "ab")]
    hidden, shown = (ask(http, ids, max_tokens=0, logprobs=0, skip_special_tokens=skips)[0] for skips in (True, False))
    assert hidden["text"] == "ab"
    assert shown["text"] == tokenizer.eos_token + "ab"
    assert hidden["logprobs"]["tokens"] == shown["logprobs"]["tokens"]
    assert hidden["logprobs"]["text_offset"][:2] == [0, 0]
    assert shown["logprobs"]["text_offset"][:2] == [0, len(tokenizer.eos_token)]


def test_the_log_probabilities_of_prompts_in_another_form(http: httpx.Client, tokenizer: Any) -> None:
    """By token id, as one engine has them beside its completions and chats."""
    ids = ids_of(tokenizer, TEXT)
    response = http.post(PATH, json={"prompt": [ids, ids], "max_tokens": 1, "prompt_logprobs": 2})
    assert response.status_code == 200, response.text
    expected = reference(ids)
    for choice in response.json()["choices"]:
        assert choice["logprobs"] is None
        first, *others = choice["prompt_logprobs"]
        assert first is None
        for position, (found, token_id) in enumerate(zip(others, ids[1:], strict=True)):
            own = found[str(token_id)]
            assert own["logprob"] == pytest.approx(expected[position, token_id].item(), abs=1e-3)
            assert own["rank"] == 1 + int((expected[position] > expected[position, token_id]).sum())
            assert 2 <= len(found) <= 3
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "prompt_logprobs": 0}
    answer = http.post("/v1/chat/completions", json=chat).json()
    assert len(answer["prompt_logprobs"]) == answer["usage"]["prompt_tokens"]
    assert answer["prompt_logprobs"][0] is None
    assert {len(each) for each in answer["prompt_logprobs"][1:]} == {1}


@pytest.mark.parametrize("path", [PATH, "/v1/chat/completions"])
def test_prompts_in_that_form_are_for_whole_answers(http: httpx.Client, path: str) -> None:
    body = {"prompt": "a"} if path == PATH else {"messages": [{"role": "user", "content": "a"}]}
    response = http.post(path, json={**body, "prompt_logprobs": 1, "stream": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "prompt_logprobs"


# Bytes


def test_answers_can_be_put_together_from_the_bytes_of_their_tokens(server: Served, tokenizer: Any) -> None:
    """Half of the tokens of this model's answers are parts of characters."""
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
        bias = {str(token_id): 100 for token_id in ids_of(tokenizer, "你é")}
        asked: dict[str, Any] = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "seed": 5}
        asked |= {"max_tokens": 24, "logprobs": True, "top_logprobs": 4, "logit_bias": bias}
        asked |= {"extra_body": {"ignore_eos": True}}
        whole = client.chat.completions.create(**asked)
        tokens = whole.choices[0].logprobs.content  # type: ignore[union-attr]
        check_bytes(tokens, whole.choices[0].message.content or "")
        stream = client.chat.completions.create(**asked, stream=True)
        pieces = [
            each for chunk in stream if chunk.choices[0].logprobs for each in chunk.choices[0].logprobs.content or ()
        ]
        assert [each.bytes for each in pieces] == [each.bytes for each in tokens or ()]
        response = client.responses.create(
            model="tiny",
            input="a",
            max_output_tokens=24,
            include=["message.output_text.logprobs"],
            top_logprobs=4,
            extra_body={"ignore_eos": True, "seed": 5},
        )
        part = response.output[0].content[0]  # type: ignore[union-attr, index]
        check_bytes(part.logprobs, response.output_text)  # type: ignore[union-attr]


def check_bytes(tokens: Any, text: str) -> None:
    assert len(tokens) == 24
    shown = [bytes(each.bytes) for each in tokens if not each.token.startswith("<|")]  # special tokens are no text
    assert b"".join(shown).decode(errors="replace") == text
    for each in tokens:
        names = [
            top.token for top in each.top_logprobs if top.token
        ]  # the model's head has more ids than there are tokens
        assert len(names) == len(set(names))
        for one in (each, *each.top_logprobs):
            own = bytes(one.bytes)
            is_part = "\ufffd" in own.decode(errors="replace")
            assert one.token == ("".join(f"\\x{byte:02x}" for byte in own) if is_part else own.decode())


def test_parts_of_characters_have_names_of_their_own(http: httpx.Client, tokenizer: Any) -> None:
    """In completions a token's name is all that there is of it: two parts must not be one key of an object."""
    ids = ids_of(tokenizer, "é")
    (choice,) = ask(http, "é" * 3, max_tokens=0, logprobs=100)
    parts = [name for top in choice["logprobs"]["top_logprobs"][1:] for name in top if name.startswith("bytes:")]
    assert len(ids) == 2
    assert choice["logprobs"]["tokens"] == ["bytes:\\xc3", "bytes:\\xa9"] * 3
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 1, 2, 2]
    assert len(set(parts)) > 20
    assert not any("\ufffd" in name for top in choice["logprobs"]["top_logprobs"][1:] for name in top)

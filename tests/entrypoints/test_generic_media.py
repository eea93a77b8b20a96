"""An architecture without a class here, served by the modules of transformers: the official client asks it about
pictures, and gets what transformers' own template, processor and `generate` make of the same chats."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, PreTrainedModel

from sensorium.multimodal.hf_items import HFItems
from tests.entrypoints.served import data_url, served
from tests.helpers.generic_media import NUM_TOKENS, generated_media_tokens, hf_items, model_config_of
from tests.helpers.mixed_requests import picture
from tests.helpers.tiny_media import save_tiny_media

MODEL_TYPE = "vipllava"
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }} "
    "{% else %}{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }} "
    "{% else %}PLACEHOLDER {% endif %}{% endfor %}{% endif %}{% endfor %}a"
)
CHATS: tuple[tuple[Any, ...], ...] = (
    (1, "what is this ?"),
    ("what is", 2, "and", 3, "?"),
    ("a b c",),
    (1, "what is x ?"),
)
"""Numbers are pictures. The last is about a picture that the first has shown."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreTrainedModel, HFItems]:
    """A checkpoint with a chat template, its model, and its processor."""
    path = tmp_path_factory.mktemp(MODEL_TYPE)
    made = save_tiny_media(MODEL_TYPE, path)
    items = hf_items(model_config_of(path))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE.replace("PLACEHOLDER", items.placeholders["image"].text)
    tokenizer.save_pretrained(path)
    return path, made, items


@pytest.fixture
def client(model: tuple[Path, PreTrainedModel, HFItems]) -> Iterator[openai.OpenAI]:
    limits = {"limit_mm_per_prompt": {"image": 2}, "max_num_batched_tokens": 20, "max_model_len": 512}
    with (
        served(model[0], **limits) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def expected(model: PreTrainedModel, items: HFItems, chat: tuple[Any, ...]) -> str:
    """What transformers alone says."""
    tokenizer: Any = items.processor.tokenizer
    content = [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in chat]
    template = TEMPLATE.replace("PLACEHOLDER", items.placeholders["image"].text)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], chat_template=template, tokenize=False, add_generation_prompt=True
    )
    pictures: list[Image.Image] = [picture(part) for part in chat if isinstance(part, int)]
    with torch.inference_mode():
        tokens = generated_media_tokens(model, items, [(text, {"image": pictures} if pictures else {})])
    answer: str = tokenizer.decode(tokens[0], skip_special_tokens=True)
    return answer


def ask(client: openai.OpenAI, chat: tuple[Any, ...]) -> str:
    """The answer of the chat route."""
    content: list[Any] = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(picture(part))}}
        for part in chat
    ]
    answer = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": content}],
        temperature=0.0,
        max_tokens=NUM_TOKENS,
        extra_body={"ignore_eos": True},
    )
    return (answer.choices[0].message.content or "").strip()  # words of this tokenizer are parted by spaces


def test_chats_with_pictures_are_answered_as_by_transformers(
    client: openai.OpenAI, model: tuple[Path, PreTrainedModel, HFItems]
) -> None:
    """All at once, so that they meet in steps, in chunks that cut pictures; and again, with all of it cached."""
    answers = [expected(*model[1:], chat) for chat in CHATS]
    assert len(set(answers)) == len(CHATS), "the pictures make no difference"
    for _ in range(2):
        with ThreadPoolExecutor(len(CHATS)) as pool:
            assert list(pool.map(lambda chat: ask(client, chat), CHATS)) == answers


def test_a_chat_with_more_pictures_than_allowed_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="At most 2 image"):
        ask(client, (1, 2, 3, "what is this ?"))

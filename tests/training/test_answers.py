"""Answers of the bundled model through the whole engine, however it is run: the reference answers, item by item.

Logits that are slightly wrong may still give plausible tokens. Here the answers are known: what is held out must be
answered rightly through the server, in batches, from caches, in chunks, after preemptions, under a schema, and with
weights of 8 bits.
"""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import openai
import pytest

from sensorium import LLM, SamplingParams, StructuredOutputs
from tests.entrypoints.served import served
from training.answering import MAX_NEW_TOKENS, SensoriumAnswerer, openai_messages
from training.dialogue import Item
from training.encoding import MODEL_FOLDER
from training.evaluate import held_out_items
from training.export_omni import export
from training.speech import SpeechBank
from training.worlds import SKILLS, Source

ITEMS_PER_SKILL = 3

WAYS: dict[str, dict[str, Any]] = {
    "all at once": {"num_blocks": 2048},
    "one at a time": {"num_blocks": 512, "max_num_seqs": 1},
    "chunks of 24": {"num_blocks": 1024, "max_num_batched_tokens": 24, "max_num_seqs": 8},
    "no caches": {
        "num_blocks": 1024,
        "enable_prefix_caching": False,
        "encoder_cache_rows": 0,
        "mm_processor_cache_bytes": 0,
    },
    "weights in int8": {"num_blocks": 2048, "quantization": "int8"},
    "preempted": {
        "num_blocks": 120,
        "block_size": 4,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 512,
        "max_model_len": 450,
    },
}


@pytest.fixture(scope="module")
def items() -> list[Item]:
    """Held-out items of every skill that the model is known to answer: digits and words it may mishear are left out."""
    source = Source("held_out", SpeechBank.load(Path(__file__).parent / "spoken_words.npz"))
    return [item for skill in SKILLS for item in held_out_items(skill, ITEMS_PER_SKILL, source)]


def references(items: list[Item]) -> list[str]:
    return [item.turns[0].answer for item in items]


@pytest.mark.parametrize("way", WAYS)
def test_answers_are_right_however_they_are_computed(way: str, items: list[Item]) -> None:
    answerer = SensoriumAnswerer(MODEL_FOLDER, **WAYS[way])
    assert answerer.answers(items) == references(items)
    if way == "all at once":
        # Now every prefix, every encoded item and every mapped tensor comes from a cache.
        assert answerer.answers(items) == references(items)
    if way == "preempted":
        assert answerer._llm.engine.core.stats().num_preemptions > 0


def test_answers_are_right_through_the_server(items: list[Item]) -> None:
    async def answers(url: str) -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def answer(item: Item) -> str | None:
                completion = await client.chat.completions.create(
                    model="tiny",
                    messages=openai_messages(item),  # type: ignore[arg-type]
                    temperature=0,
                    max_completion_tokens=MAX_NEW_TOKENS,
                )
                return completion.choices[0].message.content

            return list(await asyncio.gather(*map(answer, items)))

    with served(MODEL_FOLDER, limit_mm_per_prompt={"image": 2}, num_blocks=2048) as server:
        assert asyncio.run(answers(server.url)) == references(items)


def test_answers_are_right_from_the_layout_of_whole_checkpoints(items: list[Item], tmp_path: Path) -> None:
    export(MODEL_FOLDER, tmp_path)
    assert SensoriumAnswerer(tmp_path, num_blocks=2048).answers(items) == references(items)


def test_answers_in_json_are_right_under_a_schema(items: list[Item]) -> None:
    """The schema says the form, the picture what is in it."""
    asked = [item for item in items if item.turns[0].answer.startswith("{")]
    assert len(asked) >= ITEMS_PER_SKILL
    llm = LLM(str(MODEL_FOLDER), limit_mm_per_prompt={"image": 2}, num_blocks=1024)
    params = [
        SamplingParams(
            temperature=0,
            max_tokens=MAX_NEW_TOKENS,
            structured_outputs=StructuredOutputs(json=_schema(json.loads(item.turns[0].answer))),
        )
        for item in asked
    ]
    outputs = llm.chat([openai_messages(item) for item in asked], params)
    got = [json.loads(output.outputs[0].text) for output in outputs]
    assert got == [json.loads(answer) for answer in references(asked)]


def _schema(value: Any) -> dict[str, Any]:
    """A schema that allows every value of the same shape."""
    if isinstance(value, dict):
        members = {name: _schema(member) for name, member in value.items()}
        return {"type": "object", "properties": members, "required": list(value), "additionalProperties": False}
    if isinstance(value, list):
        return {"type": "array", "items": _schema(value[0])} if value else {"type": "array"}
    if isinstance(value, bool):
        return {"type": "boolean"}
    return {"type": "integer"} if isinstance(value, int) else {"type": "string"}

"""The cost of structured outputs: compiling grammars, computing the masks of a step, and applying them to the logits.

    python benchmarks/structured_output.py [--rows 16] [--vocab-sizes 32000 151936] [--tokenizer tokenizer.json]

Without `--tokenizer`, a byte-level tokenizer of each size is trained on Python's own library (a minute for the large
one). Each row writes a JSON document of its own, token by token, under one schema; nothing is computed meanwhile, so
"masks" is the time from the tokens of a step to the masks of the next, which a forward pass would hide. Prints
medians, worst cases, and a line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from sensorium import SamplingParams, StructuredOutputs
from sensorium.grammar.compiler import GrammarCompiler
from sensorium.grammar.constrained_requests import ConstrainedRequests
from sensorium.messages import EngineOutput, EngineRequest, NewRequest, SchedulerOutput, Vocabulary
from sensorium.model_executor.token_mask import TokenMask
from sensorium.worker.token_masks import MaskReader, RowMasks

END = "<|endoftext|>"
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "role": {"enum": ["admin", "editor", "reader"]},
        "email": {"type": "string", "maxLength": 60},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
    },
    "required": ["name", "age", "role", "email", "tags"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {"summary": {"type": "string"}, "people": {"type": "array", "items": PERSON}},
    "required": ["summary", "people"],
    "additionalProperties": False,
}
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "seventeen", "engineers", "measure", "every", "step")


def library_texts() -> Iterator[str]:
    for path in sorted(Path(os.__file__).parent.rglob("*.py")):
        yield path.read_text(errors="replace")


def trained_tokenizer(vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, initial_alphabet=alphabet, special_tokens=[END], show_progress=False
    )
    tokenizer.train_from_iterator(library_texts(), trainer)
    return tokenizer


def document(rng: random.Random) -> str:
    def words(count: int) -> str:
        return " ".join(rng.choices(WORDS, k=count))

    people = [
        {
            "name": words(2),
            "age": rng.randrange(100),
            "role": rng.choice(PERSON["properties"]["role"]["enum"]),  # type: ignore[index]
            "email": f"{rng.choice(WORDS)}@example.com",
            "tags": [words(1) for _ in range(rng.randrange(4))],
        }
        for _ in range(4)
    ]
    return json.dumps({"summary": words(25), "people": people}, indent=rng.choice([None, 2]))


def milliseconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": round(1e3 * statistics.median(ordered), 3),
        "p95": round(1e3 * ordered[int(0.95 * (len(ordered) - 1))], 3),
        "worst": round(1e3 * ordered[-1], 3),
    }


def timed(call: Any) -> float:
    begin_s = time.perf_counter()
    call()
    return time.perf_counter() - begin_s


def measure(tokenizer: Tokenizer, num_rows: int) -> dict[str, Any]:
    rng = random.Random(0)
    end_id = tokenizer.token_to_id(END)
    vocab_size = tokenizer.get_vocab_size()
    vocabulary = Vocabulary(tokenizer.to_str(), () if end_id is None else (end_id,), vocab_size)
    compiler = GrammarCompiler(num_rows, deadline_s=30.0)
    compiler.use_vocabulary(vocabulary)
    grammar = StructuredOutputs(json=SCHEMA)
    first_s = timed(lambda: compiler.compile(grammar).result())
    compile_s = [
        timed(lambda i=i: compiler.compile(StructuredOutputs(json={**SCHEMA, "title": str(i)})).result())  # type: ignore[misc]
        for i in range(20)
    ]
    again_s = [timed(lambda: compiler.compile(grammar).result()) for _ in range(20)]

    requests, reader = ConstrainedRequests(compiler, num_rows), MaskReader()
    names = [str(i) for i in range(num_rows)]
    params = SamplingParams(structured_outputs=grammar)
    new = tuple(NewRequest(EngineRequest(name, [1], params)) for name in names)

    def masks_of(step: SchedulerOutput) -> RowMasks | None:
        masks = requests.begin_step(step)
        assert masks is not None
        reader.begin_step(masks)
        return reader.read(masks, names)

    documents = [tokenizer.encode(document(rng), add_special_tokens=False).ids for _ in range(num_rows)]
    num_steps = min(map(len, documents)) - 1
    first_masks_s = timed(lambda: masks_of(replace(SchedulerOutput.idle(), new_requests=new)))
    mask_s, apply_s = [], []
    logits = torch.randn(num_rows, vocab_size)
    for step in range(num_steps):
        outputs = [EngineOutput(name, [ids[step]]) for name, ids in zip(names, documents, strict=True)]
        begin_s = time.perf_counter()
        requests.append(outputs)
        masks = masks_of(SchedulerOutput.idle())
        mask_s.append(time.perf_counter() - begin_s)
        assert masks is not None
        assert len(masks.rows) == num_rows, masks.failures
        mask = TokenMask(masks.rows, masks.words)
        apply_s.append(timed(lambda mask=mask: mask.apply_(logits)))  # type: ignore[misc]
    reader.close()
    compiler.close()
    return {
        "vocab_size": vocab_size,
        "rows": num_rows,
        "steps": num_steps,
        "first grammar, processes started (ms)": round(1e3 * first_s, 1),
        "new grammar (ms)": milliseconds(compile_s),
        "known grammar (ms)": milliseconds(again_s),
        "first masks (ms)": round(1e3 * first_masks_s, 3),
        "masks of a step (ms)": milliseconds(mask_s),
        "laying them over the logits (ms)": milliseconds(apply_s),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--vocab-sizes", type=int, nargs="*", default=[32_000, 151_936])
    parser.add_argument("--tokenizer", type=Path, nargs="*", help="files, instead of trained ones")
    args = parser.parse_args()
    tokenizers = (
        [Tokenizer.from_file(str(path)) for path in args.tokenizer]
        if args.tokenizer
        else [trained_tokenizer(size) for size in args.vocab_sizes]
    )
    results = [measure(tokenizer, args.rows) for tokenizer in tokenizers]
    for result in results:
        print(f"{result['rows']} rows, a vocabulary of {result['vocab_size']:,}, {result['steps']} steps")
        for name, value in result.items():
            if name.endswith("(ms)"):
                shown = value if isinstance(value, dict) else {"": value}
                print(f"  {name:36s}", "  ".join(f"{key} {number:9.3f}" for key, number in shown.items()))
    print(json.dumps({"structured_output": results}))


if __name__ == "__main__":
    main()

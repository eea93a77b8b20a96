"""The gain of drafts: seconds and steps of the same outputs without and with `speculative_config`.

    PYTHONPATH=. python benchmarks/speculation.py [CHECKPOINT] [--requests 1 4] [--tokens 128] [--drafts 4]

Without a checkpoint, random weights in a real shape: what a step costs is real, what the model says is not. So there
are two kinds of output. "Repeated" is an answer that repeats its prompt: `structured_outputs` hold it to that, as what
they are about holds extracts and edits. "Free" is whatever the model says. Prints a row each, and a line of JSON.

With `--num-threads 1` the rates are by the process's own time, which a busy machine hardly changes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sensorium import LLM, SamplingParams, StructuredOutputs
from tests.helpers.checkpoints import make_tokenizer

WORDS = ("red", "green", "small", "large", "house", "bird", "river", "stone", "light", "table", "under", "north")


def random_checkpoint(folder: Path, layers: int) -> Path:
    """A text model as wide as Qwen2.5-0.5B, with a tokenizer of bytes; loaded with random weights."""
    from transformers import Qwen2Config

    config = Qwen2Config(
        vocab_size=32_000,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        architectures=["Qwen2ForCausalLM"],
        dtype="float32",
    )
    config.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def table(seed: int, num_chars: int) -> str:
    """Text without long repetitions."""
    rng = random.Random(seed)
    text = ""
    while len(text) < num_chars:
        text += f"{rng.choice(WORDS)} {rng.randrange(1000)}; "
    return text[:num_chars].strip()


def jobs(kind: str, count: int, num_tokens: int) -> tuple[list[str], list[SamplingParams]]:
    """Prompts, and what is asked of their answers."""
    texts = [table(seed, num_tokens) for seed in range(count)]
    prompts = [f"Repeat this: {text}\n" for text in texts]
    fields: list[dict[str, Any]] = [{} for _ in texts]
    if kind == "repeated":
        fields = [{"structured_outputs": StructuredOutputs(regex=re.escape(text))} for text in texts]
    return prompts, [
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=kind == "free", **each) for each in fields
    ]


def run(llm: LLM, prompts: list[str], params: list[SamplingParams]) -> dict[str, Any]:
    """Seconds, counts and outputs."""
    before, begin, cpu_begin = llm.engine.core.stats(), time.perf_counter(), time.process_time()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    seconds, cpu_seconds, after = time.perf_counter() - begin, time.process_time() - cpu_begin, llm.engine.core.stats()
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "tokens": sum(len(each.outputs[0].token_ids) for each in outputs),
        "steps": after.num_steps - before.num_steps,
        "drafts": after.num_draft_tokens - before.num_draft_tokens,
        "accepted": after.num_accepted_tokens - before.num_accepted_tokens,
        "outputs": [each.outputs[0].token_ids for each in outputs],
    }


def measure(llms: Sequence[LLM], kind: str, count: int, num_tokens: int, repeats: int) -> list[dict[str, Any]]:
    """The best of several runs of each engine. The engines alternate, so that the machine's other load affects both."""
    prompts, params = jobs(kind, count, num_tokens)
    rounds = [[run(llm, prompts, params) for llm in llms] for _ in range(1 + repeats)]
    # The first round compiles grammars and fills prefix caches.
    return [min(runs, key=lambda each: float(each["cpu_seconds"])) for runs in zip(*rounds[1:], strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("checkpoint", nargs="?")
    parser.add_argument("--requests", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--layers", type=int, default=12, help="of the random model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int)
    parser.add_argument("--folder", default="/tmp/sensorium-speculation", help="for the random model")
    args = parser.parse_args()
    path = args.checkpoint or str(random_checkpoint(Path(args.folder), args.layers))
    settings = {
        "max_num_seqs": max(args.requests),
        "load_format": "safetensors" if args.checkpoint else "dummy",
        "num_threads": args.num_threads,
    }
    clock = "cpu_seconds" if args.num_threads == 1 else "seconds"
    config = {"method": "ngram", "num_speculative_tokens": args.drafts}
    llms = [LLM(path, speculative_config=each, **settings) for each in (None, config)]
    found: dict[str, list[dict[str, Any]]] = {}
    for kind, count in itertools.product(("repeated", "free"), args.requests):
        off, on = found[f"{kind}, {count}"] = measure(llms, kind, count, args.tokens, args.repeats)
        assert off.pop("outputs") == on.pop("outputs"), f"{kind}, {count}: the outputs differ"
        rates = [each["tokens"] / each[clock] for each in (off, on)]
        print(
            f"{kind}, {count:<4d} {rates[0]:7.1f} -> {rates[1]:7.1f} tokens/s ({rates[1] / rates[0]:.2f} times), "
            f"{off['steps']} -> {on['steps']} steps, {on['accepted']} of {on['drafts']} guesses right"
        )
    print(json.dumps({"benchmark": "speculation", "drafts": args.drafts, "runs": found}))


if __name__ == "__main__":
    main()

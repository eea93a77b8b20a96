"""A decoder in bfloat16, compared with quantized weights or cache: time of a step and of prefill, and accuracy.

    python benchmarks/quantization.py [CHECKPOINT] [--schemes int8 fp8] [--device cuda] [--shape 7b] [--repeats 3]

Without a checkpoint: random weights in the shape of Qwen2-0.5B, or another, with a vocabulary of 32,000. All engines
live at once, and their runs alternate, so that all see the machine's same minutes. A step's time is the best of the
repeats, each of which is what 32 more tokens take. Accuracy is taken over the tokens of random prompts: the error of
their log probabilities, how often another token is the likeliest, and how many tokens of greedy answers come before the
first that differs. The last line is one JSON object.

Schemes kv_fp8_e4m3 and kv_fp8_e5m2 leave the weights and hold the KV cache in 8 bits.

On a CPU, fp8 weights are held in bfloat16: accuracy is that of the rounded weights, speed that of bfloat16. To try the
script, `--shape tiny --repeats 1`.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sensorium import LLM, SamplingParams

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"hidden": 256, "inner": 512, "layers": 2, "heads": 4, "kv_heads": 2, "tied": True},
    "0.5b": {"hidden": 896, "inner": 4864, "layers": 24, "heads": 14, "kv_heads": 2, "tied": True},
    "7b": {"hidden": 3584, "inner": 18944, "layers": 28, "heads": 28, "kv_heads": 4, "tied": False},
}
PROMPT, STEPS, PREFILL = 128, 32, (4, 512)
NUM_PROMPTS = 16
ANSWER = 64
SCHEMES = {"cpu": ["int8", "fp8", "kv_fp8_e4m3"], "cuda": ["fp8", "kv_fp8_e4m3"]}


def config_of(shape: str) -> dict[str, Any]:
    """A checkpoint's config."""
    sizes = SHAPES[shape]
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": sizes["hidden"],
        "intermediate_size": sizes["inner"],
        "num_hidden_layers": sizes["layers"],
        "num_attention_heads": sizes["heads"],
        "num_key_value_heads": sizes["kv_heads"],
        "vocab_size": 32000,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": sizes["tied"],
        "dtype": "bfloat16",
    }


def make_engine(args: argparse.Namespace, scheme: str) -> LLM:
    """An engine, with random weights if there is no checkpoint."""
    of_cache = scheme.startswith("kv_")
    settings: dict[str, Any] = {
        "device": args.device,
        "dtype": "bfloat16",
        "quantization": None if of_cache or scheme == "bfloat16" else scheme,
        "kv_cache_dtype": scheme.removeprefix("kv_") if of_cache else "auto",
        "num_threads": args.num_threads,
        "kv_cache_bytes": 1 << 30 if args.shape == "7b" else 1 << 28,
        "max_model_len": 2048,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    if args.checkpoint is not None:
        return LLM(str(args.checkpoint), **settings)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config_of(args.shape)))
        return LLM(folder, load_format="dummy", **settings)


def seconds(llm: LLM, num_prompts: int, prompt_tokens: int, new_tokens: int) -> float:
    """How long a batch of random prompts takes."""
    prompts = [{"prompt_token_ids": random_ids(llm, prompt_tokens)} for _ in range(num_prompts)]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - begin


def random_ids(llm: LLM, count: int) -> list[int]:
    """Random token ids, without the special ones at the ends of most vocabularies."""
    vocab_size = llm.engine.config.model_config.vocab_size
    return random.choices(range(100, max(min(30000, vocab_size - 300), 101)), k=count)


def measure(llm: LLM) -> dict[str, float]:
    """One repeat of every figure."""
    figures = {}
    for batch in (1, 16):
        first = seconds(llm, batch, PROMPT, 1)
        figures[f"step of {batch}, ms"] = (seconds(llm, batch, PROMPT, STEPS + 1) - first) / STEPS * 1e3
    figures[f"prefill of {PREFILL[0]} x {PREFILL[1]}, ms"] = seconds(llm, *PREFILL, 1) * 1e3
    return figures


def likelihoods(llm: LLM, prompts: list[list[int]]) -> tuple[np.ndarray[Any, Any], list[int]]:
    """Of each token of the prompts but their first: its log probability, and the token that was likeliest."""
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=1, ignore_eos=True)
    values, best = [], []
    for output in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params):
        assert output.prompt_logprobs is not None
        for token, entry in zip(output.prompt_token_ids, output.prompt_logprobs, strict=True):
            if entry is not None:
                values.append(entry[token].logprob)
                best.append(max(entry, key=lambda each: entry[each].logprob))
    return np.array(values), best


def accuracy(reference: LLM, llm: LLM, prompts: list[list[int]]) -> dict[str, float]:
    """The differences between two engines' outputs."""
    (want, want_best), (got, got_best) = likelihoods(reference, prompts), likelihoods(llm, prompts)
    changed = [one != other for one, other in zip(want_best, got_best, strict=True)]
    params = SamplingParams(temperature=0, max_tokens=ANSWER, ignore_eos=True)
    answers = [
        [
            output.outputs[0].token_ids
            for output in each.generate([{"prompt_token_ids": ids} for ids in prompts], params)
        ]
        for each in (reference, llm)
    ]
    equal = [equal_start(*pair) for pair in zip(*answers, strict=True)]
    return {
        "error of log probabilities": float(np.sqrt(np.mean((got - want) ** 2))),
        "relative to their spread, %": float(100 * np.sqrt(np.mean((got - want) ** 2)) / want.std()),
        "another token likeliest, %": 100 * sum(changed) / len(changed),
        f"equal tokens of {ANSWER}": sum(equal) / len(equal),
    }


def equal_start(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens come before the first that differs."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), len(one))


def print_table(figures: dict[str, dict[str, float]], columns: list[str]) -> None:
    """A row for each figure."""
    print(f"{'':30s}" + "".join(f"{name:>12s}" for name in columns))
    for figure in figures[columns[-1]]:
        print(f"{figure:30s}" + "".join(f"{figures[name].get(figure, 0.0):12.3f}" for name in columns))


def main() -> None:
    """Print two tables and a JSON line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--schemes", nargs="+", help="quantizations beside bfloat16; by default those of the device")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--shape", choices=SHAPES, default="0.5b")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args()
    random.seed(0)
    schemes = args.schemes or SCHEMES[args.device.partition(":")[0]]
    engines = {name: make_engine(args, name) for name in ("bfloat16", *schemes)}
    best: dict[str, dict[str, float]] = {name: {} for name in engines}
    for llm in engines.values():
        seconds(llm, 1, PROMPT, 4)
    for _ in range(args.repeats):
        for name, llm in engines.items():
            for figure, value in measure(llm).items():
                best[name][figure] = min(value, best[name].get(figure, value))
    for name, llm in engines.items():
        best[name]["weights, MiB"] = llm.engine.report.memory_bytes["weights"] / 2**20
    print_table(best, list(engines))
    prompts = [random_ids(engines["bfloat16"], PROMPT) for _ in range(NUM_PROMPTS)]
    errors = {name: accuracy(engines["bfloat16"], engines[name], prompts) for name in schemes}
    print_table(errors, list(schemes))
    figures = {name: best[name] | errors.get(name, {}) for name in engines}
    rounded = {name: {figure: round(value, 3) for figure, value in values.items()} for name, values in figures.items()}
    print(json.dumps({"benchmark": "quantization", "shape": args.shape, "device": args.device, "figures": rounded}))


if __name__ == "__main__":
    main()

"""A decoder in bfloat16 beside the same in int8: time of a decoding step, and prefill.

    python benchmarks/quantization.py [CHECKPOINT] [--repeats 3] [--num-threads N]

Without a checkpoint: random weights in the shape of Qwen2-0.5B with a vocabulary of 32,000. Both engines live at once,
and their runs alternate, so that both see the machine's same minutes. A step's time is the best of the repeats, each of
which is what 32 more tokens take. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

from sensorium import LLM, SamplingParams

CONFIG = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 896,
    "intermediate_size": 4864,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
}
PROMPT, STEPS, PREFILL = 128, 32, (4, 512)
SCHEMES = (None, "int8")


def make_engine(checkpoint: Path | None, quantization: str | None, num_threads: int | None) -> LLM:
    """An engine on the CPU, with random weights if there is no checkpoint."""
    settings: dict[str, Any] = {
        "device": "cpu",
        "dtype": "bfloat16",
        "quantization": quantization,
        "num_threads": num_threads,
        "kv_cache_bytes": 1 << 28,
        "max_model_len": 4096,
        "skip_tokenizer_init": True,
        "enable_prefix_caching": False,
    }
    if checkpoint is not None:
        return LLM(str(checkpoint), **settings)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        return LLM(folder, load_format="dummy", **settings)


def seconds(llm: LLM, num_prompts: int, prompt_tokens: int, new_tokens: int) -> float:
    """How long a batch of random prompts takes."""
    prompts = [{"prompt_token_ids": random.choices(range(100, 30000), k=prompt_tokens)} for _ in range(num_prompts)]
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    begin = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - begin


def measure(llm: LLM) -> dict[str, float]:
    """One repeat of every figure."""
    figures = {}
    for batch in (1, 16):
        first = seconds(llm, batch, PROMPT, 1)
        figures[f"step of {batch}, ms"] = (seconds(llm, batch, PROMPT, STEPS + 1) - first) / STEPS * 1e3
    figures[f"prefill of {PREFILL[0]} x {PREFILL[1]}, ms"] = seconds(llm, *PREFILL, 1) * 1e3
    return figures


def main() -> None:
    """Print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--num-threads", type=int)
    args = parser.parse_args()
    random.seed(0)
    engines = {scheme or "bfloat16": make_engine(args.checkpoint, scheme, args.num_threads) for scheme in SCHEMES}
    best: dict[str, dict[str, float]] = {name: {} for name in engines}
    for llm in engines.values():
        seconds(llm, 1, PROMPT, 4)
    for _ in range(args.repeats):
        for name, llm in engines.items():
            for figure, value in measure(llm).items():
                best[name][figure] = min(value, best[name].get(figure, value))
    for name, llm in engines.items():
        best[name]["weights, MiB"] = llm.engine.report.memory_bytes["weights"] / 2**20
    print(f"{'':24s}" + "".join(f"{name:>12s}" for name in engines))
    for figure in best["int8"]:
        print(f"{figure:24s}" + "".join(f"{best[name][figure]:12.1f}" for name in engines))
    rounded = {name: {figure: round(value, 2) for figure, value in values.items()} for name, values in best.items()}
    print(json.dumps({"benchmark": "quantization", "figures": rounded}))


if __name__ == "__main__":
    main()

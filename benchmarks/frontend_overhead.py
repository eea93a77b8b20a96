"""The server's own overhead: requests per second and added latency, with a model that takes almost no time.

    python -m benchmarks.frontend_overhead [--streams 1 16 64 256] [--vllm PYTHON]

Makes a checkpoint of one layer of 64 channels, serves it, and loads it with `sensorium bench serve` at each number of
streams. With `--vllm PYTHON`, the interpreter of an environment that has vLLM, its own server gets the same checkpoint
and the same load in the same run; without it, the output says so. Prints a table, and one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.http_server import free_port, serving, started
from tests.helpers.checkpoints import chat_template, make_tokenizer

MAX_MODEL_LEN = 512


def make_checkpoint(path: Path) -> None:
    """A random Llama of one layer, with a byte tokenizer and a chat template."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = chat_template({})
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=MAX_MODEL_LEN,
        eos_token_id=tokenizer.eos_token_id,
        dtype="float32",
    )
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    tokenizer.save_pretrained(path)


@contextmanager
def sensorium_server(path: Path, most_streams: int) -> Iterator[str]:
    """Our server's address."""
    flags = ("--max-num-seqs", str(most_streams), "--max-model-len", str(MAX_MODEL_LEN), "--log-level", "WARNING")
    with serving(str(path), *flags, "--num-blocks", str(most_streams * MAX_MODEL_LEN // 16 + 16)) as server:
        yield server.url


@contextmanager
def vllm_server(python: str, path: Path, most_streams: int) -> Iterator[str]:
    """The address of vLLM's."""
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_NUM_OF_RESERVED_CPU": "0"}
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path), "--port", str(port)]
    command += ["--max-num-seqs", str(most_streams), "--max-model-len", str(MAX_MODEL_LEN), "--dtype", "float32"]
    with started([*command, "--disable-uvicorn-access-log"], f"http://127.0.0.1:{port}"):
        yield f"http://127.0.0.1:{port}"


def load(url: str, num_streams: int, args: argparse.Namespace) -> dict[str, float]:
    """The figures of one number of streams, times in milliseconds."""
    command = [sys.executable, "-m", "sensorium.entrypoints.cli.main", "bench", "serve", "--url", url]
    command += ["--streams", str(num_streams), "--num-requests", str(max(4 * num_streams, args.requests))]
    command += ["--output-tokens", str(args.output_tokens), "--text-words", "8", "--max-s", "60"]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return pick(json.loads(output.strip().splitlines()[-1]))


def pick(figures: dict[str, Any]) -> dict[str, float]:
    """The columns of the table from what the load generator reports."""
    found = {name: figures[name] for name in ("requests_per_s", "output_tokens_per_s", "failed")}
    for name in ("ttft_ms", "tpot_ms", "itl_ms"):
        found |= {f"{name}_{rank}": figures[name][rank] for rank in ("p50", "p99")}
    return found


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--requests", type=int, default=32, help="at least so many at each number of streams")
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vLLM")
    args = parser.parse_args()
    found: dict[str, dict[int, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_checkpoint(path)
        servers = {"sensorium": sensorium_server(path, max(args.streams))}
        if args.vllm:
            servers["vllm"] = vllm_server(args.vllm, path, max(args.streams))
        else:
            print("vllm: not measured; give its interpreter with --vllm", file=sys.stderr)
        for name, server in servers.items():
            with server as url:
                found[name] = {streams: load(url, streams, args) for streams in args.streams}
    for name, rows in found.items():
        for streams, row in rows.items():
            print(f"{name:10} {streams:4} streams  " + "  ".join(f"{key} {value:g}" for key, value in row.items()))
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

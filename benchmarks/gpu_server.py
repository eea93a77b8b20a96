"""The server on a GPU, compared with the same requests in one process: the cost of HTTP, streams and a second process.

    python benchmarks/gpu_server.py [--shape qwen3b] [--streams 64,256] [--requests 256]

Each request has a new picture of 1024 x 1024 pixels, about 128 tokens of text, and 128 tokens of output. Offline, all
requests are there at once and `max_num_seqs` is the number of streams; the server's clients send the next request as
one ends. Needs the extra `serve`. Prints a line for each number of streams and ends with one line of JSON; `--dry` runs
tiny sizes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks import gpu_checkpoints as checkpoints
from benchmarks.http_server import serving

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def bench(*arguments: str) -> dict[str, Any]:
    """The figures of a `sensorium bench` command, which are its last line."""
    command = [sys.executable, "-m", "sensorium.entrypoints.cli.main", "bench", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return figures


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", default="qwen3b", help="of " + ", ".join(checkpoints.SHAPES))
    parser.add_argument("--streams", default="64,256")
    parser.add_argument("--requests", type=int, default=256)
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "sensorium-gpu"), help="for checkpoints")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    if DEVICE == "cpu" and not options.dry:
        parser.error("no GPU: --dry runs tiny sizes on a CPU")
    path = checkpoints.make_checkpoint("small" if options.dry else options.shape, Path(options.folder), DEVICE)
    checkpoints.add_tokenizer(path)
    count, side, length = (4, 112, 4) if options.dry else (options.requests, 1024, 128)
    workload = ["--num-requests", str(count), "--images", "1", "--image-size", f"{side}x{side}"]
    workload += ["--text-words", "24", "--output-tokens", str(length)]
    settings = ["--max-model-len", "4096", "--device", DEVICE, "--memory-fraction", "0.6"]
    settings += ["--num-blocks", "1024"] if options.dry else []
    results: dict[str, Any] = {"device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"}
    for streams in options.streams.split(","):
        engine = [*settings, "--max-num-seqs", streams]
        offline = bench("throughput", str(path), "--repeats", "2", *workload, *engine)
        with serving(str(path), *engine, "--limit-mm-per-prompt", '{"image": 1}') as server:
            online = bench("serve", "--url", server.url, "--streams", streams, "--warmup", streams, *workload)
        rates = [each["output_tokens_per_s"] for each in (offline, online)]
        results[f"streams {streams}"] = {"offline": offline, "server": online}
        print(f"{streams} streams: offline {rates[0]:,.0f} tok/s, server {rates[1]:,.0f}, {rates[1] / rates[0]:.0%}")
    print(json.dumps(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())

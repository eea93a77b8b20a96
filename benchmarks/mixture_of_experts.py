"""A mixture of experts of Qwen3-30B-A3B's shape on the CPU, compared with Hugging Face's module with the same weights.

    python benchmarks/mixture_of_experts.py [--dtype bfloat16] [--repeats 3] [--rows 1 8 64 512]

Times are the best of the repeats, which take turns, so that both see the same minutes; each is of a call on so
many rows of noise, whose experts are as different as they can be. Also printed: how far both are from each other, and
how fast the weights of the chosen experts are read. Hugging Face runs each of its ways that a CPU has. The last line is
one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import transformers
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

from sensorium.model_executor.layers.activation import SiluAndMul
from sensorium.model_executor.layers.mixture_of_experts import Experts, MixtureOfExperts, Routing, route
from sensorium.model_executor.model_loader.loader import finish_loading
from sensorium.model_executor.model_loader.weight_utils import FUSED_WEIGHTS, load_fused_weights

NUM_EXPERTS, TOP_K, HIDDEN, INNER = 128, 8, 2048, 768
WAYS = ("eager", "grouped_mm", "batched_mm")
"""Hugging Face's, as `experts_implementation`."""
MAX_COPIED_ROWS = 64
"""`batched_mm` copies the weights of each row's experts."""


def blocks(dtype: torch.dtype) -> tuple[MixtureOfExperts, Qwen3MoeSparseMoeBlock]:
    """This engine's layer, and Hugging Face's with the same weights."""
    config = transformers.Qwen3MoeConfig(
        hidden_size=HIDDEN,
        moe_intermediate_size=INNER,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        norm_topk_prob=True,
    )
    torch.set_default_dtype(dtype)
    theirs = Qwen3MoeSparseMoeBlock(config)
    for parameter in theirs.parameters():
        parameter.normal_(0, parameter.shape[-1] ** -0.5)
    ours = MixtureOfExperts(Experts(NUM_EXPERTS, HIDDEN, INNER, SiluAndMul()), Routing(TOP_K), HIDDEN)
    load_fused_weights(ours, theirs.state_dict().items(), FUSED_WEIGHTS)
    finish_loading(ours)
    return ours, theirs.eval()


def time_of(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def measure(ours: MixtureOfExperts, theirs: Qwen3MoeSparseMoeBlock, num_rows: int, repeats: int) -> dict[str, float]:
    """Milliseconds by way, the relative difference, and gigabytes of weights a second here."""
    x = torch.randn(num_rows, HIDDEN)

    def by(way: str) -> torch.Tensor:
        theirs.experts.config._experts_implementation = way
        output: torch.Tensor = theirs(x[None])[0]
        return output

    calls: dict[str, Callable[[], torch.Tensor]] = {"sensorium": lambda: ours(x)}
    calls |= {way: (lambda way=way: by(way)) for way in WAYS if way != "batched_mm" or num_rows <= MAX_COPIED_ROWS}
    expected, got = by("eager").float(), ours(x).float()
    best = dict.fromkeys(calls, float("inf"))
    for _ in range(repeats):
        for name, call in calls.items():
            best[name] = min(best[name], time_of(call))
    num_chosen = len(route(ours.gate(x)[0], ours.routing)[1].unique())
    num_bytes = num_chosen * 3 * HIDDEN * INNER * x.element_size()
    figures = {name: round(1000 * seconds, 3) for name, seconds in best.items()}
    figures["difference"] = float((got - expected).abs().max() / expected.abs().max())
    figures["gb_per_s"] = round(num_bytes / best["sensorium"] / 1e9, 1)
    figures["ratio"] = round(min(best[way] for way in calls if way != "sensorium") / best["sensorium"], 2)
    return figures


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 64, 512])
    args = parser.parse_args()
    torch.manual_seed(0)
    ours, theirs = blocks(getattr(torch, args.dtype))
    results = {}
    for num_rows in args.rows:
        results[num_rows] = figures = measure(ours, theirs, num_rows, args.repeats)
        print(f"{num_rows:5} rows: " + ", ".join(f"{name} {value:.4g}" for name, value in figures.items()))
    print(json.dumps({"dtype": args.dtype, "threads": torch.get_num_threads(), "ms_by_rows": results}))


if __name__ == "__main__":
    main()

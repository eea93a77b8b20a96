"""Hugging Face's modules in this engine, compared with the native class and with Hugging Face's `generate`.

    PYTHONPATH=. python benchmarks/generic.py [--hidden-size 2048] [--layers 4] [--dtype float32 bfloat16]

A Qwen2.5-VL of real widths, few layers and random weights is loaded three times: by the native class, by the modules of
transformers (`model_impl="transformers"`), and by transformers alone. It prints as ratios:

- steps, generic / native: decoding 1 and 16 requests, and a prefill; the two engines alternate step by step;
- 32 requests with a picture each, and answers of several lengths: both engines, and `generate` in static batches of 16,
  padded on the left, each of which runs until its longest answer ends.

With one thread, times are the process's own CPU time, which a busy machine hardly changes. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image

from sensorium import LLM, LLMEngine, SamplingParams
from sensorium.multimodal.hf_processors import cached_get_processor
from sensorium.outputs import OutputKind
from tests.helpers.checkpoints import FAMILIES, QWEN_PLACEHOLDERS, make_tokenizer, qwen_media_ids, token_ids

BATCH_OF_GENERATE = 16
CACHED, WARM_UP = 100, 5
"""Tokens of a prompt whose decodes are timed, and its first steps, which aren't counted."""
MODES = {"native": "auto", "generic": "transformers"}


@dataclass(frozen=True)
class Job:
    """A request with a picture."""

    prompt: str
    picture: Image.Image
    num_tokens: int


def make_checkpoint(folder: Path, hidden_size: int, layers: int, dtype: str) -> Path:
    """Qwen2.5-VL with random weights, a decoder and a tower of so many layers, and a vocabulary of 8192."""
    heads = hidden_size // 128
    text = {"hidden_size": hidden_size, "intermediate_size": hidden_size * 43 // 8, "num_hidden_layers": layers}
    text |= {"num_attention_heads": heads, "num_key_value_heads": 2 if heads % 2 == 0 else 1, "vocab_size": 8192}
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    text |= {
        "rope_parameters": rope,
        "max_position_embeddings": 4096,
        "bos_token_id": None,
        "use_sliding_window": False,
    }
    vision = {"depth": layers, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420}
    vision |= {"out_hidden_size": hidden_size, "fullatt_block_indexes": [layers - 1]}
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **qwen_media_ids())
    config.architectures = [FAMILIES["qwen2_5_vl"].model_class]
    torch.manual_seed(0)
    model = transformers.Qwen2_5_VLForConditionalGeneration(config).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    for name, content in FAMILIES["qwen2_5_vl"].processor_files.items():
        (folder / name).write_text(json.dumps({**content, "max_pixels": 1 << 20}))
    return folder


# Steps


def add(engine: LLMEngine, name: str, ids: Sequence[int], num_tokens: int) -> None:
    """Queue a request of text."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    engine.add_processed(engine.preprocess(name, {"prompt_token_ids": list(ids)}, params), OutputKind.DELTA)


def timed(work: Callable[[], object], clock: Callable[[], float]) -> float:
    """Seconds of a call."""
    begin = clock()
    work()
    return clock() - begin


def prompts(seed: int, count: int, num_tokens: int) -> list[list[int]]:
    """Random token ids of text."""
    found: list[list[int]] = np.random.default_rng(seed).integers(1, 250, (count, num_tokens)).tolist()
    return found


def decode_ratio(engines: Sequence[LLMEngine], batch: int, steps: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of a step of each engine; the engines alternate."""
    for engine in engines:
        for i, ids in enumerate(prompts(batch, batch, CACHED)):
            add(engine, f"d{batch}-{i}", ids, steps + WARM_UP + 4)
        for _ in range(WARM_UP):
            engine.step()
    rows = [[timed(engine.step, clock) for engine in engines] for _ in range(steps)]
    for engine in engines:
        while engine.has_unfinished_requests():
            engine.step()
    return [statistics.median(times) for times in zip(*rows, strict=True)]


def serve(engine: LLMEngine, name: str, ids: Sequence[int]) -> None:
    """Run a prompt, and generate one token."""
    add(engine, name, ids, 1)
    while engine.has_unfinished_requests():
        engine.step()


def prefill_ratio(engines: Sequence[LLMEngine], repeats: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of a prompt of 128 tokens and one generated token, for each engine; the engines alternate."""
    rows = []
    for i, ids in enumerate(prompts(1000, repeats + 1, 128)):
        rows.append([timed(partial(serve, engine, f"p{i}", ids), clock) for engine in engines])
    return [statistics.median(times) for times in zip(*rows[1:], strict=True)]


# Requests with pictures


def answer_lengths(rng: np.random.Generator, kind: str, count: int, longest: int) -> list[int]:
    """Numbers of tokens: all the same, uniformly distributed, or log-normal as in chats, where few answers are long."""
    if kind == "equal":
        return [longest] * count
    if kind == "even":
        return [int(each) for each in rng.integers(max(longest // 16, 1), longest + 1, count)]
    return [int(min(max(each, 1), longest)) for each in rng.lognormal(np.log(longest / 8), 1.0, count)]


def jobs(seed: int, args: argparse.Namespace, kind: str) -> list[Job]:
    """Requests about new pictures of several sizes, with questions of several lengths."""
    rng = np.random.default_rng(seed)
    made: list[Job] = []
    for i, num_tokens in enumerate(answer_lengths(rng, kind, args.requests, args.longest)):
        if i % args.questions:
            picture = made[-1].picture
        else:
            height, width = rng.choice((112, 168, 224, 280), 2).tolist()
            picture = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        question = "".join(rng.choice(list("abcdefgh "), int(rng.integers(16, 64))))
        made.append(Job(f"{QWEN_PLACEHOLDERS['IMAGE']}{question}", picture, num_tokens))
    return made


def by_engine(llm: LLM, work: Sequence[Job]) -> list[list[int]]:
    """Greedy tokens of the requests."""
    params = [SamplingParams(temperature=0, max_tokens=job.num_tokens, ignore_eos=True) for job in work]
    inputs = [{"prompt": job.prompt, "multi_modal_data": {"image": job.picture}} for job in work]
    return [list(each.outputs[0].token_ids) for each in llm.generate(inputs, params, use_tqdm=False)]


@torch.inference_mode()
def by_generate(model: Any, processor: Any, work: Sequence[Job]) -> list[list[int]]:
    """The same by transformers in static batches."""
    found: list[list[int]] = []
    for begin in range(0, len(work), BATCH_OF_GENERATE):
        batch = work[begin : begin + BATCH_OF_GENERATE]
        texts, pictures = [job.prompt for job in batch], [job.picture for job in batch]
        inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt", padding_side="left")
        inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        longest = max(job.num_tokens for job in batch)
        output = model.generate(**inputs, do_sample=False, max_new_tokens=longest, min_new_tokens=longest)
        answers = output[:, inputs["input_ids"].shape[1] :].tolist()
        found += [answer[: job.num_tokens] for answer, job in zip(answers, batch, strict=True)]
    return found


def throughput(llms: dict[str, LLM], path: Path, dtype: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Tokens per second of each way, repetition by repetition on new pictures."""
    model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    # Every answer gets all its tokens: an end token doesn't stop it.
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = token_ids()["<|endoftext|>"]
    processor = cached_get_processor(str(path))
    for repeat in range(args.repeats):
        for kind in args.answers:
            work = jobs(repeat, args, kind)
            ways: dict[str, Callable[[], list[list[int]]]] = {
                **{name: partial(by_engine, llm, work) for name, llm in llms.items()},
                "generate": partial(by_generate, model, processor, work),
            }
            rates, answers = {}, {}
            for name, run in ways.items():
                begin = args.clock()
                answers[name] = run()
                rates[name] = sum(job.num_tokens for job in work) / (args.clock() - begin)
            equal = sum(one == other for one, other in zip(answers["generic"], answers["generate"], strict=True))
            yield {"answers": kind, **rates, "equal": equal / len(work)}


def measure(dtype: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures for a dtype."""
    with tempfile.TemporaryDirectory(prefix="sensorium-generic-") as folder:
        path = make_checkpoint(Path(folder), args.hidden_size, args.layers, dtype)
        settings: dict[str, Any] = {"dtype": dtype, "num_threads": args.num_threads, "max_num_seqs": args.requests}
        settings |= {"max_model_len": 2048, "num_blocks": 2048}
        llms = {name: LLM(str(path), model_impl=impl, **settings) for name, impl in MODES.items()}
        engines = [llm.engine for llm in llms.values()]
        found: dict[str, list[float]] = {}
        for batch in (1, 16):
            found[f"decode {batch}"] = decode_ratio(engines, batch, args.steps, args.clock)
        found["prefill 128"] = prefill_ratio(engines, max(args.steps // 8, 5), args.clock)
        for name, (native, generic) in found.items():
            ratio = f"native {native * 1e3:8.2f} ms, generic {generic * 1e3:8.2f} ms, ratio {generic / native:.2f}"
            print(f"{dtype:9s} {name:12s} {ratio}", flush=True)
        runs = []
        for run in throughput(llms, path, dtype, args):
            rates = ", ".join(f"{name} {run[name]:.1f}" for name in (*MODES, "generate"))
            ratio = f"generic / generate {run['generic'] / run['generate']:.2f}, equal answers {run['equal']:.0%}"
            print(f"{dtype:9s} pictures, {run['answers']:5s} answers, tokens/s: {rates}; {ratio}", flush=True)
            runs.append(run)
    return {"seconds": found, "tokens per second": runs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--hidden-size", type=int, default=2048, help="a multiple of 128")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--longest", type=int, default=256, help="answer, in tokens")
    parser.add_argument("--answers", nargs="+", default=["chat", "even"], choices=["chat", "even", "equal"])
    parser.add_argument("--questions", type=int, default=1, help="about each picture")
    parser.add_argument("--repeats", type=int, default=2, help="of the requests with pictures")
    parser.add_argument("--num-threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.num_threads)
    args.clock = time.process_time if args.num_threads == 1 else time.perf_counter
    figures = {dtype: measure(dtype, args) for dtype in args.dtype}
    settings = {name: value for name, value in vars(args).items() if name != "clock"}
    print(json.dumps({"benchmark": "generic", "settings": settings, "figures": figures}))


if __name__ == "__main__":
    main()

"""The engine on one GPU: checks its results first, then measures its speed against the machine's limits.

    python benchmarks/gpu.py [--shapes qwen3b,qwen7b,llama8b] [--cases correct,storm,decode,...] [--batches 1,64,256]

Needs torch, Triton, transformers and Sensorium's own dependencies; checkpoints have random weights and are made in
--folder. Cases: `correct` (float32 greedy tokens beside Hugging Face's, pictures of many sizes), `bfloat16` (log
probabilities beside those of Hugging Face's own attention implementations), `storm` (requests that are aborted while
their steps are in flight), `start`, `first_token`, `decode`, `prefill`, `text`, `images`, `tower`,
and `steps` (where a step's time goes). Prints a line for each figure, with the share of the limit where bytes or
operations set one, and ends with one line of JSON. `--dry` runs everything on a CPU at tiny sizes. `--ranks 2` runs the
cases of `gpu_ranks.py` instead, on several GPUs: checks first, and then the gain over one GPU.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

BEGIN_S = time.perf_counter()
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

from benchmarks import gpu_checkpoints as checkpoints  # noqa: E402
from sensorium import LLM, SamplingParams  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = (
    "correct",
    "bfloat16",
    "storm",
    "start",
    "first_token",
    "decode",
    "prefill",
    "text",
    "images",
    "tower",
    "steps",
)


def token_ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(1000, 150_000, count).tolist()


def picture(width: int, height: int, seed: int) -> Image.Image:
    """A picture with smooth patches of colour and noise, similar to a photograph."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (max(height // 32, 2), max(width // 32, 2), 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    noisy = pixels + rng.integers(-12, 13, pixels.shape, dtype=np.int16)
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def picture_prompt(image: Image.Image, seed: int, num_text: int = 128) -> dict[str, Any]:
    marks = [checkpoints.VISION_START_ID, checkpoints.IMAGE_ID, checkpoints.VISION_END_ID]
    # The picture comes first: other questions about it share its keys and values.
    return {"prompt_token_ids": [*marks, *token_ids(num_text, seed)], "multi_modal_data": {"image": image}}


def greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)


class Bench:
    """The state that the cases share: settings, checkpoints, figures."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.is_dry = DEVICE == "cpu"
        self.figures: dict[str, Any] = {}
        self.bandwidth = self.matrix_rate = 0.0

    def checkpoint(self, shape: str) -> Path:
        return checkpoints.make_checkpoint(shape, Path(self.options.folder), DEVICE)

    def load(self, shape: str, **settings: Any) -> LLM:
        defaults: dict[str, Any] = {
            "device": DEVICE,
            "max_model_len": 16_384,
            "max_num_seqs": 256,
            "memory_fraction": 0.6,
            "skip_tokenizer_init": True,
        }
        if self.is_dry:
            defaults |= {"num_blocks": 2048, "max_model_len": 4096}
        if checkpoints.takes_pictures(shape):
            defaults["limit_mm_per_prompt"] = {"image": 1}
        return LLM(str(self.checkpoint(shape)), **{**defaults, **settings})

    def report(self, name: str, **figures: Any) -> None:
        self.figures[name] = figures
        text = ", ".join(
            f"{key} {value:,.3f}" if isinstance(value, float) else f"{key} {value}" for key, value in figures.items()
        )
        print(f"{name}: {text}", flush=True)

    def print_json(self) -> None:
        device = torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu"
        print(json.dumps({"device": device, **self.figures}), flush=True)

    def limits(self) -> None:
        """Copy bandwidth in bytes/s, read and written, and the rate of bfloat16 products in operations/s."""
        if self.is_dry:
            self.bandwidth, self.matrix_rate = 1e10, 1e11
            return
        source = torch.empty(1 << 31, dtype=torch.uint8, device=DEVICE).random_()
        target = torch.empty_like(source)
        self.bandwidth = 2 * source.nbytes / device_seconds(lambda: target.copy_(source))
        a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device=DEVICE) for _ in range(2))
        self.matrix_rate = 2 * 8192**3 / device_seconds(lambda: a @ b)
        self.report("limits", copy_tb_s=self.bandwidth / 1e12, matrix_tflop_s=self.matrix_rate / 1e12)


def device_seconds(run: Callable[[], Any], repeats: int = 10) -> float:
    """Median of the device's time for a call."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def generate(llm: LLM, prompts: list[dict[str, Any]], num_tokens: int) -> tuple[list[list[int]], float]:
    """Tokens, and the seconds that they took."""
    begin = time.perf_counter()
    outputs = llm.generate(prompts, greedy(num_tokens), use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs], time.perf_counter() - begin


# --- Checks ---


def correct(bench: Bench) -> bool:
    """Check that greedy tokens in float32 equal Hugging Face's, in any batch, in chunks, and with caches."""
    import transformers

    from sensorium.multimodal.byte_patches import as_processed

    count, num_tokens = (4, 6) if bench.is_dry else (bench.options.prompts, 24)
    rng = random.Random(5)
    sides = [28 * rng.randint(2, 10 if bench.is_dry else 36) for _ in range(2 * count)]
    prompts = [
        picture_prompt(picture(sides[2 * i], sides[2 * i + 1], i), 900 + i, 20 + 7 * (i % 19)) for i in range(count)
    ]
    whole = bench.load("small", max_model_len=4096)
    requests = [
        whole.engine.preprocess(f"reference-{i}", prompt, greedy(1)).engine_request for i, prompt in enumerate(prompts)
    ]
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    path = bench.checkpoint("small")
    model_class = transformers.Qwen2_5_VLForConditionalGeneration
    reference = model_class.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").to(DEVICE).eval()
    reference.generation_config.eos_token_id = None
    expected = []
    with torch.inference_mode():
        for request in requests:
            ids = torch.tensor([list(request.prompt_token_ids)], device=DEVICE)
            media = as_processed(request.media[0].kwargs or {}, 2)
            inputs = {name: torch.as_tensor(value).to(DEVICE) for name, value in media.items()}
            types = (ids == checkpoints.IMAGE_ID).long()
            out = reference.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                mm_token_type_ids=types,
                **inputs,
                max_new_tokens=num_tokens,
                do_sample=False,
            )
            expected.append(out[0, ids.shape[1] :].tolist())
    del reference
    found = {"together": generate(whole, prompts, num_tokens)[0], "again": generate(whole, prompts, num_tokens)[0]}
    whole.shutdown()
    cut = {"enable_prefix_caching": False, "max_num_batched_tokens": 100, "encoder_cache_rows": 0}
    for name, settings in (
        ("in chunks of 100", {}),
        ("call by call, one step in flight", {"enforce_eager": True, "max_steps_in_flight": 1}),
    ):
        llm = bench.load("small", max_model_len=4096, **cut, **settings)
        found[name] = generate(llm, prompts, num_tokens)[0]
        llm.shutdown()
    equal = {name: sum(a == b for a, b in zip(expected, tokens, strict=True)) for name, tokens in found.items()}
    bench.report("correct", prompts=count, distinct_tokens=len({t for row in expected for t in row}), **equal)
    return all(value == count for value in equal.values())


def bfloat16(bench: Bench) -> bool:
    """Check that bfloat16 log probabilities are as close to float32's as those of Hugging Face's attentions."""
    import transformers

    from sensorium.multimodal.byte_patches import as_processed

    count, top = (3, 5) if bench.is_dry else (24, 20)
    prompts = [picture_prompt(picture(28 * (3 + i), 28 * (20 - i % 15), i), 40 + i, 20 + 5 * i) for i in range(count)]
    llm = bench.load("small", max_model_len=4096, dtype="bfloat16")
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=top, ignore_eos=True)
    requests = [
        llm.engine.preprocess(f"bf16-{i}", prompt, greedy(1)).engine_request for i, prompt in enumerate(prompts)
    ]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found = [output.outputs[0].logprobs[0] for output in outputs]  # type: ignore[index]
    llm.shutdown()

    def expected(dtype: torch.dtype, attention: str) -> list[torch.Tensor]:
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        model = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(
            bench.checkpoint("small"), dtype=dtype, attn_implementation=attention
        )
        model = model.to(DEVICE).eval()
        rows = []
        with torch.inference_mode():
            for request, at in zip(requests, found, strict=True):
                ids = torch.tensor([list(request.prompt_token_ids)], device=DEVICE)
                media = as_processed(request.media[0].kwargs or {}, 2)
                inputs = {name: torch.as_tensor(value).to(DEVICE) for name, value in media.items()}
                types = (ids == checkpoints.IMAGE_ID).long()
                mask = torch.ones_like(ids)
                logits = model(input_ids=ids, attention_mask=mask, mm_token_type_ids=types, **inputs).logits[0, -1]
                rows.append(logits.double().log_softmax(-1)[list(at)].cpu())
        return rows

    exact = expected(torch.float32, "sdpa")
    ours = [torch.tensor([entry.logprob for entry in at.values()], dtype=torch.float64) for at in found]
    candidates = {"ours": ours, **{name: expected(torch.bfloat16, name) for name in ("eager", "sdpa")}}
    errors = {
        name: float(torch.stack([(a - b).abs().mean() for a, b in zip(rows, exact, strict=True)]).mean())
        for name, rows in candidates.items()
    }
    bench.report("bfloat16", prompts=count, tokens_each=top, **{f"mean_error_{name}": e for name, e in errors.items()})
    return errors["ours"] <= 1.1 * max(errors["eager"], errors["sdpa"])


def storm(bench: Bench) -> bool:
    """Abort requests while their steps are in flight, and check that the others' tokens equal those of a quiet run."""
    count = 40 if bench.is_dry else 2000
    rng = random.Random(3)
    llm = bench.load("small", max_model_len=2048, max_num_seqs=64)
    engine = llm.engine
    shared = [token_ids(rng.randint(5, 200), 50 + i) for i in range(20)]
    plans = [
        ([*rng.choice(shared), *token_ids(rng.randint(1, 60), 1000 + i)], rng.randint(1, 40)) for i in range(count)
    ]
    kept = set(rng.sample(range(count), count // 5))
    quiet = {i: generate(llm, [{"prompt_token_ids": plans[i][0]}], plans[i][1])[0][0] for i in sorted(kept)[:60]}
    outputs: dict[str, list[int]] = {}
    next_one = num_aborted = 0
    running: list[int] = []
    while next_one < count or engine.has_unfinished_requests():
        for _ in range(rng.randint(0, 24)):
            if next_one < count:
                ids, length = plans[next_one]
                engine.add_request(f"r{next_one}", {"prompt_token_ids": ids}, greedy(length))
                running.append(next_one)
                next_one += 1
        for output in engine.step():
            if output.finished:
                outputs[output.request_id] = list(output.outputs[0].token_ids)  # type: ignore[union-attr]
        running = [i for i in running if f"r{i}" not in outputs]
        doomed = [i for i in running if i not in kept]
        for i in rng.sample(doomed, min(len(doomed), rng.randint(0, 12))):
            engine.abort_request(f"r{i}")
            running.remove(i)
            num_aborted += 1
    engine.core.scheduler.check_idle()
    runner = engine.core.executor.worker.runner  # type: ignore[attr-defined]
    num_equal = sum(outputs[f"r{i}"] == tokens for i, tokens in quiet.items())
    llm.shutdown()
    bench.report(
        "storm", requests=count, aborted=num_aborted, compared=len(quiet), equal=num_equal, held=runner.num_requests
    )
    return num_equal == len(quiet) and runner.num_requests == 0


CHECKS = {"correct": correct, "bfloat16": bfloat16, "storm": storm}


# --- Speed ---


def first_token(bench: Bench, shape: str, llm: LLM) -> None:
    side, repeats = (112, 2) if bench.is_dry else (1024, 6)
    new, again, other = [], [], []
    for i in range(repeats):
        image = picture(side, side, 500 + i)
        prompt = picture_prompt(image, 500 + i)
        for times, each in ((new, prompt), (again, prompt), (other, picture_prompt(image, 7000 + i))):
            times.append(generate(llm, [each], 1)[1] * 1e3)
    new, again, other = (statistics.median(times[1:]) for times in (new, again, other))
    bench.report(f"{shape} first_token_ms", new_picture=new, same_again=again, other_question=other)


def decode(bench: Bench, shape: str, llm: LLM, batch: int) -> None:
    """Milliseconds of a step, from the difference between runs of the same cached prompts for 1 token and for many."""
    context, steps = (48, 6) if bench.is_dry else (1024, 128)
    prompts = [{"prompt_token_ids": token_ids(context, 100_000 + 300 * batch + i)} for i in range(batch)]
    generate(llm, prompts, 1 + steps)
    runs = [(generate(llm, prompts, 1)[1], generate(llm, prompts, 1 + steps)[1]) for _ in range(4)]
    short, long = min(short for short, _ in runs), sorted(long for _, long in runs)
    best, median = ((seconds - short) / steps * 1e3 for seconds in (long[0], statistics.median(long)))
    limit = checkpoints.step_bytes(shape, batch, context + steps // 2) / bench.bandwidth * 1e3
    bench.report(f"{shape} decode {batch}", ms=best, median_ms=median, limit_ms=limit, share=limit / best)


def prefill(bench: Bench, shape: str, llm: LLM) -> None:
    count = 256 if bench.is_dry else 8192
    times = [generate(llm, [{"prompt_token_ids": token_ids(count, 90_000 + i)}], 1)[1] for i in range(5)]
    seconds = statistics.median(times[1:])
    limit = checkpoints.prefill_operations(shape, count) / bench.matrix_rate
    bench.report(f"{shape} prefill {count}", ms=seconds * 1e3, tok_s=count / seconds, share=limit / seconds)
    if "steps" in bench.options.cases and not bench.is_dry:
        print_kernels(lambda: generate(llm, [{"prompt_token_ids": token_ids(count, 90_100)}], 1), 1)


def text(bench: Bench, shape: str, llm: LLM) -> None:
    count, length = (4, 8) if bench.is_dry else (64, 128)
    rates = []
    for repeat in range(3):
        prompts = [{"prompt_token_ids": token_ids(128, 5000 + 100 * repeat + i)} for i in range(count)]
        rates.append(count * length / generate(llm, prompts, length)[1])
    bench.report(f"{shape} text {count}x128+{length}", tok_s=statistics.median(rates), worst_tok_s=min(rates))


def images(bench: Bench, shape: str, llm: LLM) -> None:
    count, length, side = (2, 4, 112) if bench.is_dry else (bench.options.pictures, 128, 1024)
    sets = [[picture(side, side, 20_000 + 1000 * k + i) for i in range(count)] for k in range(3)]
    rates = []
    for k, pictures in enumerate(sets):
        prompts = [picture_prompt(image, 30_000 + 1000 * k + i) for i, image in enumerate(pictures)]
        rates.append(count * length / generate(llm, prompts, length)[1])
    again = count * length / generate(llm, prompts, length)[1]
    asked = [picture_prompt(image, 60_000 + i) for i, image in enumerate(sets[-1])]
    other = count * length / generate(llm, asked, length)[1]
    bench.report(
        f"{shape} images {count}x{side}^2+128+{length}",
        new_tok_s=statistics.median(rates[1:]),
        same_again_tok_s=again,
        other_question_tok_s=other,
    )


def tower(bench: Bench, shape: str, llm: LLM) -> None:
    """Encoding pictures that are mapped already: the device's time, and how long the host needs to launch it."""
    from sensorium.model_executor.drivers import EncodeJob

    driver = llm.engine.core.executor.worker.runner._driver  # type: ignore[attr-defined]
    side, figures = 112 if bench.is_dry else 1024, {}
    begin = time.perf_counter()
    requests = [
        llm.engine.preprocess(f"t{i}", picture_prompt(picture(side, side, 70_000 + i), i), greedy(1)).engine_request
        for i in range(4)
    ]
    figures["preprocess_ms"] = (time.perf_counter() - begin) / 4 * 1e3
    jobs = [EncodeJob(request, request.media[0]) for request in requests]
    for count in (1, 4):
        with torch.inference_mode():
            driver.encode(jobs[:count])
            synchronize()
            begin = time.perf_counter()
            for _ in range(4):
                driver.encode(jobs[:count])
            figures[f"host_ms_{count}"] = (time.perf_counter() - begin) / 4 * 1e3
            synchronize()
            figures[f"whole_ms_{count}"] = (time.perf_counter() - begin) / 4 * 1e3
    if not bench.is_dry:
        figures["kernels"] = print_kernels(lambda: driver.encode(jobs[:1]), 1)
    bench.report(f"{shape} tower", **figures)


def synchronize() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def print_kernels(run: Callable[[], Any], count: int) -> float:
    """The kernels that take most time in `count` calls; returns how many there are in one."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded, torch.inference_mode():
        for _ in range(count):
            run()
        torch.cuda.synchronize()
    totals: dict[str, list[float]] = {}
    for event in recorded.events():
        if str(event.device_type).endswith("CUDA"):
            totals.setdefault(event.name, []).append(event.time_range.elapsed_us())
    for name, times in sorted(totals.items(), key=lambda entry: -sum(entry[1]))[:12]:
        print(f"    {name[:90]}: {len(times) / count:.0f} times, {sum(times) / count:.1f} us")
    return sum(map(len, totals.values())) / count


def steps(bench: Bench, shape: str, llm: LLM, batch: int) -> None:
    """Host and device time of decoding steps, and the kernels that take most of the device's."""
    engine, context = llm.engine, 48 if bench.is_dry else 1024
    core = engine.core
    runner = core.executor.worker.runner  # type: ignore[attr-defined]
    for i in range(batch):
        engine.add_request(f"s{batch}-{i}", {"prompt_token_ids": token_ids(context, 7 * i + batch)}, greedy(200))
    while any(not request.is_caught_up for request in core.scheduler._table.running) or core.scheduler._table.waiting:
        engine.step()
    for _ in range(8):
        engine.step()
    before, begin, count = core.stats(), time.perf_counter(), 3 if bench.is_dry else 60
    for _ in range(count):
        engine.step()
    wall, after = (time.perf_counter() - begin) / count, core.stats()
    busy = (after.forward_s - before.forward_s) / count
    figures = {"step_ms": wall * 1e3, "device_ms": busy * 1e3, "idle_ms": (after.idle_s - before.idle_s) / count * 1e3}
    if not bench.is_dry:
        figures["kernels"] = print_kernels(engine.step, 8)
    bench.report(f"{shape} steps {batch}", **figures)
    engine.abort_request([f"s{batch}-{i}" for i in range(batch)])
    while engine.has_unfinished_requests():
        engine.step()
    assert runner.num_requests == 0


def measure(bench: Bench, shape: str) -> None:
    cases, batches = bench.options.cases, [int(each) for each in bench.options.batches.split(",")]
    begin = time.perf_counter()
    bench.checkpoint(shape)
    made_s, begin = time.perf_counter() - begin, time.perf_counter()
    llm = bench.load(shape)
    loaded_s, begin = time.perf_counter() - begin, time.perf_counter()
    generate(llm, [{"prompt_token_ids": token_ids(64, 1)}], 1)
    if "start" in cases:
        stages = {name.replace(" ", "_") + "_s": seconds for name, seconds in llm.engine.report.seconds.items()}
        bench.report(
            f"{shape} start", load_s=loaded_s, first_s=time.perf_counter() - begin, checkpoint_s=made_s, **stages
        )
        for line in llm.engine.report.lines():
            print(f"    {line}")
    if "first_token" in cases and checkpoints.takes_pictures(shape):
        first_token(bench, shape, llm)
    for batch in batches:
        if "decode" in cases:
            decode(bench, shape, llm, batch)
    for name, case in (("prefill", prefill), ("text", text)):
        if name in cases:
            case(bench, shape, llm)
    for name, case in (("images", images), ("tower", tower)):
        if name in cases and checkpoints.takes_pictures(shape):
            case(bench, shape, llm)
    for batch in batches:
        if "steps" in cases:
            steps(bench, shape, llm, batch)
    llm.shutdown()
    del llm


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shapes", default="qwen3b,qwen7b,llama8b", help="of " + ", ".join(checkpoints.SHAPES))
    parser.add_argument("--cases", default=",".join(CASES), help="of " + ", ".join(CASES))
    parser.add_argument("--batches", default="1,16,64,256")
    parser.add_argument("--prompts", type=int, default=64, help="of the comparison with Hugging Face")
    parser.add_argument("--pictures", type=int, default=64, help="of a burst")
    parser.add_argument("--folder", default=str(Path(tempfile.gettempdir()) / "sensorium-gpu"), help="for checkpoints")
    parser.add_argument("--ranks", type=int, default=1, help="GPUs that share one model; see gpu_ranks.py")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    options = parser.parse_args()
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"--cases: got {sorted(unknown)}, expected some of {', '.join(CASES)}")
    if DEVICE == "cpu" and not options.dry:
        parser.error("no GPU: --dry runs everything at tiny sizes on a CPU")
    bench = Bench(options)
    bench.figures["import_s"] = time.perf_counter() - BEGIN_S
    bench.limits()
    if options.ranks > 1:
        from benchmarks import gpu_ranks

        is_right = gpu_ranks.run(bench, options.ranks)
        bench.print_json()
        return 0 if is_right else 1
    checks = [
        check(bench)
        for name, check in (("correct", correct), ("bfloat16", bfloat16), ("storm", storm))
        if name in options.cases
    ]
    for shape in ["small"] if options.dry else options.shapes.split(","):
        if set(options.cases) - set(CHECKS):
            measure(bench, shape)
    bench.print_json()
    return 0 if all(checks) else 1


if __name__ == "__main__":
    sys.exit(main())

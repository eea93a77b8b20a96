"""One engine in a process of its own: python engine_process.py ENGINE CHECKPOINT DTYPE.

Runs in the engine's own environment, so it imports nothing else of this project. It reads one JSON object a line, a
batch of requests, and answers each with one line: the seconds from the call to the last token, and the tokens counted.
The first line that it writes says that the model is loaded.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

Batch = list[dict[str, Any]]
"""Each request has `token_ids`, or `prompt` and the path of an `image`."""
Generate = Callable[[Batch, int], list[int]]
"""Greedily generate exactly so many tokens for each request; returns the prompts' lengths."""

MAX_MODEL_LEN, MAX_NUM_SEQS = 4096, 64


def open_image(path: str) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


def as_prompts(batch: Batch) -> list[dict[str, Any]]:
    """Requests as Sensorium and vLLM take them."""
    return [
        {"prompt_token_ids": request["token_ids"]}
        if "token_ids" in request
        else {"prompt": request["prompt"], "multi_modal_data": {"image": open_image(request["image"])}}
        for request in batch
    ]


def prompt_lengths(llm: Any, params: Any, batch: Batch) -> list[int]:
    outputs = llm.generate(as_prompts(batch), params, use_tqdm=False)
    assert all(len(output.outputs[0].token_ids) == params.max_tokens for output in outputs)
    return [len(output.prompt_token_ids) for output in outputs]


def load_sensorium(path: str, dtype: str) -> Generate:
    from sensorium import LLM, SamplingParams

    llm = LLM(path, dtype=dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS)
    return lambda batch, n: prompt_lengths(llm, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True), batch)


def load_vllm(path: str, dtype: str) -> Generate:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")  # GiB
    os.environ.setdefault("VLLM_CPU_NUM_OF_RESERVED_CPU", "0")  # all cores compute, as Sensorium's do
    from vllm import LLM, SamplingParams

    # Without the last option it encodes an image of the largest size allowed at start-up, which takes minutes.
    options: dict[str, Any] = {"disable_log_stats": True, "seed": 0, "skip_mm_profiling": True}
    llm = LLM(path, dtype=dtype, max_model_len=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS, **options)
    return lambda batch, n: prompt_lengths(llm, SamplingParams(temperature=0, max_tokens=n, ignore_eos=True), batch)


def load_transformers(path: str, dtype: str) -> Generate:
    """Batches of at most 16, padded on the left."""
    import torch
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    with_images = hasattr(config, "vision_config")
    auto = transformers.AutoModelForImageTextToText if with_images else transformers.AutoModelForCausalLM
    model = auto.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    processor = transformers.AutoProcessor.from_pretrained(path, padding_side="left") if with_images else None

    def inputs_of(batch: Batch) -> Any:
        if "token_ids" in batch[0]:
            ids = torch.tensor([request["token_ids"] for request in batch])
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        assert processor is not None
        images = [open_image(request["image"]) for request in batch]
        return processor(
            text=[request["prompt"] for request in batch], images=images, padding=True, return_tensors="pt"
        )

    @torch.inference_mode()
    def generate(batch: Batch, num_tokens: int) -> list[int]:
        lengths: list[int] = []
        for begin in range(0, len(batch), 16):
            inputs = inputs_of(batch[begin : begin + 16])
            model.generate(**inputs, do_sample=False, max_new_tokens=num_tokens, min_new_tokens=num_tokens)
            lengths += inputs["attention_mask"].sum(1).tolist()
        return lengths

    return generate


def load_openvino(path: str, dtype: str) -> Generate:
    """OpenVINO GenAI's continuous batching over an exported model, which must lie in `<checkpoint>-openvino`."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    del dtype  # that of the export
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 2, True
    scheduler.max_num_seqs = MAX_NUM_SEQS
    pipeline = genai.ContinuousBatchingPipeline(f"{path}-openvino", scheduler, "CPU")
    tokenizer = pipeline.get_tokenizer()

    def generate(batch: Batch, num_tokens: int) -> list[int]:
        settings = genai.GenerationConfig(max_new_tokens=num_tokens, min_new_tokens=num_tokens, ignore_eos=True)
        settings.apply_chat_template = False
        all_settings = [settings] * len(batch)
        if "token_ids" in batch[0]:
            ids = [ov.Tensor(np.array([request["token_ids"]], dtype=np.int64)) for request in batch]
            pipeline.generate(ids, all_settings)
            return [len(request["token_ids"]) for request in batch]
        images = [[ov.Tensor(np.array(open_image(request["image"]))[None])] for request in batch]
        pipeline.generate([request["prompt"] for request in batch], images=images, generation_config=all_settings)
        return [tokenizer.encode(request["prompt"]).input_ids.shape[1] for request in batch]

    return generate


LOADERS: dict[str, tuple[Callable[[str, str], Generate], tuple[str, ...]]] = {
    "sensorium": (load_sensorium, ("sensorium", "torch")),
    "vllm": (load_vllm, ("vllm", "vllm-cpu", "torch")),
    "transformers": (load_transformers, ("transformers", "torch")),
    "openvino": (load_openvino, ("openvino-genai",)),
}


def versions(packages: tuple[str, ...]) -> str:
    """Those that are installed, as `name version`."""
    found = []
    for name in packages:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join(found)


def main() -> None:
    engine, path, dtype = sys.argv[1:]
    # Engines print to the standard output; what goes to the caller must not be mixed with that.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    load, packages = LOADERS[engine]
    generate = load(path, dtype)
    print(json.dumps({"versions": versions(packages)}), file=answers)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.perf_counter()
        lengths = generate(job["requests"], job["num_tokens"])
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "prompt_tokens": sum(lengths)}), file=answers)


if __name__ == "__main__":  # engines with worker processes import this file again
    main()

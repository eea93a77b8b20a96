"""Tiny checkpoints of any type of transformers, served by its modules, and what transformers itself says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sensorium import LLM, SamplingParams
from sensorium.engine.args import EngineArgs
from sensorium.messages import LoadReport
from sensorium.worker.worker import Worker

PROMPTS = ([5, 6, 7], list(range(20, 61)), [70 + 3 * i for i in range(18)])
"""Of different lengths: beyond a window or chunk of tiny models, and one that others are prefilled beside."""
NUM_TOKENS = 6


def load_generic(path: Path, **settings: Any) -> tuple[Any, LoadReport]:
    """The loaded model, as a worker has it, and its report."""
    settings = {"model_impl": "transformers", "max_model_len": 128, "num_blocks": 32, "max_num_seqs": 4, **settings}
    args = EngineArgs(model=str(path), device="cpu", skip_tokenizer_init=True, **settings)
    worker = Worker(args.create_engine_config())
    report = worker.load()
    return worker.model, report


def served_tokens(path: Path, num_rounds: int = 1, **settings: Any) -> list[list[int]]:
    """Greedy tokens of `PROMPTS`, in chunks of at most 16, beside each other; again in each round.

    Of models whose encoder reads prompts whole, `max_num_batched_tokens` has to be larger.
    """
    defaults = {"model_impl": "transformers", "max_model_len": 128, "num_blocks": 64, "max_num_batched_tokens": 16}
    llm = LLM(str(path), device="cpu", skip_tokenizer_init=True, **{**defaults, **settings})
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in PROMPTS]
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(num_rounds)]
    return [list(output.outputs[0].token_ids) for outputs in rounds for output in outputs]


@torch.inference_mode()
def generated_tokens(model: PreTrainedModel) -> list[list[int]]:
    """The same by transformers alone, one prompt after another."""
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    found = []
    for ids in PROMPTS:
        given = torch.tensor([ids])
        output = model.generate(
            given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_TOKENS, do_sample=False
        )
        begun = 1 if model.config.is_encoder_decoder else len(ids)  # by the decoder's start token, or the prompt
        found.append(output[0, begun:].tolist())
    return found

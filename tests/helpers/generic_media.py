"""Media on tiny checkpoints of any type of transformers: what transformers itself generates, and what is served."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from sensorium import LLM, SamplingParams
from sensorium.config import ModelConfig
from sensorium.engine.args import EngineArgs
from sensorium.model_executor.models.transformers.media_rows import on_device
from sensorium.multimodal.hf_items import HFItems, Processed, dummy_item, hf_items

NUM_TOKENS = 6
_SETTINGS = {"model_impl": "transformers", "max_model_len": 2048, "num_blocks": 600}


def model_config_of(path: Path) -> ModelConfig:
    """The resolved configuration of a checkpoint."""
    return EngineArgs(model=str(path), device="cpu", **_SETTINGS).create_engine_config().model_config  # type: ignore[arg-type]


def media_requests(items: HFItems, modality: str, num_items: int = 2) -> list[tuple[str, dict[str, list[Any]]]]:
    """Prompts with media: two items, or one where a processor takes no more, the last alone, and text if it may be."""
    text = items.placeholders[modality].text
    data = [dummy_item(modality, i) for i in range(num_items)]
    requests = [
        (" ".join(f"a {text} b" for _ in data) + " what is this ?", {modality: data}),
        (f"x {text} c a", {modality: data[-1:]}),
        ("what is this ? a b c", {}),
    ]
    return [request for request in requests if _is_taken(items, *request)]


def _is_taken(items: HFItems, text: str, data: dict[str, list[Any]]) -> bool:
    try:
        items.process(text, data)
    except Exception:  # noqa: BLE001  whatever processors raise
        return False
    return True


def served_media_tokens(
    path: Path, requests: Sequence[tuple[str, dict[str, list[Any]]]], num_rounds: int = 1, **settings: Any
) -> list[list[int]]:
    """Greedy tokens of prompts with media, in chunks that cut items, beside each other; again in each round."""
    limits = {modality: 4 for _, data in requests for modality in data}
    settings = {**_SETTINGS, "max_num_batched_tokens": 20, "limit_mm_per_prompt": limits, **settings}
    llm = LLM(str(path), device="cpu", **settings)
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, ignore_eos=True)
    prompts = [{"prompt": text, "multi_modal_data": data} if data else text for text, data in requests]
    rounds = [llm.generate(prompts, params, use_tqdm=False) for _ in range(num_rounds)]
    return [list(output.outputs[0].token_ids) for outputs in rounds for output in outputs]


@torch.inference_mode()
def generated_media_tokens(
    model: PreTrainedModel, items: HFItems, requests: Sequence[tuple[str, dict[str, list[Any]]]]
) -> list[list[int]]:
    """The same by transformers alone, one prompt after another, as its processor makes them."""
    model.generation_config.eos_token_id = model.generation_config.forced_eos_token_id = None
    model.generation_config.pad_token_id = 0
    found = []
    for text, data in requests:
        processed = items.process(text, data, add_special_tokens=True)
        ids = torch.from_numpy(processed.token_ids)[None]
        types = _token_types(model, items, processed) if data else {}
        output = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NUM_TOKENS,
            do_sample=False,
            **types,
            **on_device(processed.tensors, torch.device("cpu"), model.dtype),
        )
        found.append(output[0, -NUM_TOKENS:].tolist())
    return found


def _token_types(model: PreTrainedModel, items: HFItems, processed: Processed) -> dict[str, torch.Tensor]:
    """Of which modality each token is, for models that want to be told and processors that don't tell."""
    name = "mm_token_type_ids"
    if name in processed.tensors or name not in inspect.signature(model.forward).parameters:
        return {}
    return {name: torch.tensor(items.processor.create_mm_token_type_ids([processed.token_ids.tolist()]))}


__all__ = [
    "dummy_item",
    "generated_media_tokens",
    "hf_items",
    "media_requests",
    "model_config_of",
    "served_media_tokens",
]

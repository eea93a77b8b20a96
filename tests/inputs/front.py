"""Models that are nothing but registrations, to test the way of a request up to the engine core.

An image is an array `(rows, 4)` and takes one decoder row per array row; the mapper stacks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig

from sensorium.chat.renderer import ChatRenderer
from sensorium.config import ModelFeatures
from sensorium.inputs import INPUT_REGISTRY
from sensorium.inputs.preprocess import InputPreprocessor, ProcessedRequest
from sensorium.inputs.tokenizer import get_tokenizer
from sensorium.model_executor.models.interfaces import SupportsMultiModal
from sensorium.model_executor.models.registry import ModelRegistry
from sensorium.multimodal import MULTIMODAL_REGISTRY
from sensorium.multimodal.hf_processors import cached_get_processor
from sensorium.multimodal.utils import repeat_and_pad_placeholder_tokens
from sensorium.sampling_params import SamplingParams
from tests.helpers.checkpoints import make_checkpoint, make_tokenizer, token_ids
from tests.helpers.configs import make_engine_config

IMAGE = token_ids()["<image>"]
VIDEO = token_ids()["<|video_pad|>"]
AUDIO = token_ids()["<|AUDIO|>"]
START, END = token_ids()["<|vision_start|>"], token_ids()["<|vision_end|>"]
VOCAB_SIZE, HIDDEN_SIZE, WIDTH = 320, 16, 4
MAX_ROWS = 8


class Calls(list[tuple[str, Any]]):
    """What the registered callables were called with, in order."""

    def of(self, name: str) -> list[Any]:
        return [data for each, data in self if each == name]


def picture(rows: int = 3, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal((rows, WIDTH)).astype(np.float32)


def map_pictures(name: str, calls: Calls, key: str = "pixel_values") -> Callable[..., Any]:
    """A mapper that takes lists and single items, and records what it gets."""

    def mapper(ctx: Any, data: Any, *, scale: float = 1.0) -> dict[str, Any]:
        calls.append((name, data))
        items = data if isinstance(data, list) else [data]
        if all(isinstance(item, torch.Tensor) for item in items):
            return {f"{name}_embeds": data}
        return {key: [torch.from_numpy(np.asarray(item)) * scale for item in items]}

    return mapper


def rows_of(data: Any) -> list[int]:
    items = data if isinstance(data, list) else [data]
    return [item.shape[-2] for item in items]


def expand(ctx: Any, inputs: dict[str, Any], *, surplus: int = 0) -> dict[str, Any]:
    """Expands each placeholder to its item's rows, as LLaVA does, and reports no ranges."""
    ids = list(inputs["prompt_token_ids"])
    for modality, token in (("image", IMAGE), ("video", VIDEO), ("audio", AUDIO)):
        data = (inputs.get("multi_modal_data") or {}).get(modality)
        if data is not None:
            counts = [rows + surplus for rows in rows_of(data)]
            _, ids, _ = repeat_and_pad_placeholder_tokens(
                None, None, ids, placeholder_token_id=token, repeat_count=counts
            )
    return {**inputs, "prompt_token_ids": ids}


def expand_with_ranges(ctx: Any, inputs: dict[str, Any]) -> dict[str, Any]:
    """The same for images, with a start and an end token around each item and ranges that cover them."""
    data = (inputs.get("multi_modal_data") or {}).get("image")
    if data is None:
        return inputs
    _, ids, ranges = repeat_and_pad_placeholder_tokens(
        None,
        None,
        inputs["prompt_token_ids"],
        placeholder_token_id=IMAGE,
        repeat_count=rows_of(data),
        pad_token_left=START,
        pad_token_right=END,
    )
    return {**inputs, "prompt_token_ids": ids, "multi_modal_placeholders": {"image": ranges}}


def new_model(
    calls: Calls | None = None,
    *,
    processor: Callable[..., Any] | None = expand,
    mappers: Mapping[str, Any] | None = None,
    max_rows: int | None = MAX_ROWS,
) -> type:
    """A class that takes images, and what else `mappers` has, without any method."""
    model = type("FrontModel", (nn.Module, SupportsMultiModal), {})
    calls = Calls() if calls is None else calls
    for modality, mapper in (mappers or {"image": map_pictures("image", calls)}).items():
        model = MULTIMODAL_REGISTRY.register_input_mapper(modality, mapper)(model)
        if max_rows is not None:
            model = MULTIMODAL_REGISTRY.register_max_multimodal_tokens(modality, max_rows)(model)
    return model if processor is None else INPUT_REGISTRY.register_input_processor(processor)(model)


def features_of(**changes: Any) -> ModelFeatures:
    fields = {
        "tier": "1",
        "placeholder_token_ids": {"image": frozenset({IMAGE}), "video": frozenset({VIDEO})},
        "max_item_rows": {"image": MAX_ROWS, "video": MAX_ROWS},
    }
    return ModelFeatures(**{**fields, **changes})


class Front:
    """A preprocessor around a model, with short calls."""

    def __init__(
        self,
        model_class: type | None = None,
        *,
        features: ModelFeatures | None = None,
        limits: Mapping[str, int] | None = None,
        tokenizer: bool = True,
        media_loader: Any = None,
        engine: Mapping[str, Any] | None = None,
        accept_embeddings: bool = True,
        model: Path | None = None,
        **config: Any,
    ) -> None:
        hf_config = LlamaConfig(vocab_size=VOCAB_SIZE, hidden_size=HIDDEN_SIZE, num_attention_heads=2, eos_token_id=2)
        config = {"hf_config": hf_config, "limits": limits or {"image": 4, "video": 4}, **config}
        config |= {} if model is None else {"model": model}
        self.config = make_engine_config(new_model() if model_class is None else model_class, **config)
        for name, value in (engine or {}).items():
            object.__setattr__(self.config, name, value)
        own_tokenizer = make_tokenizer() if model is None else get_tokenizer(self.config.model_config)
        self.preprocessor = InputPreprocessor(
            self.config,
            features_of() if features is None else features,
            own_tokenizer if tokenizer else None,
            media_loader,
            accept_embeddings=accept_embeddings,
        )

    def __call__(self, prompt: Any, params: SamplingParams | None = None, **kwargs: Any) -> ProcessedRequest:
        return self.preprocessor.process("request", prompt, params or SamplingParams(), **kwargs)

    def images(self, *images: Any, text: str = "", **prompt: Any) -> ProcessedRequest:
        """A prompt with a placeholder and a letter for each image."""
        body = text or "".join("<image>x" for _ in images)
        return self({"prompt": body, "multi_modal_data": {"image": list(images)}, **prompt})


TEMPLATES = {
    "strings": """{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}""",
    "parts": """{% for m in messages %}[{{ m['role'] }}]{% for p in m['content'] %}\
{% if p['type'] == 'text' %}{{ p['text'] }}{% elif p['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}\
{% if add_generation_prompt %}[assistant]{% endif %}""",
    "images first": """{% for m in messages %}{{ m['role'] | upper }}: \
{% if m['content'] is string %}{{ m['content'] }}{% else %}\
{% for p in m['content'] if p['type'] == 'image' %}<image>\n{% endfor %}\
{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }} {% endfor %}{% endif %}{% endfor %}""",
}
"""Chat templates of the three common kinds."""


def renderer_of(front: Front | None = None, template: str | None = TEMPLATES["parts"], **kwargs: Any) -> ChatRenderer:
    """A chat renderer for a preprocessor's model; None as template: the checkpoint's."""
    front = Front() if front is None else front
    assert front.preprocessor.encoder is not None
    tokenizer = front.preprocessor.encoder.tokenizer
    return ChatRenderer(front.config.model_config, tokenizer, chat_template=template, **kwargs)


def front_of(family: str, path: Path | None = None, **kwargs: Any) -> Front:
    """A preprocessor for the native class of a checkpoint of `tests.helpers.checkpoints`, or a copy of one."""
    path = make_checkpoint(family) if path is None else path
    hf_config = AutoConfig.from_pretrained(path)
    model_class, _ = ModelRegistry.resolve(hf_config.architectures)
    features = features_of(tier="2", placeholder_token_ids={}, max_item_rows={})
    limits = {"image": 8, "video": 2, "audio": 4}
    return Front(model_class, features=features, model=path, hf_config=hf_config, limits=limits, **kwargs)


def hf_processor(family: str) -> Any:
    """Hugging Face's processor of the same checkpoint."""
    return cached_get_processor(str(make_checkpoint(family)))


def spans_of(processed: ProcessedRequest) -> list[tuple[int, int]]:
    return [(item.span.offset, item.span.length) for item in processed.engine_request.media]


def keys_of(processed: ProcessedRequest) -> list[str]:
    return [item.key for item in processed.engine_request.media]

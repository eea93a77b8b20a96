"""Tiny checkpoints of models that don't generate, as sentence-transformers and Hugging Face write them."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tokenizers import processors
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.helpers.checkpoints import make_tokenizer, token_ids

SIZES: Mapping[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 130,
    "pad_token_id": token_ids()["<|endoftext|>"],
    "initializer_range": 0.3,
}


def bert(**settings: Any) -> transformers.PretrainedConfig:
    """As bge, e5 and MiniLM have it."""
    return transformers.BertConfig(**{**SIZES, **settings})


def roberta(**settings: Any) -> transformers.PretrainedConfig:
    """As XLM-RoBERTa: positions are counted from behind the padding's id."""
    return transformers.XLMRobertaConfig(**{**SIZES, "pad_token_id": 1, **settings})


def modern_bert(**settings: Any) -> transformers.PretrainedConfig:
    """Every other layer sees 4 positions before and behind."""
    ids = dict.fromkeys(("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0)
    return transformers.ModernBertConfig(
        **{**SIZES, "local_attention": 8, "global_attn_every_n_layers": 2, **ids, **settings}
    )


def qwen3(**settings: Any) -> transformers.PretrainedConfig:
    """A decoder."""
    return transformers.Qwen3Config(**{**SIZES, "num_key_value_heads": 2, "head_dim": 8, **settings})


def pair_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer with BERT's marks around texts, and type ids."""
    tokenizer = make_tokenizer()
    marks = {name: tokenizer.convert_tokens_to_ids(name) for name in ("<|im_start|>", "<|im_end|>")}
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|im_start|>:0 $A:0 <|im_end|>:0",
        pair="<|im_start|>:0 $A:0 <|im_end|>:0 $B:1 <|im_end|>:1",
        special_tokens=list(marks.items()),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        pad_token="<|endoftext|>",
        cls_token="<|im_start|>",
        sep_token="<|im_end|>",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )


@functools.cache
def _reference(folder: Path, class_name: str) -> PreTrainedModel:
    model: PreTrainedModel = getattr(transformers, class_name).from_pretrained(folder, attn_implementation="eager")
    return model.eval()


def make_pooling_checkpoint(class_name: str, config: transformers.PretrainedConfig, **changes: Any) -> Path:
    """A folder with a model of random weights and a tokenizer; `changes` of its config.json."""
    folder = Path(tempfile.mkdtemp(prefix="sensorium-pooling-"))
    torch.manual_seed(0)
    model = getattr(transformers, class_name)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.1)
    model.save_pretrained(folder)
    pair_tokenizer().save_pretrained(folder)
    if changes:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


def add_modules(
    folder: Path, *, mode: str | None = "mean_tokens", dense: Sequence[tuple[int, int]] = (), normalize: bool = True
) -> Path:
    """Make a sentence-transformers checkpoint of a folder: pooling, linear layers `(in, out)`, norm."""
    modules = [("", "sentence_transformers.models.Transformer")]
    if mode is not None:
        _write(folder / "1_Pooling" / "config.json", {f"pooling_mode_{mode}": True, "word_embedding_dimension": 32})
        modules.append(("1_Pooling", "sentence_transformers.models.Pooling"))
    for number, (size, width) in enumerate(dense, 2):
        name = f"{number}_Dense"
        activation = "torch.nn.modules.activation.Tanh" if mode else "torch.nn.modules.linear.Identity"
        settings = {"in_features": size, "out_features": width, "bias": mode is not None}
        _write(folder / name / "config.json", {**settings, "activation_function": activation})
        weights = {"linear.weight": torch.randn(width, size) / 8}
        if mode is not None:
            weights["linear.bias"] = torch.randn(width)
        save_file(weights, folder / name / "model.safetensors")
        modules.append((name, "sentence_transformers.models.Dense"))
    if normalize and mode is not None:
        modules.append(("9_Normalize", "sentence_transformers.models.Normalize"))
    _write(
        folder / "modules.json",
        [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(modules)],
    )
    return folder


def _write(path: Path, content: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content))


@torch.inference_mode()
def reference_output(folder: Path, class_name: str, *texts: str, **options: Any) -> torch.Tensor:
    """Hugging Face's scores, or last states `(num_tokens, hidden_size)`, of a text or a pair, alone."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = _reference(folder, class_name)
    given = dict(tokenizer(*texts, return_tensors="pt", **options))
    if not getattr(model.config, "type_vocab_size", 0):
        given.pop("token_type_ids", None)
    output = model(**given)
    found: torch.Tensor = output[0] if getattr(output, "logits", None) is None else output.logits
    return found[0]

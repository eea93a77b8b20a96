"""Text models with V0's constructors: from a checkpoint of Hugging Face to its tokens."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from sensorium.compat.v0.vllm.model_executor.models.gemma import GemmaForCausalLM, GemmaModel
from sensorium.compat.v0.vllm.model_executor.models.gemma2 import Gemma2ForCausalLM
from sensorium.compat.v0.vllm.model_executor.models.internlm2 import InternLM2ForCausalLM
from sensorium.compat.v0.vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from sensorium.compat.v0.vllm.model_executor.models.minicpm import MiniCPMForCausalLM
from sensorium.compat.v0.vllm.model_executor.models.opt import OPTForCausalLM
from sensorium.compat.v0.vllm.model_executor.models.persimmon import PersimmonForCausalLM
from sensorium.compat.v0.vllm.model_executor.models.phi3 import Phi3ForCausalLM
from sensorium.compat.v0.vllm.model_executor.models.qwen2 import Qwen2ForCausalLM, Qwen2Model
from sensorium.compat.v0.vllm.model_executor.models.utils import init_vllm_registered_model
from sensorium.errors import ModelError
from sensorium.model_executor.adapter import construct_model
from sensorium.model_executor.layers.layernorm import RMSNorm
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.model_loader import load_model
from sensorium.model_executor.models.utils import AutoWeightsLoader, default_weight_loader
from tests.helpers.configs import make_engine_config
from tests.helpers.direct import DirectRun, relative_error
from tests.helpers.tiny_architectures import spread

IDS = [5, 17, 3, 44, 9, 9, 60, 2, 31, 8, 13, 27]
NUM_TOKENS = 5
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
LLAMA = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2}
OPT = {**SIZES, "ffn_dim": 48, "pad_token_id": 1}
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**LLAMA),
    "tied": transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True),
    "qwen2": transformers.Qwen2Config(**LLAMA),
    "gemma": transformers.GemmaConfig(**LLAMA, head_dim=8),
    "gemma2": transformers.Gemma2Config(**LLAMA, head_dim=8, sliding_window=6, query_pre_attn_scalar=10),
    "phi3": transformers.Phi3Config(**LLAMA),
    "opt": transformers.OPTConfig(**OPT, word_embed_proj_dim=24),
    "opt with norms behind": transformers.OPTConfig(**OPT, word_embed_proj_dim=32, do_layer_norm_before=False),
    "persimmon": transformers.PersimmonConfig(**SIZES, intermediate_size=48),
}
WITH_HEAD: dict[str, type[nn.Module]] = {
    "llama": LlamaForCausalLM,
    "tied": LlamaForCausalLM,
    "qwen2": Qwen2ForCausalLM,
    "gemma": GemmaForCausalLM,
    "gemma2": Gemma2ForCausalLM,
    "phi3": Phi3ForCausalLM,
    "opt": OPTForCausalLM,
    "opt with norms behind": OPTForCausalLM,
    "persimmon": PersimmonForCausalLM,
}


class ByParts(nn.Module):
    """An outer class as those of 0.6.3 were, with the model that `inner` names in it."""

    inner: type[nn.Module]

    def __init__(self, config: Any, multimodal_config: Any, cache_config: Any = None, quant_config: Any = None) -> None:
        super().__init__()
        self.language_model: Any = self.inner(config, cache_config, quant_config)
        assert self.language_model.make_empty_intermediate_tensors(
            3, torch.float32, torch.device("cpu")
        ).tensors.keys() == {"hidden_states", "residual"}

    def forward(self, input_ids: Any, positions: Any, kv_caches: Any, attn_metadata: Any) -> torch.Tensor:
        embeds = self.language_model.model.get_input_embeddings(input_ids)
        hidden: torch.Tensor = self.language_model.model(None, positions, kv_caches, attn_metadata, None, embeds)
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        logits: torch.Tensor = self.language_model.compute_logits(hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        AutoWeightsLoader(self).load_weights((f"language_model.{name}", tensor) for name, tensor in weights)


class DecoderOnly(nn.Module):
    """An outer class of 0.6.4 that has its own head, and loads by the names of parameters, as Qwen2-VL does."""

    inner: type[nn.Module]

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.model: Any = self.inner(vllm_config=vllm_config.with_hf_config(config), prefix="model")
        self.lm_head: VocabParallelEmbedding = self.model.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(config.vocab_size, config.hidden_size, prefix="lm_head")
        self.logits_processor = LogitsProcessor(config.vocab_size)

    def forward(self, input_ids: Any, positions: Any, kv_caches: Any, attn_metadata: Any) -> torch.Tensor:
        hidden: torch.Tensor = self.model(
            input_ids=input_ids,
            positions=positions,
            kv_caches=kv_caches,
            attn_metadata=attn_metadata,
            intermediate_tensors=None,
            inputs_embeds=None,
        )
        return hidden

    def compute_logits(self, hidden_states: torch.Tensor, sampling_metadata: Any) -> torch.Tensor:
        logits: torch.Tensor = self.logits_processor(self.lm_head, hidden_states, sampling_metadata)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        stacked = [("qkv_proj", "q_proj", "q"), ("qkv_proj", "k_proj", "k"), ("qkv_proj", "v_proj", "v")]
        stacked += [("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1)]  # type: ignore[list-item]
        parameters = dict(self.named_parameters(remove_duplicate=False))
        for name, tensor in weights:
            for fused, part, shard in stacked:
                if part in name:
                    parameter: Any = parameters[name.replace(part, fused)]
                    parameter.weight_loader(parameter, tensor, shard)
                    break
            else:
                parameter = parameters[name]
                getattr(parameter, "weight_loader", default_weight_loader)(parameter, tensor)


class LayersOnly(DecoderOnly):
    """An outer class that stacks layers itself, as Mllama does."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        config, layers = vllm_config.model_config.hf_config, range(2)
        self.model = nn.Module()
        self.model.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList(
            LlamaDecoderLayer(config, cache_config=vllm_config.cache_config, prefix=f"model.layers.{i}") for i in layers
        )
        self.model.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, input_ids: Any, positions: Any, kv_caches: Any, attn_metadata: Any) -> torch.Tensor:
        hidden, residual = self.model.embed_tokens(input_ids), None
        for layer, kv_cache in zip(self.model.layers, kv_caches, strict=True):
            hidden, residual = layer(
                positions=positions,
                hidden_states=hidden,
                kv_cache=kv_cache,
                attn_metadata=attn_metadata,
                residual=residual,
            )
        normed: torch.Tensor = self.model.norm(hidden, residual)[0]
        return normed


def reference_of(config: transformers.PretrainedConfig, folder: Path) -> transformers.PreTrainedModel:
    """A tiny checkpoint, and Hugging Face's model of it."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    spread(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:  # biases and norms, which would be zeros and ones
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.tie_weights()
    model.save_pretrained(folder)
    return model


def check(model_class: type[nn.Module], config: transformers.PretrainedConfig, folder: Path, reference: Any) -> None:
    """Logits of a prompt in chunks are the reference's, and so are the tokens behind it."""
    engine_config = make_engine_config(model=folder, hf_config=config)
    run = DirectRun(load_model(engine_config, model_class), engine_config)
    with torch.no_grad():
        expected = reference(torch.tensor([IDS]), use_cache=False).logits[0]
    logits = torch.cat([run.step(IDS[:5]), run.step(IDS[5:])])
    assert relative_error(logits, expected) < 1e-4
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < NUM_TOKENS:
        tokens.append(int(run.step(tokens[-1:])[-1].argmax()))
    given = torch.tensor([IDS])
    output = reference.generate(
        given, attention_mask=torch.ones_like(given), max_new_tokens=NUM_TOKENS, do_sample=False
    )
    assert tokens == output[0, len(IDS) :].tolist()


def subclass(base: type, inner: type[nn.Module]) -> type:
    return type(f"{base.__name__}Of{inner.__name__}", (base,), {"inner": inner})


@pytest.mark.parametrize("name", WITH_HEAD)
def test_models_with_a_head(name: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    reference = reference_of(config, tmp_path)
    check(WITH_HEAD[name], config, tmp_path, reference)
    check(subclass(ByParts, WITH_HEAD[name]), config, tmp_path, reference)


@pytest.mark.parametrize(
    ("name", "model_class"), [("llama", LlamaModel), ("qwen2", Qwen2Model), ("gemma", GemmaModel), ("tied", LlamaModel)]
)
def test_decoders_without_a_head(name: str, model_class: type[nn.Module], tmp_path: Path) -> None:
    reference = reference_of(CONFIGS[name], tmp_path)
    check(subclass(DecoderOnly, model_class), CONFIGS[name], tmp_path, reference)


def test_single_layers(tmp_path: Path) -> None:
    reference = reference_of(CONFIGS["llama"], tmp_path)
    check(subclass(LayersOnly, LlamaModel), CONFIGS["llama"], tmp_path, reference)


def test_internlm2_is_llama_with_projections_fused_by_group(tmp_path: Path) -> None:
    """Each key/value head has its query heads before it."""
    reference = reference_of(CONFIGS["llama"], tmp_path)
    names = {
        "embed_tokens": "tok_embeddings",
        "lm_head": "output",
        "self_attn.o_proj": "attention.wo",
        "mlp.gate_proj": "feed_forward.w1",
        "mlp.up_proj": "feed_forward.w3",
        "mlp.down_proj": "feed_forward.w2",
        "input_layernorm": "attention_norm",
        "post_attention_layernorm": "ffn_norm",
    }
    weights = {}
    for name, tensor in reference.state_dict().items():
        if ".q_proj." in name:
            parts = [reference.state_dict()[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            fused = torch.cat([part.view(2, -1, 8, 32) for part in parts], 1)
            weights[name.replace("self_attn.q_proj", "attention.wqkv")] = fused.reshape(-1, 32)
        elif ".k_proj." not in name and ".v_proj." not in name:
            there = next((each for each in names if each in name), "norm")
            weights[name.replace(there, names.get(there, "norm"))] = tensor.contiguous()
    save_file(weights, tmp_path / "model.safetensors")
    config = transformers.LlamaConfig(**LLAMA)
    config.bias = False
    check(InternLM2ForCausalLM, config, tmp_path, reference)
    check(subclass(ByParts, InternLM2ForCausalLM), config, tmp_path, reference)


def test_minicpm_is_llama_with_factors(tmp_path: Path) -> None:
    """The reference has the factors in its weights."""
    reference = reference_of(CONFIGS["llama"], tmp_path)
    config = transformers.LlamaConfig(**LLAMA)
    config.scale_emb, config.scale_depth, config.dim_model_base = 3, 1.4, 16
    factors = {"embed_tokens": 3, "o_proj": 1.4 / 2**0.5, "down_proj": 1.4 / 2**0.5, "lm_head": 16 / 32}
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            parameter.mul_(next((factor for part, factor in factors.items() if part in name), 1.0))
    check(MiniCPMForCausalLM, config, tmp_path, reference)
    check(subclass(ByParts, MiniCPMForCausalLM), config, tmp_path, reference)


def test_minicpm_with_experts_is_refused() -> None:
    config = transformers.LlamaConfig(**LLAMA)
    config.num_experts = 4
    with pytest.raises(ModelError, match="num_experts of MiniCPM: got 4"):
        construct_model(MiniCPMForCausalLM, make_engine_config(hf_config=config))


class OfAnyKind(ByParts):
    """An outer class of 0.6.4 that asks for the inner model of its config."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        nn.Module.__init__(self)
        config = vllm_config.model_config.hf_config
        self.language_model = init_vllm_registered_model(config, vllm_config=vllm_config, prefix="language_model")


@pytest.mark.parametrize(("name", "model_class"), [("opt", OPTForCausalLM), ("phi3", Phi3ForCausalLM)])
def test_inner_models_that_only_the_room_has(name: str, model_class: type[nn.Module], tmp_path: Path) -> None:
    config = CONFIGS[name]
    reference = reference_of(config, tmp_path)
    model = construct_model(OfAnyKind, make_engine_config(hf_config=config))
    assert type(model.language_model) is model_class
    check(OfAnyKind, config, tmp_path, reference)

"""Requests with adapters of their own share passes and change nothing for one another: a toy adapter stands for all."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from typing import Any

import msgspec
import pytest
import torch
from torch.nn import functional as F

from sensorium import LLMEngine, SamplingParams
from sensorium.config import LoRAConfig
from sensorium.errors import ConfigError
from sensorium.ipc.codec import decode_request, encode_request
from sensorium.kernels import native_refusal
from sensorium.messages import EngineRequest
from sensorium.model_executor.adapter_rows import adapter_ids_of_rows, current_adapters, split_rows
from sensorium.model_executor.layers import decoder
from sensorium.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear
from sensorium.model_executor.layers.logits_processor import LogitsProcessor
from sensorium.model_executor.layers.quantization import LinearMethod
from sensorium.model_executor.layers.quantization.fp8 import Fp8Config
from sensorium.model_executor.layers.quantization.int8 import Int8Config
from sensorium.model_executor.layers.quantization.layer import WeightedLayer
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.sampling_metadata import SamplingMetadata
from sensorium.worker.worker import Worker
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.graphs import HostReplay
from tests.helpers.mixed_requests import limits, random_plan
from tests.helpers.serving import Planned, differing, make_engine, quiet_engine, serve

RANK = 2


class ToyAdapters(LinearMethod):
    """Adds to each row the product with its adapter's two thin matrices, whatever the method beneath holds."""

    name = "toy adapters"

    def __init__(self, inner: LinearMethod) -> None:
        self.inner = inner

    def create_weights(self, layer: WeightedLayer) -> None:
        self.inner.create_weights(layer)

    def after_loading(self, layer: WeightedLayer) -> None:
        self.inner.after_loading(layer)

    def apply(self, layer: WeightedLayer, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        out = self.inner.apply(layer, x, bias)
        adapters = current_adapters()
        if adapters is None:
            return out
        adapter_ids = adapters.ids
        assert adapter_ids.shape == x.shape[:1], f"{layer.prefix}: {len(x)} rows, {len(adapter_ids)} adapters"
        rows = zip(out, x, adapter_ids.tolist(), strict=True)
        return torch.stack([row + self.delta(layer, given, adapter_id) for row, given, adapter_id in rows])

    @staticmethod
    def delta(layer: WeightedLayer, row: torch.Tensor, adapter_id: int) -> torch.Tensor:
        if not adapter_id:
            return torch.zeros(layer.output_size, dtype=row.dtype)
        down, up = thin_matrices(layer.prefix, adapter_id, layer.input_size, layer.output_size)
        return (up @ (down @ row.float())).to(row.dtype)


@cache
def thin_matrices(prefix: str, adapter_id: int, input_size: int, output_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(sum(prefix.encode()) * 100 + adapter_id)
    down = torch.randn(RANK, input_size, generator=generator) * input_size**-0.5
    return down, torch.randn(output_size, RANK, generator=generator)


# Layers


@pytest.mark.parametrize("config", [None, Int8Config(), Fp8Config()], ids=["float", "int8", "fp8"])
@pytest.mark.parametrize("make", [ReplicatedLinear, ParallelLMHead, VocabParallelEmbedding])
def test_rows_of_many_adapters_equal_each_alone(make: Callable[..., Any], config: Any) -> None:
    layer = make(20, 30, quant_config=config, prefix="layer")
    weight = torch.randn(layer.weight.shape)
    layer.weight_loader(layer.weight, weight)
    if getattr(layer, "bias", None) is not None:
        torch.nn.init.zeros_(layer.bias)
    layer.wrap_method(ToyAdapters)
    multiply = layer.project if isinstance(layer, VocabParallelEmbedding) else lambda rows: layer(rows)[0]
    x = torch.randn(6, layer.input_size)
    ids = torch.tensor([0, 2, 1, 2, 0, 7])
    with adapter_ids_of_rows(ids):
        together = multiply(x)
    base = multiply(x)
    for i, adapter_id in enumerate(ids):
        with adapter_ids_of_rows(adapter_id[None]):
            torch.testing.assert_close(multiply(x[i : i + 1])[0], together[i])
    changed = (together != base).any(-1)
    assert changed.tolist() == [False, True, True, True, False, True]
    assert current_adapters() is None


def test_who_takes_a_part_of_the_rows_takes_their_adapters_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long prompts go through an MLP in pieces, and a head gets the rows that are sampled."""
    monkeypatch.setattr(decoder, "MLP_CHUNK_ROWS", 4)
    torch.manual_seed(0)
    mlp = decoder.GatedMLP(8, 12, "silu", prefix="mlp")
    head = ParallelLMHead(20, 8, prefix="head")
    for layer in (mlp.gate_up_proj, mlp.down_proj, head):
        assert isinstance(layer, WeightedLayer)
        layer.weight_loader(layer.weight, torch.randn(layer.weight.shape))
        layer.wrap_method(ToyAdapters)
    x, ids = torch.randn(11, 8), torch.arange(11) % 3
    rows = torch.tensor([10, 3, 4])
    with adapter_ids_of_rows(ids):
        whole = mlp(x)
        logits = LogitsProcessor(20)(head, x, SamplingMetadata(3, selected_token_indices=rows))
    for i, adapter_id in enumerate(ids):
        with adapter_ids_of_rows(adapter_id[None]):
            torch.testing.assert_close(mlp(x[i : i + 1])[0], whole[i])
            if i in rows:
                torch.testing.assert_close(LogitsProcessor(20)(head, x[i : i + 1])[0], logits[rows.tolist().index(i)])


def test_pieces_without_adapters_are_plain_pieces() -> None:
    assert [len(piece) for piece in split_rows(torch.zeros(5, 2), 2)] == [2, 2, 1]
    assert current_adapters() is None


def test_bounds_of_adapters_are_checked() -> None:
    assert LoRAConfig().max_lora_rank == 16
    with pytest.raises(ConfigError, match="max_loras"):
        LoRAConfig(max_loras=0)


# The engine


@pytest.fixture
def native_kernels() -> None:
    reason = native_refusal()
    if reason is not None:
        pytest.skip(f"plain torch's products depend on the batch in their last bits: {reason}")


def adapted_engine(make: Callable[..., LLMEngine], family: str, adapters: dict[str, int], **settings: Any) -> LLMEngine:
    """An engine whose requests have these adapters, by their ids, in every linear layer and head."""
    engine = make(make_checkpoint(family), device="cpu", limit_mm_per_prompt=limits(family), **settings)
    for module in engine.core.executor.worker.model.modules():  # type: ignore[attr-defined]
        if isinstance(module, WeightedLayer) and module.loaded_by is not None:
            module.wrap_method(ToyAdapters)
    add = engine.core.add_request

    def add_adapted(request: EngineRequest) -> None:
        add(replace(request, adapter_id=adapters[request.request_id]))

    engine.core.add_request = add_adapted  # type: ignore[method-assign]
    return engine


WAYS: dict[str, dict[str, Any]] = {
    "chunks of 16": {"max_num_batched_tokens": 16},
    "preempted": {"num_blocks": 40, "block_size": 8, "max_num_batched_tokens": 64},
    "recorded": {"max_steps_in_flight": 2},
}


@pytest.mark.usefixtures("native_kernels")
@pytest.mark.parametrize(
    ("family", "way"),
    [
        *(("llama", way) for way in WAYS),
        *((each, "chunks of 16") for each in ("llava", "qwen2_audio")),
        ("qwen2_vl", "preempted"),
    ],
)
def test_requests_of_many_adapters_equal_each_alone(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded passes are the base model's: steps of its requests alone replay them, others run call by call."""
    plan = random_plan(family, 16, random.Random(family), spread=2, aborts=0, max_tokens=80)
    adapters = {each.request_id: i % 3 for i, each in enumerate(plan)}
    single = adapted_engine(quiet_engine, family, adapters)
    reference = {
        each.request_id: serve(single, [replace(each, arrival_step=0)]).tokens(each.request_id) for each in plan
    }
    capture = HostReplay()
    if way == "recorded":
        monkeypatch.setattr(Worker, "_graph_capture", lambda worker: capture)
    engine = adapted_engine(make_engine, family, adapters, **WAYS[way])
    for _ in range(2):  # the second time with everything cached
        served = serve(engine, plan)
        for each in plan:
            got = served.tokens(each.request_id)
            assert got == reference[each.request_id], differing(got, reference[each.request_id])
    assert engine.core.stats().num_prefix_hit_tokens > 0
    assert way != "preempted" or engine.core.stats().num_preemptions > 0
    assert (way == "recorded") == (capture.num_replays > 0)
    engine.core.scheduler.check_idle()


@pytest.mark.usefixtures("native_kernels")
def test_a_prompt_is_not_shared_across_adapters() -> None:
    """Each adapter's first request computes the prompt, its second finds it; log probabilities of the prompt too."""
    adapters = {f"r{i}": i % 3 for i in range(6)}
    engine = adapted_engine(make_engine, "llama", adapters)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    prompt = {"prompt_token_ids": list(range(5, 75))}
    outputs = [serve(engine, [Planned(f"r{i}", prompt, params)]).outputs[f"r{i}"] for i in range(6)]
    assert [output.num_cached_tokens for output in outputs] == [0, 0, 0, 64, 64, 64]
    tokens = [tuple(output.outputs[0].token_ids) for output in outputs]
    assert tokens[:3] == tokens[3:]
    assert len(set(tokens)) == 3, "adapters change the answer"
    with_logprobs = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, ignore_eos=True)
    values = []
    for i in range(3):
        output = serve(engine, [Planned(f"r{i}", prompt, with_logprobs)]).outputs[f"r{i}"]
        assert output.prompt_logprobs is not None
        values.append(tuple(next(iter(each.values())).logprob for each in output.prompt_logprobs if each))
    assert len(set(values)) == 3


@contextmanager
def counted(engine: LLMEngine) -> Iterator[list[int]]:
    """The numbers of items that each step encodes."""
    runner = engine.core.executor.worker.runner  # type: ignore[attr-defined]
    run, counts = runner.encoder.run, []

    def counting(inputs: Any, batch: Any) -> None:
        counts.append(len(inputs))
        run(inputs, batch)

    runner.encoder.run = counting
    yield counts
    runner.encoder.run = run


@pytest.mark.usefixtures("native_kernels")
def test_an_encoded_picture_is_shared_across_adapters() -> None:
    """Adapters are the decoder's: a picture's rows are the base model's, and its blocks are not."""
    plan = [
        each
        for each in random_plan("qwen2_vl", 12, random.Random(1), spread=0, aborts=0)
        if "multi_modal_data" in each.prompt
    ]
    (first, *_) = plan
    adapters = {"r0": 1, "r1": 2}
    engine = adapted_engine(make_engine, "qwen2_vl", adapters)
    with counted(engine) as counts:
        outputs = [serve(engine, [Planned(name, first.prompt, first.params)]).outputs[name] for name in adapters]
    assert sum(counts) > 0
    with counted(engine) as counts:
        serve(engine, [Planned("r1", first.prompt, first.params)])
    assert sum(counts) == 0
    assert outputs[1].num_cached_tokens == 0


def test_an_adapter_survives_the_way_to_the_core() -> None:
    request = EngineRequest("r", [1, 2], SamplingParams(), adapter_id=7)
    assert decode_request(msgspec.Raw(encode_request(request).payload), None).adapter_id == 7


def test_plain_layers_are_plain() -> None:
    """What no adapter was laid over gives what it gave."""
    merged = MergedColumnParallelLinear(8, [4, 4], bias=False)
    weight = torch.randn(8, 8)
    merged.weight_loader(merged.weight, weight)
    merged.process_weights_after_loading()
    with adapter_ids_of_rows(torch.tensor([1])):
        x = torch.randn(3, 8)
        torch.testing.assert_close(merged(x)[0], F.linear(x, weight))

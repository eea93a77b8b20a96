"""Layers that ranks share give what one rank gives, whatever they are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sensorium.attention import Attention
from sensorium.distributed import ONE_RANK, Division, TensorParallel, constructing_for
from sensorium.errors import ConfigError, WeightsError
from sensorium.model_executor.layers.decoder import GatedMLP
from sensorium.model_executor.layers.encoder import EncoderAttention, EncoderMLP
from sensorium.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sensorium.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sensorium.model_executor.model_loader import load_model
from sensorium.model_executor.model_loader.loader import finish_loading
from sensorium.worker.dummy_steps import DummySteps
from sensorium.worker.kv_cache import CacheLayout
from tests.contract.test_models import CROSS, FAMILIES
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.direct import DirectRun, engine_config, relative_error
from tests.helpers.ranks import on_ranks

RANKS = (1, 2, 4)
VOCABULARIES = (64, 61, 5)
"""The second leaves the last rank fewer rows than the others, and the third leaves it none."""


def random_weights(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def filled(layer: nn.Module, tensors: Mapping[str, torch.Tensor | list[torch.Tensor]]) -> Any:
    """A layer with values; a list has those of its parts."""
    for name, given in tensors.items():
        parameter = layer.get_parameter(name)
        if isinstance(given, torch.Tensor):
            parameter.weight_loader(parameter, given)  # type: ignore[operator]
        else:
            for part, tensor in enumerate(given):
                shard: int | str = "qkv"[part] if isinstance(layer, QKVParallelLinear) else part
                parameter.weight_loader(parameter, tensor, shard)  # type: ignore[operator]
    finish_loading(layer)
    return layer


def agree(num_ranks: int, run: Callable[[TensorParallel], torch.Tensor]) -> None:
    """Every rank's result is that of one rank."""
    with torch.inference_mode():
        alone = run(ONE_RANK)
    for result in on_ranks(num_ranks, run):
        torch.testing.assert_close(result, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_column_and_row(num_ranks: int) -> None:
    """Columns, then rows: what lies between is never whole. The bias of the second is added once."""
    x, up, up_bias, down, down_bias = random_weights((3, 8), (16, 8), (16,), (8, 16), (8,))

    def run(group: TensorParallel) -> torch.Tensor:
        first = filled(ColumnParallelLinear(8, 16), {"weight": up, "bias": up_bias})
        second = filled(RowParallelLinear(16, 8), {"weight": down, "bias": down_bias})
        inner = first(x)[0]
        assert inner.shape == (3, 16 // group.size)
        result: torch.Tensor = second(torch.relu(inner))[0]
        return result

    agree(num_ranks, run)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_what_comes_whole_or_leaves_whole(num_ranks: int) -> None:
    x, weight, bias, fused, row = random_weights((3, 8), (16, 8), (16,), (24, 8), (4, 8))

    def run(group: TensorParallel) -> torch.Tensor:
        column = filled(ColumnParallelLinear(8, 16, gather_output=True), {"weight": weight, "bias": bias})
        merged = MergedColumnParallelLinear(8, [8, 16], bias=False, gather_output=True)
        replicated = filled(ReplicatedLinear(8, 16), {"weight": weight, "bias": bias})
        divided = filled(RowParallelLinear(8, 4, bias=False, input_is_parallel=False), {"weight": row})
        parts = [column, filled(merged, {"weight": fused}), replicated, divided]
        return torch.cat([part(x)[0] for part in parts], -1)

    agree(num_ranks, run)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_bias_that_is_left_to_the_caller_is_whole(num_ranks: int) -> None:
    x, weight, bias = random_weights((3, 8), (4, 8), (4,))

    def run(group: TensorParallel) -> torch.Tensor:
        layer = RowParallelLinear(8, 4, input_is_parallel=False, skip_bias_add=True)
        output, left = filled(layer, {"weight": weight, "bias": bias})(x)
        return torch.cat([output, left[None]])

    agree(num_ranks, run)


@pytest.mark.parametrize("is_fused", [False, True], ids=["parts", "fused"])
@pytest.mark.parametrize("num_kv_heads", [8, 4, 2, 1])
@pytest.mark.parametrize("num_ranks", RANKS)
def test_each_rank_has_its_query_heads_and_their_keys_and_values(
    num_ranks: int, num_kv_heads: int, is_fused: bool
) -> None:
    """Where there are fewer key/value heads than ranks, several ranks have the same."""
    num_heads, head_size = 8, 4
    sizes = [num_heads * head_size, num_kv_heads * head_size, num_kv_heads * head_size]
    x, *parts = random_weights((5, 16), *((size, 16) for size in sizes))
    biases = [part[:, 0] for part in parts]

    def heads_of(group: TensorParallel) -> torch.Tensor:
        layer = QKVParallelLinear(16, head_size, num_heads, num_kv_heads)
        given = (
            {"weight": torch.cat(parts), "bias": torch.cat(biases)} if is_fused else {"weight": parts, "bias": biases}
        )
        query, key, value = filled(layer, given).split_heads(layer(x)[0])
        assert query.shape[1] == num_heads // group.size
        # Each query head beside the key and the value that it reads, in the order of query heads.
        repeats = layer.num_heads // layer.num_kv_heads
        read = [each.repeat_interleave(repeats, 1) for each in (key, value)]
        joined = torch.cat([query, *read], -1)
        return group.all_gather(joined.transpose(1, 2)).transpose(1, 2)

    agree(num_ranks, heads_of)


@pytest.mark.parametrize("num_rows", VOCABULARIES)
@pytest.mark.parametrize("num_ranks", RANKS)
def test_embeddings_and_heads(num_ranks: int, num_rows: int) -> None:
    """Ids beyond the table give zeros; a head gives as many logits as it has rows, padding apart."""
    table, head, bias, hidden = random_weights((num_rows, 8), (num_rows, 8), (num_rows,), (4, 8))
    ids = torch.tensor([0, num_rows - 1, num_rows, -1, 10_000, 2])

    def run(group: TensorParallel) -> torch.Tensor:
        embedding = filled(VocabParallelEmbedding(num_rows, 8), {"weight": table})
        own = filled(ParallelLMHead(num_rows, 8, bias=True), {"weight": head, "bias": bias})
        tied = ParallelLMHead(num_rows, 8).tie_weights(embedding)
        finish_loading(tied)
        logits = torch.cat([own.project(hidden), tied.project(hidden), embedding.project(hidden)], -1)
        assert logits.shape == (4, 3 * num_rows)
        return torch.cat([embedding(ids).flatten(), logits.flatten()])

    agree(num_ranks, run)


def test_rows_that_only_the_model_has_are_zero_on_every_rank() -> None:
    (table,) = random_weights((5, 8))

    def run(group: TensorParallel) -> torch.Tensor:
        layer = filled(VocabParallelEmbedding(12, 8, org_num_embeddings=5), {"weight": table})
        embedded: torch.Tensor = layer(torch.arange(12))
        return embedded

    agree(4, run)


@pytest.mark.parametrize("num_ranks", RANKS)
def test_a_gated_mlp(num_ranks: int) -> None:
    x, gate, up, down = random_weights((3, 8), (16, 8), (16, 8), (8, 16))

    def run(group: TensorParallel) -> torch.Tensor:
        mlp = GatedMLP(8, 16, "silu")
        filled(mlp.gate_up_proj, {"weight": [gate, up]})
        filled(mlp.down_proj, {"weight": down})
        result: torch.Tensor = mlp(x)
        return result

    agree(num_ranks, run)


def test_towers_are_whole_on_every_rank() -> None:
    def run(group: TensorParallel) -> tuple[int, ...]:
        return tuple(EncoderMLP(8, 16, "gelu").fc1.weight.shape)

    assert on_ranks(2, run) == [(16, 8)] * 2


@pytest.mark.parametrize("num_ranks", RANKS)
def test_towers_are_divided_where_that_is_asked_for(num_ranks: int) -> None:
    """By heads and by inner channels. What norms see whole, or ranks can't share evenly, each has whole."""
    x, up, down, *qkv, out = random_weights((5, 12), (16, 12), (12, 16), (12, 12), (12, 12), (12, 12), (12, 12))

    def run(group: TensorParallel) -> torch.Tensor:
        with constructing_for(group, Division(towers=True)):
            mlp, attention = EncoderMLP(12, 16, "gelu", bias=False), EncoderAttention(12, 4, bias=False)
            odd = EncoderAttention(12, 3, bias=False)
            normed = EncoderAttention(12, 4, bias=False, make_qk_norm=lambda: nn.LayerNorm(12))
        assert mlp.fc1.output_size == 16 // group.size
        assert attention.qkv_proj.num_heads == attention.attn.spec.num_heads == 4 // group.size
        assert (odd.qkv_proj.num_heads, normed.qkv_proj.num_heads) == (3, 4)
        for each in (attention, odd, normed):
            filled(each.qkv_proj, {"weight": qkv})
            filled(each.out_proj, {"weight": out})
        filled(mlp.fc1, {"weight": up})
        filled(mlp.fc2, {"weight": down})
        lengths = torch.tensor([0, 2, 5], dtype=torch.int32)
        attended = torch.stack([each(x, cu_seqlens=lengths) for each in (attention, odd, normed)]).sum(0)
        result: torch.Tensor = mlp(attended)
        return result

    agree(num_ranks, run)


def test_layers_keep_the_group_that_they_were_made_for() -> None:
    def run(group: TensorParallel) -> tuple[int, int]:
        mine = ColumnParallelLinear(8, 16)
        with constructing_for(ONE_RANK):
            whole = ColumnParallelLinear(8, 16)
        return mine.output_size, whole.output_size

    assert on_ranks(4, run) == [(4, 16)] * 4
    assert ColumnParallelLinear(8, 16).output_size == 16


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: ColumnParallelLinear(8, 6), "got 4 for 6 output channels"),
        (lambda: RowParallelLinear(6, 8), "got 4 for 6 input channels"),
        (lambda: QKVParallelLinear(8, 4, 6), "got 4 for 6 attention heads"),
        (lambda: QKVParallelLinear(8, 4, 12, 6), "got 4 for 6 key/value heads"),
        (lambda: QKVParallelLinear(8, 4, 12, 3), "got 4 for 3 key/value heads"),
    ],
)
def test_what_ranks_can_not_share_is_refused(make: Callable[[], nn.Module], told: str) -> None:
    with pytest.raises(ConfigError, match=f"tensor_parallel_size: {told}"):
        on_ranks(4, lambda group: make())


def test_a_tensor_of_the_wrong_size_is_refused_on_every_rank() -> None:
    for size in (15, 12, 32):
        with pytest.raises(WeightsError):
            on_ranks(2, lambda group, size=size: filled(ColumnParallelLinear(8, 16), {"weight": torch.ones(size, 8)}))  # type: ignore[misc]
        with pytest.raises(WeightsError):
            on_ranks(2, lambda group, size=size: filled(VocabParallelEmbedding(16, 8), {"weight": torch.ones(size, 8)}))  # type: ignore[misc]


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in CROSS])
def test_logits_of_every_family(family: str) -> None:
    """Loaded share by share from one checkpoint.

    Integers round each share's inputs on their own: ranks may be as far from the float logits as one rank is.
    """
    token_ids = list(range(20, 50))

    def run(group: TensorParallel, quantization: str | None = None) -> torch.Tensor:
        config = engine_config(make_checkpoint(family), quantization=quantization, tensor_parallel_size=2)
        model: Any = load_model(config.as_rank_of(group))
        attention = next(module for module in model.modules() if isinstance(module, Attention))
        assert attention.num_kv_heads == 2 // group.size
        text = model if hasattr(model, "model") else model.language_model
        direct = DirectRun(text, config)
        positions = torch.arange(len(token_ids)).expand(3, -1) if config.model_config.uses_mrope else None
        return direct.step(token_ids, positions)

    with torch.inference_mode():
        exact, rounded = run(ONE_RANK), run(ONE_RANK, "int8")
    for logits in on_ranks(2, run):
        assert relative_error(logits, exact) < 1e-5
    for logits in on_ranks(2, lambda group: run(group, "int8")):
        assert relative_error(logits, exact) < 1.5 * relative_error(rounded, exact) < 0.15


@pytest.mark.parametrize("num_ranks", RANKS[1:])
@pytest.mark.parametrize("family", CROSS)
def test_logits_of_decoders_that_attend_to_an_encoder(family: str, num_ranks: int) -> None:
    """Four ranks have two key/value heads of Llama 3.2 Vision among them."""
    config = engine_config(make_checkpoint(family), tensor_parallel_size=num_ranks)
    token_ids, rows = np.arange(20, 50), torch.randn(50, 64, generator=torch.Generator().manual_seed(1))

    def run(group: TensorParallel) -> torch.Tensor:
        model: Any = load_model(config.as_rank_of(group))
        steps = DummySteps(config, CacheLayout.of(model, config), torch.device("cpu"))
        step = steps.step([(token_ids, 0, len(token_ids))], steps.caches(64), encoder_outputs=rows)
        hidden = model(step.input_ids, step.positions, step.kv_caches, step.attn_metadata, encoder_outputs=rows)
        logits: torch.Tensor = model.compute_logits(hidden, None)
        return logits

    with torch.inference_mode():
        alone = run(ONE_RANK)
    for logits in on_ranks(num_ranks, run):
        assert relative_error(logits, alone) < 1e-5

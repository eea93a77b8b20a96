"""What layers declare becomes groups with memory of their own, of which windows and states need little."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from sensorium import LLMEngine
from sensorium.attention import Attention
from sensorium.cache_spec import (
    CacheKind,
    CacheSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    SharedCacheSpec,
    SlidingWindowSpec,
    StateSpec,
    StateTensor,
)
from sensorium.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from sensorium.errors import ConfigError, ModelError
from sensorium.worker.kv_cache import CacheLayout
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.serving import make_engine

CPU = torch.device("cpu")
FULL = FullAttentionSpec(2, 8, 8)
STATE = StateSpec((StateTensor((3, 5)), StateTensor((4,), "float32")))


class Layer(nn.Module):
    """A layer with any declaration."""

    group_index = 0

    def __init__(self, spec: CacheSpec | None) -> None:
        super().__init__()
        self.spec = spec

    def cache_spec(self) -> CacheSpec | None:
        return self.spec


def model(*specs: CacheSpec | None) -> nn.Module:
    return nn.ModuleList(Layer(spec) for spec in specs)


def config(*, max_num_seqs: int = 4, max_num_batched_tokens: int = 64, **settings: Any) -> EngineConfig:
    model_config = ModelConfig("m", "m", None, "bfloat16", max_model_len=1024)  # type: ignore[arg-type]
    scheduler = SchedulerConfig(max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens)
    return EngineConfig(model_config, CacheConfig(**settings), scheduler)


def test_layers_that_keep_alike_form_a_group_whatever_their_sizes() -> None:
    wide, window = FullAttentionSpec(4, 16, 16), SlidingWindowSpec(1, 8, 8, 32)
    layers = model(window, FULL, None, STATE, wide, SlidingWindowSpec(1, 8, 8, 64), window)
    layout = CacheLayout.of(layers, config())
    groups = layout.groups([10, 5, 3, 2])
    assert [(group.kind, group.reach, group.layers) for group in groups] == [
        (CacheKind.FULL, None, ("1", "4")),
        (CacheKind.WINDOW, 32, ("0", "6")),
        (CacheKind.WINDOW, 64, ("5",)),
        (CacheKind.STATE, None, ("3",)),
    ]
    assert [layer.group_index for layer in layers] == [1, 0, 0, 3, 0, 2, 1]  # type: ignore[attr-defined]
    caches = layout.allocate(groups, CPU)
    sizes = [cache.nbytes if isinstance(cache, torch.Tensor) else sum(c.nbytes for c in cache) for cache in caches]
    assert sum(sizes) == sum(group.num_bytes for group in groups), "the report says what is allocated"
    assert [cache.shape for cache in caches if isinstance(cache, torch.Tensor)] == [
        (2, 5, 16, 1, 8),
        (2, 10, 16, 2, 8),
        (2, 10, 16, 4, 16),
        (2, 3, 16, 1, 8),
        (2, 5, 16, 1, 8),
    ]
    assert [(c.shape, c.dtype) for c in caches[2]] == [((4, 3, 5), torch.bfloat16), ((4, 4), torch.float32)]


def test_a_layer_may_share_the_cache_of_another() -> None:
    layers = model(FULL, SharedCacheSpec("0"), SharedCacheSpec("1"))
    layout = CacheLayout.of(layers, config())
    [group] = layout.groups([8])
    caches = layout.allocate([group], CPU)
    assert group.layers == ("0",)
    assert caches[0] is caches[1] is caches[2]
    assert group.num_bytes == caches[0].nbytes  # type: ignore[union-attr]


def test_keys_and_values_of_different_sizes_stand_side_by_side() -> None:
    layout = CacheLayout.of(model(FullAttentionSpec(2, 24, 16), FullAttentionSpec(1, 40, 0)), config())
    caches = layout.allocate(layout.groups([6]), CPU)
    assert [cache.shape for cache in caches] == [(6, 16, 2, 40), (6, 16, 1, 40)]  # type: ignore[union-attr]


def test_the_sizes_follow_the_layers_of_attention() -> None:
    layers = nn.ModuleList([Attention(4, 8, 1.0, 2), Attention(4, 8, 1.0, 2, per_layer_sliding_window=7)])
    assert [layer.cache_spec() for layer in layers] == [FULL, SlidingWindowSpec(2, 8, 8, 7)]


def test_num_blocks_is_what_groups_that_keep_everything_get() -> None:
    window = SlidingWindowSpec(2, 8, 8, 32)
    layout = CacheLayout.of(model(FULL, window, STATE), config())
    full, windowed, state = layout.plan(config(num_blocks=500), 0)
    # 4 requests, each with 31 positions before its newest anywhere in blocks of 16, beside 64 tokens of a step; twice.
    assert (full.num_blocks, windowed.num_blocks, state.num_blocks) == (500, 2 * (4 * 3 + 4), 3 * 4)
    full, windowed, state = layout.plan(config(num_blocks=5, enable_prefix_caching=False), 0)
    assert (full.num_blocks, windowed.num_blocks, state.num_blocks) == (5, 5, 2 * 4)


def test_as_many_blocks_as_fit_into_the_budget() -> None:
    window = SlidingWindowSpec(2, 8, 8, 32)
    block_bytes = 16 * 2 * 16 * 2
    layout = CacheLayout.of(model(FULL, window, window), config())
    for budget in (3 * 2 * block_bytes, 100 * block_bytes, 101 * block_bytes, 200 * block_bytes):
        groups = layout.plan(config(), budget)
        assert budget - 3 * block_bytes < sum(group.num_bytes for group in groups) <= budget
    full = layout.plan(config(kv_cache_bytes=1 << 30), 0)[0]
    assert full.num_blocks == 2 * 4 * 64, "more is of no use"
    with pytest.raises(
        ConfigError, match=f"got 100 bytes, expected at least {3 * block_bytes} for one block.*memory_fr"
    ):
        layout.plan(config(), 100)


def test_states_take_their_memory_first() -> None:
    layout = CacheLayout.of(model(FULL, STATE), config())
    with pytest.raises(ConfigError, match=r"for one block beside 644 for 12 states.*or lower max_num_seqs"):
        layout.plan(config(), 1600)
    full, state = layout.plan(config(), 1700)
    assert (full.num_blocks, state.num_blocks, state.num_bytes) == (1, 12, 14 * (30 + 16))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        ([None], "got no layer with a cache, expected at least one sensorium.attention.Attention"),
        ([FULL, SharedCacheSpec("7")], "layer 1: got '7' as the layer whose cache it shares, expected one of 0"),
        ([SharedCacheSpec("1"), SharedCacheSpec("0")], "expected one of those with a cache"),
        (["window"], "got a str, expected a spec of sensorium.cache_spec"),
        (
            [CrossAttentionSpec(2, 8, 8)],
            "got a layer of cross-attention, expected none in a class without Sup",
        ),
    ],
)
def test_what_can_not_be_kept_is_an_error_of_loading(specs: list[Any], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        CacheLayout.of(model(*specs), config())


def reported(engine: LLMEngine) -> list[str]:
    return [line for line in engine.report.lines() if line.startswith("KV cache")]


def test_windows_make_the_report_smaller() -> None:
    """Gemma 3, of whose layers most see a window: the same tokens in less memory, or more tokens in the same."""
    settings: dict[str, Any] = {"max_num_seqs": 4, "max_num_batched_tokens": 64, "block_size": 8}
    engine = make_engine(make_checkpoint("gemma3"), num_blocks=512, **settings)
    full, window = engine.report.cache_groups
    assert (full.num_blocks, len(full.layers), window.reach, len(window.layers)) == (512, 1, 24, 3)
    assert window.num_bytes < full.num_bytes / 2, "three layers of windows take less than one that keeps everything"
    assert engine.report.memory_bytes["KV cache"] == full.num_bytes + window.num_bytes
    assert reported(engine) == [
        "KV cache: full attention in 1 layer: 512 blocks of 8 tokens = 4,096 tokens, 1.5 MiB",
        "KV cache: sliding window of 24 in 3 layers: 48 blocks of 8 tokens = 384 tokens, 0.4 MiB",
    ]
    budget = engine.report.memory_bytes["KV cache"]
    more = make_engine(make_checkpoint("gemma3"), num_blocks=None, kv_cache_bytes=budget, **settings)
    assert more.report.num_blocks == 512, "where every layer kept everything it would be 164"

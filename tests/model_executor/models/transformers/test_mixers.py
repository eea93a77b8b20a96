"""Modules that keep something of a sequence by themselves are found by what they change, whatever they are called."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch

from sensorium.cache_spec import FullAttentionSpec, StateSpec
from sensorium.model_executor.models.transformers import interface
from sensorium.model_executor.models.transformers.by_sequence import Mixer
from sensorium.model_executor.models.transformers.discovery import discover
from sensorium.model_executor.models.transformers.mixers import FoundMixer, find_mixers
from sensorium.model_executor.models.transformers.model import AttentionSwitch
from sensorium.model_executor.models.transformers.position_tables import find_tables
from sensorium.model_executor.models.transformers.refusal import CannotRunError
from tests.helpers.tiny_architectures import tiny_model

IDS = [70 + 3 * i for i in range(6)]
CPU = torch.device("cpu")


@contextmanager
def reached(model: Any) -> Iterator[AttentionSwitch]:
    """Within it, the model's attention calls the engine's function."""
    interface.register()
    switch = AttentionSwitch(model)
    switch.set(interface.NAME)
    with torch.inference_mode():
        yield switch


def mixers_of(model_type: str, *, every_attention: bool = False) -> list[FoundMixer]:
    model = tiny_model(model_type)
    with reached(model) as switch:
        return find_mixers(model, IDS, CPU, switch.eager, every_attention=every_attention)


@pytest.mark.parametrize(
    ("model_type", "names"),
    [
        ("llama", []),
        ("mamba2", ["Mamba2Mixer"] * 4),
        ("lfm2_moe", ["Lfm2MoeShortConv"] * 2),
        ("gptj", ["GPTJAttention"] * 4),
    ],
)
def test_attention_of_the_interface_is_none_of_them(model_type: str, names: list[str]) -> None:
    assert [type(each.module).__name__ for each in mixers_of(model_type)] == names


def test_what_they_keep_is_declared_to_the_engine() -> None:
    """A state of fixed size, or keys and values of each token."""
    state = Mixer(mixers_of("mamba2")[0]).cache_spec()
    assert isinstance(state, StateSpec)
    assert len(state.tensors) == 2  # of the convolution and of the recurrence
    assert Mixer(mixers_of("gptj")[0]).cache_spec() == FullAttentionSpec(4, 16, 16)


def test_masks_and_biases_are_read_as_the_model_makes_them() -> None:
    """MPT's masks are true where a key is hidden; the bias of Bloom's ALiBi is one of keys."""
    mpt, bloom = mixers_of("mpt")[0], mixers_of("bloom")[0]
    assert mpt.mask_values is not None
    assert [bool(each) for each in mpt.mask_values] == [False, True]
    assert bloom.keys_only == {"alibi"}


def test_attention_that_keeps_more_than_keys_and_values_is_taken_as_a_whole() -> None:
    found = mixers_of("deepseek_v32", every_attention=True)
    assert {type(each.module).__name__ for each in found} == {"DeepseekV32Attention"}
    assert {path for path, _ in found[0].tensors} == {("keys",), ("values",), ("indexer_keys",)}


def test_what_grows_beside_attention_is_refused() -> None:
    with pytest.raises(CannotRunError, match="grows with each token"):
        mixers_of("deepseek_v4")


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_model("mamba2")
    ids = torch.tensor([IDS])
    with reached(model) as switch:
        expected = model(input_ids=ids, use_cache=False).logits
        before = [module.forward for module in model.modules()]
        found = discover(model, IDS, 99, CPU, switch.eager)
        assert torch.equal(model(input_ids=ids, use_cache=False).logits, expected)
        found.remove()
        assert [module.forward for module in model.modules()] == before


def test_a_table_has_what_a_module_makes_of_each_position() -> None:
    """Marian counts rows by itself, from the first one on."""
    model = tiny_model("marian", is_encoder_decoder=False)
    ids, positions = torch.tensor([IDS]), torch.arange(40, 46)
    with reached(model):
        tables = find_tables(model, model.get_decoder(), IDS, 64, CPU)
        assert len(tables) == 1
        embed = model.get_decoder().embed_positions
        assert torch.equal(embed(ids.shape), tables_rows(tables, embed, ids, torch.arange(6)))
        assert torch.equal(embed((1, 46))[40:], tables_rows(tables, embed, ids, positions))


def tables_rows(tables: Any, embed: Any, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    with tables.at(positions):
        rows: torch.Tensor = embed(ids.shape)
    return rows


def test_positions_beyond_what_a_model_counts_are_refused() -> None:
    model = tiny_model("bart")
    with reached(model), pytest.raises(CannotRunError, match="counts positions by itself"):
        find_tables(model, model.get_decoder(), IDS, 4096, CPU)


def test_nothing_is_found_where_nothing_is_kept() -> None:
    model = tiny_model("openai-gpt")
    with torch.inference_mode():
        assert find_mixers(model, IDS, CPU, nullcontext, every_attention=True) == []

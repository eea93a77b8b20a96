"""What a position sees is read from transformers' mask functions, and anything but the known rules is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import masking_utils

from sensorium.model_executor.models.transformers.mask_rules import MaskRule, read_rule
from sensorium.model_executor.models.transformers.refusal import CannotRunError

NO_PADDING = torch.zeros(1, dtype=torch.long)


def window(size: int) -> Any:
    return masking_utils.sliding_window_causal_mask_function(size)


def chunks(size: int) -> Any:
    return masking_utils.chunked_causal_mask_function(size, NO_PADDING)


@pytest.mark.parametrize("max_position", [15, 100, 511, 40_000])
def test_causal_masks_show_everything(max_position: int) -> None:
    assert read_rule(masking_utils.causal_mask_function, max_position) == MaskRule()


@pytest.mark.parametrize("size", [1, 2, 6, 128, 4096])
def test_windows_are_read(size: int) -> None:
    assert read_rule(window(size), 40_000) == MaskRule(window=size)


@pytest.mark.parametrize("size", [2, 8, 100, 8192])
def test_chunks_are_read(size: int) -> None:
    assert read_rule(chunks(size), 40_000) == MaskRule(chunk=size)


@pytest.mark.parametrize("rule", [window(100), window(512), chunks(512)])
def test_what_is_larger_than_the_context_hides_nothing(rule: Any) -> None:
    assert read_rule(rule, 99) == MaskRule()


def test_the_first_key_of_each_rule() -> None:
    assert [MaskRule().first_key(q) for q in (0, 5, 9)] == [0, 0, 0]
    assert [MaskRule(window=3).first_key(q) for q in (0, 2, 3, 9)] == [0, 0, 1, 7]
    assert [MaskRule(chunk=4).first_key(q) for q in (0, 3, 4, 9)] == [0, 0, 4, 8]


def sees_ahead(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return key <= query + 1


def every_other(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & ((query - key) % 2 == 0)


def window_that_grows(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & (key >= query // 2)


def with_sink_token(batch: Any, head: Any, query: Any, key: Any) -> Any:
    return (key <= query) & ((key > query - 4) | (key == 0))


@pytest.mark.parametrize(
    "rule",
    [masking_utils.bidirectional_mask_function, sees_ahead, every_other, window_that_grows, with_sink_token],
)
def test_other_rules_are_refused(rule: Any) -> None:
    with pytest.raises(CannotRunError, match="mask"):
        read_rule(rule, 300)


def test_a_rule_that_looks_into_the_prompt_is_refused() -> None:
    blocks = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, -1]]))
    with pytest.raises(CannotRunError, match="depends on the prompt"):
        read_rule(masking_utils.or_masks(masking_utils.causal_mask_function, blocks), 300)

"""Batching of mapped keyword arguments, and the map from their rows to rows of a batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from sensorium.multimodal import (
    IndexMap,
    MultiModalInputs,
    MultiModalKwargs,
    MultiModalPlaceholderMap,
    PlaceholderRange,
)


def assert_nested_equal(actual: Any, expected: Any) -> None:
    assert type(actual) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert actual.shape == expected.shape
        assert torch.equal(actual, expected)
        return
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert_nested_equal(a, b)


def numbered(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(sum(shape)))


def batch(*values: Any) -> Any:
    return MultiModalKwargs.batch([MultiModalKwargs({"x": value}) for value in values])["x"]


def test_a_single_entry_gets_a_batch_axis() -> None:
    a = numbered(1, 2)
    assert_nested_equal(batch(a), a[None])


def test_equal_tensors_are_stacked() -> None:
    a = numbered(1, 1, 2)
    assert_nested_equal(batch(a, a, a), torch.stack([a, a, a]))
    assert batch(a, a, a).shape == (3, 1, 1, 2)


def test_tensors_of_different_shapes_stay_a_list() -> None:
    values = [numbered(1, 2, 2), numbered(1, 3, 2), numbered(1, 4, 2)]
    assert_nested_equal(batch(*values), values)


def test_lists_of_one_equal_tensor_are_stacked_twice() -> None:
    a, b, c = numbered(2, 3), numbered(2, 3), numbered(2, 3)
    assert_nested_equal(batch([a], [b], [c]), torch.stack([a[None], b[None], c[None]]))
    assert batch([a], [b], [c]).shape == (3, 1, 2, 3)


def test_lists_of_different_lengths_are_stacked_inside_only() -> None:
    a, b, c = numbered(1, 2, 3), numbered(1, 2, 3), numbered(1, 2, 3)
    assert_nested_equal(batch([a, b], [c]), [torch.stack([a, b]), c[None]])
    assert [tuple(member.shape) for member in batch([a, b], [c])] == [(2, 1, 2, 3), (1, 1, 2, 3)]


def test_equal_lists_of_equal_tensors_are_one_tensor() -> None:
    a, b, c, d = (numbered(1, 2, 3) for _ in range(4))
    assert_nested_equal(batch([a, b], [c, d]), torch.stack([torch.stack([a, b]), torch.stack([c, d])]))
    assert batch([a, b], [c, d]).shape == (2, 2, 1, 2, 3)


def test_lists_of_different_tensors_stay_lists() -> None:
    a, b, c = numbered(1, 2, 3), numbered(1, 3, 3), numbered(1, 4, 3)
    assert_nested_equal(batch([a, b], [c]), [[a, b], c[None]])
    assert_nested_equal(batch([a], [b, c]), [a[None], [b, c]])


def test_keys_are_united_and_values_kept_in_order_of_the_entries_that_have_them() -> None:
    a, b, c = numbered(2), numbered(2) + 1, numbered(3)
    batched = MultiModalKwargs.batch([{"x": a}, {"y": c}, {"x": b, "y": c}])
    assert list(batched) == ["x", "y"]
    assert_nested_equal(batched["x"], torch.stack([a, b]))
    assert_nested_equal(batched["y"], torch.stack([c, c]))


def test_arrays_and_numbers_become_tensors() -> None:
    assert_nested_equal(batch(np.ones((2, 3), np.float32)), torch.ones(1, 2, 3))
    assert_nested_equal(batch(3, 4), torch.tensor([3, 4]))
    assert_nested_equal(batch(0.5), torch.tensor([0.5]))
    assert_nested_equal(batch(np.int64(3)), torch.tensor([3]))


@pytest.mark.parametrize("view", [lambda a: a[::-1], np.asfortranarray, lambda a: a.astype(">f4")])
def test_arrays_of_any_layout_become_tensors_without_a_warning(view: Any) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    assert_nested_equal(batch(view(array)), torch.from_numpy(view(array).astype("f4").copy(order="C"))[None])
    read_only = array.copy()
    read_only.flags.writeable = False
    assert_nested_equal(batch(read_only), torch.from_numpy(array)[None])


def test_no_entries_and_empty_lists() -> None:
    assert MultiModalKwargs.batch([]) == {}
    assert batch([]) == [[]]


@pytest.mark.parametrize("leaf", [None, "text", object(), np.array(["a"]), np.array([None])])
def test_other_leaves_are_a_type_error(leaf: Any) -> None:
    with pytest.raises(TypeError, match="expected a tensor"):
        batch([torch.ones(1), leaf])


def test_as_kwargs_moves_every_leaf() -> None:
    moved: Any = MultiModalKwargs.as_kwargs({"x": [torch.ones(2), [torch.ones(3)]], "y": torch.ones(1)}, device="meta")
    assert moved["x"][0].device.type == "meta"
    assert moved["x"][1][0].device.type == "meta"
    assert moved["y"].device.type == "meta"


def test_as_kwargs_needs_tensors() -> None:
    with pytest.raises(AttributeError):
        MultiModalKwargs.as_kwargs({"x": "text"}, device="cpu")


def test_the_older_name() -> None:
    assert MultiModalInputs is MultiModalKwargs


# Placeholder maps: the prompt is AAAA, one text token, BBBB, and text behind it.


@dataclass
class Prompt:
    multi_modal_data: Any = field(default_factory=lambda: {"image": ["A", "B"]})
    multi_modal_placeholders: Any = field(
        default_factory=lambda: {"image": [PlaceholderRange(offset=0, length=4), PlaceholderRange(offset=5, length=4)]}
    )


@pytest.mark.parametrize(
    ("window", "items", "src", "dest"),
    [
        (range(30), ["A", "B"], [range(4), range(4, 8)], [range(4), range(5, 9)]),
        (range(2, 7), ["A", "B"], [range(2, 4), range(4, 6)], [range(2), range(3, 5)]),
        (range(5, 30), ["B"], [range(4)], [range(4)]),
        (range(6, 8), ["B"], [range(1, 3)], [range(2)]),
        (range(9, 30), None, [], []),
        (range(4, 5), None, [], []),
    ],
)
def test_a_window_gets_the_items_it_meets(window: range, items: Any, src: list[range], dest: list[range]) -> None:
    data, maps = MultiModalPlaceholderMap.from_seq_group(Prompt(), window)
    assert data.get("image") == items
    image = maps["image"]
    assert image.src_ranges == src
    assert image.dest_ranges == dest
    assert image.src_len == 4 * len(items or [])
    assert image.dest_len == len(window)
    assert image.index_map() == IndexMap([i for r in src for i in r], [i for r in dest for i in r])


def test_without_placeholders_all_data_come_and_no_map() -> None:
    prompt = Prompt(multi_modal_placeholders=None)
    assert MultiModalPlaceholderMap.from_seq_group(prompt, range(2, 3)) == ({"image": ["A", "B"]}, {})
    assert MultiModalPlaceholderMap.from_seq_group(Prompt(multi_modal_data=None), range(3)) == ({}, {})


def test_a_single_item_need_not_be_a_list() -> None:
    prompt = Prompt({"image": "A"}, {"image": [PlaceholderRange(offset=1, length=2)]})
    data, maps = MultiModalPlaceholderMap.from_seq_group(prompt, range(3))
    assert data == {"image": ["A"]}
    assert maps["image"].dest_ranges == [range(1, 3)]


def test_items_and_ranges_must_have_the_same_length() -> None:
    prompt = Prompt(multi_modal_data={"image": ["A", "B", "C"]})
    with pytest.raises(ValueError, match="same length"):
        MultiModalPlaceholderMap.from_seq_group(prompt, range(9))


def test_maps_of_several_prompts_are_appended() -> None:
    _, first = MultiModalPlaceholderMap.from_seq_group(Prompt(), range(2, 7))
    _, second = MultiModalPlaceholderMap.from_seq_group(Prompt(), range(4, 10))
    joined = first["image"]
    joined.extend(second["image"])
    assert joined.src_len == 12
    assert joined.dest_len == 11
    assert joined.index_map() == IndexMap([2, 3, 4, 5, 8, 9, 10, 11], [0, 1, 3, 4, 6, 7, 8, 9])

"""Equal media have equal identities, and nothing that a mapper could tell apart has."""

from __future__ import annotations

import functools
import io
from collections import UserDict, namedtuple
from itertools import combinations
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sensorium.multimodal.hashing import (
    UncacheableError,
    callable_identity,
    content_digest,
    derive,
    group_identity,
    identify,
    identify_encoded,
    identify_uuid,
    key_of,
)

Pair = namedtuple("Pair", "left right")  # noqa: PYI024  an untyped one is meant


def image_of(mode: str, size: tuple[int, int], fill: int = 7) -> Image.Image:
    channels = len(Image.new(mode, (1, 1)).getbands())
    return Image.frombytes(mode, size, bytes([fill]) * (size[0] * size[1] * channels))


def test_same_pixels_of_another_size_or_mode_differ() -> None:
    # Published as CVE-2025-46722: a digest over pixel bytes alone gave one user another's cached image.
    images = [
        image_of("RGB", (4, 6)),
        image_of("RGB", (6, 4)),
        image_of("RGB", (12, 2)),
        image_of("L", (12, 6)),
    ]
    images += [image_of("P", (12, 6)), image_of("HSV", (4, 6))]
    assert len({image.tobytes() for image in images}) == 1
    assert len({content_digest(image) for image in images}) == len(images)


def test_palette_transparency_and_orientation_count() -> None:
    plain = image_of("P", (4, 4), 1)
    plain.putpalette([0, 0, 0, 255, 0, 0])
    other_palette = plain.copy()
    other_palette.putpalette([0, 0, 0, 0, 255, 0])
    transparent = plain.copy()
    transparent.info["transparency"] = 1
    rotated = image_of("RGB", (4, 4))
    rotated.getexif()[0x0112] = 6
    digests = {content_digest(i) for i in (plain, other_palette, transparent, rotated, image_of("RGB", (4, 4)))}
    assert len(digests) == 5


def test_an_image_is_the_same_from_memory_and_from_a_file_under_any_name(tmp_path: Any) -> None:
    image = image_of("RGB", (5, 3))
    for name in ("a.png", "b.png"):
        image.save(tmp_path / name)
        with Image.open(tmp_path / name) as loaded:
            assert content_digest(loaded) == content_digest(image)


def test_an_animation_has_no_digest() -> None:
    buffer = io.BytesIO()
    frames = [image_of("L", (4, 4), fill) for fill in (0, 255)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    with pytest.raises(UncacheableError):
        content_digest(Image.open(buffer))


def test_arrays_and_tensors_count_type_and_shape() -> None:
    base = np.arange(12, dtype=np.int32)
    variants: list[Any] = [
        base,
        base.reshape(3, 4),
        base.reshape(4, 3),
        base.view(np.uint32),
        base.view(np.float32),
    ]
    variants += [
        base.astype(">i4"),
        torch.from_numpy(base),
        torch.from_numpy(base).reshape(3, 4),
        base.tobytes(),
    ]
    variants += [base.tolist(), np.zeros((0, 3)), np.zeros((3, 0)), torch.zeros(0, 3)]
    assert len({content_digest(v) for v in variants}) == len(variants)


def test_layout_in_memory_does_not_count() -> None:
    array = np.arange(24, dtype=np.float32).reshape(4, 6)
    assert content_digest(array) == content_digest(np.asfortranarray(array))
    assert content_digest(array[:, ::2]) == content_digest(array[:, ::2].copy())
    tensor = torch.from_numpy(array)
    assert content_digest(tensor.t()) == content_digest(tensor.t().contiguous())
    assert content_digest(tensor.clone().requires_grad_()) == content_digest(tensor)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_tensor_types_without_a_numpy_twin_are_digested(dtype: torch.dtype) -> None:
    zeros, ones = torch.zeros(3).to(dtype), torch.ones(3).to(dtype)
    assert content_digest(zeros) != content_digest(ones)
    assert content_digest(ones) == content_digest(torch.ones(3).to(dtype))
    assert content_digest(torch.tensor(1.0).to(dtype)) != content_digest(torch.tensor([1.0]).to(dtype))


def test_no_two_values_write_the_same_bytes() -> None:
    values: list[Any] = [
        None,
        False,
        True,
        0,
        1,
        -1,
        1.0,
        1 + 0j,
        "",
        "1",
        b"1",
        [],
        (),
        {},
        [None],
        [[]],
        ["ab"],
    ]
    values += [["a", "b"], ("a", "b"), ("ab",), {"a": "b"}, {"ab": ""}, Pair("a", "b"), UserDict({"a": "b"})]
    values += [
        10**200,
        [1, [2, 3]],
        [[1, 2], 3],
        [1, 2, 3],
        0.0,
        -0.0,
        [0.5] * 65,
        [0.5] * 66,
        np.float64(1.0),
    ]
    values += [np.array([1, "x"], dtype=object), np.array([[1], ["x"]], dtype=object), {1: "a"}, {"1": "a"}]
    digests = [content_digest(value) for value in values]
    for (left, a), (right, b) in combinations(zip(digests, values, strict=True), 2):
        assert left != right, (a, b)
    assert all(len(digest) * 8 == 256 for digest in digests)


def test_order_of_keys_does_not_count_and_order_of_items_does() -> None:
    assert content_digest({"a": 1, "b": [2]}) == content_digest(MappingProxyType({"b": [2], "a": 1}))
    assert content_digest([1, 2]) != content_digest([2, 1])


def test_audio_counts_its_rate() -> None:
    samples = np.zeros(100, dtype=np.float32)
    assert content_digest((samples, 16000)) != content_digest((samples, 8000))


class Opaque:
    def __reduce__(self) -> Any:
        raise AssertionError("media must never be pickled")


def cyclic() -> list[Any]:
    value: list[Any] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "value",
    [
        Opaque(),
        [Opaque()],
        {Opaque(): 1},
        {1, 2},
        cyclic(),
        torch.eye(3).to_sparse(),
        torch.empty(2, device="meta"),
        np.ma.masked_array([1, 2], mask=[False, True]),
        np.zeros(2, dtype=[("a", "O")]),
    ],
    ids=lambda value: type(value).__name__,
)
def test_unknown_content_gets_an_identity_of_its_own(value: object) -> None:
    first, second = identify(value), identify(value)
    assert not first.is_cacheable
    assert first.digest != second.digest
    assert not derive(first, "x").is_cacheable
    assert not group_identity([identify(1), first]).is_cacheable


def test_names_given_by_users_never_meet_content() -> None:
    content = identify("cat")
    kinds = [
        content,
        identify_uuid("cat"),
        identify_encoded(content_digest("cat")),
        identify_uuid(key_of(content)),
    ]
    assert len({kind.digest for kind in kinds}) == 4
    assert identify_uuid("cat") == identify_uuid("cat")


def test_derivation_depends_on_everything_given() -> None:
    base = identify("x")
    derived = [
        derive(base),
        derive(base, 1),
        derive(base, 1, 2),
        derive(base, (1, 2)),
        derive(base, 2, 1),
        base,
    ]
    derived += [group_identity([base]), group_identity([base, base]), derive(identify("y"), 1)]
    assert len({identity.digest for identity in derived}) == len(derived)
    assert derive(base, {"a": 1}) == derive(base, {"a": 1})
    assert not derive(base, Opaque()).is_cacheable
    assert len(key_of(base)) == 64


def mapper(ctx: object, data: object, *, size: int = 1) -> None: ...


def test_partials_are_told_apart_by_what_they_bind() -> None:
    a, b = functools.partial(mapper, size=1), functools.partial(mapper, size=2)
    names = [
        callable_identity(f) for f in (mapper, a, b, functools.partial(a, 3), test_layout_in_memory_does_not_count)
    ]
    assert len(set(map(content_digest, names))) == 5
    assert callable_identity(a) == callable_identity(functools.partial(mapper, size=1))

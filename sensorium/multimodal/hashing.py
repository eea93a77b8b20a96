"""Identity of media: a digest over canonical content, and the key that caches share an item's rows by.

Content is identity: two objects with the same digest are interchangeable for every mapper, and whatever could
make a mapper's result differ (an image's mode, an array's type and shape, a sound's rate) is part of the
digest. Nothing is pickled and no digest is shortened. Called by preprocessing, before the input processor
sees the media. Loads neither torch nor Pillow.
"""

from __future__ import annotations

import hashlib
import os
import struct
import sys
from array import array
from collections import UserDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np

from sensorium.multimodal.video_array import VideoArray

DIGEST_BYTES = 32
MAX_DEPTH = 32
"""Deepest nesting of containers that is looked into; what lies deeper, or in itself, has no digest."""

_EXIF_ORIENTATION = 0x0112

Feed: TypeAlias = Callable[[bytes | memoryview], None]


class UncacheableError(TypeError):
    """The content has no canonical form, so nothing can tell whether it equals another."""


def content_digest(value: object) -> bytes:
    """Digest of media content, or of anything built from plain values, arrays, tensors and images.

    Every value is written with a tag of its kind and its length, so that no two different values write the
    same bytes: `["ab"]`, `["a", "b"]` and `("ab",)` differ, and so do `1`, `1.0` and `True`. A mapping's
    order of keys is not part of it. Raises `UncacheableError` for what has no canonical form.
    """
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    _feed(digest.update, value, 0)
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Identity:
    """What one media item is: its content, or the name that the user gave it. `digest` covers which of the two it is,
    too."""

    digest: bytes
    is_cacheable: bool = True
    """False: no other item will ever have this identity."""


def identify(content: object) -> Identity:
    """The identity of an item by its content; one of its own if that has no canonical form."""
    try:
        return Identity(_combine(b"content", content_digest(content)))
    except UncacheableError:
        return Identity(_combine(b"unique", os.urandom(DIGEST_BYTES)), is_cacheable=False)


def identify_encoded(digest: bytes) -> Identity:
    """The identity of an item by the digest of its encoded bytes and of how they were decoded."""
    return Identity(_combine(b"encoded", digest))


def identify_uuid(uuid: str) -> Identity:
    """The identity of an item by the name that the user gave it; never equal to one by content."""
    return Identity(_combine(b"uuid", uuid.encode("utf-8", "surrogatepass")))


def derive(identity: Identity, *parts: object) -> Identity:
    """The identity of what follows from an item and `parts`: how it was processed, where it stands.

    One of its own if a part has no canonical form.
    """
    try:
        digests = [content_digest(part) for part in parts]
    except UncacheableError:
        return Identity(_combine(b"unique", os.urandom(DIGEST_BYTES)), is_cacheable=False)
    return Identity(_combine(b"derived", identity.digest, *digests), identity.is_cacheable)


def group_identity(identities: Iterable[Identity]) -> Identity:
    """The identity of several items together, in their order."""
    members = tuple(identities)
    return Identity(
        _combine(b"group", *(member.digest for member in members)),
        all(member.is_cacheable for member in members),
    )


def key_of(identity: Identity) -> str:
    """The identity as the hex string that messages and caches carry."""
    return identity.digest.hex()


def callable_identity(function: Callable[..., Any]) -> tuple[object, ...]:
    """What names a registered function: where it is defined and, for `functools.partial`, what is bound."""
    bound: list[object] = []
    while (inner := getattr(function, "func", None)) is not None:
        bound.append((tuple(getattr(function, "args", ())), dict(getattr(function, "keywords", {}))))
        function = inner
    module = getattr(function, "__module__", "")
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return (str(module), str(name), tuple(bound))


def _combine(tag: bytes, *parts: bytes) -> bytes:
    digest = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in (tag, *parts):
        _write(digest.update, b"p", part)
    return digest.digest()


# Writers of single kinds of value. Each writes a tag, then lengths before contents.


def _write(feed: Feed, tag: bytes, payload: bytes | memoryview) -> None:
    feed(tag + struct.pack(">Q", payload.nbytes if isinstance(payload, memoryview) else len(payload)))
    feed(payload)


def _feed(feed: Feed, value: object, depth: int) -> None:
    if depth > MAX_DEPTH:
        raise UncacheableError("nested too deeply")
    writer = _SCALARS.get(type(value))
    if writer is not None:
        writer(feed, value)
    elif isinstance(value, list | tuple):
        _feed_sequence(feed, value, depth)
    elif isinstance(value, dict | UserDict | MappingProxyType):
        _feed_mapping(feed, value, depth)
    elif type(value) is np.ndarray:
        _feed_array(feed, value, depth)
    elif type(value) is VideoArray:
        _write(feed, b"v", b"")
        _feed(feed, value.metadata, depth + 1)
        _feed_array(feed, value, depth)
    elif isinstance(value, np.generic):
        _write(feed, b"g", b"")
        _feed_array(feed, np.asarray(value), depth)
    elif _is_instance(value, "torch", "Tensor"):
        _feed_tensor(feed, value)
    elif _is_instance(value, "PIL.Image", "Image"):
        _feed_image(feed, value, depth)
    else:
        raise UncacheableError(f"{type(value).__name__} has no canonical form")


_SCALARS: dict[type, Callable[[Feed, Any], None]] = {
    type(None): lambda feed, _: feed(b"n"),
    bool: lambda feed, value: feed(b"T" if value else b"F"),
    int: lambda feed, value: _write(feed, b"i", hex(value).encode()),
    float: lambda feed, value: feed(b"f" + struct.pack(">d", value)),
    complex: lambda feed, value: feed(b"c" + struct.pack(">dd", value.real, value.imag)),
    str: lambda feed, value: _write(feed, b"s", value.encode("utf-8", "surrogatepass")),
    bytes: lambda feed, value: _write(feed, b"b", value),
    bytearray: lambda feed, value: _write(feed, b"b", memoryview(value)),
}


def _feed_sequence(feed: Feed, value: list[Any] | tuple[Any, ...], depth: int) -> None:
    kind = type(value)
    tag = b"l" if issubclass(kind, list) else b"t"
    if kind not in (list, tuple):  # a named tuple and the like: its class is part of the digest
        tag += kind.__qualname__.encode()
    _write(feed, tag, struct.pack(">Q", len(value)))
    if len(value) > 64 and set(map(type, value)) == {float}:  # samples of a sound: thousands of them
        _write(feed, b"d", memoryview(array("d", value)).cast("B"))
        return
    for item in value:
        _feed(feed, item, depth + 1)


def _feed_mapping(feed: Feed, value: Any, depth: int) -> None:
    entries = []
    for key, item in value.items():
        entries.append((content_digest(key) if type(key) in _SCALARS else _refuse_key(key), item))
    entries.sort(key=lambda entry: entry[0])
    kind = b"" if type(value) in (dict, MappingProxyType) else type(value).__qualname__.encode()
    _write(feed, b"m" + kind, struct.pack(">Q", len(entries)))
    for key_digest, item in entries:
        feed(key_digest)
        _feed(feed, item, depth + 1)


def _refuse_key(key: object) -> bytes:
    raise UncacheableError(f"a key of type {type(key).__name__} has no canonical form")


def _feed_array(feed: Feed, value: np.ndarray[Any, Any], depth: int) -> None:
    if value.dtype == object:
        _write(feed, b"o", repr(value.shape).encode())
        for item in value.flat:
            _feed(feed, item, depth + 1)
        return
    if value.dtype.hasobject:
        raise UncacheableError("an array of records that hold objects has no canonical form")
    _write(feed, b"a", repr((value.dtype.descr, value.shape)).encode())
    _write(feed, b"A", _bytes_of(value))


def _bytes_of(value: np.ndarray[Any, Any]) -> memoryview:
    """The array's contents in C order, without a copy where they lie so."""
    if value.size == 0 or value.dtype.itemsize == 0:
        return memoryview(b"")
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _feed_tensor(feed: Feed, value: Any) -> None:
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter) or value.layout is not torch.strided:
        raise UncacheableError(f"a {type(value).__name__} of layout {value.layout} has no canonical form")
    if value.is_meta or value.is_quantized or value.is_nested:
        raise UncacheableError("a tensor without plain dense values has no canonical form")
    dense = value.detach().cpu().resolve_conj().resolve_neg().contiguous()
    _write(feed, b"x", repr((str(dense.dtype), tuple(dense.shape))).encode())
    flat = dense.reshape(-1).view(torch.uint8) if dense.numel() else dense.new_empty(0, dtype=torch.uint8)
    _write(feed, b"X", _bytes_of(flat.numpy()))


def _feed_image(feed: Feed, image: Any, depth: int) -> None:
    """A Pillow image: all of its state that a conversion to pixels may look at.

    The orientation tag is written beside the pixels as stored, so that equal digests mean equal images to
    mappers that apply it and to those that don't.
    """
    if getattr(image, "is_animated", False):
        raise UncacheableError("an image of several frames may be read at any of them")
    image.load()
    palette = image.palette
    state = (
        image.mode,
        image.size,
        (palette.mode, bytes(image.getpalette(None) or ())) if palette is not None else None,
        image.info.get("transparency"),
        image.info.get("icc_profile"),
        _orientation(image),
    )
    _write(feed, b"P", b"")
    _feed(feed, state, depth + 1)
    _write(feed, b"Q", image.tobytes())


def _orientation(image: Any) -> int | None:
    try:
        orientation = image.getexif().get(_EXIF_ORIENTATION)
    except Exception as exc:  # whatever Pillow's parser makes of a malformed block
        raise UncacheableError("the image's EXIF block can't be read") from exc
    return orientation if isinstance(orientation, int) else None


def _is_instance(value: object, module: str, name: str) -> bool:
    """Whether `value` is an instance of a class, without loading the class's module for the question."""
    loaded = sys.modules.get(module)
    return loaded is not None and isinstance(value, getattr(loaded, name))

"""Messages to bytes and back, without pickle; tensors through shared memory.

A message is msgpack with a schema. Large arrays and tensors stand in it as references into a *segment*: a piece of
anonymous shared memory, written once by the sender, handed over as an open file with the message, and mapped by the
receiver in place. Segments have no names that could leak: the memory is freed with the last tensor over it, or when the
processes end, for whatever reason.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import numpy as np
import torch

from sensorium.anonymous_file import anonymous_file, write_all
from sensorium.errors import ModelError
from sensorium.messages import EngineRequest, SchedulerOutput

T = TypeVar("T")

_INLINE_BYTES = 2048
"""Arrays up to this size travel inside the message."""
_ALIGNMENT = 64
_TENSOR, _ARRAY, _TUPLE = 1, 2, 3
"""Codes of msgpack extensions."""


class _ArrayRef(msgspec.Struct, frozen=True, array_like=True):
    """A tensor or array: its bytes, or where they are in the segment."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | int


class EncodedMessage:
    """Bytes of a message, and the open file of its segment if it has one. Its last owner closes it."""

    __slots__ = ("fd", "payload")

    def __init__(self, payload: bytes, fd: int | None = None) -> None:
        self.payload = payload
        self.fd = fd

    def segment_bytes(self) -> int:
        """Size of the segment; 0 without one."""
        return 0 if self.fd is None else os.fstat(self.fd).st_size

    def close(self) -> None:
        """Close the segment. May be called again."""
        fd, self.fd = self.fd, None
        if fd is not None:
            os.close(fd)

    def __del__(self) -> None:
        self.close()


def encode(message: msgspec.Struct) -> EncodedMessage:
    """A message without a segment: everything is inline."""
    return EncodedMessage(msgspec.msgpack.encode(message, enc_hook=_Writer(inline_bytes=None).hook))


def encode_request(request: EngineRequest) -> EncodedMessage:
    """A request with its media in a segment; the payload goes into `Add.request`.

    Raises:
        ModelError: A mapped keyword argument has a type that can't leave the process.
    """
    return _with_segment(_request_fields(request))


def encode_step(step: SchedulerOutput) -> EncodedMessage:
    """A step with the media of its new requests in a segment. Where masks are, it doesn't say.

    Raises:
        ModelError: See `encode_request`.
    """
    new_requests = [{**_fields(new), "request": _request_fields(new.request)} for new in step.new_requests]
    without_masks = {"masks": None, "has_masks": step.masks is not None}
    return _with_segment({**_fields(step), "new_requests": new_requests, **without_masks})


def decode_request(payload: msgspec.Raw, fd: int | None) -> EngineRequest:
    """A request whose tensors lie over its segment. Closes `fd`.

    Raises `msgspec.MsgspecError` for anything else.
    """
    return _decode(EngineRequest, payload, fd)


def decode_step(payload: msgspec.Raw, fd: int | None) -> SchedulerOutput:
    """A step whose tensors lie over its segment. Closes `fd`. Raises `msgspec.MsgspecError` if it is none."""
    return _decode(SchedulerOutput, payload, fd)


def _decode(kind: type[T], payload: msgspec.Raw, fd: int | None) -> T:
    reader = _Reader(None if fd is None else _map(fd))
    return msgspec.msgpack.Decoder(kind, dec_hook=_expect, ext_hook=reader.hook).decode(payload)


def _with_segment(fields: dict[str, Any]) -> EncodedMessage:
    writer = _Writer(inline_bytes=_INLINE_BYTES)
    payload = msgspec.msgpack.encode(fields, enc_hook=writer.hook)
    return EncodedMessage(payload, writer.finish())


def _request_fields(request: EngineRequest) -> dict[str, Any]:
    media = [{**_fields(item), "kwargs": _pack(item.kwargs, "kwargs")} for item in request.media]
    return {**_fields(request), "media": media}


def _fields(value: Any) -> dict[str, Any]:
    return {name: getattr(value, name) for name in value.__dataclass_fields__}


def _pack(value: Any, where: str) -> Any:
    """Mapped values in a form that keeps tuples; refuses what can't be sent."""
    if value is None or isinstance(value, bool | int | float | str | bytes | torch.Tensor | np.ndarray | np.generic):
        return value
    if isinstance(value, Mapping):
        return {key: _pack(member, f"{where}[{key!r}]") for key, member in value.items()}
    if isinstance(value, list):
        return [_pack(member, where) for member in value]
    if isinstance(value, tuple):
        return _Packed(tuple(_pack(member, where) for member in value))
    raise ModelError(
        f"mapped {where}: got a {type(value).__name__}, expected tensors, arrays, numbers, strings, and lists, tuples "
        "and dicts of them. Change what the model's input mapper returns."
    )


class _Packed:
    """Wraps a tuple for `_Writer.hook`; msgspec would write a plain tuple as a list."""

    __slots__ = ("members",)

    def __init__(self, members: tuple[Any, ...]) -> None:
        self.members = members


class _Writer:
    """Writes arrays inline or into a segment. Used for one message."""

    def __init__(self, inline_bytes: int | None) -> None:
        self._inline_bytes = inline_bytes
        self._pieces: list[tuple[int, np.ndarray[Any, Any]]] = []
        self._size = 0

    def hook(self, value: Any) -> Any:
        """`enc_hook` of msgspec: whatever it can't write by itself."""
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
            name = str(value.dtype).removeprefix("torch.")
            return self._reference(_TENSOR, name, tuple(value.shape), flat)
        if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
            array = np.ascontiguousarray(value)
            return self._reference(_ARRAY, array.dtype.str, value.shape, array.reshape(-1).view(np.uint8))
        if isinstance(value, _Packed):
            return msgspec.msgpack.Ext(_TUPLE, msgspec.msgpack.encode(list(value.members), enc_hook=self.hook))
        raise ModelError(f"message between processes: got a {type(value).__name__}, expected plain values and arrays.")

    def _reference(self, code: int, dtype: str, shape: tuple[int, ...], flat: np.ndarray[Any, Any]) -> Any:
        data: bytes | int
        if self._inline_bytes is None or flat.nbytes <= self._inline_bytes:
            data = flat.tobytes()
        else:
            data = self._size
            self._pieces.append((data, flat))
            self._size += -(-flat.nbytes // _ALIGNMENT) * _ALIGNMENT
        return msgspec.msgpack.Ext(code, msgspec.msgpack.encode(_ArrayRef(dtype, shape, data)))

    def finish(self) -> int | None:
        """The open file of the segment; None if it is empty."""
        if not self._pieces:
            return None
        fd = anonymous_file()
        try:
            os.ftruncate(fd, self._size)
            for offset, flat in self._pieces:
                write_all(fd, flat.data.cast("B"), offset)
        except BaseException:
            os.close(fd)
            raise
        return fd


class _Reader:
    """Reads arrays of one message."""

    def __init__(self, segment: torch.Tensor | None) -> None:
        self._segment = segment

    def hook(self, code: int, data: memoryview) -> Any:
        """`ext_hook` of msgspec."""
        if code == _TUPLE:
            return tuple(msgspec.msgpack.decode(bytes(data), ext_hook=self.hook))
        reference = _array_ref.decode(data)
        if code == _ARRAY:
            return self._array(reference)
        if code == _TENSOR:
            return self._tensor(reference)
        raise msgspec.ValidationError(f"message: got an extension of code {code}, expected 1 to 3.")

    def _tensor(self, reference: _ArrayRef) -> torch.Tensor:
        dtype = getattr(torch, reference.dtype, None)
        if not isinstance(dtype, torch.dtype):
            raise msgspec.ValidationError(f"message: got the dtype {reference.dtype!r}, expected one of torch's.")
        return self._bytes(reference, dtype.itemsize).view(dtype).reshape(reference.shape)

    def _array(self, reference: _ArrayRef) -> np.ndarray[Any, Any]:
        dtype = np.dtype(reference.dtype)
        if dtype.hasobject:
            raise msgspec.ValidationError("message: got an array of objects, expected numbers.")
        return self._bytes(reference, dtype.itemsize).numpy().view(dtype).reshape(reference.shape)

    def _bytes(self, reference: _ArrayRef, item_bytes: int) -> torch.Tensor:
        """`(num_bytes,)` uint8 of an array, in the segment or, writable too, from the message."""
        num_bytes = math.prod(reference.shape) * item_bytes
        if num_bytes == 0:
            return torch.empty(0, dtype=torch.uint8)
        if isinstance(reference.data, bytes):
            return torch.frombuffer(bytearray(reference.data), dtype=torch.uint8)
        if self._segment is None:
            raise msgspec.ValidationError("message: got a reference into shared memory, but none came with it.")
        return self._segment[reference.data : reference.data + num_bytes]


def _expect(expected: type, value: Any) -> Any:
    """`dec_hook` of msgspec: fields of types that only an extension can bring."""
    if isinstance(value, np.ndarray):
        return value
    raise msgspec.ValidationError(f"message: got a {type(value).__name__}, expected {expected}.")


def _map(fd: int) -> torch.Tensor:
    """The segment as bytes, in private memory, so that a tensor changed in place changes no other process's.

    Python's own `mmap` would keep a file open for as long as the memory is in use.
    """
    try:
        return torch.from_file(f"/dev/fd/{fd}", shared=False, size=os.fstat(fd).st_size, dtype=torch.uint8)
    finally:
        os.close(fd)


def inline_hook(code: int, data: memoryview) -> Any:
    """`ext_hook` of msgspec for messages of `encode`."""
    return _Reader(None).hook(code, data)


_array_ref = msgspec.msgpack.Decoder(_ArrayRef)

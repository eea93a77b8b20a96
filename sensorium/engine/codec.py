"""The messages of `core_messages` as bytes and back; see `sensorium.ipc.codec`."""

from __future__ import annotations

import msgspec

from sensorium.engine.core_messages import Add, ToCore, ToFront
from sensorium.ipc.codec import EncodedMessage, inline_hook
from sensorium.sampling_params import SamplingParams


def encode_add(request: EncodedMessage, outputs: list[tuple[str, SamplingParams]]) -> EncodedMessage:
    """The message that queues `outputs` of an encoded request, whose segment it takes over."""
    fd, request.fd = request.fd, None
    return EncodedMessage(msgspec.msgpack.encode(Add(msgspec.Raw(request.payload), outputs)), fd)


def decode_to_core(payload: bytes) -> ToCore:
    """Raises `msgspec.MsgspecError` for any other message."""
    return _to_core.decode(payload)


def decode_to_front(payload: bytes) -> ToFront:
    """Raises `msgspec.MsgspecError` for any other message."""
    return _to_front.decode(payload)


_to_core: msgspec.msgpack.Decoder[ToCore] = msgspec.msgpack.Decoder(ToCore, ext_hook=inline_hook)
_to_front: msgspec.msgpack.Decoder[ToFront] = msgspec.msgpack.Decoder(ToFront, ext_hook=inline_hook)

"""The way of one picture through the code: the files that it passes through, from the chat route to the encoder.

    python -m tests.helpers.request_walk [FAMILY]

A file is on the way if a function in it is given the picture, in whatever form: as text of a request, as bytes, as
pixels, as a model's arguments, or as what holds one of these. The process that decodes pictures isn't followed.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import threading
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import msgspec
import numpy as np
import torch
from PIL import Image

import sensorium
from sensorium.entrypoints.openai.protocol import parse_body
from tests.entrypoints.served import data_url, served
from tests.helpers.checkpoints import make_checkpoint

PACKAGE = str(Path(sensorium.__file__).parent) + "/"
PNG = b"\x89PNG"
PNG_IN_BASE64 = "iVBORw0KGgo"
MAX_MEMBERS = 32
"""Members of a container that are looked at."""
MIN_VALUES = 256
"""Of an array that may hold pixels."""
ENCODER_METHOD = "get_multimodal_embeddings"


class RequestWalk:
    """A profile function (see `sys.setprofile`) that notes files from the reading of a body to the encoder's call."""

    def __init__(self) -> None:
        self.files: list[str] = []
        """Relative to the package, in order, each once."""
        self.kinds: set[str] = set()
        """Kinds of values, of this package, that are passed on with the picture in them, and not a whole request."""
        self._is_on_its_way = False
        self._has_arrived = False

    def __call__(self, frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event != "call" or self._has_arrived or not code.co_filename.startswith(PACKAGE):
            return
        self._is_on_its_way = self._is_on_its_way or code is parse_body.__code__
        file = code.co_filename.removeprefix(PACKAGE)
        if self._is_on_its_way and _is_given_the_picture(frame, code):
            if file not in self.files:
                self.files.append(file)
            self.kinds.update(kind.__name__ for value in _given(frame, code).values() for kind in _kinds(value))
        self._has_arrived = self._is_on_its_way and code.co_name == ENCODER_METHOD


def _given(frame: FrameType, code: CodeType) -> dict[str, Any]:
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return {name: frame.f_locals[name] for name in names if name in frame.f_locals}


def _is_given_the_picture(frame: FrameType, code: CodeType) -> bool:
    # What a long-lived object holds somewhere deep inside is not what a call of it is about.
    return any(_holds_picture(value, 2 if name == "self" else 8) for name, value in _given(frame, code).items())


def _kinds(value: Any, depth: int = 2) -> Iterator[type]:
    """Kinds of values, in lists and dicts too, that hold the picture at most three containers deep."""
    if isinstance(value, list | tuple | dict) and depth and type(value).__module__ == "builtins":
        members = value.values() if isinstance(value, dict) else value
        for member in islice(list(members), MAX_MEMBERS):
            yield from _kinds(member, depth - 1)
    elif type(value).__module__.startswith("sensorium") and not isinstance(value, torch.nn.Module):
        is_value = dataclasses.is_dataclass(value) or isinstance(value, msgspec.Struct | dict)
        if is_value and _holds_picture(value, 3):
            yield type(value)


def _holds_picture(value: Any, depth: int) -> bool:
    if isinstance(value, str):
        return PNG_IN_BASE64 in value
    if isinstance(value, bytes | bytearray):
        return PNG in value or PNG_IN_BASE64.encode() in value
    if isinstance(value, np.ndarray | torch.Tensor):
        return value.ndim >= 2 and np.prod(value.shape) >= MIN_VALUES
    return isinstance(value, Image.Image) or (depth > 0 and any(_holds_picture(m, depth - 1) for m in _members(value)))


def _members(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return islice(list(value.values()), MAX_MEMBERS)
    if isinstance(value, list | tuple):
        return value[:MAX_MEMBERS]
    return _attributes(value) if type(value).__module__.startswith("sensorium") else ()


def _attributes(value: Any) -> Iterator[Any]:
    slots = [name for cls in type(value).__mro__ for name in getattr(cls, "__slots__", ())]
    yield from (object.__getattribute__(value, name) for name in slots if hasattr(value, name))
    yield from list(getattr(value, "__dict__", {}).values())


def rooms_of(files: Sequence[str]) -> list[tuple[str, list[str]]]:
    """Files as visits to rooms; one that lies at the top belongs to the visit that it is entered from."""
    visits: list[tuple[str, list[str]]] = []
    for file in files:
        room, _, rest = file.partition("/")
        if rest and (not visits or visits[-1][0] != room):
            visits.append((room, []))
        visits[-1][1].append(rest or room)
    return visits


def walk(family: str = "llava") -> RequestWalk:
    """The way of a picture to a model of this family."""
    noted = RequestWalk()
    threading.setprofile(noted)
    try:
        with served(make_checkpoint(family)) as server:
            picture = {"type": "image_url", "image_url": {"url": data_url(Image.new("RGB", (64, 48), "red"))}}
            content = [{"type": "text", "text": "hello"}, picture]
            body = {"model": "tiny", "max_tokens": 2, "messages": [{"role": "user", "content": content}]}
            request = urllib.request.Request(f"{server.url}/v1/chat/completions", json.dumps(body).encode())
            request.add_header("Content-Type", "application/json")
            with urllib.request.urlopen(request) as response:
                assert response.status == 200
    finally:
        threading.setprofile(None)
    return noted


if __name__ == "__main__":
    way = walk(*sys.argv[1:])
    for visited, names in rooms_of(way.files):
        print(f"{visited:16}", " ".join(names))
    print(f"{len(way.files)} files, {len(rooms_of(way.files))} visits to rooms; as {', '.join(sorted(way.kinds))}")

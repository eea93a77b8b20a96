"""What may be told of a failure in a model's own code, to the caller of a request and to who loads the model."""

from __future__ import annotations

import os
import re
import traceback
from pathlib import Path

import torch

import sensorium
from sensorium.errors import SensoriumError

_SHAPES = re.compile(
    r"(shape mismatch: value tensor|The (expanded )?size of( the)? tensor|Sizes of tensors must match"
    r"|mat1 and mat2 shapes|Number of elements of source|Tensors must have same number of dimensions"
    r"|shape '\[[-\d, ]*\]' is invalid for input of size)"
    r"[\w\s\[\](),.:;<>=+*'-]{0,300}"
)
"""Torch's complaints about shapes, whole: they quote numbers and nothing of the input."""
_LONGEST_TEXT = 600
_NOT_THE_AUTHORS = (
    "<",
    *(str(Path(str(package.__file__)).parent) + os.sep for package in (torch, sensorium)),
    os.path.join("site-packages", "transformers", ""),
)
"""Parts of file names whose lines tell an author nothing."""


def told_to_caller(error: BaseException) -> str:
    """The part of a model's exception that its caller may read.

    This package's errors are written for callers, and torch's messages about shapes say which counts differ. Any other
    message may hold paths and contents, so only its class is given.
    """
    if isinstance(error, SensoriumError):
        return str(error)
    if type(error) in (RuntimeError, IndexError, ValueError) and _SHAPES.fullmatch(str(error)):
        return f"{type(error).__name__}: {error}"
    return type(error).__name__


def told_to_author(error: BaseException) -> str:
    """An exception in one line, with the place in the author's own file that it comes from, for who loads a model."""
    text = " ".join(str(error).split()).rstrip(".")
    said = f"{type(error).__name__}: {text[:_LONGEST_TEXT]}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not any(part in frame.filename for part in _NOT_THE_AUTHORS)]
    return f"{said} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else said

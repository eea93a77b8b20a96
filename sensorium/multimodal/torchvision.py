"""Whether torchvision is needed, whether it can be had, and keeping it away where it isn't needed.

Transformers imports torchvision wherever it is installed. That costs a second of start-up, a CUDA build of it fails
beside a CPU build of torch, and most checkpoints don't need it: their image processors have a backend of PIL and NumPy,
and video is computed here. Some processors exist for torchvision only; for those it is imported, if it can be.

Transformers asks once whether there is one, and its modules remember: so all that a checkpoint needs is settled before
the first of its processors is loaded.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import lru_cache

from sensorium.errors import MissingLibraryError

_hidden = False


def torchvision_problem() -> str | None:
    """Why torchvision can't be used in this process, in words that follow its name; None if it can. Imports it."""
    if _hidden:
        return (
            "was left out when another model's processors were loaded in this process; load this model first, or in a "
            "process of its own"
        )
    if sys.modules.get("torchvision") is None and importlib.util.find_spec("torchvision") is None:
        return "is not installed; install it (pip install torchvision) in the version that belongs to this torch"
    try:
        importlib.import_module("torchvision.transforms.v2.functional")
    except Exception as error:  # noqa: BLE001  its C++ part fails in many ways
        import torch

        return (
            f"can't be imported beside torch {torch.__version__} ({type(error).__name__}: {error}); install the build "
            f"that belongs to it"
        )
    return None


def require_torchvision(what: str, way_out: str = "") -> None:
    """Import torchvision for `what`. Raises `MissingLibraryError` (a `RuntimeError`), which says what is missing."""
    problem = torchvision_problem()
    if problem is not None:
        raise MissingLibraryError(f"Media: {what} needs torchvision, which {problem}{way_out}.")


def hide_torchvision() -> None:
    """Let transformers find that torchvision is not installed, for good, unless it is imported already.

    Transformers asks once, through functions that remember the answer. They are asked while an import of torchvision
    would fail.
    """
    global _hidden  # noqa: PLW0603  so is what transformers finds
    if _hidden or sys.modules.get("torchvision") is not None:
        return
    _hidden = importlib.util.find_spec("torchvision") is not None
    import_utils = importlib.import_module("transformers.utils.import_utils")
    questions = [
        getattr(import_utils, name, None) for name in ("is_torchvision_available", "is_torchvision_v2_available")
    ]
    sys.modules["torchvision"] = None  # type: ignore[assignment]  # makes importlib.util.find_spec return None
    try:
        for question in questions:
            if question is not None:
                question.cache_clear()
                question()
    finally:
        del sys.modules["torchvision"]


@lru_cache(maxsize=64)
def is_processor(name: str) -> bool:
    """Whether transformers has a class of this name, be it usable here or not. Loads none."""
    return name in dir(importlib.import_module("transformers"))


@lru_cache(maxsize=64)
def only_for_torchvision(image_processor_type: str | None, model_type: str | None) -> str | None:
    """The class of an image processor that exists for torchvision and not for PIL; None for any other.

    Args:
        image_processor_type: As a checkpoint's file names it, in any of its spellings.
        model_type: Of the checkpoint, which decides if the file names none.
    """
    names = importlib.import_module("transformers.models.auto.auto_mappings")
    mapping = getattr(names, "IMAGE_PROCESSOR_MAPPING_NAMES", {})
    if image_processor_type is None:
        entries = [mapping[model_type]] if model_type in mapping else []
    else:
        base = image_processor_type.removesuffix("Fast").removesuffix("Pil")
        entries = [entry for entry in mapping.values() if base in entry.values()]
    if not entries or any(entry.get("pil") for entry in entries):
        return None
    found: str = entries[0]["torchvision"]
    return found

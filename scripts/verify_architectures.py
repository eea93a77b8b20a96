"""Tries every architecture of text that the installed transformers has, on a tiny random checkpoint: how it runs, and
whether its greedy tokens are those of `generate`. Writes what `sensorium models` shows. Takes some minutes.

    PYTHONPATH=. python scripts/verify_architectures.py [TYPE...]
"""

from __future__ import annotations

import datetime as dt
import importlib.metadata
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import transformers

from sensorium import logger
from sensorium.entrypoints.model_table import VERIFIED
from tests.helpers.generic import generated_tokens, load_generic, served_tokens
from tests.helpers.tiny_architectures import save_tiny, text_types

LONGEST_REASON = 240
NEEDS_MORE = {"blt": "two sequence lengths, and minutes to make", "kimi_linear": "minutes without its kernels"}
"""Types that aren't tried."""


def main() -> None:
    warnings.simplefilter("ignore")
    logger.configure(logger.LogSettings("ERROR"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    known = json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {"architectures": {}}
    chosen = sys.argv[1:] or sorted(text_types())
    if not sys.argv[1:]:
        known["architectures"] = {}
    for model_type in chosen:
        name = text_types()[model_type]
        result = tried(model_type)
        print(f"{model_type}: {result}", flush=True)
        other = known["architectures"].get(name, {"model_type": model_type})
        if other["model_type"] == model_type or is_better(result, other):
            known["architectures"][name] = {"model_type": model_type, **result}
        write(known)


def write(known: dict[str, Any]) -> None:
    """After each type, so that a run that is cut off leaves what it found."""
    known["date"] = dt.datetime.now(tz=dt.UTC).date().isoformat()
    known["versions"] = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    known["architectures"] = dict(sorted(known["architectures"].items()))
    VERIFIED.write_text(json.dumps(known, indent=1) + "\n")


def is_better(result: dict[str, Any], other: dict[str, Any]) -> bool:
    """Several types share a class; the one that runs best counts."""
    ranks = ["", "by request", "flat"]
    return (result["is_equal"], ranks.index(result["tier"])) > (other["is_equal"], ranks.index(other["tier"]))


def tried(model_type: str) -> dict[str, Any]:
    """The tier, whether tokens are equal, and what was in the way."""
    if model_type in NEEDS_MORE:
        return {"tier": "", "is_equal": False, "note": f"not tried: {NEEDS_MORE[model_type]}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            expected = generated_tokens(save_tiny(model_type, folder))
        except Exception as error:  # noqa: BLE001  whatever a config or a class raises
            return {"tier": "", "is_equal": False, "note": f"not tried: no tiny config ({_first_line(error)})"}
        try:
            _, report = load_generic(folder)
            tokens = served_tokens(folder)
        except Exception as error:  # noqa: BLE001  whatever modules raise
            return {"tier": "", "is_equal": False, "note": _first_line(error).replace(name, "the checkpoint")}
    tier = report.features.tier.removeprefix("transformers ")
    note = next((note for note in report.features.notes if note.startswith("not ")), "")
    if tokens != expected:
        return {"tier": tier, "is_equal": False, "note": f"greedy tokens of {tier} differ from those of generate"}
    return {"tier": tier, "is_equal": True, "note": note[:LONGEST_REASON]}


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:LONGEST_REASON]


if __name__ == "__main__":
    main()

"""Tries every architecture of the installed transformers on a tiny random checkpoint: how it runs, and whether its
greedy tokens equal those of `generate`, for text, and for pictures, clips and sounds if it takes them. Writes what
`sensorium models` shows. Takes some minutes; processors that need torchvision, timm or num2words are skipped if these
aren't installed.

    PYTHONPATH=. python scripts/verify_architectures.py [TYPE or CLASS...]
"""

from __future__ import annotations

import argparse
import datetime as dt
import importlib.metadata
import json
import logging
import tempfile
import warnings
from pathlib import Path
from typing import Any

import transformers

from sensorium import logger
from sensorium.entrypoints.model_table import VERIFIED
from sensorium.model_executor.models.transformers.media_model import reads_text_alone
from tests.helpers.generic import generated_tokens, load_generic, served_tokens
from tests.helpers.generic_media import (
    generated_media_tokens,
    hf_items,
    media_requests,
    model_config_of,
    served_media_tokens,
)
from tests.helpers.tiny_architectures import save_tiny, text_types
from tests.helpers.tiny_media import media_types, save_tiny_media

LONGEST_REASON = 240
NO_DECODER = "an encoder of media with cross-attention"
NEEDS_MORE = {"blt": "two sequence lengths, and minutes to make"}
"""Types that aren't tried."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="types or classes; all by default")
    chosen = set(parser.parse_args().names)
    warnings.simplefilter("ignore")
    logger.configure(logger.LogSettings("ERROR"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    known = json.loads(VERIFIED.read_text()) if VERIFIED.exists() else {"architectures": {}}
    if not chosen:
        known["architectures"] = {}
    for model_type, name, takes_media in entries():
        if chosen and not chosen & {model_type, name}:
            continue
        result = tried_media(model_type) if takes_media else tried(model_type)
        print(f"{model_type} {name}: {result}", flush=True)
        other = known["architectures"].get(name, {"model_type": model_type})
        if other["model_type"] == model_type or is_better(result, other):
            known["architectures"][name] = {"model_type": model_type, **result}
        write(known)


def entries() -> list[tuple[str, str, bool]]:
    """Types with their classes, and whether these take media or read a source; a type may have one of each kind."""
    media = media_types()
    of_text = [(model_type, name, False) for model_type, name in text_types().items() if name not in media.values()]
    return sorted([*of_text, *((model_type, name, True) for model_type, name in media.items())])


def write(known: dict[str, Any]) -> None:
    """Save after each type, so that an interrupted run keeps its results."""
    known["date"] = dt.datetime.now(tz=dt.UTC).date().isoformat()
    known["versions"] = {package: importlib.metadata.version(package) for package in ("torch", "transformers")}
    known["architectures"] = dict(sorted(known["architectures"].items()))
    VERIFIED.write_text(json.dumps(known, indent=1) + "\n")


def is_better(result: dict[str, Any], other: dict[str, Any]) -> bool:
    """Several types share a class; the one that runs best counts."""
    ranks = ["", "by request", "flat"]
    return (result["is_equal"], ranks.index(result["tier"])) > (other["is_equal"], ranks.index(other["tier"]))


def tried(model_type: str, class_name: str = "", **settings: Any) -> dict[str, Any]:
    """The tier, whether tokens are equal, and the error if there was one."""
    if model_type in NEEDS_MORE:
        return {"tier": "", "is_equal": False, "note": f"not tried: {NEEDS_MORE[model_type]}"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            expected = generated_tokens(save_tiny(model_type, folder, class_name=class_name))
        except Exception as error:  # noqa: BLE001  whatever a config or a class raises
            return {"tier": "", "is_equal": False, "note": f"not tried: no tiny config ({_first_line(error)})"}
        try:
            _, report = load_generic(folder)
            tokens = served_tokens(folder, **settings)
        except Exception as error:  # noqa: BLE001  whatever modules raise
            return {"tier": "", "is_equal": False, "note": _first_line(error).replace(name, "the checkpoint")}
    tier = report.features.tier.removeprefix("transformers ")
    note = _note(report.features)
    if tokens != expected:
        return {"tier": tier, "is_equal": False, "note": f"greedy tokens of {tier} differ from those of generate"}
    return {"tier": tier, "is_equal": True, "note": note}


def tried_media(model_type: str) -> dict[str, Any]:
    """The same of an architecture that takes media, of each kind that its processor takes."""
    if model_type in NEEDS_MORE:
        return {"tier": "", "is_equal": False, "note": f"not tried: {NEEDS_MORE[model_type]}"}
    if getattr(transformers.CONFIG_MAPPING[model_type](), "is_encoder_decoder", False):
        name = media_types()[model_type]
        # An encoder reads a prompt whole.
        return (
            tried(model_type, name, max_num_batched_tokens=48)
            if reads_text_alone(name)
            else {"tier": "", "is_equal": False, "note": NO_DECODER}
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            model = save_tiny_media(model_type, folder)
        except Exception as error:  # noqa: BLE001  whatever a config, a class or a processor raises
            return {"tier": "", "is_equal": False, "note": f"not tried: no tiny checkpoint ({_first_line(error)})"}
        try:
            items = hf_items(model_config_of(folder))
            if not items.placeholders:
                why = "; ".join(items.refusals.values()).replace(name, "the checkpoint")
                return {"tier": "", "is_equal": False, "note": f"not tried: no media ({why})"[:LONGEST_REASON]}
            report = load_generic(folder, max_model_len=2048, num_blocks=400)[1]
            requests = {modality: media_requests(items, modality) for modality in items.placeholders}
            different = [
                modality
                for modality, prompts in requests.items()
                if served_media_tokens(folder, prompts) != generated_media_tokens(model, items, prompts)
            ]
        except Exception as error:  # noqa: BLE001  whatever modules raise
            return _media_failure(error, name)
    tier = report.features.tier.removeprefix("transformers ")
    note = _note(report.features)
    media = sorted(requests.keys() - set(different))
    if not media:
        note = f"greedy tokens of {tier} differ from those of generate with {', '.join(different)}"
        return {"tier": tier, "is_equal": False, "note": note}
    return {"tier": tier, "is_equal": True, "note": note, "media": media}


def _note(features: Any) -> str:
    """The note about a tier: why no faster tier applies, or which part is slower than in other models."""
    not_taken = next((note for note in features.notes if note.startswith("not ")), "")
    slower = ("one sequence at a time", "over all of its tokens")
    found = next((each for each in slower if any(each in note for note in features.notes)), "")
    what = {slower[0]: "some layers one sequence at a time", slower[1]: "every pass runs all tokens again"}.get(
        found, ""
    )
    return "; ".join(filter(None, (what, not_taken)))[:LONGEST_REASON]


def _media_failure(error: Exception, folder: str) -> dict[str, Any]:
    """What to record of a failure: the tiny config's, as far as untouched modules can't be run on it either."""
    reason = _first_line(error).replace(folder, "the checkpoint")
    if "an encoder with cross-attention" in reason:
        reason = NO_DECODER
    elif "untouched modules on" in reason and "pixel_values" not in reason:
        reason = (
            f"not tried: untouched modules fail on the tiny checkpoint: {reason.partition('untouched modules ')[2]}"
        )
    elif "ConfigError" in reason or "WeightsError" in reason:
        reason = f"not tried: {reason}"
    return {"tier": "", "is_equal": False, "note": reason[:LONGEST_REASON]}


def _first_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"[:LONGEST_REASON]


if __name__ == "__main__":
    main()

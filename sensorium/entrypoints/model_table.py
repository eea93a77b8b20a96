"""Which architectures run, and how: those with a class here, and those that run by the modules of transformers.

What is known of the latter comes from `verified.json`, which `scripts/verify_architectures.py` writes: each
architecture was run on a tiny random checkpoint, and its tokens were compared with those of `generate`.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sensorium.model_executor.models.registry import IN_TREE, POOLING
from sensorium.model_executor.models.transformers.architectures import media_architectures, text_architectures

VERIFIED = Path(__file__).parent.parent / "model_executor" / "models" / "transformers" / "verified.json"
VERIFIED_POOLING = VERIFIED.with_name("verified_pooling.json")
NATIVE, FLAT, BY_REQUEST, NOT_SERVED, UNKNOWN = "native", "flat", "by request", "not served", "by the check at load"
WHOLE, PADDED = "flat, whole prompts", "padded"
WAYS = {
    NATIVE: "a class of this engine: every feature, at full speed",
    FLAT: "modules of transformers over a flat batch and the engine's caches: batching, chunks, prefix cache",
    BY_REQUEST: "modules of transformers, a pass for each request, with Hugging Face's cache or over all tokens again",
    WHOLE: "modules of transformers that don't generate, over whole prompts in one flat batch, without a cache",
    PADDED: "the same with prompts of about the same length together, padded",
    UNKNOWN: "not tried beforehand; loading finds out which of these ways is right, or refuses it",
    NOT_SERVED: "no way was right, or there is none yet",
}
"""What is said of each way."""


@dataclass(frozen=True, slots=True)
class Row:
    """One architecture."""

    architecture: str
    way: str
    is_verified: bool
    note: str = ""


def rows(registered: Collection[str] = ()) -> list[Row]:
    """All architectures, by name; `registered` beside those that have a class here from the start."""
    native = {*IN_TREE, *registered}
    tried = recorded()["architectures"]
    found = [Row(name, NATIVE, name in IN_TREE, "" if name in IN_TREE else "registered") for name in native]
    found += [_row(name, tried.get(name)) for name in (text_architectures() | media_architectures()) - native]
    named = {row.architecture for row in found}
    found += [row for row in _pooling_rows() if row.architecture not in named]
    return sorted(found, key=lambda row: row.architecture.lower())


def _pooling_rows() -> list[Row]:
    """Architectures that don't generate: those with a class here, and those whose heads or encoders were tried."""
    own = [name for name in POOLING if name not in IN_TREE]
    found = [Row(name, PADDED if "dual" in POOLING[name] else NATIVE, is_verified=True) for name in own]
    tried = json.loads(VERIFIED_POOLING.read_text(encoding="utf-8"))["architectures"]
    ways = {"flat": WHOLE, "padded": PADDED, "one by one": PADDED}
    for name, each in tried.items():
        row = _row(name, each)
        found.append(replace(row, way=ways.get(row.way, row.way)))
    return [row for i, row in enumerate(found) if row.architecture not in own or i < len(own)]


def recorded() -> dict[str, Any]:
    """What `verified.json` holds."""
    content: dict[str, Any] = json.loads(VERIFIED.read_text(encoding="utf-8"))
    return content


def _row(name: str, tried: dict[str, Any] | None) -> Row:
    if tried is None:
        return Row(name, UNKNOWN, False)
    if tried["note"].startswith("not tried"):
        return Row(name, UNKNOWN, False, tried["note"])
    if not tried["is_equal"]:
        return Row(name, NOT_SERVED, False, tried["note"])
    return Row(
        name,
        tried["tier"],
        True,
        "; ".join(each for each in (", ".join(tried.get("media", ())), tried["note"]) if each),
    )


def counts(table: Sequence[Row]) -> dict[str, int]:
    """Rows of each way, in the order of `WAYS`."""
    return {way: sum(row.way == way for row in table) for way in WAYS}


def lines(table: Sequence[Row]) -> list[str]:
    """The table for a terminal."""
    width = max(len(row.architecture) for row in table)
    shown = [
        f"{row.architecture:{width}}  {row.way:20}  {'verified' if row.is_verified else '':8}  {row.note}".rstrip()
        for row in table
    ]
    return [*shown, "", *(f"{count:4} {way}: {WAYS[way]}" for way, count in counts(table).items())]


def markdown(table: Sequence[Row]) -> str:
    """The page of the documentation."""
    content = recorded()
    versions = ", ".join(f"{name} {version}" for name, version in content["versions"].items())
    head = (
        "# Models\n\n"
        "Made by `scripts/make_docs.py` from what `sensorium models` shows; don't edit it by hand.\n\n"
        "Architectures of the installed transformers, and how each runs. A class of this engine wins where there is "
        "one; `--model-impl transformers` asks for the modules of transformers all the same. How an architecture runs "
        "by those is decided at load, by comparing the model with its untouched modules, and the load report says what "
        "came of it, and why no faster way was right: this page only says what came of tiny random checkpoints.\n\n"
        f"Verified means: greedy tokens equal those of `generate` ({content['date']}; {versions}), "
        "of text and of the media that are named behind it, as a tiny model's processor makes them; and vectors and "
        "scores of models that don't generate equal those of their untouched modules. "
        "`sensorium verify` does more of that for a checkpoint of yours.\n\n"
    )
    ways = "".join(f"| {way} | {count} | {WAYS[way]} |\n" for way, count in counts(table).items())
    body = "".join(
        f"| `{row.architecture}` | {row.way} | {'yes' if row.is_verified else ''} | {_cell(row.note)} |\n"
        for row in table
    )
    return (
        f"{head}| way | architectures | what it is |\n|---|---|---|\n{ways}\n"
        f"| architecture | way | verified | note |\n|---|---|---|---|\n{body}"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")

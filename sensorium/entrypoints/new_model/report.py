"""What `sensorium new-model` says: whether the class runs without a line, what was found, and what is left to do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from sensorium.entrypoints import model_table
from sensorium.entrypoints.new_model.anatomy import Anatomy
from sensorium.entrypoints.new_model.skeleton import MARK


def already(anatomy: Anatomy) -> str:
    """How the architecture runs now."""
    row = next((each for each in model_table.rows() if each.architecture == anatomy.architecture), None)
    name, way = anatomy.architecture, model_table.UNKNOWN if row is None else row.way
    if way == model_table.NATIVE:
        return f"{name} has a class in this engine already; `sensorium serve` runs it. A file of yours comes before it."
    if way == model_table.NOT_SERVED:
        assert row is not None
        return f"{name} doesn't run by the modules of transformers ({row.note}): it needs a file."
    if way == model_table.UNKNOWN:
        return (
            f"{name}: loading finds out whether it runs by the modules of transformers. Try `sensorium verify` first."
        )
    return (
        f"{name} runs already, by the modules of transformers ({way}: {model_table.WAYS[way]}); `sensorium serve` "
        "needs no file. One of your own makes it faster."
    )


def summary(anatomy: Anatomy, path: Path, test: Path) -> Iterator[str]:
    """What was found and written, and how to go on."""
    yield ""
    for part in anatomy.parts:
        kind = "tower" if part.is_tower else "projector" if part.hf_class else "parameter"
        unknown = "" if part.made is not None else f"  {MARK}: how it is made"
        yield f"{kind:10} {part.name:24} {part.hf_class or '-':32} {part.num_parameters:>14,}{unknown}"
    decoder = anatomy.decoder
    by = decoder.architecture or "none here"
    yield f"{'decoder':10} {decoder.path:24} {decoder.hf_class:32} by {by}"
    for item in anatomy.items:
        seen = f"{item.num_rows} rows of an item of noise" if item.num_rows else "not tried: there is no processor"
        yield f"{item.modality:10} {item.placeholder or '-':24} {', '.join(item.tensors):32} {seen}"
    marks = path.read_text(encoding="utf-8").count(MARK)
    yield ""
    yield f"Wrote {path} ({marks} places marked {MARK}) and {test}. When they are filled in:"
    folder = anatomy.folder or "CHECKPOINT"
    random = "" if anatomy.has_weights else " --random-weights"
    yield f"    sensorium verify {folder} --plugin {path}{random}"

"""From the names of a checkpoint to those of a new class: a table of prefixes, found by comparing names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from sensorium.model_executor.models.utils import WeightsMapper

Renaming: TypeAlias = tuple[str, str | None]
"""A prefix in checkpoints, and what stands in its place; None: the weights are dropped."""
LANGUAGE_MODEL = "language_model"
"""What the decoder with its head is called in a new class."""
MAX_RENAMINGS, MAX_ROUNDS = 24, 4


def renamings(model: Any, decoder_path: str, parts: Sequence[str]) -> tuple[Renaming, ...]:
    """The table for checkpoints as the installed transformers names parameters, and as it saves them.

    The longest prefix stands first, since the first one that fits is taken.
    """
    own, saved = _own_names(model, decoder_path, parts), _saved_names(model)
    pairs = [(old, new) for name, new in own.items() for old in dict.fromkeys((name, saved.get(name, name)))]
    table: dict[str, str | None] = {}
    for _ in range(MAX_ROUNDS):  # a later entry may be in the way of an earlier one
        wrong = [(old, new) for old, new in pairs if applied(old, _sorted(table)) != new]
        if not wrong:
            break
        for old, new in wrong:
            if applied(old, _sorted(table)) != new:
                _add(table, old, new)
    return tuple(_sorted(table))[:MAX_RENAMINGS]


def applied(name: str, table: Sequence[Renaming]) -> str | None:
    """The new name, as `WeightsMapper` gives it."""
    return WeightsMapper(orig_to_new_prefix=dict(table)).map_name(name)


def _sorted(table: Mapping[str, str | None]) -> list[Renaming]:
    return sorted(table.items(), key=lambda each: -len(each[0]))


def _add(table: dict[str, str | None], old: str, new: str | None) -> None:
    """The shortest prefix for a name that the table doesn't have."""
    for num_common in range(old.count(".") + 1):
        old_prefix, new_prefix = _differing(old, new, num_common)
        if old_prefix not in table and old_prefix != new_prefix:
            table[old_prefix] = new_prefix
            return


def _own_names(model: Any, decoder_path: str, parts: Sequence[str]) -> dict[str, str | None]:
    """Each parameter of the model by its name, and its name in the new class."""
    parent, _, _ = decoder_path.rpartition(".")
    inside = f"{parent}." if parent else ""
    head = next((name for name, module in model.named_modules() if module is model.get_output_embeddings()), None)
    names: dict[str, str | None] = {}
    for name in model.state_dict():
        if name.startswith(f"{decoder_path}."):
            names[name] = f"{LANGUAGE_MODEL}.model.{name.removeprefix(f'{decoder_path}.')}"
        elif head is not None and name.startswith(f"{head}."):
            names[name] = f"{LANGUAGE_MODEL}.lm_head.{name.removeprefix(f'{head}.')}"
        else:
            own = name.removeprefix(inside)
            names[name] = own if own.split(".")[0] in parts else None
    return names


def _saved_names(model: Any) -> Mapping[str, str]:
    """Names in a checkpoint that transformers writes, where they are others; it keeps those of older versions."""
    from transformers import core_model_loading

    revert = getattr(core_model_loading, "revert_weight_conversion", None)
    if revert is None:
        return {}
    state = model.state_dict()
    of_tensor = {id(tensor): name for name, tensor in state.items()}
    try:
        saved = revert(model, state)
    except Exception:  # noqa: BLE001  tensors that are cut or joined can't be without memory
        return {}
    return {of_tensor[id(tensor)]: name for name, tensor in saved.items() if id(tensor) in of_tensor}


def _differing(old: str, new: str | None, num_common: int) -> Renaming:
    """The beginnings of two names, without the end that they have in common but for its first `num_common` parts."""
    if new is None:
        return old, None
    left, right = old.split("."), new.split(".")
    common: list[str] = []
    while left and right and left[-1] == right[-1] and (len(left) > 1 or len(right) == 1):
        common.insert(0, left.pop())
        right.pop()
    kept = common[:num_common]
    return _joined([*left, *kept]), _joined([*right, *kept])


def _joined(parts: Sequence[str]) -> str:
    return "".join(f"{part}." for part in parts)

"""Reads a checkpoint's folder: its JSON files, and which files hold its weights.

A checkpoint is not trusted. Its JSON is read with bounds, and malformed content is one clear error. File names in it
are checked before links are resolved: one that leads out of the folder is refused. Links inside the folder are
followed, since the model hub's cache is made of them.

Free of torch and transformers. Nothing here opens weights.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from sensorium.errors import ModelError, WeightsError

MAX_JSON_BYTES = 64 << 20
"""Bound on one JSON file. The index of a checkpoint with 100,000 tensors takes about 10 MiB."""
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
PICKLE_PATTERNS = ("*.bin", "*.pt", "*.pth", "*.ckpt")

TOKENIZER_CONFIG = "tokenizer_config.json"
_TOKENIZER_FILES = ("vocab_file", "merges_file", "tokenizer_file", "spm_file", "source_spm", "target_spm")
_FLOAT_TYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}
_SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")
_MAX_NAMES_IN_MESSAGE = 5


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a checkpoint; empty if there is no such file.

    Raises:
        ModelError: The file can't be read, is too large, or holds anything else.
    """
    content = _json_in(path)
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ModelError(
            f"{path.name} of the checkpoint: got a JSON {_json_type(content)}, expected an object. Correct the file."
        )
    return content


def read_json_list(path: Path) -> list[Any]:
    """The list in a JSON file of a checkpoint; empty if there is no such file. Raises as `read_json`."""
    content = _json_in(path)
    if content is None:
        return []
    if not isinstance(content, list):
        raise ModelError(
            f"{path.name} of the checkpoint: got a JSON {_json_type(content)}, expected an array. Correct the file."
        )
    return content


def _json_in(path: Path) -> Any:
    """What a JSON file holds; None if there is no such file."""
    if not path.exists():
        return None
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ModelError(
                f"{path.name} of the checkpoint: got {path.stat().st_size} bytes, expected at most {MAX_JSON_BYTES}. "
                "Replace the file."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{path.name} of the checkpoint: got a file that is no JSON ({type(error).__name__}: {error}), expected a "
            "JSON object. Download the file again, or correct it."
        ) from error
    if content is None:
        raise ModelError(f"{path.name} of the checkpoint: got a JSON null, expected an object. Correct the file.")
    return content


def member(folder: Path, name: object, named_by: str) -> Path:
    """The file of a folder that a name from the checkpoint stands for; it need not be there.

    Raises:
        ModelError: The name is no text, or leads out of the folder.
    """
    if not isinstance(name, str) or not _stays_inside(name):
        raise ModelError(
            f"{named_by}: got the file name {name!r:.120}, expected one of a file in the checkpoint's folder. "
            "Correct the name, and move the file into the folder."
        )
    return folder / name


def check_tokenizer_names(folder: Path) -> None:
    """Refuse a tokenizer whose settings name files outside of its folder, which transformers would open.

    Paths of the machine that it was saved on are left over in many; what isn't there can't be opened.

    Raises:
        ModelError: It names the file and where it is named.
    """
    settings = read_json(folder / TOKENIZER_CONFIG)
    names = settings.get("fast_tokenizer_files")
    for name in names if isinstance(names, list) else ():
        member(folder, name, f"fast_tokenizer_files in {TOKENIZER_CONFIG}")
    for key in _TOKENIZER_FILES:
        name = settings.get(key)
        if isinstance(name, str) and not _stays_inside(name) and "\0" not in name and (folder / name).is_file():
            member(folder, name, f"{key} in {TOKENIZER_CONFIG}")


def _stays_inside(name: str) -> bool:
    """Whether a name stands for a file in a folder or below, on every system."""
    if not 0 < len(name) <= 255 or any(ord(character) < 32 for character in name):
        return False
    posix, windows = PurePosixPath(name), PureWindowsPath(name)
    if posix.is_absolute() or windows.drive or windows.root:
        return False
    return bool(posix.parts) and ".." not in (*posix.parts, *windows.parts)


# Weights


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a checkpoint's weights, in reading order: those that Hugging Face reads.

    They are what `transformers_weights` in config.json names, else `model.safetensors`, else the files that the index
    names. Where there is neither, Hugging Face gives up; here all files are taken.

    Raises:
        ModelError: A name leads out of the folder, or the index is malformed.
        WeightsError: There are none, or a file that is named isn't there.
    """
    named = read_json(folder / "config.json").get("transformers_weights")
    if named is not None:
        return _named_files(folder, named)
    if (folder / SINGLE_NAME).is_file():
        return [folder / SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        return _files_of_index(folder, folder / INDEX_NAME)
    files = sorted(file for file in folder.glob("*.safetensors") if file.is_file())
    if not files:
        raise WeightsError(_no_weights_message(folder))
    _check_one_set(files)
    return files


def _named_files(folder: Path, name: object) -> list[Path]:
    file = member(folder, name, "transformers_weights in config.json")
    if not file.name.endswith((".safetensors", ".safetensors.index.json")):
        raise ModelError(
            f"transformers_weights in config.json: got {name!r:.120}, expected a *.safetensors file or the index of "
            "such files. Correct or remove it."
        )
    if not file.is_file():
        raise WeightsError(_missing_message(folder, "transformers_weights in config.json", [file.name]))
    return _files_of_index(folder, file) if file.name.endswith(".json") else [file]


def _files_of_index(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, Mapping) or not weight_map:
        got = "nothing" if not weight_map else f"a {_json_type(weight_map)}"
        raise ModelError(
            f"weight_map in {index.name}: got {got}, expected the names of weights and their files. Correct the index, "
            "or remove it if it belongs to other weights."
        )
    names = {str(name): name for name in weight_map.values()}
    files = [member(folder, name, f"weight_map in {index.name}") for _, name in sorted(names.items())]
    if missing := [file.name for file in files if not file.is_file()]:
        raise WeightsError(_missing_message(folder, index.name, missing))
    return files


def other_weight_files(folder: Path, read: Sequence[Path]) -> list[str]:
    """Names of safetensors files in the folder that are not among those that are read."""
    return sorted(file.name for file in folder.glob("*.safetensors") if file not in read)


def _check_one_set(files: Sequence[Path]) -> None:
    """Refuse shards of several sets beside each other, where no index says which belong together."""
    sets = {match.groups() for file in files if (match := _SHARD.fullmatch(file.name))}
    incomplete = any(sum(_set_of(file) == each for file in files) != int(each[1]) for each in sets)
    if len(sets) > 1 or incomplete:
        raise WeightsError(
            f"checkpoint files: got {_listing([file.name for file in files])}, expected one complete set of shards. "
            f"Remove files that don't belong, or add {INDEX_NAME}."
        )


def _set_of(file: Path) -> tuple[str, ...] | None:
    match = _SHARD.fullmatch(file.name)
    return None if match is None else match.groups()


def _missing_message(folder: Path, named_by: str, missing: Sequence[str]) -> str:
    others = [file.name for file in sorted(folder.glob("*.safetensors"))]
    there = f" There are {_listing(others)}: if those are the weights, remove {named_by}." if others else ""
    return (
        f"checkpoint files in {folder}: got no {_listing(missing)}, which {named_by} names, expected all of them. "
        f"Download the checkpoint again.{there}"
    )


def _no_weights_message(folder: Path) -> str:
    pickles = sorted(path.name for pattern in PICKLE_PATTERNS for path in folder.glob(pattern))
    if not pickles:
        return f"weights in {folder}: got no *.safetensors file, expected at least one. Check the model path."
    return (
        f"weights in {folder}: got {pickles[0]}, expected *.safetensors. Pickled files can run code and are never "
        "opened here; convert them on a machine you trust with transformers' "
        "`AutoModel.from_pretrained(...).save_pretrained(...)`."
    )


def _listing(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_MAX_NAMES_IN_MESSAGE])
    more = len(names) - _MAX_NAMES_IN_MESSAGE
    return f"{shown} and {more} more" if more > 0 else shown


def _json_type(value: object) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def first_float_type(folder: Path) -> str | None:
    """The type of the first floating-point tensor of a checkpoint, as torch names it; None if there is none.

    Raises what `weight_files` raises.
    """
    for file in weight_files(folder):
        for tensor in _header(file).values():
            found = _FLOAT_TYPES.get(tensor.get("dtype", "")) if isinstance(tensor, Mapping) else None
            if found is not None:
                return found
    return None


def _header(file: Path) -> Mapping[str, Any]:
    """What stands in front of a safetensors file's values; empty if that can't be read, which loading will tell."""
    try:
        with file.open("rb") as stream:
            size = int.from_bytes(stream.read(8), "little")
            content = json.loads(stream.read(size)) if size <= MAX_JSON_BYTES else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, Mapping) else {}

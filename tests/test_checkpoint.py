"""A checkpoint's folder: which files hold the weights, which names are refused, what malformed JSON is told."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from sensorium.checkpoint import MAX_JSON_BYTES, check_tokenizer_names, member, read_json, weight_files
from sensorium.errors import ModelError, SensoriumError, WeightsError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


def folder_of(path: Path, files: Sequence[str], index: object = None, config: Mapping[str, Any] | None = None) -> Path:
    """A folder with these files, all empty, and an index whose map this is."""
    for name in files:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    if index is not None:
        (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (path / "config.json").write_text(json.dumps(config or {}))
    return path


# Which files are read


@pytest.mark.parametrize(
    ("files", "index", "expected"),
    [
        ([SINGLE], None, [SINGLE]),
        ([SINGLE, *SHARDS], dict(zip("ab", SHARDS, strict=True)), [SINGLE]),
        ([SINGLE], dict(zip("ab", SHARDS, strict=True)), [SINGLE]),  # the index is stale
        ([SINGLE], {"a": "../elsewhere.safetensors"}, [SINGLE]),
        ([SINGLE], [], [SINGLE]),
        ([SINGLE, "consolidated.safetensors"], None, [SINGLE]),
        (SHARDS, dict(zip("ab", SHARDS, strict=True)), SHARDS),
        (SHARDS, {"a": SHARDS[1]}, SHARDS[1:]),  # partial: what is missing is found when the model is filled
        (["parts/x.safetensors"], {"a": "parts/x.safetensors"}, ["parts/x.safetensors"]),
        (SHARDS, None, SHARDS),  # Hugging Face refuses these two
        (["weights.safetensors"], None, ["weights.safetensors"]),
    ],
)
def test_the_files_are_those_that_hugging_face_reads(
    files: Sequence[str], index: object, expected: Sequence[str], tmp_path: Path
) -> None:
    """A model was saved anew over a folder with old shards and their index, and the old shards were served."""
    found = weight_files(folder_of(tmp_path, files, index))
    assert [str(file.relative_to(tmp_path)) for file in found] == list(expected)


def test_the_config_may_name_the_file(tmp_path: Path) -> None:
    config = {"transformers_weights": "other.safetensors"}
    assert weight_files(folder_of(tmp_path, [SINGLE, "other.safetensors"], config=config)) == [
        tmp_path / "other.safetensors"
    ]
    (tmp_path / "some.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    (tmp_path / "config.json").write_text(json.dumps({"transformers_weights": "some.safetensors.index.json"}))
    assert weight_files(tmp_path) == [tmp_path / SINGLE]


@pytest.mark.parametrize(
    ("files", "index", "message"),
    [
        (SHARDS[:1], dict(zip("ab", SHARDS, strict=True)), SHARDS[1]),
        (["new.safetensors"], {"a": SHARDS[0]}, r"There are new\.safetensors: if those are the weights, remove"),
        (SHARDS[:1], None, "one complete set of shards"),
        ([*SHARDS, "model-00001-of-00001.safetensors"], None, "one complete set of shards"),
        ([], None, "at least one"),
    ],
)
def test_files_that_lack_are_named(files: Sequence[str], index: object, message: str, tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=message):
        weight_files(folder_of(tmp_path, files, index))


@pytest.mark.parametrize("index", [{}, [], "x", 3, {"a": 3}, {"a": None}, {"a": ["b"]}, {"a": ""}, {"a": "x" * 5000}])
def test_malformed_maps_are_one_sentence(index: object, tmp_path: Path) -> None:
    with pytest.raises(SensoriumError, match="weight_map"):
        weight_files(folder_of(tmp_path, SHARDS, index))


# Names that lead out of the folder


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "a/../../x.safetensors",
        "a/..",
        "..",
        ".",
        "/etc/x.safetensors",
        "//host/x.safetensors",
        "..\\x.safetensors",
        "C:\\x.safetensors",
        "C:x.safetensors",
        "\\x.safetensors",
        "a\0b.safetensors",
        "a\n.safetensors",
        "",
    ],
)
@pytest.mark.parametrize("place", ["index", "config"])
def test_a_name_that_leads_out_of_the_folder_is_refused(name: str, place: str, tmp_path: Path) -> None:
    """An index named `../outside.safetensors`, and the file outside the checkpoint's folder was read and served."""
    (tmp_path / "x.safetensors").touch()
    (tmp_path / "inside").mkdir()
    index, config = ({"a": name}, {}) if place == "index" else (None, {"transformers_weights": name})
    folder = folder_of(tmp_path / "inside", [] if place == "index" else [SINGLE], index, config)
    with pytest.raises(ModelError, match=r"expected one of a file in the checkpoint's folder"):
        weight_files(folder)


def test_links_of_the_hub_cache_are_followed(tmp_path: Path) -> None:
    """The cache holds a snapshot of links to blobs in another folder: the name counts, not the link."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "main"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / "abc").write_text("{}")
    (snapshot / SINGLE).symlink_to(blobs / "abc")
    assert weight_files(snapshot) == [snapshot / SINGLE]
    assert member(snapshot, SINGLE, "here").read_text() == "{}"


# JSON


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe{}", b"[1]", b"null", b"3", b'"x"', b"[" * 100_000, b'{"a": }'],
    ids=lambda content: str(content[:6]),
)
def test_malformed_json_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    """Malformed configs ended in tracebacks of the libraries that read them."""
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"^config\.json of the checkpoint: got"):
        read_json(tmp_path / "config.json")


def test_huge_json_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(MAX_JSON_BYTES + 1)
    with pytest.raises(ModelError, match="at most"):
        read_json(tmp_path / "config.json")


def test_a_folder_in_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ModelError, match=r"config\.json"):
        read_json(tmp_path / "config.json")
    shutil.rmtree(tmp_path / "config.json")
    assert read_json(tmp_path / "config.json") == {}


@pytest.mark.parametrize("key", ["fast_tokenizer_files", "vocab_file", "tokenizer_file"])
def test_a_tokenizer_names_no_files_outside(key: str, tmp_path: Path) -> None:
    (tmp_path / "inside").mkdir()
    (tmp_path / "tokenizer.0.1.json").write_text("{}")
    folder = tmp_path / "inside"

    def write(name: str) -> None:
        settings = {key: [name] if key == "fast_tokenizer_files" else name}
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))

    for name in ("../tokenizer.0.1.json", str(tmp_path / "tokenizer.0.1.json")):
        write(name)
        with pytest.raises(ModelError, match=f"{key} in tokenizer_config"):
            check_tokenizer_names(folder)
    write("tokenizer.0.1.json")
    check_tokenizer_names(folder)
    if key != "fast_tokenizer_files":
        write("/home/somebody/that/saved/it/vocab.json")  # stands in many checkpoints, and is nowhere
        check_tokenizer_names(folder)

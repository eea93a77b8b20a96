"""The output of a batch run: what an earlier run left is taken in, a torn line repaired, anything else left alone."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from sensorium.entrypoints.batch.input_file import BatchInput
from sensorium.entrypoints.batch.output_file import BatchOutput
from sensorium.entrypoints.batch.records import Record, Response, parse_line
from sensorium.errors import ConfigError, InvalidRequestError


def answered(custom_id: str, status: int = 200) -> Record:
    return Record.answered(custom_id, Response(status, "r", msgspec.Raw(b'{"text": "\xc3\xa9"}')))


def written(path: Path, *records: Record) -> bytes:
    with BatchOutput(str(path)) as output:
        for record in records:
            output.write(record)
    return path.read_bytes()


def test_a_run_goes_on_where_another_ended(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    before = written(path, answered("a"), Record.refused(None, 2, "no"), answered("b", 400))
    with BatchOutput(str(path)) as output:
        assert (output.done_ids, output.done_lines) == ({"a", "b"}, {2})
        output.write(answered("c"))
    assert path.read_bytes().startswith(before)
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [record["custom_id"] for record in records] == ["a", None, "b", "c"]
    assert records[0]["response"] == {"status_code": 200, "request_id": "r", "body": {"text": "é"}}
    assert records[1]["error"] == {"code": "invalid_line", "message": "line 2: no", "line": 2}


@pytest.mark.parametrize("keep", range(1, 140, 9))
def test_a_torn_last_line_is_taken_off(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "out.jsonl"
    whole = written(path, answered("a"))
    path.write_bytes(whole + whole[:keep])
    with BatchOutput(str(path)) as output:
        assert output.done_ids == {"a"}
    assert path.read_bytes() == whole


def test_failures_are_asked_again_if_wanted(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    written(path, answered("a"), answered("b", 503), Record.refused("c", 3, "no"), answered("d"))
    with BatchOutput(str(path), retry_failed=True) as output:
        assert (output.done_ids, output.done_lines) == ({"a", "d"}, set())
        output.write(answered("b"))
    assert [json.loads(line)["custom_id"] for line in path.read_text().splitlines()] == ["a", "d", "b"]
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("content", ['{"custom_id": "a"}\n', "notes\n", "notes", '{"custom_id": "a"'])
@pytest.mark.parametrize("retry_failed", [False, True])
def test_a_file_of_something_else_is_left_alone(tmp_path: Path, content: str, retry_failed: bool) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(ConfigError, match="expected a new file or one that this command wrote"):
        BatchOutput(str(path), retry_failed=retry_failed)
    assert path.read_text() == content


def test_two_runs_do_not_write_one_file(tmp_path: Path) -> None:
    path = str(tmp_path / "out.jsonl")
    with BatchOutput(path), pytest.raises(ConfigError, match="another run is writing"):
        BatchOutput(path)
    with pytest.raises(ConfigError, match="expected a file to write"):
        BatchOutput(str(tmp_path))


def test_input_lines_are_numbered_and_bounded(tmp_path: Path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"one\n\n  \r\ntwo\r\n" + b"x" * 100 + b"\nlast")
    with BatchInput(str(path), max_line_bytes=10) as lines:
        assert lines.num_lines == 4
        assert list(lines) == [(1, b"one"), (4, b"two"), (5, b"x" * 12), (6, b"last")]


@pytest.mark.parametrize("name", ["https://example.com/in.jsonl", "nowhere.jsonl"])
def test_input_that_is_no_file(name: str) -> None:
    with pytest.raises(ConfigError, match="input: got"):
        BatchInput(name, max_line_bytes=10)


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b"{", "no JSON"),
        (b"[" * 100_000, "no JSON|no request"),
        (b"[]", "no request"),
        (b'{"custom_id": "a", "url": "/x"}', "body"),
        (b'{"url": "/x", "body": {}}', "custom_id"),
        (b'{"custom_id": 1, "url": "/x", "body": {}}', "custom_id"),
        (b'{"custom_id": "", "url": "/x", "body": {}}', "custom_id: got 0 characters"),
        (b'{"custom_id": "a", "url": "/x", "body": []}', "body: got something else"),
        (b'{"custom_id": "a", "url": "/x", "body": {}, "method": "GET"}', "method: got 'GET'"),
        (b'{"custom_id": "a", "url": "/x", "body": {}, "more": 1}', "more"),
        (b'{"custom_id": "a", "url": "/x", "body": {"stream": true}}', "body.stream: got true"),
        (b'{"custom_id": "\xff", "url": "/x", "body": {}}', "no JSON"),
    ],
)
def test_lines_that_are_no_requests(line: bytes, match: str) -> None:
    with pytest.raises(InvalidRequestError, match=match):
        parse_line(line)

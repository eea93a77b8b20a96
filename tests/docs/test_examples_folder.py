"""The scripts of `examples/` run as they stand, outside of the repository, and print what they should.

Those that load the model in their own process share one, since most of a start is imports; each still begins as
`__main__`, with names of its own.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from sensorium.media.encode import encode_video
from tests.helpers.waiting import HANG_S

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PARTS = ("colour_namer", "serving")
"""Files that other scripts use."""

EXPECTED = {
    "chat_with_a_picture": (
        r"What is in the image\?\n  There are a red circle at the top left and a blue square at the bottom right\.\n"
        r"  \(0 of \d+ prompt tokens were cached\)\n"
        r"How many shapes are there\?\n  There are 2 shapes\.\n  \([1-9]\d* of \d+ prompt tokens were cached\)\n"
    ),
    "folder_of_pictures": "".join(
        r'\{"file": "broken\.png", "error": "image can\'t be read: .*"\}\n'
        if name == "broken"
        else rf'\{{"file": "{name}\.png", "answer": "There is a {name} square in the center\."\}}\n'
        for name in ("black", "blue", "broken", "green", "red")
    ),
    "structured_answers": "".join(
        rf"\('{kind}', '{color}'\) -> \{{'color': '{color}', 'kind': '{kind}'\}}\n"
        for kind in ("circle", "square")
        for color in ("red", "green", "blue", "yellow")
    ),
    "video_question": (
        r"What moves\?\n  The green circle moves to the right\.  \(the clip takes \d+ prompt tokens\)\n"
        r"How many shapes are there\?\n  There is 1 shape\.  .*\n"
        r'Which way .*\n  \{"direction": "to the right"\}  .*\n'
    ),
    "embeddings": (
        r"vectors \(5, 256\)\n 1\.000  a red circle\n 1\.000  the same again\n"
        r" 0\.\d+  a red circle elsewhere\n 0\.\d+  a blue circle\n +-?0\.\d+  a text\n"
    ),
    "rerank": r"(?: 0\.\d+  (?:There is a|The) .+\n){3}",
    "evaluation": r"circle   8 of 8 right\nsquare   8 of 8 right\ndiamond  8 of 8 right\nall      100%\n",
    "own_model": r"tier: 0 auto-split\nnavy -> blue\ngold -> yellow\nred and yellow -> orange\n",
}
ALONE = {
    "asyncio_streams": "".join(
        rf"(?=(?:.*\n)*{color}: There is a {color} circle in the center\.\n)" for color in ("red", "green", "blue")
    )
    + r"(?:.+\n){3}",
    "tool_call": r"2 circles: call order with \{'count': 2\}\n3 circles: call order with \{'count': 3\}\n",
    "transcription": r"seven_three_nine\.mp3: 'seven three nine'\nas a stream: \[seven three nine\]\n",
}
"""Processes or servers of their own."""

TOGETHER = """
import contextlib, io, json, runpy, sys
commands = json.loads(sys.argv[1])
printed = []
for command in commands:
    sys.argv = command
    with contextlib.redirect_stdout(io.StringIO()) as output:
        runpy.run_path(command[0], run_name="__main__")
    printed.append(output.getvalue())
print(json.dumps(printed))
"""
"""Runs scripts one after another; prints what they printed as a list."""


def run(*arguments: str, folder: Path) -> str:
    """What a Python process prints, in a folder of its own."""
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(folder)},
        capture_output=True,
        text=True,
        timeout=HANG_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def given_media(folder: Path) -> dict[str, str]:
    """For each script that takes a path: one, of media that differ from those that it draws itself."""
    frames = []
    for top in (10, 20, 30, 40, 50, 60, 70, 80):
        frame = Image.new("RGB", (112, 112), "white")
        ImageDraw.Draw(frame).rectangle((40, top, 64, top + 24), fill="blue")
        frames.append(np.asarray(frame))
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.fromarray(frames[4]).save(pictures / "own.png")
    (folder / "own.mp4").write_bytes(encode_video(np.stack(frames), fps=2))
    return {
        "chat_with_a_picture": str(pictures / "own.png"),
        "folder_of_pictures": str(pictures),
        "video_question": str(folder / "own.mp4"),
    }


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, bool], str]:
    """What scripts print that load the model in their own process, by name and by whether they were given a path."""
    folder = tmp_path_factory.mktemp("examples")
    commands = {(name, False): [str(EXAMPLES / f"{name}.py")] for name in EXPECTED}
    for name, path in given_media(folder).items():
        commands[name, True] = [str(EXAMPLES / f"{name}.py"), path]
    lines = run("-c", TOGETHER, json.dumps(list(commands.values())), folder=folder).splitlines()
    return dict(zip(commands, json.loads(lines[-1]), strict=True))


def test_every_script_is_run_and_listed() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {*EXPECTED, *ALONE, *PARTS}
    listed = re.findall(r"\[(\w+)\.py\]\(\1\.py\)", (EXAMPLES / "README.md").read_text())
    assert set(listed) == names


@pytest.mark.parametrize("name", EXPECTED)
def test_a_script_prints_what_it_should(name: str, printed: dict[tuple[str, bool], str]) -> None:
    assert re.fullmatch(EXPECTED[name], printed[name, False]), printed[name, False]


@pytest.mark.parametrize("name", ALONE)
def test_a_script_with_processes_of_its_own(name: str, tmp_path: Path) -> None:
    """Where a stream's pieces end depends on how fast they are read: slow readers get several tokens at once."""
    text = run(str(EXAMPLES / f"{name}.py"), folder=tmp_path)
    whole = text.replace("|", "").replace("] [", "")
    assert re.fullmatch(ALONE[name], whole), text


def test_a_path_that_is_given_is_looked_at_instead(printed: dict[tuple[str, bool], str]) -> None:
    assert "There is a blue square" in printed["chat_with_a_picture", True]
    [line] = printed["folder_of_pictures", True].splitlines()
    assert json.loads(line)["file"] == "own.png"
    assert "The blue square moves down." in printed["video_question", True]


def test_every_script_that_offers_a_path_was_given_one(printed: dict[tuple[str, bool], str]) -> None:
    offers = {name for name in EXPECTED if f"{name}.py [" in (EXAMPLES / f"{name}.py").read_text()}
    assert offers == {name for name, is_given in printed if is_given}

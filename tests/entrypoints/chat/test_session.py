"""The chat without a terminal: what lines mean, what commands do, what an interrupt and an error leave behind."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sensorium.entrypoints.chat.answers import LoopThread
from sensorium.entrypoints.chat.attachments import Attachment, attach
from sensorium.entrypoints.chat.backends import Piece
from sensorium.entrypoints.chat.lines import parse_line
from sensorium.entrypoints.chat.session import ChatSession
from sensorium.entrypoints.chat.terminal import Terminal
from sensorium.errors import EngineDeadError, InvalidRequestError
from sensorium.media.encode import encode_audio, encode_video
from tests.helpers.mixed_requests import picture
from tests.helpers.waiting import until
from tests.media import samples


class Script(Terminal):
    """Lines that are there already; what is written is kept. `on_write` may interrupt."""

    def __init__(self, *lines: str, is_interactive: bool = False) -> None:
        self.is_interactive = is_interactive
        self._has_style = False
        self.lines = list(lines)
        self.written: list[str] = []
        self.complaints: list[str] = []
        self.on_write: Callable[[str], None] = lambda _: None

    def _read_one(self, prompt: str) -> str | None:
        return self.lines.pop(0) if self.lines else None

    def write(self, text: str, *, is_dim: bool = False) -> None:
        self.written.append(text)
        self.on_write(text)

    def complain(self, text: str) -> None:
        self.complaints.append(text)


class Echo:
    """Answers with what was said, letter by letter."""

    model = "echo"

    def __init__(self) -> None:
        self.asked: list[list[dict[str, Any]]] = []
        self.num_open = 0

    async def stream(self, messages: list[dict[str, Any]]) -> AsyncIterator[Piece]:
        self.asked.append(messages)
        content = messages[-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if text == "fail":
            raise InvalidRequestError("text: got 'fail', expected better.")
        if text == "die":
            raise EngineDeadError("the engine has ended.")
        self.num_open += 1
        try:
            yield Piece("hm", is_reasoning=True)
            for letter in text:
                yield Piece(letter)
        finally:
            self.num_open -= 1

    async def close(self) -> None:
        pass


@pytest.fixture
def loop() -> Iterator[LoopThread]:
    thread = LoopThread()
    yield thread
    thread.close()


def chat(loop: LoopThread, script: Script, system: str | None = None) -> tuple[int, Echo]:
    echo = Echo()
    return ChatSession(loop, echo, script, system).run(), echo


def test_turns_follow_each_other_and_answers_are_all_that_is_written(loop: LoopThread) -> None:
    script = Script("hello", "", "again", "/reset", "fresh")
    status, echo = chat(loop, script, system="Be kind")
    assert status == 0
    assert "".join(script.written) == "hello\nagain\nfresh\n"
    system = {"role": "system", "content": "Be kind"}
    first = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hello"}]
    assert echo.asked[1] == [system, *first, {"role": "user", "content": "again"}]
    assert echo.asked[2] == [system, {"role": "user", "content": "fresh"}]


def test_files_go_with_messages_and_stay_in_the_conversation(loop: LoopThread, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a b.png")
    picture(2).save(tmp_path / "c.png")
    named, saved = tmp_path / "c.png", tmp_path / "saved.json"
    lines = [f"/image '{tmp_path}/a b.png'", f"what is @{named} ?", "and now?", f"/save {saved}"]
    _, echo = chat(loop, Script(*lines))
    parts = echo.asked[0][0]["content"]
    assert [part["type"] for part in parts] == ["image_url", "text", "image_url", "text"]
    assert parts[0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert [part.get("text") for part in parts] == [None, "what is", None, "?"]
    assert echo.asked[1][0] == echo.asked[0][0]
    messages = json.loads(saved.read_text())["messages"]
    assert messages[0]["content"][2] == {"type": "image_url", "image_url": {"url": str(named)}}
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2


def test_an_interrupt_stops_the_answer_and_keeps_what_came(loop: LoopThread) -> None:
    script = Script("abcdef", "next", is_interactive=True)

    def interrupt(text: str) -> None:
        if text == "c":
            raise KeyboardInterrupt

    script.on_write = interrupt
    status, echo = chat(loop, script)
    assert (status, "".join(script.written).count("(stopped)")) == (0, 1)
    assert echo.asked[1][1] == {"role": "assistant", "content": "abc"}
    until(lambda: not echo.num_open, "the stream that was stopped is still open")


def test_errors_end_an_answer_and_not_the_chat(loop: LoopThread) -> None:
    script = Script("fail", "/nonsense", "/image", "/image nowhere.png", "@nowhere.png", "good")
    status, echo = chat(loop, script)
    assert status == 1, "somebody who reads a pipe wants to know"
    assert [complaint.partition(":")[0] for complaint in script.complaints] == [
        "text",
        "command",
        "media",
        "media",
        "media",
    ]
    assert echo.asked[-1] == [{"role": "user", "content": "good"}], "what failed is not part of the conversation"
    with pytest.raises(EngineDeadError):
        chat(loop, Script("die", "more"))


def test_media_wait_for_a_question_that_succeeds(loop: LoopThread, tmp_path: Path) -> None:
    picture(1).save(tmp_path / "a.png")
    _, echo = chat(loop, Script(f"{tmp_path}/a.png", "fail", "what?"))
    assert [part["type"] for part in echo.asked[1][0]["content"]] == ["image_url", "text"]


def test_commands(loop: LoopThread, tmp_path: Path) -> None:
    script = Script("/system", "/system Be brief", "/system", "hi", "/help", "/save", "/quit", "never")
    _, echo = chat(loop, script)
    text = "".join(script.written)
    assert text.startswith("(no system text)\nBe brief\nhi\n/image PATH...")
    assert "never" not in text
    assert script.complaints == ["save: got no path, expected a file. Give a path."]
    assert echo.asked[0][0] == {"role": "system", "content": "Be brief"}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [(["a\\", "b"], "a\nb"), (['"""', "a", "", "b", '"""'], "a\n\nb"), (['"""a', 'b"""'], "a\nb"), (['"""a"""'], "a")],
)
def test_lines_that_go_on(loop: LoopThread, lines: list[str], expected: str) -> None:
    _, echo = chat(loop, Script(*lines))
    assert [asked[-1]["content"] for asked in echo.asked] == [expected]


def names(line: str) -> list[str]:
    return [each.name if isinstance(each, Attachment) else f"[{each}]" for each in parse_line(line)]


def test_what_names_a_file_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.png", "my cat.png"):
        picture(1).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("notes")
    root = str(tmp_path)
    assert names("see @a.png and @a.png") == ["[see]", "a.png", "[and]", "a.png"]
    assert names(f"{root}/a.png") == [f"{root}/a.png"]
    assert names(f"'{root}/my cat.png' or {root}/my\\ cat.png?") == [f"{root}/my cat.png", f"[or {root}/my\\ cat.png?]"]
    assert names(f"{root}/my\\ cat.png") == [f"{root}/my cat.png"]
    assert names(f"file://{root}/a.png") == [f"file://{root}/a.png"]
    assert names(f"{root}/notes.txt is a/b, don't ask a.png or @anna's friend @anna") == [
        f"[{root}/notes.txt is a/b, don't ask a.png or @anna's friend @anna]"
    ]
    assert names("@https://example.com/a.png what?") == ["https://example.com/a.png", "[what?]"]
    assert names("https://example.com/a.png") == ["[https://example.com/a.png]"]
    with pytest.raises(InvalidRequestError, match="expected a file"):
        parse_line("@b.png")


def test_what_a_file_is(tmp_path: Path) -> None:
    samples_of = {
        "picture.jpg": ("image", "image_url"),
        "picture.gif": ("image", "image_url"),
        "clip.mp4": ("video", "video_url"),
        "clip.mkv": ("video", "video_url"),
        "sound.wav": ("audio", "input_audio"),
        "sound.mp3": ("audio", "input_audio"),
        "sound.flac": ("audio", "audio_url"),
        "sound.m4a": ("audio", "audio_url"),
    }
    for name, (modality, kind) in samples_of.items():
        path = tmp_path / name
        form = name.partition(".")[2]
        if modality == "image":
            picture(1).save(path)
        elif modality == "video":
            path.write_bytes(encode_video(samples.numbered_frames(4), format=form))
        else:
            path.write_bytes(encode_audio(samples.tone(0.2, 16000), 16000, form))
        found = attach(str(path))
        assert (found.modality, found.part["type"]) == (modality, kind), name
        if form != "m4a":  # a container that says no more than that it holds something
            nameless = tmp_path / "nameless"
            nameless.write_bytes(path.read_bytes())
            assert attach(str(nameless)).modality == modality
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(InvalidRequestError, match="neither a picture nor a clip nor a sound"):
        attach(str(tmp_path / "notes.txt"))
    assert attach(str(tmp_path / "notes.txt"), "audio").modality == "audio"

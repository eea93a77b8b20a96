"""`/v1/audio/transcriptions`: what the bundled model hears, through the official client, and uploads of no use."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from sensorium import LLM, SamplingParams
from sensorium.media import MediaLimits
from sensorium.media.encode import encode_audio
from tests.entrypoints.served import SETTINGS, Served, served
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S
from tests.media import samples
from training.speech import SAMPLE_RATE, SpeechBank

MAX_AUDIO_BYTES = 1_500_000
BANK = Path(__file__).parents[1] / "training" / "spoken_words.npz"


def spoken(*words: str, format: str = "wav") -> bytes:
    """A sound in which a held-out voice says the words."""
    bank = SpeechBank.load(BANK)
    pause = np.zeros(SAMPLE_RATE // 10, np.float32)
    pieces = [piece for word in words for piece in (bank.waveforms[word][0], pause)]
    return encode_audio(np.concatenate([pause, *pieces]), SAMPLE_RATE, format)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("demo", limits=MediaLimits(max_audio_bytes=MAX_AUDIO_BYTES), max_model_len=2048) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as client:
        yield client


@pytest.mark.parametrize("format", ["wav", "flac", "mp3"])
def test_spoken_words_are_written_down(client: openai.OpenAI, format: str) -> None:
    file = (f"../../{format}", spoken("seven", "three", "nine", format=format))
    answer = client.audio.transcriptions.create(model="tiny", file=file)
    assert answer.text == "seven three nine"
    usage = answer.usage
    assert usage is not None
    assert usage.type == "tokens"
    assert usage.input_token_details is not None
    assert 25 < (usage.input_token_details.audio_tokens or 0) < usage.input_tokens
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens


def test_forms_of_the_answer(client: openai.OpenAI) -> None:
    file = ("a.wav", spoken("one", "two"))
    assert client.audio.transcriptions.create(model="tiny", file=file, response_format="text") == "one two"  # type: ignore[comparison-overlap]
    verbose = client.audio.transcriptions.create(
        model="tiny", file=file, response_format="verbose_json", language="en", temperature=0
    )
    assert (verbose.text, verbose.language) == ("one two", "en")
    assert verbose.duration == pytest.approx(len(spoken("one", "two")) / 2 / SAMPLE_RATE, abs=0.01)
    silence = encode_audio(np.zeros(SAMPLE_RATE, np.float32), SAMPLE_RATE, "wav")
    assert client.audio.transcriptions.create(model="tiny", file=silence).text == ""


def test_a_stream_says_the_same_in_pieces(server: Served) -> None:
    async def run() -> None:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            file = ("a.wav", spoken("one", "two", "red"))
            stream = await client.audio.transcriptions.create(model="tiny", file=file, stream=True)
            events = [event async for event in stream]
        deltas, done = events[:-1], events[-1]
        assert {event.type for event in deltas} == {"transcript.text.delta"}
        assert len(deltas) > 1
        assert done.type == "transcript.text.done"
        assert "".join(event.delta for event in deltas if event.type == "transcript.text.delta") == done.text
        assert done.text == "one two red"
        assert done.usage is not None
        assert done.usage.output_tokens > 3

    asyncio.run(run())


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"language": "de"}, "language: got 'de', expected one of ['en']"),
        ({"language": "klingon"}, "language: got 'klingon'"),
        ({"response_format": "srt"}, "response_format: got 'srt'"),
        ({"response_format": "vtt"}, "response_format: got 'vtt'"),
        ({"response_format": "text", "stream": "true"}, "response_format: got 'text' with stream"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities: got 'word', expected none"),
        ({"include[]": "logprobs"}, "include: got 'logprobs', expected some of"),
        ({"chunking_strategy": "auto"}, "chunking_strategy: got 'auto', expected null"),
        ({"made_up": "1"}, "made_up: got a field"),
        ({"temperature": "hot"}, "temperature: got 'hot', expected a number"),
        ({"temperature": "nan"}, "temperature"),
        ({"temperature": "-1"}, "temperature: got -1"),
        ({"stream": "perhaps"}, "stream: got"),
        ({"max_tokens": "0"}, "max_tokens: got 0"),
        ({"prompt": "x" * 70_000}, "prompt: got more than 65536 bytes"),
        ({"prompt": "x" * 60_000}, "too long"),
        ({"prompt": "<|AUDIO|><|AUDIO|>"}, "2 audio placeholders"),
        ({str(number): "x" for number in range(40)}, "parts"),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:24],
)
def test_a_bad_field_is_refused_by_name(http: httpx.Client, fields: dict[str, str], text: str) -> None:
    response = http.post("/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", spoken("one"))})
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("files", "status", "text"),
    [
        ({"file": b""}, 400, "file: got nothing"),
        ({"audio": spoken("one")}, 400, "audio: got a file, expected none there"),
        ({"file": b"no sound at all"}, 415, "audio"),
        ({"file": spoken("one")[:40]}, 400, "audio"),
        ({"file": b"x" * (MAX_AUDIO_BYTES + 1)}, 413, "max_audio_bytes"),
        ({"file": samples.sound("wav", 30.2, 16_000)}, 400, "got a sound of 30.2 s, expected at most the 30 s"),
        ([("file", spoken("one")), ("file", spoken("two"))], 400, "file: got it twice"),
    ],
    ids=["empty", "other-name", "noise", "truncated", "large", "long", "twice"],
)
def test_a_file_that_is_none_is_refused(server: Served, http: httpx.Client, files: Any, status: int, text: str) -> None:
    response = http.post("/v1/audio/transcriptions", data={"model": "tiny"}, files=files)
    assert response.status_code == status, response.text
    assert text in response.json()["error"]["message"]
    server.settle()


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("application/json", b"{}"),
        ("multipart/form-data", b""),
        ("multipart/form-data; boundary=x", b""),
        ("multipart/form-data; boundary=x", b"--x\r\n"),
        ("multipart/form-data; boundary=x", b"--y\r\n\r\n\r\n--y--"),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="file"\r\n\r\nRIFF'),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\nRIFF\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"A: b\r\n" * 5000 + b"\r\n\r\n--x--\r\n"),
        ("multipart/form-data; boundary=x", b"--x\r\nA: " + b"b" * 500_000 + b"\r\n\r\n\r\n--x--\r\n"),
        ("multipart/form-data; boundary=" + "x" * 9000, b"--x\r\n"),
    ],
)
def test_a_body_that_is_no_upload_is_refused(http: httpx.Client, kind: str, body: bytes) -> None:
    response = http.post("/v1/audio/transcriptions", content=body, headers={"Content-Type": kind})
    assert response.status_code == 400, response.text
    assert "the body: got" in response.json()["error"]["message"]


def send_part(server: Served, num_declared: int, num_sent: int) -> socket.socket:
    """A connection on which an upload has begun."""
    address = server.url.removeprefix("http://").split(":")
    head = (
        "POST /v1/audio/transcriptions HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
    )
    part = '--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
    connection = socket.create_connection((address[0], int(address[1])), timeout=HANG_S)
    connection.sendall(f"{head}Content-Length: {num_declared}\r\n\r\n{part}".encode() + b"x" * num_sent)
    return connection


def test_a_large_file_is_refused_while_it_is_read(server: Served) -> None:
    with send_part(server, 100_000_000, MAX_AUDIO_BYTES + 1) as connection:
        answer = connection.recv(65536)
    assert b" 413 " in answer.split(b"\r\n")[0]


def test_an_upload_that_breaks_off_and_a_sound_that_was_heard_leave_nothing(server: Served) -> None:
    send_part(server, 1_000_000, 500_000).close()
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        stream = client.audio.transcriptions.create(model="tiny", file=spoken("one", "two"), stream=True)
        next(iter(stream))
        stream.close()
        assert client.audio.transcriptions.create(model="tiny", file=spoken("one")).text == "one"
    server.settle()
    assert server.engine.load().num_media_bytes == 0


def test_a_model_that_is_asked_in_words_is_not_told_to_translate(http: httpx.Client) -> None:
    response = http.post("/v1/audio/translations", files={"file": ("a.wav", spoken("one"))})
    assert response.status_code == 400
    assert "asked in words, expected a model of speech" in response.json()["error"]["message"]


def test_any_model_that_hears_is_asked_as_the_operator_says() -> None:
    path, instruction = make_checkpoint("qwen2_audio"), "Put it in writing."
    settings = {"transcription_instruction": instruction, "transcription_answer": "{text}"}
    sound = samples.sound("wav", 0.5, 16_000)
    part = {"type": "audio", "audio": sound}
    chat = [{"role": "user", "content": [part, {"type": "text", "text": f"{instruction} The language is French."}]}]
    params = SamplingParams(temperature=0.0, max_tokens=8)
    (expected,) = LLM(str(path), **SETTINGS).chat(chat, params)[0].outputs
    with (
        served(path, settings, max_model_len=104) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
    ):
        create = client.audio.transcriptions.create
        answer = create(model="tiny", file=sound, language="fr", extra_body={"max_tokens": 8})
        assert answer.text == expected.text
        with pytest.raises(openai.BadRequestError, match="doesn't end"):
            create(model="tiny", file=sound)
        with pytest.raises(openai.APIError, match="doesn't end"):
            list(create(model="tiny", file=sound, stream=True))


def test_a_model_that_hears_nothing_says_so() -> None:
    with (
        served(make_checkpoint("llama")) as running,
        openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client,
        pytest.raises(openai.BadRequestError, match="takes no audio"),
    ):
        client.audio.transcriptions.create(model="tiny", file=b"x")

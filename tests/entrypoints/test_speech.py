"""A model of speech behind `/v1/audio`: its tokens and times are those of Hugging Face's own `generate`, for sounds of
any length."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch
from transformers import GenerationConfig, WhisperFeatureExtractor

from sensorium import LLM, SamplingParams
from sensorium.entrypoints.openai import windows
from sensorium.inputs.speech import Segment, SpeechTokens, segments_of, subtitles
from sensorium.media.audio import decode_audio
from sensorium.media.encode import encode_audio
from sensorium.timestamps import TimestampRules
from tests.entrypoints.served import SETTINGS, Served, served
from tests.helpers.checkpoints import WHISPER_TOKENS, make_checkpoint, make_hf_model, make_tokenizer, whisper_ids
from tests.helpers.waiting import HANG_S

RATE = 16_000
TOKENS = 24
"""Of each window. A model with random weights doesn't end by itself."""
PATH = "/v1/audio/transcriptions"


def sound(seconds: float, seed: int = 0) -> bytes:
    """A tone for each half second."""
    rng = np.random.default_rng(seed)
    parts = []
    for _ in range(10):
        times = np.arange(RATE // 2) / RATE
        parts.append(rng.uniform(0.05, 0.9) * np.sin(2 * np.pi * rng.uniform(100, 6000) * times))
    return encode_audio(np.concatenate(parts)[: int(seconds * RATE)].astype(np.float32), RATE, "wav")


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("whisper"), max_model_len=448) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=HANG_S, trust_env=False) as client:
        yield client


@pytest.fixture(scope="module")
def reference() -> Any:
    model = make_hf_model("whisper")
    model.generation_config = GenerationConfig.from_pretrained(make_checkpoint("whisper"))
    return model


@torch.inference_mode()
def generated(model: Any, data: bytes, **options: Any) -> Any:
    """What Hugging Face makes of a sound."""
    samples, _ = decode_audio(data)
    extractor = WhisperFeatureExtractor.from_pretrained(make_checkpoint("whisper"))
    is_long = len(samples) > RATE
    features = extractor(
        samples,
        sampling_rate=RATE,
        truncation=False,
        padding="longest" if is_long else "max_length",
        return_tensors="pt",
    )["input_features"]
    return model.generate(features, max_new_tokens=TOKENS, do_sample=False, return_segments=True, **options)


def text_ids(token_ids: Any) -> list[int]:
    end = make_hf_model("whisper").config.eos_token_id
    return [each for each in token_ids.tolist() if each < end]


@pytest.mark.parametrize("task", ["transcribe", "translate"])
@pytest.mark.parametrize("seconds", [0.4, 1.0, 3.3])
def test_segments_and_times_equal_hugging_face(http: httpx.Client, reference: Any, seconds: float, task: str) -> None:
    data = sound(seconds)
    options = {"language": "de", "task": task, "return_timestamps": True}
    [expected] = generated(reference, data, **options)["segments"]
    form = {"language": "de", "response_format": "verbose_json", "max_tokens": str(TOKENS)}
    path = PATH if task == "transcribe" else "/v1/audio/translations"
    answer = http.post(path, data=form, files={"file": ("a.wav", data)})
    assert answer.status_code == 200, answer.text
    body = answer.json()
    got = [(each["start"], each["end"], each["tokens"]) for each in body["segments"]]
    assert got == [(round(float(e["start"]), 2), round(float(e["end"]), 2), text_ids(e["tokens"])) for e in expected]
    assert (body["task"], body["language"]) == (task, "german")
    assert body["duration"] == pytest.approx(seconds, abs=0.01)
    if seconds > 1:
        assert len({each["seek"] for each in body["segments"]}) > 1, "several windows"
    assert all(-20 < each["avg_logprob"] < 0 < each["compression_ratio"] for each in body["segments"] if each["text"])


def test_text_without_times_and_a_language_that_is_detected(client: openai.OpenAI, reference: Any) -> None:
    """A short sound is asked about without times, as `generate` does it."""
    for seed in range(3):
        data = sound(0.7, seed)
        [expected] = generated(reference, data, task="transcribe", return_timestamps=False)["segments"]
        answer: Any = client.audio.transcriptions.create(model="tiny", file=data, extra_body={"max_tokens": TOKENS})
        tokenizer = make_tokenizer(WHISPER_TOKENS)
        ids = [each for piece in expected for each in text_ids(piece["tokens"])]
        assert answer.text == tokenizer.decode(ids, skip_special_tokens=True).strip()
        assert (answer.usage.type, answer.usage.seconds) == ("duration", 1)


def test_a_prompt_stands_in_front_of_every_window(http: httpx.Client, reference: Any) -> None:
    data, ids = sound(1.6), whisper_ids()
    before = make_tokenizer(WHISPER_TOKENS).encode(" Mr. Quilter", add_special_tokens=False)
    prompt = torch.tensor([ids["<|startofprev|>"], *before])
    options = {"language": "en", "task": "transcribe", "return_timestamps": True, "prompt_ids": prompt}
    [expected] = generated(reference, data, **options)["segments"]
    form = {"language": "en", "response_format": "verbose_json", "max_tokens": str(TOKENS), "prompt": "Mr. Quilter"}
    body = http.post(PATH, data=form, files={"file": ("a.wav", data)}).json()
    assert [each["tokens"] for each in body["segments"]] == [text_ids(each["tokens"]) for each in expected]


def test_subtitles_and_streams(client: openai.OpenAI, server: Served) -> None:
    data, extra = sound(2.5), {"max_tokens": TOKENS}
    verbose = client.audio.transcriptions.create(
        model="tiny",
        file=data,
        response_format="verbose_json",
        language="en",
        timestamp_granularities=["segment"],
        extra_body=extra,
    )
    assert verbose.segments
    srt: Any = client.audio.transcriptions.create(
        model="tiny", file=data, response_format="srt", language="en", extra_body=extra
    )
    assert srt.count(" --> ") == len([each for each in verbose.segments if each.text.strip()])
    vtt: Any = client.audio.transcriptions.create(
        model="tiny", file=data, response_format="vtt", language="en", extra_body=extra
    )
    assert vtt.startswith("WEBVTT\n\n00:00:0")
    whole = client.audio.transcriptions.create(model="tiny", file=data, language="en", extra_body=extra)
    events = list(
        client.audio.transcriptions.create(model="tiny", file=data, language="en", stream=True, extra_body=extra)
    )
    deltas = [event.delta for event in events if event.type == "transcript.text.delta"]
    assert len(deltas) > 1, "one for each window"
    assert "".join(deltas).strip() == whole.text
    assert events[-1].type == "transcript.text.done"
    server.settle()


def test_a_sound_that_a_model_goes_through_in_tiny_steps_is_given_up(
    http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request could keep the model busy for a day: every window may end a fiftieth of a second behind the last."""
    monkeypatch.setattr(windows, "segments_of", lambda *_, **__: ([], 2))
    response = http.post(PATH, data={"language": "en", "max_tokens": "1"}, files={"file": ("a.wav", sound(1.5))})
    assert response.status_code == 400
    assert "got a sound of which 20 windows brought 27%" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    ("path", "fields", "text"),
    [
        (PATH, {"language": "fr"}, "language: got 'fr', expected one of ['de', 'en']"),
        (PATH, {"response_format": "docx"}, "response_format: got 'docx', expected one of"),
        (PATH, {"timestamp_granularities[]": "word"}, "timestamp_granularities: got 'word', expected 'segment'"),
        (PATH, {"timestamp_granularities[]": "segment"}, "expected it with 'verbose_json'"),
        (PATH, {"prompt": "<|endoftext|><|startoftranscript|>"}, "prompt: got a special token"),
    ],
)
def test_a_bad_field_is_refused_by_name(http: httpx.Client, path: str, fields: dict[str, str], text: str) -> None:
    response = http.post(path, data=fields, files={"file": ("a.wav", sound(0.3))})
    assert response.status_code == 400, response.text
    assert text in response.json()["error"]["message"]


def test_offline_prompts_give_the_same_tokens(reference: Any) -> None:
    data = sound(0.8)
    task = "<|startoftranscript|><|de|><|translate|><|notimestamps|>"
    prompt: Any = {"prompt": task, "multi_modal_data": {"audio": tuple(decode_audio(data))}}
    llm = LLM(str(make_checkpoint("whisper")), **{**SETTINGS, "max_model_len": 448})
    [output] = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=TOKENS))
    options = {"language": "de", "task": "translate", "return_timestamps": False, "force_unique_generate_call": True}
    [expected] = generated(reference, data, **options)["segments"]
    ids = [each for piece in expected for each in piece["tokens"].tolist()]
    assert list(output.outputs[0].token_ids)[: len(ids)] == ids
    assert len(ids) > TOKENS // 2, "what stands behind the last time is left out there"


# Rules of times


SPEECH = SpeechTokens(begin=91, end=90, window_frames=3000, max_prompt_tokens=223, no_times=99)


@pytest.mark.parametrize(
    ("token_ids", "expected", "done"),
    [
        ([100, 5, 150, 150, 6, 180], [(0.0, 1.0, (5,)), (1.0, 1.6, (6,))], 3000),
        ([100, 5, 150, 150, 6], [(0.0, 1.0, (5,))], 100),
        ([100, 5, 150], [(0.0, 1.0, (5,))], 3000),
        ([100, 5], [(0.0, 30.0, (5,))], 3000),
        ([], [(0.0, 30.0, ())], 3000),
    ],
)
def test_where_segments_end_and_the_next_window_begins(
    token_ids: list[int], expected: list[tuple[float, float, tuple[int, ...]]], done: int
) -> None:
    segments, num_frames = segments_of(token_ids, SPEECH, seek=0, num_frames=3000)
    assert [(each.start_s, each.end_s, each.token_ids) for each in segments] == expected
    assert num_frames == done
    later, _ = segments_of(token_ids, SPEECH, seek=500, num_frames=3000)
    assert [each.start_s for each in later] == [each.start_s + 5 for each in segments]


def test_what_may_follow_what() -> None:
    rules = TimestampRules(100, 90, max_first=50)

    def allowed(output: list[int]) -> set[int]:
        left = set(range(160))
        for begin, end in rules.forbidden(output, 160):
            left -= set(range(begin, end))
        return left

    assert allowed([]) == set(range(100, 151))
    assert allowed([100]) == set(range(99))
    assert allowed([100, 5]) == set(range(99)) | set(range(101, 160))
    assert allowed([100, 5, 120]) == set(range(90, 99)) | set(range(120, 160))
    assert allowed([100, 5, 120, 120]) == set(range(99))


def test_subtitles_are_blocks_of_their_own() -> None:
    pieces = [(Segment(0.0, 1.5, ()), " Hello.\n\nYou --> there"), (Segment(3661.25, 3662.0, ()), " Bye.")]
    assert subtitles(pieces, "srt") == (
        "1\n00:00:00,000 --> 00:00:01,500\nHello. You -> there\n\n2\n01:01:01,250 --> 01:01:02,000\nBye.\n"
    )
    assert subtitles(pieces[1:], "vtt") == "WEBVTT\n\n01:01:01.250 --> 01:01:02.000\nBye.\n"

"""Random requests: the same for the same seed, all different otherwise, and of the shapes that were asked for."""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import av
import pytest
from PIL import Image

from sensorium.entrypoints.bench import bodies
from sensorium.entrypoints.bench.bodies import BodyMaker
from sensorium.entrypoints.bench.spans import Size, Span
from sensorium.entrypoints.bench.workload import BenchRequest, RequestSource, Workload
from sensorium.errors import ConfigError
from sensorium.media import MediaLoader

MIXED = Workload(
    num_requests=40,
    seed=3,
    text_words=Span(5, 9),
    shared_words=4,
    output_tokens=Span(2, 4),
    images=Span(0, 2),
    image_size=(Size(32, 16, 3), Size(48, 48)),
)


def requests(workload: Workload, offset: int = 0) -> list[BenchRequest]:
    return list(RequestSource(workload, offset).requests())


def test_a_seed_gives_the_same_requests_and_another_gives_others() -> None:
    assert requests(MIXED) == requests(MIXED)
    texts = [request.text for request in requests(MIXED)]
    others = [request.text for request in requests(MIXED, offset=1)]
    assert len({*texts, *others}) == len(texts) + len(others)
    source = RequestSource(MIXED)
    refs = [ref for request in source.requests() for ref in request.media]
    assert len({source.media(ref).data for ref in refs}) == len(set(refs)) == len(refs)
    assert RequestSource(MIXED).media(refs[3]) == source.media(refs[3])
    assert RequestSource(MIXED, offset=1).media(refs[3]) != source.media(refs[3])


def test_spans_are_kept() -> None:
    found = requests(MIXED)
    assert {len(request.text.split()) for request in found} == {5, 6, 7, 8, 9}
    assert {request.num_output_tokens for request in found} == {2, 3, 4}
    assert {len(request.media) for request in found} == {0, 1, 2}
    assert len({request.system for request in found}) == 1
    assert (MIXED.media_limits, MIXED.has_media, Workload().has_media) == ({"image": 2}, True, False)


def test_repeated_media_came_in_an_earlier_request() -> None:
    workload = Workload(num_requests=200, images=Span(1, 2), repeated_media=0.5)
    seen: set[Any] = set()
    num_repeated = num_all = 0
    for request in requests(workload):
        num_all += len(request.media)
        num_repeated += sum(ref in seen for ref in request.media)
        seen.update(request.media)
    assert 0.4 < num_repeated / num_all < 0.6
    every = requests(Workload(num_requests=9, images=Span(1, 1), repeated_media=1.0))
    assert len({ref for request in every for ref in request.media}) == 1


def test_media_are_what_they_say() -> None:
    source = RequestSource(MIXED)
    refs = [ref for request in source.requests() for ref in request.media]
    sizes = Counter(Image.open(io.BytesIO(source.media(ref).data)).size for ref in refs)
    assert sizes.keys() == {(32, 16), (48, 48)}
    assert sizes[32, 16] > sizes[48, 48]
    other = Workload(
        videos=Span(1, 1), video_size=Size(64, 32), video_frames=Span(5, 5), audios=Span(1, 1), audio_s=0.5
    )
    [clip, sound] = [RequestSource(other).media(ref) for ref in requests(other)[0].media]
    frames = MediaLoader().load_video(clip.data).frames
    assert frames.shape == (5, 32, 64, 3)
    audio = MediaLoader().load_audio(sound.data)
    assert (len(audio.samples), audio.sampling_rate) == (8000, 16000)
    with av.open(io.BytesIO(clip.data)) as container:
        assert container.streams.video[0].frames == 5


def test_bodies_hold_the_media_in_order_and_shared_pieces_once() -> None:
    workload = Workload(num_requests=6, images=Span(2, 2), audios=Span(1, 1), audio_s=0.1, repeated_media=0.5)
    source = RequestSource(workload)
    maker = BodyMaker(source, "m", is_chat=True, fields={"ignore_eos": True})
    pieces: dict[Any, int] = {}
    for request in source.requests():
        body = maker.body(request)
        content = json.loads(b"".join(body))
        assert (content["model"], content["stream"], content["max_tokens"], content["ignore_eos"]) == (
            "m",
            True,
            64,
            True,
        )
        [message] = content["messages"]
        assert [part["type"] for part in message["content"]] == ["image_url", "image_url", "input_audio", "text"]
        assert message["content"][-1]["text"] == request.text
        for ref, part, piece in zip(request.media, message["content"], body[1::2], strict=False):
            data = part["input_audio"]["data"] if ref.modality == "audio" else part["image_url"]["url"].split(",")[1]
            assert data.encode() == piece
            assert pieces.setdefault(ref, id(piece)) == id(piece)


def test_bodies_of_completions() -> None:
    workload = Workload(shared_words=2, text_words=Span(3, 3))
    source = RequestSource(workload)
    [request] = source.requests(1)
    [body] = BodyMaker(source, "m", is_chat=False, fields={}).body(request)
    assert json.loads(body)["prompt"] == f"{request.system} {request.text}"


def test_more_bytes_than_may_be_prepared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies, "MAX_PREPARED_BYTES", 100)
    source = RequestSource(Workload())
    with pytest.raises(ConfigError, match="fewer requests"):
        BodyMaker(source, "m", is_chat=True, fields={}).body(next(source.requests()))


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_requests": 0},
        {"output_tokens": Span(0, 4)},
        {"repeated_media": 1.5},
        {"image_format": "bmp"},
        {"audio_s": 0.0},
        {"seed": -1},
    ],
)
def test_workloads_that_are_wrong(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="got"):
        Workload(**wrong)

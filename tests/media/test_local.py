"""Data URLs, base64 and local files."""

import base64
import io
import os
import threading
from pathlib import Path

import pytest

from sensorium.errors import (
    ConfigError,
    MediaError,
    MediaForbiddenError,
    MediaTooLargeError,
    MediaUnavailableError,
)
from sensorium.media import FetchedMedia, FetchPolicy, MediaFetcher, MediaLimits
from sensorium.media.limits import check_encoded_bytes
from sensorium.media.local import decode_base64, read_bounded

SMALL = MediaLimits(max_image_bytes=100)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    allowed = tmp_path / "allowed"
    (allowed / "sub").mkdir(parents=True)
    (allowed / "sub" / "a b.png").write_bytes(b"inside")
    (tmp_path / "secret.txt").write_bytes(b"outside")
    (tmp_path / "allowed-too").mkdir()
    (tmp_path / "allowed-too" / "x").write_bytes(b"outside")
    return allowed


def fetch(source: str | Path | bytes, policy: FetchPolicy | None = None, limits: MediaLimits = SMALL) -> FetchedMedia:
    return MediaFetcher(limits, policy).fetch(source, "image")


def assert_no_path(error: MediaError) -> None:
    for leak in ("secret", "allowed/", "/tmp", "Errno", "sub"):
        assert leak not in str(error)


# --- data URLs ---


def test_data_urls() -> None:
    payload = base64.b64encode(b"bytes").decode()
    assert fetch(f"data:image/png;base64,{payload}") == FetchedMedia(b"bytes", "image/png")
    assert fetch(f"DATA:Image/PNG;Base64,{payload}") == FetchedMedia(b"bytes", "image/png")
    assert fetch(f"data:;base64,{payload}") == FetchedMedia(b"bytes", None)
    assert fetch(f"data:image/png;charset=x;base64,{payload}").media_type == "image/png;charset=x"


@pytest.mark.parametrize(
    "url",
    ["data:", "data:image/png", "data:image/png,plain", "data:image/png;base64", "data:" + "x" * 300 + ";base64,"],
)
def test_other_data_urls_are_refused(url: str) -> None:
    with pytest.raises(MediaError, match=r"data URL|base64"):
        fetch(url)


DATA = bytes(range(256)) + b"\xfb\xff"
CLEAN = base64.b64encode(DATA).decode()


@pytest.mark.parametrize(
    "text",
    [
        CLEAN,
        CLEAN.rstrip("="),
        base64.urlsafe_b64encode(DATA).decode(),
        base64.urlsafe_b64encode(DATA).decode().rstrip("="),
        base64.encodebytes(DATA).decode(),
        "\r\n".join(CLEAN[at : at + 76] for at in range(0, len(CLEAN), 76)),
        " " + CLEAN + "\n",
        base64.encodebytes(DATA).decode().replace("+", "-").replace("/", "_").replace("=", ""),
    ],
)
def test_base64_in_every_spelling(text: str) -> None:
    """Encoders differ in alphabet, padding and line breaks; all of them say the same bytes."""
    assert decode_base64(text, modality="image", max_bytes=len(DATA)) == DATA
    assert MediaFetcher().fetch(f"data:image/png;base64,{text}", "image").data == DATA
    with pytest.raises(MediaTooLargeError):
        decode_base64(text, modality="image", max_bytes=len(DATA) - 4)


def test_data_urls_may_be_percent_encoded() -> None:
    text = CLEAN.replace("+", "%2B").replace("/", "%2f").replace("=", "%3D")
    assert MediaFetcher().fetch(f"data:image/png;base64,{text}", "image").data == DATA


@pytest.mark.parametrize("text", ["Ynl0Z", "Ynl0ZXM==", "Ynl0=ZXM", "Ynl0é", "Ynl0%3D", "====", "Ynl0*XM=", "data"[:1]])
def test_what_is_no_base64_is_refused(text: str) -> None:
    with pytest.raises(MediaError, match="base64"):
        decode_base64(text, modality="image", max_bytes=100)


def test_base64_is_bounded_before_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    for size in (99, 100):
        assert len(fetch(f"data:;base64,{base64.b64encode(bytes(size)).decode()}").data) == size
    with pytest.raises(MediaTooLargeError, match="max_image_bytes"):
        fetch(f"data:;base64,{base64.b64encode(bytes(101)).decode()}")

    def never(*args: object, **kwargs: object) -> bytes:
        raise AssertionError("decoded before the size was checked")

    monkeypatch.setattr("binascii.a2b_base64", never)
    with pytest.raises(MediaTooLargeError):
        fetch("data:;base64," + "A" * 10_000)
    with pytest.raises(MediaTooLargeError):
        MediaFetcher(MediaLimits(max_video_bytes=100)).fetch("data:video/jpeg;base64," + "A" * 10_000, "video")


# --- local files ---


def test_local_files_are_off_by_default(folder: Path) -> None:
    for source in (folder / "sub" / "a b.png", str(folder / "sub" / "a b.png"), f"file://{folder}/sub/a%20b.png"):
        with pytest.raises(MediaForbiddenError, match="allowed_local_media_path") as caught:
            fetch(source)
        assert_no_path(caught.value)


def test_files_under_the_folder_are_read(folder: Path) -> None:
    policy = FetchPolicy(allowed_local_media_path=folder)
    for source in (
        folder / "sub" / "a b.png",
        str(folder / "sub" / "a b.png"),
        "sub/a b.png",
        f"file://{folder}/sub/a%20b.png",
        f"file://localhost{folder}/sub/a%20b.png",
        f"FILE://{folder}/sub/a%20b.png#part",
    ):
        assert fetch(source, policy).data == b"inside"


def test_files_elsewhere_are_forbidden_whether_they_exist_or_not(folder: Path) -> None:
    policy = FetchPolicy(allowed_local_media_path=folder)
    outside = folder.parent / "secret.txt"
    for source in (
        outside,
        f"file://{outside}",
        "../secret.txt",
        f"file://{folder}/../secret.txt",
        f"file://{folder}/%2e%2e/secret.txt",
        folder.parent / "allowed-too" / "x",
        folder.parent / "missing",
        "/etc/hostname",
    ):
        with pytest.raises(MediaForbiddenError, match="outside") as caught:
            fetch(source, policy)
        assert_no_path(caught.value)
    for url in ("file://other.example/etc/hostname", "file:/etc/hostname"):
        with pytest.raises(MediaForbiddenError, match="file URL"):
            fetch(url, policy)


def test_links_count_as_what_they_point_to(folder: Path) -> None:
    policy = FetchPolicy(allowed_local_media_path=folder)
    (folder / "out").symlink_to(folder.parent / "secret.txt")
    (folder / "up").symlink_to(folder.parent)
    (folder / "in").symlink_to(folder / "sub" / "a b.png")
    (folder / "round").symlink_to(folder / "round")
    assert fetch(folder / "in", policy).data == b"inside"
    for name in ("out", "up/secret.txt"):
        with pytest.raises(MediaForbiddenError):
            fetch(folder / name, policy)
    with pytest.raises(MediaError):
        fetch(folder / "round", policy)


def test_link_swapped_in_after_the_check_is_not_followed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The race between resolving a path and opening it."""
    real_resolve = Path.resolve

    def resolve_then_swap(self: Path, strict: bool = False) -> Path:
        resolved = real_resolve(self, strict)
        if resolved.name == "a b.png":
            resolved.unlink()
            resolved.symlink_to(folder.parent / "secret.txt")
        return resolved

    monkeypatch.setattr(Path, "resolve", resolve_then_swap)
    with pytest.raises(MediaUnavailableError):
        fetch(folder / "sub" / "a b.png", FetchPolicy(allowed_local_media_path=folder))


def test_odd_files_are_unavailable(folder: Path) -> None:
    policy = FetchPolicy(allowed_local_media_path=folder)
    os.mkfifo(folder / "pipe")
    for source in (folder / "missing", folder / "sub", folder / "pipe", folder, "a\x00b", "x" * 5000):
        with pytest.raises(MediaUnavailableError) as caught:
            fetch(source, policy)
        assert_no_path(caught.value)
    with pytest.raises(MediaError):
        fetch("/dev/zero", FetchPolicy(allow_any_local_path=True))


def test_own_process_may_read_any_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = FetchPolicy(allow_any_local_path=True)
    assert fetch(folder.parent / "secret.txt", policy).data == b"outside"
    monkeypatch.chdir(folder)
    assert fetch("sub/a b.png", policy).data == b"inside"


def test_file_size_is_checked_while_reading(folder: Path) -> None:
    policy = FetchPolicy(allowed_local_media_path=folder)
    (folder / "big").write_bytes(bytes(101))
    with pytest.raises(MediaTooLargeError, match="max_image_bytes"):
        fetch(folder / "big", policy)


def test_uploads_are_cut_off_at_the_bound() -> None:
    class Endless(io.RawIOBase):
        given = 0

        def read(self, size: int | None = -1, /) -> bytes:
            assert size is not None
            assert size > 0
            self.given += size
            return bytes(size)

    upload = Endless()
    with pytest.raises(MediaTooLargeError, match="more than"):
        read_bounded(upload, "audio", 3_000_000)  # type: ignore[arg-type]
    assert upload.given < 6_000_000
    assert read_bounded(io.BytesIO(b"abc"), "audio", 3) == b"abc"


@pytest.mark.parametrize("source", ["ftp://example.com/x", "javascript:alert(1)", "concat:/etc/hostname", "C:\\x.png"])
def test_other_schemes_are_forbidden(source: str) -> None:
    with pytest.raises(MediaForbiddenError, match="scheme") as caught:
        fetch(source)
    assert source not in str(caught.value)


def test_bytes_are_bounded() -> None:
    assert fetch(b"x" * 100).data == b"x" * 100
    with pytest.raises(MediaTooLargeError):
        fetch(b"x" * 101)


def test_async_reads_do_not_block_the_loop(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import asyncio

    threads: set[str] = set()
    real = os.fdopen

    def spy(*args: object, **kwargs: object) -> object:
        threads.add(threading.current_thread().name)
        return real(*args, **kwargs)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "fdopen", spy)
    fetcher = MediaFetcher(SMALL, FetchPolicy(allowed_local_media_path=folder))
    assert asyncio.run(fetcher.afetch("sub/a b.png", "image")).data == b"inside"
    assert threads
    assert threading.main_thread().name not in threads


# --- limits ---


@pytest.mark.parametrize(
    ("field", "value"),
    [("max_image_bytes", 0), ("max_audio_s", -1.0), ("max_video_s", float("inf")), ("max_decode_s", float("nan")),
     ("max_image_pixels", True), ("max_redirects", -1), ("max_image_pixels", 10**9)],
)  # fmt: skip
def test_budgets_cannot_be_switched_off(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=field):
        MediaLimits(**{field: value})  # type: ignore[arg-type]


def test_budget_errors_name_the_field() -> None:
    with pytest.raises(MediaTooLargeError) as caught:
        check_encoded_bytes("video", 101, MediaLimits(max_video_bytes=100))
    assert str(caught.value) == (
        "video has too many bytes: got 101 bytes, expected at most 100. Send a smaller video, or raise max_video_bytes."
    )
    assert caught.value.status == 413

"""The playground's files over HTTP: open without a key and harmless, cached, complete, and off when asked."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import resources

import httpx
import pytest

from sensorium.entrypoints.openai import playground
from tests.entrypoints.served import Served, served
from tests.helpers.browser import running_browser
from tests.helpers.checkpoints import make_checkpoint
from tests.helpers.waiting import HANG_S

KEY = "a key of this server"
FILES = [route.path for route in playground.playground_routes()]


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(make_checkpoint("llama"), {"api_key": (KEY,)}) as running:
        yield running


@pytest.fixture
def client(server: Served) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, trust_env=False, timeout=HANG_S) as client:
        yield client


def test_every_file_of_the_page_is_served_and_refers_only_to_such() -> None:
    package = resources.files(playground.__name__)
    names = {entry.name for entry in package.iterdir() if not entry.name.startswith("__")}
    assert {"/" if name == "index.html" else f"/playground/{name}" for name in names} == set(FILES)
    for name in names:
        text = (package / name).read_text()
        used = re.findall(r'(?:src|href)="([^"#]+)"', text) + re.findall(r'from "\./([^"]+)"', text)
        assert {f"/playground/{each.removeprefix('playground/')}" for each in used} <= set(FILES), name
        remote = [each for each in re.findall(r"https?://[\w.]+", text) if each != "http://www.w3.org"]
        assert not remote, (name, remote)
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|\son\w+=", text), name


@pytest.mark.parametrize("path", FILES)
def test_files_are_open_typed_guarded_and_cached(client: httpx.Client, path: str) -> None:
    response = client.get(path)
    assert response.status_code == 200
    kinds = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
    assert response.headers["Content-Type"].startswith(kinds["html" if path == "/" else path.rpartition(".")[2]])
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["Cache-Control"] == "no-cache"
    again = client.get(path, headers={"If-None-Match": response.headers["ETag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert client.get(path, headers={"If-None-Match": '"old"'}).status_code == 200
    assert client.head(path).status_code == 200


def test_nothing_else_is_open_without_a_key(client: httpx.Client) -> None:
    for path in FILES:
        assert client.post(path).status_code == 401, path
    others = ["/playground", "/playground/", "/playground/x.js", "/playground/__init__.py", "/playground/app.js/"]
    for path in [*others, "/playground/../metrics", "/v1/models", "/metrics", "/version"]:
        assert client.get(path).status_code == 401, path
    with_key = {"Authorization": f"Bearer {KEY}"}
    for path in ("/playground/__init__.py", "/playground/..%2f..%2fapp.py", "/playground/%2e%2e/app.py"):
        assert client.get(path, headers=with_key).status_code == 404, path


def test_the_page_can_be_switched_off() -> None:
    with served(make_checkpoint("llama"), {"playground": False, "api_key": (KEY,)}) as running:
        for path in FILES:
            assert httpx.get(running.url + path, trust_env=False, timeout=HANG_S).status_code == 401
            headers = {"Authorization": f"Bearer {KEY}"}
            assert httpx.get(running.url + path, headers=headers, trust_env=False, timeout=HANG_S).status_code == 404


def test_a_browser_asks_for_the_key_and_keeps_it_in_memory_only(server: Served) -> None:
    with running_browser() as browser:
        page = browser.new_page()
        page.goto(server.url)
        key = page.get_by_label("API key")
        key.wait_for(state="visible")
        assert "asks for an API key" in page.get_by_role("alert").inner_text()
        assert key.evaluate("node => node === document.activeElement")
        key.fill("wrong")
        key.press("Enter")
        page.wait_for_timeout(200)
        assert page.locator("#model-name").inner_text() == ""
        key.fill(KEY)
        key.press("Enter")
        page.locator("#model-name").get_by_text("tiny").wait_for()
        assert page.get_by_role("alert").count() == 0
        assert page.locator("#examples-block").is_hidden(), "the model takes text only"
        assert page.locator("#attach").is_hidden()
        page.get_by_label("Most tokens of an answer").fill("5")
        page.get_by_label("Question").fill("Say something")
        page.get_by_label("Question").press("Enter")
        page.locator(".answer[aria-busy=false]").wait_for()
        assert "First token" in page.locator(".answer").inner_text()
        kept = page.evaluate("JSON.stringify([{...localStorage}, {...sessionStorage}, document.cookie])")
        assert KEY not in kept
        page.reload()
        page.get_by_role("alert").wait_for()
        assert page.get_by_label("API key").input_value() == ""

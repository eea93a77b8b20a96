"""The playground in a real browser over the bundled model: true answers, safe text, keyboard, contrast."""

from __future__ import annotations

import base64
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import Browser, Page, Response, Route, expect

from sensorium.engine.core import EngineCore
from sensorium.messages import EngineOutput
from tests.entrypoints.served import Served, served
from tests.helpers.browser import TEXT_CONTRASTS, running_browser
from tests.helpers.waiting import HANG_S

SETTINGS: dict[str, Any] = {
    "max_model_len": 2048,
    "limit_mm_per_prompt": {"image": 2, "video": 2, "audio": 2},
}
DONE = ".answer[aria-busy=false]"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def server(browser: Browser) -> Iterator[Served]:
    with served("demo", **SETTINGS) as running:
        yield running


@dataclass
class Watched:
    """What a page did that nobody sees."""

    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@pytest.fixture
def watched() -> Watched:
    return Watched()


@pytest.fixture
def page(browser: Browser, server: Served, watched: Watched) -> Iterator[Page]:
    with_page = browser.new_context(color_scheme="light", permissions=["clipboard-read", "clipboard-write"])
    page = with_page.new_page()
    page.set_default_timeout(1000 * HANG_S)
    page.on("request", lambda request: watched.requests.append(request.url))
    page.on("pageerror", lambda error: watched.errors.append(str(error)))
    page.on("console", lambda message: watched.errors.append(message.text) if message.type == "error" else None)
    page.on("dialog", lambda dialog: watched.errors.append(f"dialog: {dialog.message}"))
    page.goto(server.url)
    page.locator("#examples button").first.wait_for()
    yield page
    with_page.close()
    foreign = [url for url in watched.requests if not url.startswith((server.url, "blob:", "data:"))]
    assert not foreign, "the page needs nothing from elsewhere"
    assert not watched.errors


def ask(page: Page, text: str) -> str:
    """The answer to a question."""
    number = page.locator(".answer").count()
    page.get_by_label("Question").fill(text)
    page.get_by_label("Question").press("Enter")
    return answer(page, number)


def answer(page: Page, number: int = 0) -> str:
    page.locator(DONE).nth(number).wait_for()
    return page.locator(".answer .text").nth(number).inner_text()


def red_circle() -> bytes:
    image = Image.new("RGB", (112, 112), (240, 240, 235))
    ImageDraw.Draw(image).ellipse((10, 10, 40, 40), fill=(220, 20, 30))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def drop(page: Page, name: str, media_type: str, content: bytes) -> None:
    """Drop a file onto the page."""
    transfer = page.evaluate_handle(
        """([name, type, content]) => {
          const transfer = new DataTransfer();
          const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
          transfer.items.add(new File([bytes], name, {type}));
          return transfer;
        }""",
        [name, media_type, base64.b64encode(content).decode()],
    )
    for event in ("dragenter", "dragover", "drop"):
        page.dispatch_event("body", event, {"dataTransfer": transfer})


def streamed(*texts: str) -> str:
    """What a server would send for an answer."""
    chunks = [{"choices": [{"index": 0, "delta": {"content": text}, "finish_reason": None}]} for text in texts]
    return "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"


def answering(body: str) -> Callable[[Route], None]:
    """A route that answers in place of the server."""
    return lambda route: route.fulfill(body=body, content_type="text/event-stream")


# True answers


@pytest.mark.parametrize(
    ("title", "words"),
    [("Picture", ("red", "circle")), ("Clip", ("green", "circle", "right")), ("Sound", ("3", "beep"))],
)
def test_one_click_on_an_example_brings_a_true_answer(page: Page, title: str, words: tuple[str, ...]) -> None:
    page.locator("#examples").get_by_role("button", name=title).click()
    text = answer(page)
    assert all(word in text for word in words), text
    expect(page.locator(".asked figcaption")).to_have_text(re.compile(r"· \d+ tokens$"))
    facts = page.locator(".answer dl").inner_text().replace("\n", " ")
    for fact in (r"First token [\d.,]+ m?s", r"Prompt \d+ tokens", r"Answer \d+ tokens"):
        assert re.search(fact, facts), facts
    if "Speed" in facts:  # or all came at once
        assert re.search(r"Speed [\d.,]+ tokens/s", facts), facts


def test_a_dropped_picture_is_counted_asked_about_and_remembered(page: Page, server: Served) -> None:
    drop(page, "circle.png", "image/png", red_circle())
    tokens = page.locator("#attachments .tokens")
    expect(tokens).to_have_text("64 tokens")
    with page.expect_response(lambda response: _counts(response, "What is in the image?")) as counted:
        page.get_by_label("Question").fill("What is in the image?")  # the count follows the text
    cost = counted.value.json()["prompt_tokens"]
    expect(page.locator("#cost-text")).to_have_text(f"{cost} of 2048 tokens")
    page.get_by_role("button", name="Ask").click()
    assert "red circle" in answer(page)
    assert f"Prompt {cost} tokens" in page.locator(".answer dl").inner_text().replace("\n", " ")
    assert (
        "circle" in ask(page, "What color is the circle?") or "red" in page.locator(".answer .text").nth(1).inner_text()
    )
    assert "cached" in page.locator(".answer dl").nth(1).inner_text(), "the second turn finds the first in the cache"
    page.get_by_role("button", name="Copy").last.click()
    assert page.evaluate("navigator.clipboard.readText()") == page.locator(".answer .text").nth(1).inner_text()
    page.get_by_role("button", name="New conversation").click()
    assert page.locator(".answer, .asked").count() == 0
    assert page.locator("#welcome").is_visible()


def _counts(response: Response, text: str) -> bool:
    return response.url.endswith("/token_cost") and text in (response.request.post_data or "")


def test_files_can_be_pasted_chosen_and_removed(page: Page) -> None:
    page.locator("#files").set_input_files([{"name": "a.png", "mimeType": "image/png", "buffer": red_circle()}] * 2)
    expect(page.locator("#attachments li")).to_have_count(2)
    page.get_by_role("button", name="Remove a.png").first.click()
    expect(page.locator("#attachments li")).to_have_count(1)
    page.evaluate(
        """(content) => {
          const data = new DataTransfer();
          data.items.add(new File([Uint8Array.from(atob(content), (c) => c.charCodeAt(0))], "", {type: "image/png"}));
          dispatchEvent(new ClipboardEvent("paste", {clipboardData: data}));
        }""",
        base64.b64encode(red_circle()).decode(),
    )
    expect(page.locator("#attachments li")).to_have_count(2)
    expect(page.locator("#attachments")).to_contain_text("pasted")


def test_recordings_of_microphone_and_camera_are_media_like_any_other(page: Page) -> None:
    record = page.get_by_role("button", name="Record a sound")
    record.click()
    expect(record).to_have_attribute("aria-pressed", "true")
    page.wait_for_timeout(700)
    record.click()
    expect(page.locator("#attachments .tokens").first).to_contain_text("token")
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Take a picture").click()
    expect(page.locator("#attachments .tokens").nth(1)).to_contain_text("token")
    page.get_by_role("button", name="Use the camera").click()
    page.get_by_role("button", name="Record a clip").click()
    page.wait_for_timeout(900)
    page.get_by_role("button", name="Stop and attach").click()
    expect(page.locator("#attachments .tokens").nth(2)).to_contain_text("token")
    assert page.locator("#camera-dialog").is_hidden()


def test_settings_reach_the_server(page: Page) -> None:
    bodies: list[dict[str, Any]] = []

    def look(route: Route) -> None:
        bodies.append(json.loads(route.request.post_data or ""))
        route.continue_()

    page.route("**/v1/chat/completions", look)
    page.get_by_role("button", name="Settings").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0.5")
    page.get_by_label("Top p").fill("0.9")
    page.get_by_label("Most tokens of an answer").fill("3")
    page.get_by_label("Seed").fill("7")
    ask(page, "Hello")
    assert "Ended by length" in page.locator(".answer dl").inner_text().replace("\n", " ")
    (body,) = bodies
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.5,
        "top_p": 0.9,
        "max_tokens": 3,
        "seed": 7,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be brief."}


# Stopping and errors


def test_stopping_ends_the_request_on_the_server(page: Page, server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    step = EngineCore.step

    def slow_step(core: EngineCore) -> list[EngineOutput]:
        time.sleep(0.02)  # so that no browser is too slow to stop 1500 of them
        return step(core)

    monkeypatch.setattr(EngineCore, "step", slow_step)
    page.route("**/v1/chat/completions", _endless)
    for by_key in (False, True):
        server.settle()
        assert server.engine.stats is not None
        before = server.engine.stats.num_steps
        number = page.locator(".answer").count()
        page.get_by_label("Question").fill("Go on for ever")
        page.get_by_label("Question").press("Enter")
        page.locator(".answer .text").nth(number).get_by_text("", exact=False).first.wait_for()
        if by_key:
            page.keyboard.press("Escape")
        else:
            page.get_by_role("button", name="Stop").click()
        page.locator(DONE).nth(number).wait_for()
        assert "Ended by you" in page.locator(".answer dl").nth(number).inner_text().replace("\n", " ")
        server.settle()
        assert server.engine.stats.num_steps - before < 1500, "the answer would have had 1500 tokens"
        assert page.get_by_label("Question").evaluate("node => node === document.activeElement")


def _endless(route: Route) -> None:
    body = json.loads(route.request.post_data or "")
    route.continue_(post_data=json.dumps({**body, "ignore_eos": True, "max_tokens": 1500}))


def test_errors_are_shown_as_the_server_gives_them(page: Page, server: Served, watched: Watched) -> None:
    drop(page, "broken.png", "image/png", b"\x89PNG\r\n\x1a\nbroken")
    url = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\nbroken").decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is it?"}]
    body = {"messages": [{"role": "user", "content": content}]}
    response = httpx.post(f"{server.url}/v1/chat/completions", json=body, trust_env=False, timeout=HANG_S)
    expected = response.json()["error"]["message"]
    expect(page.locator("#cost-text")).to_have_text(expected)
    ask(page, "What is it?")
    expect(page.locator(".answer").get_by_role("alert")).to_have_text(expected)
    page.get_by_role("button", name="Ask again").click()
    expect(page.locator(".answer").get_by_role("alert")).to_have_text(expected)
    # What failed is not sent again with the next question.
    assert ask(page, "Hello")
    assert page.locator(".asked.unanswered").count() == 1
    drop(page, "notes.pdf", "application/pdf", b"%PDF")
    expect(page.locator("#notices")).to_have_text(
        "notes.pdf: got application/pdf, expected a picture, a sound or a clip."
    )
    assert all("Failed to load resource" in error for error in watched.errors)
    watched.errors.clear()


def test_a_connection_that_breaks_off_is_told(page: Page, watched: Watched) -> None:
    half = streamed("Half of ").removesuffix("data: [DONE]\n\n")
    page.route("**/v1/chat/completions", answering(half))
    assert ask(page, "Hello").strip() == "Half of"
    expect(page.locator(".answer").get_by_role("alert")).to_have_text("The connection to the server broke off.")
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", lambda route: route.abort())
    ask(page, "Hello")
    expect(page.locator(".answer").nth(1).get_by_role("alert")).to_have_text("The server can't be reached.")
    assert all("Failed to load resource" in error for error in watched.errors)
    watched.errors.clear()


# Text stays text


def test_what_a_model_or_user_writes_never_becomes_html(page: Page) -> None:
    attack = "<img src=x onerror=alert(1)><script>alert(2)</script>[x](javascript:alert(3)) <a href='//e.example'>a</a>"
    wrapped = [attack[:7], attack[7:30], attack[30:], f"\n\n# {attack}\n\n- **{attack}**\n\n```\n{attack}\n```"]
    page.route("**/v1/chat/completions", answering(streamed(*wrapped)))
    drop(page, f"{attack}.png".replace("/", ""), "image/png", red_circle())
    ask(page, attack)
    assert page.locator(".answer .text").inner_text().count("<script>alert(2)</script>") == 4
    assert page.locator(".answer :is(img, script, a, iframe)").count() == 0
    assert page.locator(".asked :is(script, a, iframe)").count() == 0
    assert attack in page.locator(".asked").inner_text()
    error = json.dumps({"error": {"message": attack, "code": 400}})
    page.unroute("**/v1/chat/completions")
    page.route("**/v1/chat/completions", answering(f"data: {error}\n\n"))
    ask(page, "again")
    expect(page.locator(".answer").nth(1).get_by_role("alert")).to_have_text(attack)


def test_markdown_becomes_structure_however_it_is_cut(page: Page) -> None:
    text = (
        "# Title\n\nSome **bold**, *slanted* and `code`.\nNext 2*3*4 line.\n\n"
        "- one\n- two\n\n3. three\n4. four\n\n```py\na = 1\n\nb = 2\n```\nEnd"
    )
    shown = []
    for size in (1, 7, len(text)):
        body = streamed(*(text[i : i + size] for i in range(0, len(text), size)))
        page.unroute_all()
        page.route("**/v1/chat/completions", answering(body))
        ask(page, "Hello")
        shown.append(page.locator(".answer .text").last.evaluate("node => node.innerHTML"))
    assert shown[0] == shown[1] == shown[2]
    assert shown[0] == (
        "<h3>Title</h3><p>Some <strong>bold</strong>, <em>slanted</em> and <code>code</code>.\nNext 2*3*4 line.</p>"
        '<ul><li>one</li><li>two</li></ul><ol start="3"><li>three</li><li>four</li></ol>'
        '<pre tabindex="0"><code>a = 1\n\nb = 2</code></pre><p>End</p>'
    )


# For everybody


def test_everything_works_by_keyboard_alone(page: Page) -> None:
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Shift+Tab")
    reached = []
    for _ in range(12):
        reached.append(page.evaluate("document.activeElement.innerText"))
        assert page.evaluate("document.activeElement.matches(':focus-visible')"), reached
        if "Picture" in reached[-1]:
            break
        page.keyboard.press("Shift+Tab")
    assert "Sound" in reached[0], "the question comes right behind the examples"
    page.keyboard.press("Enter")
    assert "red" in answer(page)
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("How many shapes are there?")
    page.keyboard.press("Shift+Enter")
    assert page.get_by_label("Question").input_value().endswith("\n")
    page.keyboard.press("Enter")
    assert answer(page, 1)
    page.get_by_role("button", name="Settings").focus()
    page.keyboard.press("Enter")
    assert page.locator("#settings").is_visible()
    page.get_by_label("System prompt").focus()
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    assert page.evaluate("document.activeElement.id") == "show-settings"


def test_controls_have_names_and_news_is_announced(page: Page) -> None:
    page.get_by_role("button", name="Settings").click()
    drop(page, "a.png", "image/png", red_circle())
    expect(page.locator("#attachments .tokens")).to_have_text("64 tokens")
    session = page.context.new_cdp_session(page)
    tree = session.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"button", "textbox", "slider", "spinbutton", "combobox", "image", "meter", "log", "form", "complementary"}
    shown = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in tree if not node["ignored"]]
    controls = [(role, name) for role, name in shown if role in roles]
    assert len(controls) > 15
    assert not [role for role, name in controls if not name.strip()]
    assert ("log", "Conversation") in controls
    ask(page, "What is in the image?")
    expect(page.get_by_role("status")).to_have_text("Answer complete.")
    assert page.locator("html").get_attribute("lang") == "en"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_the_page_fits(page: Page, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == ("rgb(250, 249, 246)" if scheme == "light" else "rgb(19, 21, 23)")
    lowest = [page.evaluate(TEXT_CONTRASTS)]
    page.locator("#examples").get_by_role("button", name="Clip").click()
    answer(page)
    page.get_by_role("button", name="Settings").click()
    drop(page, "a.pdf", "application/pdf", b"")
    lowest.append(page.evaluate(TEXT_CONTRASTS))
    assert len(lowest[0]) > 8
    assert len(lowest[1]) > 20
    assert not [each for found in lowest for each in found if each[0] < 4.5]
    page.get_by_role("button", name="Settings").click()
    for width in (320, 390, 1280):
        page.set_viewport_size({"width": width, "height": 700})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert page.get_by_role("button", name="Ask", exact=True).is_visible()
    running = page.evaluate("document.getAnimations().length")
    assert running == 0, "nothing moves for those who don't want it"


def test_the_choice_of_dark_lasts(page: Page) -> None:
    page.get_by_role("button", name="Light or dark").click()
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 21, 23)"
    page.get_by_role("button", name="Light or dark").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(250, 249, 246)"

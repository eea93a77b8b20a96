"""A real browser without a window, for tests of the page."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from playwright.sync_api import Browser, sync_playwright

REQUIRE = "SENSORIUM_REQUIRE_BROWSER"
"""With this variable set, tests fail where there is no browser."""
_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
_FLAGS = (
    "--no-sandbox",  # as root, in a container
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
    "--autoplay-policy=no-user-gesture-required",
)


def chromium_path() -> str | None:
    """Where Chromium is: what `CHROMIUM` says, or on the path."""
    return os.environ.get("CHROMIUM") or next((found for name in _NAMES if (found := shutil.which(name))), None)


@contextmanager
def running_browser() -> Iterator[Browser]:
    """Chromium, or a skipped test that says why."""
    path = chromium_path()
    if path is None:
        message = "no Chromium on this machine: apt-get install chromium, or set CHROMIUM to its path"
        if os.environ.get(REQUIRE):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=list(_FLAGS))
        try:
            yield browser
        finally:
            browser.close()


TEXT_CONTRASTS = """() => {
  // The lowest contrast of each visible text with what is behind it; WCAG 2.2, "contrast ratio".
  const channels = (text) => {
    const context = document.createElement("canvas").getContext("2d", {colorSpace: "srgb"});
    context.fillStyle = text;
    context.fillRect(0, 0, 1, 1);
    return [...context.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below) => below.map((each, i) => (i < 3 ? (top[i] * top[3] + each * (255 - top[3])) / 255 : 255));
  const behind = (node) => {
    const layers = [];
    const colorOf = (each) => channels(getComputedStyle(each).backgroundColor);
    for (let each = node; each; each = each.parentElement) layers.push(colorOf(each));
    return layers.reverse().reduce((below, top) => (top[3] ? over(top, below) : below), [255, 255, 255, 255]);
  };
  const luminance = (color) => {
    const shares = color.slice(0, 3).map((c) => c / 255);
    const linear = shares.map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2];
  };
  const results = [];
  for (const node of document.querySelectorAll("body *")) {
    const own = [...node.childNodes].some((each) => each.nodeType === Node.TEXT_NODE && each.data.trim());
    const box = node.getBoundingClientRect();
    const isShown = node.checkVisibility({visibilityProperty: true}) && box.width > 1 && box.height > 1;
    const holder = node.placeholder && !node.value;
    if (!isShown || !(own || holder || node.value)) continue;
    const background = behind(node);
    const style = getComputedStyle(node, holder && !own ? "::placeholder" : undefined);
    const [a, b] = [luminance(over(channels(style.color), background)), luminance(background)].sort((x, y) => y - x);
    results.push([(a + 0.05) / (b + 0.05), node.outerHTML.slice(0, 90)]);
  }
  return results;
}"""

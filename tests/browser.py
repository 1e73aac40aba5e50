"""Runs headless Chromium, for tests that look at a page as a reader's browser shows it."""

from __future__ import annotations

import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
VIEW = {"light": "1", "dark": "0"}
"""Values of Chromium's setting preferredColorScheme."""


def opened(page: Path, folder: Path, *options: str) -> str:
    """Opens `page` in Chromium, with its profile in `folder`; returns what Chromium prints on stdout."""
    browser = next((found for name in NAMES if (found := shutil.which(name))), None)
    if browser is None:
        pytest.fail(
            "Chromium is not installed, and these tests open a page in it: `apt-get install chromium`, or leave them "
            "out by `pytest -m 'not browser'`."
        )
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}", *options, page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def screenshot(page: Path, folder: Path, view: str, width: int = 1000, height: int = 3000) -> Image.Image:
    """Returns a screenshot of the page in the `view` "light" or "dark"."""
    file = folder / f"{view}-{width}.png"
    size = f"--window-size={width},{height}"
    opened(page, folder, f"--screenshot={file}", f"--blink-settings=preferredColorScheme={VIEW[view]}", size)
    with Image.open(file) as image:
        return image.convert("RGB")


def dom(page: Path, folder: Path, *options: str) -> Dom:
    """Returns the page's elements, after the browser has parsed it and run its scripts."""
    parsed = Dom()
    parsed.feed(opened(page, folder, "--dump-dom", *options))
    return parsed


def overflow_pixels(page: Path, folder: Path, width: int) -> int:
    """Returns how much wider the page is than a window of this width; a script in a copy without policy measures it."""
    script = (
        "<script>document.title = document.documentElement.scrollWidth - document.documentElement.clientWidth"
        "</script></body>"
    )
    text = re.sub(r"<meta http-equiv=[^>]*>", "", page.read_text(encoding="utf-8"))
    copy = folder / "measured.html"
    copy.write_text(text.replace("</body>", script), encoding="utf-8")
    return int(dom(copy, folder, f"--window-size={width},900").text["title"])


class Dom(HTMLParser):
    """Collects a page's tags, the text and attributes of elements with an id, and the title."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: dict[str, int] = {}
        self.text: dict[str, str] = {}
        self.attributes: dict[str, dict[str, str | None]] = {}
        self.all_attributes: list[tuple[str, str, str]] = []  # tag, attribute, value
        self.cells: list[str] = []
        self._open: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] = self.tags.get(tag, 0) + 1
        found = dict(attrs)
        self.all_attributes += [(tag, name, value or "") for name, value in attrs]
        name = "title" if tag == "title" and "title" not in self.text else found.get("id")
        if name is not None:
            self.attributes[name] = found
            self.text[name] = ""
        self._open.append((tag, name))
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._open and self._open.pop()[0] != tag:
            pass

    def handle_data(self, data: str) -> None:
        for _, name in self._open:
            if name is not None:
                self.text[name] += data
        if any(tag == "td" for tag, _ in self._open):
            self.cells[-1] += data

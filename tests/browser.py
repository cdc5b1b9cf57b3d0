"""A real browser without a window: what it makes of a page."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import pytest

NAMES = (
    *("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome"),
    *("microsoft-edge", "microsoft-edge-stable", "msedge"),
)


def find_browser() -> str:
    """The path of a browser; without one the test is skipped, where CI=true it fails."""
    found = next((path for name in NAMES if (path := shutil.which(name))), None)
    if found is None:
        refuse = pytest.fail if os.environ.get("CI") == "true" else pytest.skip
        refuse(f"needs a browser on PATH to read the page with: one of {', '.join(NAMES)}")
    return found


@dataclass
class Element:
    """An element of a page as the browser has it."""

    tag: str
    attributes: dict[str, str | None]
    text: str = ""  # all text inside, that of its children included

    @property
    def classes(self) -> list[str]:
        return (self.attributes.get("class") or "").split()


@dataclass
class Seen:
    """What a browser has made of a page: its elements in order, and its complaints."""

    elements: list[Element]
    complaints: list[str]

    def all(self, tag: str = "", kind: str = "", **attributes: str) -> list[Element]:
        """The elements of a tag, a class and some attributes."""
        return [
            e
            for e in self.elements
            if (not tag or e.tag == tag)
            and (not kind or kind in e.classes)
            and attributes.items() <= e.attributes.items()
        ]

    def one(self, *names: str, **attributes: str) -> Element:
        """The one element of that kind."""
        (element,) = self.all(*names, **attributes)
        return element


@dataclass
class _Reader(HTMLParser):
    elements: list[Element] = field(default_factory=list)
    open: list[Element] = field(default_factory=list)

    VOID = frozenset({"meta", "img", "br", "link", "input", "hr"})

    def __post_init__(self):
        super().__init__()

    def handle_starttag(self, tag, attrs):
        element = Element(tag, dict(attrs))
        self.elements.append(element)
        if tag not in self.VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        while self.open and self.open.pop().tag != tag:
            pass

    def handle_data(self, data):
        for element in self.open:
            element.text += data


def look_at(page: Path, fragment: str = "", then: str = "") -> Seen:
    """Open a page in the browser, network off.

    Args:
        fragment: what follows ``#`` in the address.
        then: JavaScript that runs after the page's own, as a user's hand.
    """
    if then:
        text = page.read_text(encoding="utf-8")
        page = page.with_name(f"then_{page.name}")
        page.write_text(text.replace("</body>", f"<script>{then}</script></body>"), "utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
    flags += [f"--user-data-dir={page.parent / 'profile'}", "--host-resolver-rules=MAP * ~NOTFOUND"]
    address = page.resolve().as_uri() + (f"#{fragment}" if fragment else "")
    done = subprocess.run(
        [find_browser(), *flags, "--dump-dom", address],
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    reader = _Reader()
    reader.feed(done.stdout)
    assert reader.elements, done.stderr
    return Seen(reader.elements, re.findall(r".*CONSOLE.*", done.stderr))

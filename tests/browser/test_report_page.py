"""The page of a report in a real Chromium: filters and sorting do what they say, nothing is requested, nothing runs.

Chromium is spoken to through its debugging pipe, which needs nothing beside the standard library.
"""

from __future__ import annotations

import base64
import json
import os
import re
import selectors
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import pytest

from xraygpt_lite.report import html
from xraygpt_lite.report.survey import Named, survey
from xraygpt_lite.report.thumbnail import Thumbnail, make
from xraygpt_lite.values import Box, Failure, Record, Sampling, Summary, Timings

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: no chromium, chromium-browser or google-chrome"),
]
TIMEOUT = 60
DISCLAIMER = "Research use only. Not a medical device: the text may be wrong."
HOSTILE = (
    "<script>document.title='taken'</script><img src=x onerror=\"document.title='taken'\">"
    "</section></article><style>body{display:none}</style><a href='https://example.org/'>a</a>"
    "<img src=https://example.org/a.png> \u202edesrever"
)


WORST_CONTRAST = """(() => {
  const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const linear = (value) => (value <= .04045 ? value / 12.92 : ((value + .055) / 1.055) ** 2.4);
  const light = (colour) => {
    const [r, g, b] = channels(colour).map((value) => linear(value / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const ground = (one) => {
    const own = getComputedStyle(one).backgroundColor;
    return channels(own)[3] === 0 && one.parentElement ? ground(one.parentElement) : own;
  };
  const words = (one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  return [...document.querySelectorAll("body *:not(svg *, script)")]
    .filter((one) => one.getClientRects().length && words(one))
    .map((one) => {
      const [dark, bright] = [light(getComputedStyle(one).color), light(ground(one))].sort((a, b) => a - b);
      return [(bright + .05) / (dark + .05), one.className || one.tagName];
    })
    .sort((a, b) => a[0] - b[0])[0];
})()"""
"""The lowest contrast of a text that is shown with its ground (WCAG 2.2), and where it stands."""


class Chromium:
    """One page of a browser of its own.

    Attributes
    ----------
    requests
        The addresses it asked for, by request; without those that the page's own policy stopped.
    trouble
        What it complained of.
    """

    def __init__(self, profile: Path) -> None:
        down, self._send = os.pipe()
        self._receive, up = os.pipe()
        assert CHROMIUM is not None
        # Chromium reads commands from descriptor 3 and answers on 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{down} 4>&{up}', "bash", CHROMIUM, "--headless", "--no-sandbox",
             "--disable-gpu", "--no-first-run", "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(down, up), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(down)
        os.close(up)
        self._ready = selectors.DefaultSelector()
        self._ready.register(self._receive, selectors.EVENT_READ)
        self._rest = b""
        self._number = 0
        self._session: str | None = None
        self.requests: dict[str, str] = {}
        self.trouble: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        os.close(self._send)  # which ends it
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._receive)
        self._ready.close()

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """One command and its answer."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._send, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self._note(answer)
        assert "error" not in answer, (method, answer["error"])
        result: dict[str, Any] = answer["result"]
        return result

    def open(self, page: Path) -> None:
        self.requests.clear()
        self.trouble.clear()
        self.call("Page.navigate", url=page.as_uri())
        while (event := self._next()).get("method") != "Page.loadEventFired":
            self._note(event)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        done = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, done
        return done["result"].get("value")

    def press(self, key: str, text: str = "") -> None:
        code = {"Tab": 9, "Enter": 13, " ": 32, "ArrowDown": 40}.get(key, ord(key[0].upper()))
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, text=text, windowsVirtualKeyCode=code)

    def type(self, text: str) -> None:
        for letter in text:
            self.press(letter, letter)

    def size(self, width: int, height: int, dark: bool = False) -> None:
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert self._ready.select(TIMEOUT), f"Chromium said nothing for {TIMEOUT} s"
            piece = os.read(self._receive, 1 << 20)
            assert piece, "Chromium ended"
            self._rest += piece
        message, _, self._rest = self._rest.partition(b"\0")
        found: dict[str, Any] = json.loads(message)
        return found

    def _note(self, event: dict[str, Any]) -> None:
        params = event.get("params", {})
        if event.get("method") == "Network.requestWillBeSent":
            self.requests[params["requestId"]] = params["request"]["url"]
        elif event.get("method") == "Network.loadingFailed" and params.get("blockedReason") == "csp":
            del self.requests[params["requestId"]]
        elif event.get("method") == "Log.entryAdded":
            self.trouble.append(params["entry"]["text"])
        elif event.get("method") == "Runtime.exceptionThrown":
            self.trouble.append(str(params["exceptionDetails"]))


@dataclass(frozen=True)
class Header:
    bundle_id: str = "f" * 64
    bundle_name: str = "tiny"
    options: dict[str, Any] = field(default_factory=lambda: {"questions": ["Normal?"], "temperature": 0.5})
    inputs: int | None = None
    shard: tuple[int, int] | None = None
    disclaimer: str = DISCLAIMER
    version: str = "1"


def summary(name: str, text: str, **changes: Any) -> Summary:
    return replace(
        Summary(
            source=name, sha256=f"{len(name):064x}", sop_instance_uid=None, question="Normal?", prompt_variant="demo",
            text=text, raw_text=text, finish="stop", warnings=(), options=Sampling(), device="cpu", bundle_id="f" * 64,
            bundle_name="tiny", timings=Timings(), prompt_tokens=1, image_tokens=2, answer_tokens=3,
            disclaimer=DISCLAIMER,
        ),
        **changes,
    )  # fmt: skip


def timed(seconds: float, tokens: int) -> dict[str, Any]:
    return {"timings": Timings(generate=seconds), "answer_tokens": tokens}


RECORDS: list[Named] = [
    ("b/10.png", summary("b/10.png", "Clear lungs. Impression: normal.", **timed(3, 10))),
    ("b/2.png", Failure("b/2.png", None, "Normal?", "read", "ImageError", "b/2.png: is a folder")),
    ("a/1.dcm", summary("a/1.dcm", "Pleural  effusion\non the left.", warnings=("Two frames.",), **timed(1, 30))),
    ("a/1.dcm", summary("a/1.dcm", "The heart is large.", question="Heart?", **timed(1, 5))),
    ("c.png", summary("c.png", HOSTILE, question=HOSTILE, boxes=(Box(HOSTILE, 1, 2, 30, 40),), **timed(9, 20))),
    ("<b>d.png", Failure("d.png", "0" * 64, "Normal?", "generate", "NativeError", HOSTILE)),
]
EVERY = ["b/10.png", "b/2.png", "a/1.dcm", "c.png", "<b>d.png"]


def picture(_name: str, records: Sequence[Record]) -> Thumbnail | None:
    return make(np.linspace(0, 1, 64 * 48, dtype=np.float32).reshape(48, 64)) if records[0].sha256 else None


def page(records: Sequence[Named], file: Path) -> Path:
    file.write_text("".join(html.render(Header(), survey(records), iter(records), picture)), "utf-8")
    return file


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("profile")) as chromium:
        yield chromium


@pytest.fixture
def opened(browser: Chromium, tmp_path: Path) -> Chromium:
    browser.size(1600, 1000)
    browser.open(page(RECORDS, tmp_path / "page.html"))
    return browser


def shown(browser: Chromium) -> list[str]:
    """Names of the cards that can be seen, in the order in which they stand on the screen."""
    names: list[str] = browser.run(
        """[...document.querySelectorAll("article")].filter(card => card.getClientRects().length).map(card =>
        [card.getBoundingClientRect().top, card.getBoundingClientRect().left, card.querySelector("h2").textContent])
        .sort((a, b) => a[0] - b[0] || a[1] - b[1]).map(card => card[2])"""
    )
    return names


def choose(browser: Chromium, control: str, value: str) -> None:
    browser.run(f"{control}.value = {json.dumps(value)}; {control}.dispatchEvent(new Event('change'))")


def count(browser: Chromium) -> str:
    text: str = browser.run("document.getElementById('shown').innerText")
    return text


def asked(browser: Chromium) -> list[str]:
    """What was requested, beside the pictures inside the page."""
    inside = "data:image/jpeg;base64,"
    return [address.rpartition("/")[2] for address in browser.requests.values() if not address.startswith(inside)]


def test_everything_is_there_at_first(opened: Chromium) -> None:
    assert shown(opened) == EVERY
    assert count(opened) == "6 records"
    assert opened.run("[...document.images].map(image => [image.naturalWidth, image.naturalHeight])") == [[64, 48]] * 4
    assert opened.run("document.querySelector('.notice').innerText") == DISCLAIMER
    assert opened.run("document.querySelector('.notice').getBoundingClientRect().top") == 0


@pytest.mark.parametrize(
    ("typed", "names", "counted"),
    [
        ("CLEAR", ["b/10.png"], "1 of 6 records"),
        ("effusion on", ["a/1.dcm"], "1 of 6 records"),
        ("a/1", ["a/1.dcm"], "2 of 6 records"),
        ("is a folder", ["b/2.png"], "1 of 6 records"),
        ("two frames", ["a/1.dcm"], "1 of 6 records"),
        ("no such thing", [], "0 of 6 records"),
        (" ", EVERY, "6 records"),
    ],
)
def test_the_filter_finds_names_texts_messages_and_warnings(
    opened: Chromium, typed: str, names: list[str], counted: str
) -> None:
    opened.run("document.getElementById('filter').focus()")
    opened.type(typed)
    assert (shown(opened), count(opened)) == (names, counted)


@pytest.mark.parametrize(
    ("status", "names", "counted"),
    [
        ("summary", ["b/10.png", "a/1.dcm", "c.png"], "4 of 6 records"),
        ("failure", ["b/2.png", "<b>d.png"], "2 of 6 records"),
        ("warned", ["a/1.dcm"], "1 of 6 records"),
        ("all", EVERY, "6 records"),
    ],
)
def test_the_status_narrows(opened: Chromium, status: str, names: list[str], counted: str) -> None:
    choose(opened, "document.getElementById('status')", status)
    assert (shown(opened), count(opened)) == (names, counted)


def test_filters_hold_together_and_answer_by_answer(opened: Chromium) -> None:
    choose(opened, "document.getElementById('status')", "summary")
    opened.run("document.getElementById('filter').focus()")
    opened.type("heart is")
    assert shown(opened) == ["a/1.dcm"]
    assert (
        opened.run("[...document.querySelectorAll('section')].filter(one => one.getClientRects().length).length") == 1
    )


@pytest.mark.parametrize(
    ("key", "names", "backwards"),
    [
        ("run", EVERY, EVERY[::-1]),
        ("input", ["<b>d.png", "a/1.dcm", "b/2.png", "b/10.png", "c.png"],
         ["c.png", "b/10.png", "b/2.png", "a/1.dcm", "<b>d.png"]),
        ("status", ["b/2.png", "<b>d.png", "a/1.dcm", "b/10.png", "c.png"],
         ["b/10.png", "c.png", "a/1.dcm", "b/2.png", "<b>d.png"]),
        ("seconds", ["a/1.dcm", "b/10.png", "c.png", "b/2.png", "<b>d.png"],
         ["c.png", "b/10.png", "a/1.dcm", "b/2.png", "<b>d.png"]),
        ("tokens", ["b/10.png", "c.png", "a/1.dcm", "b/2.png", "<b>d.png"],
         ["a/1.dcm", "c.png", "b/10.png", "b/2.png", "<b>d.png"]),
    ],
)  # fmt: skip
def test_sorting(opened: Chromium, key: str, names: list[str], backwards: list[str]) -> None:
    """Numbers in names count as numbers; what has no time or tokens stands last either way."""
    choose(opened, "document.getElementById('sort')", key)
    assert shown(opened) == names
    opened.run("document.getElementById('reverse').click()")
    assert shown(opened) == backwards


def test_the_keyboard_reaches_and_works_everything(opened: Chromium) -> None:
    reached = []
    for _ in range(5):
        opened.press("Tab")
        reached.append(opened.run("document.activeElement.id || document.activeElement.tagName"))
        assert opened.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert reached == ["filter", "status", "sort", "reverse", "SUMMARY"]
    opened.run("document.getElementById('status').focus()")
    opened.type("fail")
    assert shown(opened) == ["b/2.png", "<b>d.png"]
    opened.run("document.getElementById('reverse').focus()")
    opened.press(" ", " ")
    assert shown(opened) == ["<b>d.png", "b/2.png"]
    names = "[...document.querySelectorAll('input, select, button')].every(one => one.labels?.length || one.innerText)"
    assert opened.run(names)


def test_nothing_is_requested_and_nothing_hostile_runs(opened: Chromium) -> None:
    assert asked(opened) == ["page.html"]
    assert opened.run("document.title") == "Chest-radiograph summaries – tiny"
    assert opened.run("document.querySelectorAll('a, iframe, form, link, section style, section img').length") == 0
    assert opened.run("document.querySelectorAll('script').length") == 1
    assert opened.run("document.querySelector('article:nth-child(4) .text').textContent") == HOSTILE
    assert opened.trouble == []


def test_the_policy_stops_what_should_ever_slip_through(browser: Chromium, tmp_path: Path) -> None:
    """The second line of defence, seen with the first one taken away."""
    file = page(RECORDS, tmp_path / "page.html")
    file.write_text(file.read_text("utf-8").replace("<h1>", f"{HOSTILE}<h1>"), "utf-8")
    browser.open(file)
    assert browser.run("document.title") == "Chest-radiograph summaries – tiny"
    assert shown(browser) != []
    assert asked(browser) == ["page.html"]
    assert len(browser.trouble) >= 3


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [360, 800, 1600])
def test_it_fits_the_screen_and_can_be_read(opened: Chromium, width: int, dark: bool) -> None:
    """Nothing sticks out, and every text has a contrast of 4.5 at least (WCAG 2.2, level AA)."""
    opened.size(width, 900, dark)
    opened.run("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert opened.run("document.documentElement.scrollWidth") <= width
    wide = f"[...document.querySelectorAll('article *')].filter(one => one.getBoundingClientRect().right > {width})"
    assert opened.run(f"{wide}.length") == 0
    worst = opened.run(WORST_CONTRAST)
    assert worst[0] >= 4.5, worst


def test_without_javascript_all_is_shown_and_no_dead_control(browser: Chromium, tmp_path: Path) -> None:
    browser.call("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page(RECORDS, tmp_path / "page.html"))
        assert shown(browser) == EVERY
        assert browser.run("document.querySelectorAll('article, section').length") == len(EVERY) + len(RECORDS)
        assert browser.run("document.getElementById('controls').getClientRects().length") == 0
        assert count(browser) == "6 records"
    finally:
        browser.call("Emulation.setScriptExecutionDisabled", value=False)


def test_the_disclaimer_stands_on_every_printed_page(browser: Chromium, tmp_path: Path) -> None:
    if not shutil.which("pdftotext"):
        pytest.skip("needs pdftotext, which is absent")
    records = [(f"{n}.png", summary(f"{n}.png", "The lungs are clear. " * (n % 17))) for n in range(60)]
    browser.open(page(records, tmp_path / "page.html"))
    pdf = tmp_path / "page.pdf"
    pdf.write_bytes(base64.b64decode(browser.call("Page.printToPDF", preferCSSPageSize=True)["data"]))
    text = subprocess.run(["pdftotext", "-layout", pdf, "-"], capture_output=True, text=True, check=True).stdout
    pages = text.split("\f")[:-1]
    assert len(pages) > 2
    assert [n for n, one in enumerate(pages) if " ".join(one.split()).count(DISCLAIMER) != 1] == []
    assert sorted(re.findall(r"\b(\d+)\.png", text), key=int) == [str(n) for n in range(60)]
    assert "Reverse" not in text


@pytest.mark.slow
def test_ten_thousand_records_stay_usable(browser: Chromium, tmp_path: Path) -> None:
    """Every step takes a fraction of a second on an idle machine; done wrongly, sorting takes minutes."""
    texts = ["Findings: the lungs are clear. " * 4, "Findings: there is a pleural effusion. " * 6]
    records = [(f"{n}.png", summary(f"{n}.png", texts[n % 2], **timed(n % 7, n % 11))) for n in range(10_000)]
    browser.open(page(records, tmp_path / "page.html"))
    began = time.monotonic()
    browser.run("document.getElementById('filter').focus()")
    browser.type("fusion")
    assert count(browser) == "5,000 of 10,000 records"
    choose(browser, "document.getElementById('sort')", "tokens")
    assert shown(browser)[:2] == ["11.png", "33.png"]
    browser.run("document.getElementById('reverse').click()")
    assert shown(browser)[:2] == ["21.png", "43.png"]
    assert time.monotonic() - began < 40

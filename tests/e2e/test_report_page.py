"""The report in a real browser: filters, dialog, keyboard, no request outside, text stays text."""

import itertools
import json
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from evals.report import build_report
from evals.run import evaluate
from evals.suites import Metric, SampleScore, Suite

CHROMIUM = shutil.which("chromium")
EVIL = "<script>alert(1)</script>"
PROMPTS, SEEDS = 30, 2

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


class Painter:
    """Paints green for right and red for wrong, by a rule on the prompt's number."""

    config = SimpleNamespace(steps=1, guidance=1.0)

    def __init__(self, right: range) -> None:
        self.right = right

    def generate(self, prompts: Sequence[str], **_: object) -> list[Image.Image]:
        """Return one picture for each prompt."""
        colors = ["green" if int(p.split()[1]) in self.right else "red" for p in prompts]
        return [Image.new("RGB", (48, 48), color) for color in colors]


def score(image: Image.Image, record: Mapping[str, Any]) -> SampleScore:
    """Green is right."""
    right = image.getpixel((0, 0)) == (0, 128, 0)
    details = {"objects": [{"label": EVIL, "box": [8, 8, 24, 24]}], "size": [48, 48]}
    return SampleScore({"strict": float(right)}, f"looked for {EVIL}", details)


class Tab:
    """One page of a headless Chromium, driven over its debugging protocol."""

    def __init__(self, profile: Path) -> None:
        websockets = pytest.importorskip("websockets.sync.client")
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
        flags += ["--disable-background-networking", "--remote-debugging-port=0"]
        command = [str(CHROMIUM), *flags, f"--user-data-dir={profile}", "about:blank"]
        self.process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        port_file = profile / "DevToolsActivePort"
        deadline = time.monotonic() + 60
        while not (port_file.exists() and "\n" in port_file.read_text()):
            assert time.monotonic() < deadline, "chromium did not start within 60 s"
            time.sleep(0.05)
        port = port_file.read_text().split("\n")[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as answer:
            page = next(entry for entry in json.load(answer) if entry["type"] == "page")
        self.stack = ExitStack()
        self.socket = self.stack.enter_context(
            websockets.connect(page["webSocketDebuggerUrl"], max_size=None)
        )
        self.numbers = itertools.count(1)
        self.events: list[dict[str, Any]] = []
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: object) -> dict[str, Any]:
        """Send a command and return its result; events on the way are kept."""
        number = next(self.numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": params}))
        while True:
            message = json.loads(self.socket.recv(timeout=60))
            if message.get("id") == number:
                assert "error" not in message, message
                return dict(message["result"])
            self.events.append(message)

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def press(self, key: str) -> None:
        """Press and release a key."""
        facts: dict[str, object] = {"key": key, "code": key}
        if key == "Enter":
            facts |= {"text": "\r", "windowsVirtualKeyCode": 13}
        if key == "Escape":
            facts |= {"windowsVirtualKeyCode": 27}
        self.call("Input.dispatchKeyEvent", type="keyDown", **facts)
        self.call("Input.dispatchKeyEvent", type="keyUp", **facts)

    def close(self) -> None:
        """End the browser."""
        self.stack.close()
        self.process.terminate()
        self.process.wait(timeout=30)


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    folder = tmp_path_factory.mktemp("page")
    records = tuple(
        {"prompt": f"prompt {n} {EVIL}", "prompt_id": f"p{n}", "metadata": {"tag": f"task{n % 3}"}}
        for n in range(PROMPTS)
    )
    suite = Suite("page", "Page", 1, records, score, {"strict": Metric("Right")}, "a test")
    # before: 0 to 9 right; after: 5 to 24 right. So 15 improve, 5 worsen, 10 fail, times 2 seeds.
    for name, right in (("before", range(10)), ("after", range(5, 25))):
        evaluate(Painter(right), suite, folder / name, seeds=SEEDS, weights=name)
    page = build_report([folder / "before", folder / "after"], folder / "report")
    browser = Tab(folder / "profile")
    try:
        browser.call("Page.navigate", url=page.as_uri())
        deadline = time.monotonic() + 60
        while not browser.run(
            "document.readyState === 'complete' && !!document.querySelector('article')"
        ):
            assert time.monotonic() < deadline, "the page did not load"
            time.sleep(0.05)
        yield browser
    finally:
        browser.close()


def count(tab: Tab) -> str:
    return str(tab.run("document.querySelector('.count').textContent"))


def choose(tab: Tab, outcome: str) -> str:
    tab.run(f"document.querySelector('[name=outcome][value={outcome}]').click()")
    return count(tab)


def test_filters_show_what_they_say(tab: Tab) -> None:
    assert choose(tab, "all") == "60 pairs of 30 prompts"
    assert choose(tab, "improved") == "30 pairs of 15 prompts"
    assert choose(tab, "worsened") == "10 pairs of 5 prompts"
    assert choose(tab, "failed") == "20 pairs of 10 prompts"
    tab.run(
        "(() => { const s = document.querySelector('[name=task]'); s.value = '0';"
        " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )
    # of the failed 0-4 and 25-29 those divisible by three: 0, 3, 27
    assert count(tab) == "6 pairs of 3 prompts"
    tab.run(
        "(() => { const s = document.querySelector('[name=task]'); s.value = '';"
        " s.dispatchEvent(new Event('change', {bubbles: true})); })()"
    )


def test_more_prompts_come_on_demand(tab: Tab) -> None:
    choose(tab, "all")
    assert tab.run("document.querySelectorAll('article').length") == 12
    for _ in range(2):
        tab.run("document.querySelector('.more').click()")
    assert tab.run("document.querySelectorAll('article').length") == 30
    assert tab.run("document.querySelector('.more').hidden") is True


def test_boxes_appear_when_asked_for(tab: Tab) -> None:
    style = "getComputedStyle(document.querySelector('article .boxes')).visibility"
    assert tab.run(style) == "hidden"
    tab.run("document.querySelector('[name=boxes]').click()")
    assert tab.run(style) == "visible"


def test_pictures_load_and_are_enlarged_crisp(tab: Tab) -> None:
    tab.run("document.querySelector('article').scrollIntoView()")
    image = "document.querySelector('article img')"
    deadline = time.monotonic() + 30
    while not tab.run(f"{image}.complete && {image}.naturalWidth > 0"):
        assert time.monotonic() < deadline, "the picture did not load"
        time.sleep(0.05)
    assert tab.run(f"{image}.naturalWidth") == 48
    assert tab.run(f"{image}.clientWidth") > 90
    assert tab.run(f"getComputedStyle({image}).imageRendering") == "pixelated"


def test_keyboard_opens_walks_and_closes(tab: Tab) -> None:
    choose(tab, "all")
    tab.run("document.querySelector('button.pair').focus()")
    tab.press("Enter")
    assert tab.run("document.getElementById('zoom').open") is True
    place = "document.querySelector('#zoom .meta').textContent"
    assert "1 of 60" in tab.run(place)
    tab.press("ArrowRight")
    assert "2 of 60" in tab.run(place)
    tab.press("ArrowLeft")
    assert "1 of 60" in tab.run(place)
    tab.press("Escape")
    assert tab.run("document.getElementById('zoom').open") is False


def test_theme_button_switches(tab: Tab) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    before = tab.run(background)
    tab.run("document.getElementById('theme').click()")
    assert tab.run(background) != before
    tab.run("document.getElementById('theme').click()")
    assert tab.run(background) == before


def test_narrow_page_does_not_scroll_sideways(tab: Tab) -> None:
    tab.call(
        "Emulation.setDeviceMetricsOverride",
        width=390, height=800, deviceScaleFactor=1, mobile=True,
    )  # fmt: skip
    assert tab.run("document.documentElement.scrollWidth") <= 390
    tab.call("Emulation.clearDeviceMetricsOverride")


def test_text_stays_text_and_nothing_leaves_the_machine(tab: Tab) -> None:
    """Last in the file: it judges everything the tests above made the page do."""
    assert EVIL in tab.run("document.querySelector('article h3').textContent")
    assert (
        tab.run(
            "[...document.scripts].filter(s => s.textContent.includes('alert(1)') "
            "&& s.type !== 'application/octet-stream').length"
        )
        == 0
    )
    events = {event["method"] for event in tab.events}
    assert "Page.javascriptDialogOpening" not in events
    assert "Runtime.exceptionThrown" not in events
    logged = [e["params"]["entry"] for e in tab.events if e["method"] == "Log.entryAdded"]
    assert [entry for entry in logged if entry["level"] == "error"] == []
    requests = [
        event["params"]["request"]["url"]
        for event in tab.events
        if event["method"] == "Network.requestWillBeSent"
    ]
    assert len(requests) > 1
    assert all(url.startswith("file:///") for url in requests)

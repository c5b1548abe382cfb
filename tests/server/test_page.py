"""The page in a real browser: what a person sees, what a hostile text cannot do, and what is said when something fails.

Screenshots are written where HEADWISE_SCREENSHOTS names a directory.
"""

from __future__ import annotations

import calendar
import json
import os
import re
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from server.test_app import call, events, until_ready

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
PATHS = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
NEVER = {"1": -100, "6": -100, "11": -100}  # the model's end tokens

CONTRAST = """() => {
  const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
  const linear = (v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = (c) => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => sum + weight * linear(c[i] / 255), 0);
  const behind = (e) => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c[3] !== 0) return c;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const says = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
    if (!says || !e.checkVisibility() || e.disabled || e.closest("script")) continue;
    const ink = getComputedStyle(e)[e.namespaceURI.endsWith("svg") ? "fill" : "color"];
    const [dark, bright] = [light(rgb(ink)), light(behind(e))].sort((a, b) => a - b);
    const ratio = (bright + 0.05) / (dark + 0.05);
    if (ratio < 4.5) found.push(`${e.tagName}.${e.className} ${e.textContent.slice(0, 30)} ${ratio.toFixed(2)}`);
  }
  return found; }"""
NAMED = """() => { const e = document.activeElement;
  return e.tagName + " " + (e.getAttribute("aria-label") || e.labels?.[0]?.textContent || e.textContent).trim().slice(0, 24); }"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        path = next((p for p in PATHS if p), None)
        try:
            found = playwright.chromium.launch(executable_path=path, args=FLAGS)
        except sync_api.Error as error:
            pytest.skip(f"no Chromium here: {error}")
        yield found
        found.close()


@contextmanager
def opened(browser: Any, url: str, *, scheme: str = "light", width: int = 1280, provoked: str = "") -> Iterator[Any]:
    """The page; at the end nothing may have been asked of another host, thrown, or refused by the policy but what was provoked."""
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 1000})
    page = context.new_page()
    page.set_default_timeout(60_000)
    faults: list[str] = []
    asked: set[str] = set()
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: asked.add(request.url))
    page.route("**/v1/chat/completions", _greedy)
    try:
        page.goto(url + "/")
        yield page
        faults = [f for f in faults if "Failed to load resource" not in f]  # an HTTP error, which the page tells
        assert [f for f in faults if not provoked or provoked not in f] == []
        assert bool(faults) == bool(provoked)
        assert all(a.startswith((url, "data:")) for a in asked), asked
    finally:
        context.close()


def _greedy(route: Any) -> None:
    """The same answer every time, and none that ends before it has begun."""
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "temperature": 0, "logit_bias": NEVER}))


def shoot(page: Any, name: str) -> None:
    if folder := os.environ.get("HEADWISE_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def send(page: Any, text: str, most: int = 24) -> None:
    page.fill("#most", str(most))
    page.fill("#text", text)
    page.press("#text", "Enter")


def long(live: Any) -> str:
    """A question of 3,500 tokens."""
    tokenizer = live.model.tokenizer
    return "What does this do?\n\n" + tokenizer.decode(tokenizer.encode(Path(calendar.__file__).read_text())[:3490])


def until(page: Any, true: str) -> None:
    """Waits for an expression; the page's policy forbids the browser to evaluate one of its own."""
    for _ in range(600):
        if page.evaluate(true):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"it never came true: {true}")


def contrast(page: Any) -> list[str]:
    """Texts whose contrast with what lies behind them is below 4.5, computed as WCAG 2.1 does."""
    return page.evaluate(CONTRAST)


@pytest.mark.parametrize(
    ("name", "scheme", "width"),
    [("light", "light", 1280), ("dark", "dark", 1280), ("narrow", "light", 360), ("narrow-dark", "dark", 360)],
)
def test_the_page_tells_what_the_server_knows(live: Any, browser: Any, name: str, scheme: str, width: int) -> None:
    until_ready(live)
    facts = call(live, "/v1/attention")[1]
    with opened(browser, live.url, scheme=scheme, width=width) as page:
        page.wait_for_selector(".cells button")
        shoot(page, name)

        assert page.inner_text("#status") == "ready"
        labels = [c.get_attribute("aria-label") for c in page.query_selector_all(".cells button")]
        said = [f"{x['kind']}, head_dim {x['head_dim']}, {x['backend']}, {x['verdict']}" for x in facts["layers"]]
        assert labels == [f"Layer {i}: {words}" for i, words in enumerate(said)]
        page.click(".cells button:nth-child(1)")
        assert "256 tokens" in page.inner_text("#layer")
        assert "all passed" in page.inner_text("#layer")
        assert "headwise-triton: runs on cuda, not on cpu" in page.inner_text("#layer")
        rows = dict(re.findall(r"^(.+?)\t(.+?)\t", page.inner_text("#memory"), re.MULTILINE))
        assert rows["weights"] == f"{facts['plan']['weights_bytes'] / 2**20:.2f} MiB"
        assert page.inner_text("#memory-summary").startswith("Measured equals planned")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        assert contrast(page) == []


def test_everything_can_be_reached_by_keyboard_and_has_a_name(live: Any, browser: Any) -> None:
    until_ready(live)
    with opened(browser, live.url) as page:
        page.wait_for_selector(".cells button")
        seen = []
        for _ in range(14):
            page.keyboard.press("Tab")
            seen.append(page.evaluate(NAMED))

        assert all(re.search(r" \S", s) for s in seen), seen
        for word in (
            "A Skip",
            "BUTTON Layer 4",
            "BUTTON New chat",
            "TEXTAREA Message",
            "INPUT Most",
            "SELECT Thinking",
            "BUTTON Send",
        ):
            assert any(s.startswith(word) for s in seen), (word, seen)
        page.focus(".cells button[tabindex='0']")
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#layer").startswith("Layer 5, sliding")
        page.keyboard.press("End")
        assert page.inner_text("#layer").startswith("Layer 9, global")


def test_a_chat_streams_and_remembers(live: Any, browser: Any) -> None:
    until_ready(live)
    with opened(browser, live.url) as page:
        page.wait_for_selector(".cells button")
        send(page, "def add(a, b):")
        page.wait_for_selector(".turn.assistant .who.number:has-text('per second')")
        first = page.inner_text(".turn.assistant p")
        assert first
        send(page, "and now?")
        until(page, "document.querySelectorAll('.turn.assistant .who.number')[1]?.textContent.includes('cached')")
        said = page.inner_text(".turn.assistant:nth-of-type(4) .who.number")

        assert int(re.findall(r"(\d+) cached", said)[0]) > 10  # the first turn was sent again, and found
        page.click("#clear")
        assert page.query_selector_all(".turn") == []


def test_a_page_shows_a_prefill_and_stops_an_answer(live: Any, browser: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt of minutes without a sign of life looks like a dead server."""
    from headwise.server import answer

    monkeypatch.setattr(answer, "PROGRESS_S", 0.05)
    until_ready(live)
    endless = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 3000, "logit_bias": NEVER}
    other = events(live, "/v1/chat/completions", endless)
    next(other)  # beside an answer a prompt goes in small chunks
    with opened(browser, live.url) as page:
        page.wait_for_selector(".cells button")
        send(page, long(live), most=2000)
        until(page, r"/prompt: [1-9][\d,]* of/.test(document.querySelector('.turn.assistant .who.number').textContent)")
        until(page, "document.querySelector('#requests').textContent.includes('prefill')")
        shoot(page, "prefill")
        done = page.evaluate("[...document.querySelectorAll('#requests progress')].map((p) => p.value / p.max)")
        assert any(0 < x < 1 for x in done), done
        page.click("#stop")
        page.wait_for_selector(".turn.assistant .who.number:has-text('stopped')")
        other.close()
        until(page, "document.querySelector('#requests-summary').textContent.startsWith('0 running, 0 waiting')")
        assert live.engine.running == 0
        assert page.evaluate("document.querySelector('#decode path').getAttribute('d').length") > 10


def test_a_hostile_text_stays_text(live: Any, browser: Any) -> None:
    """A model's answer, a tool's result or a model's name may be anything."""
    until_ready(live)
    bad = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
    with opened(browser, live.url, provoked="TrustedHTML") as page:
        page.wait_for_selector(".cells button")
        send(page, bad)
        page.wait_for_selector(".turn.assistant .who.number:has-text('per second')")

        assert page.inner_text(".turn.user p") == bad
        assert page.query_selector_all("#log img, #log script") == []
        assert page.title() == "tiny-hybrid - headwise"
        refused = page.evaluate("() => { try { document.body.innerHTML = '<b>x</b>'; return ''; } catch (e) { return e.name; } }")
        assert refused == "TypeError"  # trusted types


def test_an_engine_that_dies_is_told_and_comes_back(live: Any, browser: Any) -> None:
    until_ready(live)
    with opened(browser, live.url) as page:
        page.wait_for_selector(".cells button")
        send(page, long(live), most=3000)
        until(page, "document.querySelector('#requests').textContent.includes('#')")
        os.kill(live.engine.pid, signal.SIGKILL)
        page.wait_for_selector("#failed:not([hidden])")
        shoot(page, "error")

        assert "process died" in page.inner_text("#failed")
        assert page.inner_text("#send") == "Send"
        assert page.is_enabled("#send")
        page.wait_for_selector("#status.ok")
        until(page, "document.querySelector('#about').textContent.includes('restarted')")
        until_ready(live)
        send(page, "x = ")
        page.wait_for_selector(".turn.assistant .who.number:has-text('per second')")
        assert page.is_hidden("#failed")


def test_the_page_asks_for_the_key_and_keeps_it_in_memory(live: Any, browser: Any) -> None:
    import asyncio
    import contextlib

    import uvicorn

    from headwise.server.app import create_app
    from headwise.server.serve import _socket

    class Borrowed:
        """The models of the other server: this one does not run them."""

        def __getattr__(self, name: str) -> Any:
            return getattr(live.models, name)

        async def start(self) -> None:
            pass

        close = start

    listening = _socket("127.0.0.1", 0)
    app = create_app(Borrowed(), api_key="sesame")  # type: ignore[arg-type]
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        with opened(browser, f"http://127.0.0.1:{listening.getsockname()[1]}") as page:
            page.wait_for_selector("#lock:not([hidden])")
            assert page.evaluate("document.activeElement.id") == "key"
            page.fill("#key", "wrong")
            page.press("#key", "Enter")
            page.wait_for_selector("#wrong:has-text('refused')")
            shoot(page, "key")
            page.fill("#key", "sesame")
            page.press("#key", "Enter")
            page.wait_for_selector(".cells button")

            assert page.is_hidden("#lock")
            kept = page.evaluate("JSON.stringify(localStorage) + JSON.stringify(sessionStorage) + document.cookie + location.href")
            assert "sesame" not in kept + page.content()
    finally:
        server.should_exit = True
        with contextlib.suppress(RuntimeError):
            thread.join(20)

"""The page at ``/``, driven in headless Chromium with a model that answers from a script."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from ollama_forge.serving.api.security import ServeSettings
from ollama_forge.serving.engine.base import EngineRequest
from ollama_forge.serving.engine.scripted import ScriptedEngine
from ollama_forge.serving.metadata import ModelMetadata
from ollama_forge.serving.model import ServedModel
from ollama_forge.serving.run_facts import LIVE_KEY, REPORT_KEY
from tests.loopback import THINKING, loopback, scripted
from tests.test_api_security import call

sync_api: Any = pytest.importorskip("playwright.sync_api")

NASTY = "<img src=x onerror=alert(1)><script>alert(2)</script>"
FIGURES = {
    "model": "demo",
    "edit": "least squares, layer 20",
    "rows": [
        {"name": "base", "refused": 144, "harmful": 151, "answer_kl": None},
        {"name": "edited", "refused": 3, "harmful": 151, "answer_kl": 0.0185},
    ],
}


def say(request: EngineRequest, prompt: str) -> str:
    """The strength and the number of messages; endless for one word, and markup for another."""
    if "endless" in prompt.rsplit("<|user|>", 1)[-1]:
        return "on and " * 1000
    if "markup" in prompt.rsplit("<|user|>", 1)[-1]:
        return f"{NASTY}</think>{NASTY}"
    turns, of_base = prompt.count("<|user|>"), prompt.count("|>Strength 0,")
    return f"A thought.</think>Strength {request.strength:g}, turn {turns}: {of_base}"


def made(*, live: bool) -> ServedModel:
    model = scripted(say, template=THINKING, engine=Slow, context_length=1 << 20)
    info = {"llama.context_length": 4096, **({LIVE_KEY: 1.0, REPORT_KEY: FIGURES} if live else {})}
    metadata: ModelMetadata = replace(model.metadata, model_info=info)
    model.metadata, model.live = metadata, live
    return model


class Slow(ScriptedEngine):
    """Answers a token in two milliseconds, so that there is time to stop an endless answer."""

    async def generate(self, request: EngineRequest) -> Any:
        async for token in super().generate(request):
            await asyncio.sleep(0.002)
            yield token


@dataclass
class Tab:
    """A page in the browser, what it asked for, and what it complained of."""

    page: Any
    model: ServedModel
    url: str
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def answers(self) -> list[str]:
        """The texts of the answers of the last turn."""
        texts: list[str] = self.page.locator(".turn").last.locator(".answers > div > .text").all_inner_texts()
        return texts

    def wait(self, status: str = "Answered") -> None:
        self.shows("#status", status)

    def shows(self, selector: str, text: str) -> None:
        """Wait until an element shows a text; the page's policy lets no test evaluate text as a script."""
        sync_api.expect(self.page.locator(selector)).to_have_text(text, timeout=20_000)

    def send(self, text: str) -> list[str]:
        self.page.fill("#message", text)
        self.page.click("#send")
        self.wait()
        return self.answers()

    @property
    def engine(self) -> ScriptedEngine:
        assert isinstance(self.model.engine, ScriptedEngine)
        return self.model.engine


def opened(browser: Any, model: ServedModel, url: str) -> Tab:
    page = browser.new_page(viewport={"width": 360, "height": 740})
    page.set_default_timeout(20_000)
    tab = Tab(page, model, url)
    page.on("request", lambda request: tab.requests.append(request.url))
    page.on("console", lambda message: tab.complaints.append(message.text))
    page.on("pageerror", lambda error: tab.complaints.append(str(error)))
    page.goto(url)
    return tab


@pytest.fixture(params=["live", "plain"])
def tab(request: pytest.FixtureRequest, browser: Any) -> Iterator[Tab]:
    model = made(live=request.param == "live")
    with loopback(model) as url:
        tab = opened(browser, model, url)
        tab.shows("#title", "wire")
        yield tab
        tab.page.close()
    assert tab.complaints == []
    assert {one.split("/", 3)[2] for one in tab.requests if not one.startswith("data:")} == {url.split("/")[2]}


only_live = pytest.mark.parametrize("tab", ["live"], indirect=True)
only_plain = pytest.mark.parametrize("tab", ["plain"], indirect=True)


def test_clients_get_the_text_and_browsers_a_page_that_loads_nothing() -> None:
    with loopback(made(live=False), ServeSettings(api_key="s3cret")) as url:
        for accept in ({}, {"Accept": "*/*"}, {"Accept": "application/json"}):
            status, headers, text = call(url, "GET", "/", headers=accept)
            assert (status, text, headers["Vary"]) == (200, b"Ollama is running", "Accept")
        status, headers, text = call(url, "GET", "/", headers={"Accept": "text/html,*/*;q=0.8"})
    assert (status, headers["Content-Type"], headers["Vary"]) == (200, "text/html; charset=utf-8", "Accept")
    policy = headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    page = text.decode()
    assert "http" not in page.replace("http-equiv", "")
    assert "innerHTML" not in page
    assert "--paper: #fdfdfc" in page  # the report's colours


def test_a_conversation(tab: Tab) -> None:
    assert tab.send("hello") == ["Strength 1, turn 1: 0"]
    assert tab.page.locator("details.thought .text").inner_text() == ""  # it is folded
    tab.page.click("details.thought summary")
    assert tab.page.locator("details.thought .text").inner_text() == "A thought."
    assert "tokens/s" in tab.page.locator(".rate").inner_text()
    assert tab.send("again") == ["Strength 1, turn 2: 0"]
    tab.page.click("#clear")
    assert tab.page.locator(".turn").count() == 0
    assert tab.send("anew") == ["Strength 1, turn 1: 0"]


@only_plain
def test_text_of_a_model_is_no_markup(tab: Tab) -> None:
    assert tab.send(f"markup {NASTY}") == [NASTY]
    assert tab.page.locator("details.thought .text").text_content() == NASTY
    assert tab.page.locator(".turn > p").inner_text() == f"markup {NASTY}"
    assert tab.page.evaluate("document.querySelectorAll('.turn img, .turn script').length") == 0


@only_live
def test_the_slider_and_the_base_beside_it(tab: Tab) -> None:
    tab.page.focus("#strength")
    tab.page.keyboard.press("ArrowRight")
    assert tab.page.locator("#shown").inner_text() == "1.05"
    tab.page.keyboard.press("Home")
    assert tab.send("one") == ["Strength -1, turn 1: 0"]
    tab.page.check("#beside")
    tab.page.focus("#strength")
    tab.page.keyboard.press("End")
    assert tab.send("two") == ["Strength 0, turn 2: 0", "Strength 2, turn 2: 0"]
    assert tab.page.locator(".turn").last.locator("h2").all_inner_texts() == ["Base", "Strength 2"]
    assert tab.send("three") == ["Strength 0, turn 3: 1", "Strength 2, turn 3: 0"]  # each goes on with its own answer
    assert [request.strength for request in tab.engine.requests[:1]] == [-1.0]
    assert sorted(request.strength for request in tab.engine.requests[1:]) == [0.0, 0.0, 2.0, 2.0]


@only_plain
def test_a_model_that_is_not_live_has_no_slider(tab: Tab) -> None:
    assert not tab.page.locator("#strength").is_visible()
    assert not tab.page.locator("#beside").is_visible()


@only_live
def test_stop_and_leave(tab: Tab) -> None:
    tab.page.check("#beside")
    for how in ("#stop", "Escape", "#clear"):
        tab.page.fill("#message", "endless")
        tab.page.click("#send")
        tab.wait("Answering")
        thoughts = tab.page.locator(".turn:last-child .thought .text")
        sync_api.expect(thoughts).to_contain_text(["on and", "on and"], timeout=20_000)
        if how.startswith("#"):
            tab.page.click(how)
        else:
            tab.page.keyboard.press(how)
        tab.wait("" if how == "#clear" else "Stopped")
        for _ in range(200):
            if tab.engine.active:
                tab.page.wait_for_timeout(100)
        assert tab.engine.active == 0
        assert thoughts.count() == 0 or len(thoughts.first.text_content()) < 4000
    assert tab.page.evaluate("document.activeElement.id") == "message"


@only_live
def test_the_keyboard_alone(tab: Tab) -> None:
    reached = []
    for _ in range(8):
        tab.page.keyboard.press("Tab")
        reached.append(tab.page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert reached[:7] == ["SUMMARY", "strength", "beside", "message", "send", "clear", reached[6]]
    tab.page.focus("#beside")
    tab.page.keyboard.press("Space")
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.type("first line")
    tab.page.keyboard.press("Shift+Enter")
    tab.page.keyboard.type("second line")
    tab.page.keyboard.press("Enter")
    tab.wait()
    assert tab.page.locator(".turn > p").inner_text() == "first line\nsecond line"
    assert len(tab.answers()) == 2
    assert tab.page.evaluate("document.activeElement.id") == "message"
    tab.page.keyboard.type("endless")
    tab.page.keyboard.press("Tab")
    tab.page.keyboard.press("Space")  # on Send; the focus then moves to Stop
    sync_api.expect(tab.page.locator("#stop")).to_be_focused()
    tab.page.keyboard.press("Space")
    tab.wait("Stopped")
    assert tab.page.evaluate("document.activeElement.id") == "message"


@only_live
def test_facts_and_figures(tab: Tab) -> None:
    tab.page.click("#about > summary")
    facts = tab.page.locator("#facts").inner_text()
    for fact in ("llama", "1M", "F32", "4096 tokens", "least squares, layer 20"):
        assert fact in facts
    assert tab.page.locator("#rows tr").all_inner_texts() == ["base\t144 of 151\t", "edited\t3 of 151\t0.018"]


@only_live
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(tab: Tab, scheme: str) -> None:
    tab.page.emulate_media(color_scheme=scheme)
    tab.page.check("#beside")
    tab.send("hello")
    tab.page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert tab.page.evaluate("document.documentElement.scrollWidth") <= 360
    background = tab.page.evaluate("getComputedStyle(document.documentElement).backgroundColor")
    assert background == {"light": "rgb(253, 253, 252)", "dark": "rgb(21, 24, 27)"}[scheme]
    log = tab.page.locator("#log")
    assert (log.get_attribute("aria-live"), log.get_attribute("aria-busy")) == ("polite", "false")
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    options = {"resultTypes": ["violations"], "preload": False}
    found = axe.run(tab.page, options=options).response["violations"]
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]][:3]) for one in found] == []


def test_a_failed_answer_and_a_missing_key_are_said(browser: Any) -> None:
    model = scripted(lambda *_: "hello", fail_after=2)
    with loopback(model, ServeSettings(api_key="s3cret")) as url:
        tab = opened(browser, model, url)
        tab.shows("#status", "unauthorized: the API key is missing or wrong")
        tab.page.fill("#key", "s3cret")
        tab.page.keyboard.press("Tab")
        tab.shows("#title", "wire")
        assert tab.send("hi") == ["he"]
        assert tab.page.locator(".error").inner_text() == "the engine failed"
        tab.page.close()

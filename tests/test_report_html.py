"""``report.html``: every figure is in ``report.json``, nothing is loaded, and it can be read by everybody."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest

from ollama_forge.reporting import render
from ollama_forge.reporting.axes import Scale
from ollama_forge.reporting.markup import tag
from ollama_forge.search.ladder import Choice
from tests import made_report

BARE = {"rows": {}, "checks": None, "noise_floor": None, "separation": None, "changes": (), "machine": None}
# Figures of the page's own words: intervals, lengths of answers and the kept part of a distribution.
OWN_FIGURES = {"95", "64", "128", "512", "4", "8", "256"}
THIN = "\u202f"


def contents() -> dict[str, Any]:
    made = {
        "run": made_report.made().to_json(),
        "no-evaluate": made_report.made(**BARE).to_json(),
        "thinking": made_report.made(
            choice=made_report.thinking_choice(), separation=made_report.separation(thinks=True)
        ).to_json(),
        "evaluate": made_report.evaluation(),
    }
    return {name: json.loads(json.dumps(content)) for name, content in made.items()}


@pytest.fixture(scope="module", params=["run", "no-evaluate", "evaluate"])
def opened(request: pytest.FixtureRequest, browser: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A report's content, its page in the browser, and what the browser asked for and complained of."""
    content = contents()[request.param]
    file = tmp_path_factory.mktemp("page") / "report.html"
    file.write_text(render(content), encoding="utf-8")
    page = browser.new_page(viewport={"width": 360, "height": 740})
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(file.as_uri())
    yield content, page, requests, complaints
    page.close()


def test_nothing_is_loaded_and_nothing_fails(opened: Any) -> None:
    _, page, requests, complaints = opened
    assert requests == [page.url]
    assert complaints == []
    assert page.evaluate("document.querySelectorAll('script, img, link, iframe').length") == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(opened: Any, scheme: str) -> None:
    content, page, _, _ = opened
    if "measurements" not in content or not content["measurements"] or (scheme == "dark" and "kind" in content):
        pytest.skip("the other pages have the same elements and colours")
    page.emulate_media(color_scheme=scheme)
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    options: dict[str, Any] = {"resultTypes": ["violations"], "preload": False}
    if scheme == "dark":
        options["runOnly"] = ["color-contrast"]
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    found = axe.run(page, options=options).response["violations"]
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]][:3]) for one in found] == []


def test_a_phone_shows_the_whole_width(opened: Any) -> None:
    _, page, _, _ = opened
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360


def test_all_that_scrolls_or_opens_is_reached_by_keyboard(opened: Any) -> None:
    _, page, _, _ = opened
    wanted = page.evaluate(
        "[...document.querySelectorAll('a, summary, .scroll')].filter(one => one.checkVisibility()).length"
    )
    reached = set()
    page.evaluate("document.activeElement.blur()")
    for _ in range(wanted):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.outerHTML"))
    assert wanted
    assert len(reached) == wanted


# -- every figure is in report.json ---------------------------------------------------------------------


class Shown(HTMLParser):
    """The texts of a page, each with the entry of the report that it is said to show ("" for none)."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[tuple[str, str, bool]] = []  # tag, entry, whether it belongs to an axis or is not shown
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        if name in ("meta", "br"):
            return
        values = dict(attributes)
        apart = name in ("style", "title") or values.get("class") == "axis"
        outer = self.open[-1] if self.open else ("", "", False)
        self.open.append((name, values.get("data-from") or outer[1], apart or outer[2]))

    def handle_endtag(self, name: str) -> None:
        assert self.open.pop()[0] == name

    def handle_data(self, text: str) -> None:
        if self.open and not self.open[-1][2] and text.strip():
            self.texts.append((self.open[-1][1], text))


def looked_up(content: Any, pointer: str) -> Any:
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        content = content[int(key)] if isinstance(content, list) else content[key]
    return content


def agrees(text: str, value: Any) -> bool:
    """Whether a text shows a value, rounded to the decimals that it has."""
    if isinstance(value, str):
        return text == value or (len(value) == 64 and value.startswith(text))
    if isinstance(value, bool) or value is None:
        return text == {True: "yes", False: "no", None: "none"}[value]
    share = text.endswith(f"{THIN}%") or ("." not in text and isinstance(value, float) and abs(value) <= 1)
    shown = text.removesuffix(f"{THIN}%").replace(",", "").replace("\u2212", "-")
    decimals = len(shown.partition(".")[2])
    scaled = value * 100 if share and not math.isclose(float(shown), value) else value
    return "e" in shown or abs(float(shown) - scaled) <= 0.5 * 10**-decimals + 1e-9


@pytest.mark.parametrize("name", ["run", "no-evaluate", "thinking", "evaluate"])
def test_every_figure_is_in_report_json(name: str) -> None:
    content = contents()[name]
    shown = Shown(render(content)).texts
    entries = [(pointer, text) for pointer, text in shown if pointer]
    for pointer, text in entries:
        assert agrees(text, looked_up(content, pointer)), (pointer, text)
    strings = json.dumps(content, ensure_ascii=False)
    for text in (text for pointer, text in shown if not pointer):
        if text.strip() not in strings:  # the name of a row, a category or a stage
            assert set(re.findall(r"\d+", text)) <= OWN_FIGURES, text
    figures = [pointer for pointer, _ in entries if isinstance(looked_up(content, pointer), int | float)]
    assert len(figures) > (300 if name == "run" else 10)


def test_a_wrong_figure_is_noticed() -> None:
    assert agrees(f"58{THIN}%", 0.5781)
    assert not agrees(f"57{THIN}%", 0.5781)
    assert agrees("0.018", 0.0185)
    assert not agrees("0.021", 0.0185)
    assert agrees("1,234", 1234)
    assert not agrees("1,235", 1234)


# -- words and drawings ---------------------------------------------------------------------------------


def top(**changes: Any) -> str:
    page = render(made_report.made(**changes).to_json())
    return re.sub(r"<[^>]+>", "", page[page.index("<header>") : page.index("</header>")])


def test_trials_that_strengthen_show_harmless_refusals_too() -> None:
    assert "harmless refused" not in render(made_report.made().to_json())
    found = made_report.choice()
    settings = replace(found.settings, strength=-2.0)
    trials = [replace(trial, harmless=made_report.classes(64, 0.02)) for trial in found.trials]
    page = render(made_report.made(choice=replace(found, settings=settings, trials=tuple(trials))).to_json())
    assert page.count('data-from="/choice/trials/0/harmless/refusal"') == 1
    assert "harmless refused" in page
    assert "the further up, the more is refused" in page


def test_the_headline_says_what_the_edit_did() -> None:
    rows = made_report.made().rows
    assert "makes the model refuse less" in top()
    assert "random direction leaves refusals as they are" in top()
    short = top(choice=made_report.choice(found=False))
    assert "Nothing was found that removes this model\u2019s refusals far enough" in short
    same = {**rows, "edited": rows["random direction"]}
    assert "Nothing was found that removes this model\u2019s refusals by more than chance" in top(rows=same)
    swapped = {**rows, "base": rows["edited"], "edited": rows["base"]}
    assert "the opposite of what it is for" in top(rows=swapped)
    assert "a part of the effect" in top(rows={**rows, "random direction": rows["edited"]})
    assert "not measured" in top(rows={})
    small = {**rows, "edited": made_report.row(0.02, made_report.damage(0.001), 2)}
    assert "cannot be told from the base" in top(rows=small)
    failed = [check.__class__(check.name, False, 2.0, 0.5, "somewhere") for check in made_report.made().checks or ()]
    assert "Do not use these weights" in top(checks=tuple(failed))


def test_every_text_is_escaped() -> None:
    nasty = '<script>alert("1")</script>&'
    content = json.loads(json.dumps(made_report.made().to_json()).replace("my-model", json.dumps(nasty)[1:-1]))
    content["notes"], content["choice"]["reason"] = [nasty], nasty
    content["measurements"][nasty] = content["measurements"]["edited"]
    page = render(content)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") >= 4
    assert tag("p", title='"<') == '<p title="&quot;&lt;"></p>'


def test_the_probes_of_a_thinking_model_are_shown_for_both_directions() -> None:
    def probed(choice: Choice) -> str:
        figures = re.findall(r"<figure>.*?</figure>", render(made_report.made(choice=choice).to_json()), re.S)
        [found] = [figure for figure in figures if "What removing each layer" in figure]
        return str(found)

    plain, thinking = probed(made_report.choice()), probed(made_report.thinking_choice())
    assert "before the thought" not in plain
    assert "before the answer" in thinking
    assert "before the thought" in thinking
    assert thinking.count("<tr>") - 1 == 2 * (plain.count("<tr>") - 1)


def test_a_plot_has_its_figures_in_words_and_as_a_table() -> None:
    page = render(made_report.made().to_json())
    figures = re.findall(r"<figure>.*?</figure>", page, re.S)
    assert len(figures) == 7
    for figure in figures:
        [(name, words)] = re.findall(r'aria-labelledby="(\S+)" aria-describedby="(\S+)"', figure)
        assert f'<title id="{name}">' in figure
        assert f'<desc id="{words}">' in figure
        assert "<details><summary>" in figure
        assert "<table>" in figure
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))


def test_points_lie_where_their_values_are() -> None:
    scale = Scale.of([0.003, 0.031], 50.0, 350.0)
    assert scale.ticks[0] == 0.0
    assert scale.ticks[-1] >= 0.031
    assert len(scale.ticks) <= 6
    assert scale(0.0) == 50.0
    assert scale(scale.high / 2) == pytest.approx(200.0)
    assert Scale.of([5.0, 5.0], 0.0, 1.0, zero=False).high > 5.0
    assert Scale.of([1e-15, 0.0], 0.0, 1.0).high == 1.0
    assert Scale.of([math.nan, -3.0], 0.0, 1.0).low <= -3.0
    content = made_report.made().to_json()
    content["choice"]["trials"] = content["choice"]["trials"][:1]
    page = render(content)
    drawing = page[page.index('id="refusals-against-damage-name"') :]
    x, y = _mark(drawing)
    # 0.021 of an axis to 0.06, and 14 of 101 on an axis to 100 %
    assert x == pytest.approx(46.0 + 0.021 / 0.06 * 360.0, abs=0.1)
    assert y == pytest.approx(264.0 - 14 / 101 * 230.0, abs=0.1)


def _mark(drawing: str) -> tuple[float, float]:
    """The centre of the first diamond of series 2: its highest point is above it."""
    found = re.search(r'<path d="M([-\d.]+) ([-\d.]+)L[^"]+" class="mark s2">', drawing)
    assert found is not None
    return float(found[1]), float(found[2]) + 1.25 * 4.5

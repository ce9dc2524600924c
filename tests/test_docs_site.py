"""The built site of the docs, in headless Chromium: links, requests, search, and what axe-core finds."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urldefrag, urljoin

import click
import pytest

from tests.command_line import COMMANDS
from tests.docs_blocks import ROOT

mkdocs_build: Any = pytest.importorskip("mkdocs.commands.build")
mkdocs_config: Any = pytest.importorskip("mkdocs.config")


# A page of each kind: text, tables, commands, pictures, diffs, TOML, what is made from the code.
KINDS = (
    "",
    "tutorial/",
    "publishing/",
    "explanation/mathematics/",
    "contributing/",
    "command-line/",
    "reference/http-api/",
)
# The text below each heading, up to the next one.
SECTIONS = """() => [...document.querySelectorAll('article :is(h1, h2, h3, h4)')].map(heading => {
    let text = '';
    for (let next = heading.nextElementSibling; next && !/^H[1-4]$/.test(next.tagName); next = next.nextElementSibling)
        text += next.textContent;
    return [heading.textContent.replace(/\\W+$/, ''), text];
})"""


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the site, which is built strictly: a dead link, anchor or page outside the navigation fails."""
    folder = tmp_path_factory.mktemp("site")
    config = mkdocs_config.load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder), strict=True)
    config.plugins.on_startup(command="build", dirty=False)
    mkdocs_build.build(config)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


class Visited:
    """A page of the site: what it asks for outside and what fails in it; without scripts it is quicker."""

    def __init__(self, site: str, browser: Any, *, scripts: bool = True) -> None:
        self.site = site
        self.page = browser.new_page(java_script_enabled=scripts)
        self.outside: list[str] = []
        self.failures: list[str] = []
        self.page.on("request", lambda request: self._note(request.url))
        self.page.on("response", lambda found: self.failures.append(found.url) if found.status >= 400 else None)
        self.page.on("console", lambda said: self.failures.append(said.text) if said.type == "error" else None)

    def _note(self, url: str) -> None:
        if not url.startswith((self.site, "data:", "blob:")):
            self.outside.append(url)

    def close(self) -> None:
        """Close it; nothing was asked for outside, and nothing failed."""
        self.page.close()
        assert self.outside == []
        assert self.failures == []


def test_every_page_is_reached(site: str, browser: Any) -> None:
    visited = Visited(site, browser, scripts=False)
    page = visited.page
    waiting, anchors = [site], set[str]()
    ids: dict[str, set[str]] = {}  # by the address of a page
    while waiting:
        url = waiting.pop()
        if url in ids:
            continue
        page.goto(url)
        ids[url] = set(page.eval_on_selector_all("[id]", "found => found.map(one => one.id)"))
        for link in page.eval_on_selector_all("a[href]", "found => found.map(one => one.getAttribute('href'))"):
            target, anchor = urldefrag(urljoin(url, link))
            if target.startswith(site) and not target.endswith("/"):
                assert page.request.get(target).ok, target  # a file, such as the schema
            elif target.startswith(site):
                waiting.append(target)
                anchors |= {f"{target}#{unquote(anchor)}"} if anchor else set()
    visited.close()
    assert len(ids) > 20
    assert {target for target in anchors if target.partition("#")[2] not in ids[target.partition("#")[0]]} == set()


def test_the_search_finds_a_command(site: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(site)
    # Key by key: the page reads the query at each key's release, and `fill` releases none.
    page.locator("input.md-search__input").press_sequentially("strengthen refusal")
    page.wait_for_selector(".md-search-result__link")
    found = page.eval_on_selector_all(".md-search-result__link", "all => all.map(one => one.href)")
    assert any("how-to/strengthen" in url for url in found)
    page.close()


def test_every_option_of_every_command_is_in_the_reference(site: str, browser: Any) -> None:
    page = browser.new_page()
    page.goto(f"{site}reference/command-line/")
    sections: dict[str, str] = {}
    for heading, text in page.evaluate(SECTIONS):
        sections[heading] = text
    page.close()
    for name, command in COMMANDS.items():
        own = next(text for heading, text in sections.items() if heading.endswith(f" {name}"))
        for param in command.params:
            assert param.opts[0] in own or not isinstance(param, click.Option), (name, param.opts)


@pytest.mark.parametrize("path", KINDS, ids=lambda path: path.strip("/") or "home")
def test_a_page_asks_for_nothing_outside_and_axe_finds_nothing_serious(site: str, browser: Any, path: str) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright").Axe()
    visited = Visited(site, browser)
    visited.page.goto(site + path)
    found = axe.run(visited.page, options={"resultTypes": ["violations"], "preload": False}).response["violations"]
    serious = [one for one in found if one["impact"] in ("serious", "critical")]
    assert [(one["id"], [node["html"][:120] for node in one["nodes"]][:3]) for one in serious] == []
    visited.close()

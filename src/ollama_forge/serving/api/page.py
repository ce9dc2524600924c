"""The page that browsers get at ``/``: a chat with the served model, in one file that loads nothing else."""

from __future__ import annotations

import base64
import hashlib
import re
from functools import cache
from pathlib import Path

from starlette.responses import HTMLResponse

import ollama_forge.reporting

_PAGE = Path(__file__).with_name("page.html")
_STYLE = Path(ollama_forge.reporting.__file__).with_name("report.css")  # the page looks like the report
_STYLE_MARK = "/* report.css */\n"


def chat_page() -> HTMLResponse:
    """The page, with a policy by which the browser runs its own script alone and talks to this server alone."""
    text, policy = _page()
    headers = {
        "Content-Security-Policy": policy,
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(text, headers=headers)


@cache
def _page() -> tuple[str, str]:
    """The page's text and its Content-Security-Policy."""
    text = _PAGE.read_text(encoding="utf-8").replace(_STYLE_MARK, _STYLE.read_text(encoding="utf-8"))
    style, script = (_source(text, name) for name in ("style", "script"))
    policy = (
        f"default-src 'none'; script-src {script}; style-src {style}; img-src data:; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _source(text: str, name: str) -> str:
    """The hash of the page's element ``name``, as a policy names it."""
    found = re.search(f"<{name}>(.*?)</{name}>", text, re.S)
    assert found is not None
    return f"'sha256-{base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()}'"

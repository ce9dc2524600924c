"""Build HTML and SVG from Python: every text is escaped, and only ``tag`` makes markup."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape
from typing import TypeAlias


class Html(str):
    """Text that is markup already."""

    __slots__ = ()


Child: TypeAlias = "str | Html | Iterable[Child] | None"
_VOID = frozenset({"meta", "link", "br", "hr", "col"})


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Html:
    """An element.

    Args:
        children: markup, text to escape, None for nothing, or an iterable of these.
        attributes: by name, with ``_`` for ``-`` and ``class_`` for ``class``. None and False leave an attribute out,
            and True gives it no value. Floats are rounded to two decimals, which is enough for coordinates.
    """
    written = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Child) -> Html:
    """The markup of several children, one after another."""
    if children is None:
        return Html("")
    if isinstance(children, Html):
        return children
    if isinstance(children, str):
        return Html(escape(children, quote=False))
    return Html("".join(join(child) for child in children))


def separated(children: Iterable[Child], by: str) -> Html:
    """The markup of several children, with a text between each two."""
    return Html(join(by).join(join(child) for child in children))


def _attribute(key: str, value: str | float | bool | None) -> str:
    name = key.rstrip("_").replace("_", "-")
    if value is None or value is False:
        return ""
    if value is True:
        return f" {name}"
    text = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    return f' {name}="{escape(text)}"'
